"""Which folders a command line means: folders and patterns to adapters by name."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME

_SHOWN = 5
_FILES = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME)


def find(
    inputs: Sequence[str | os.PathLike[str]], keep_out: Sequence[Path] = ()
) -> tuple[dict[str, Path], dict[str, str]]:
    """The adapters that these folders and patterns mean.

    Args:
        inputs: an adapter's folder, a folder with such folders anywhere below it, or a pattern with *, ?, [...] or **.
            Hidden folders are not searched, nor what lies inside an adapter.
        keep_out: folders that will be written to: none of them may be inside an input, or an input inside one of them.

    Returns:
        Name -> folder, sorted; and path -> why, of the places without an adapter. A name is the path below the deepest
        folder that holds all adapters.

    Raises:
        LoraSqueezeError: no adapter at all, a pattern without a match, an adapter inside another one, or a folder to
            keep out of.
    """
    folders: dict[Path, None] = {}
    places: list[Path] = []
    for text in inputs:
        _check_pattern(str(text), keep_out)
        places += _places(str(text))
    without = []
    for place in dict.fromkeys(places):
        found = _adapters(place)
        folders.update(dict.fromkeys(found))
        if not found:
            without.append(place)
    if not folders:
        raise LoraSqueezeError(
            f"no adapter in {listed(map(str, inputs))}: expected folders with {CONFIG_NAME} and {WEIGHTS_NAME}"
        )
    _check_apart(places, folders, keep_out)
    reasons = {str(p): f"no adapter: no {CONFIG_NAME} in it" for p in without if folders.keys().isdisjoint(p.parents)}
    common = Path(os.path.commonpath([folder.parent for folder in folders]))
    return {folder.relative_to(common).as_posix(): folder for folder in sorted(folders)}, reasons


def listed(names: Iterable[str], shown: int = _SHOWN) -> str:
    """The first of these names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _places(text: str) -> list[Path]:
    """What exists under a name or matches a pattern, as absolute paths."""
    path = Path(text).expanduser()
    if path.exists():
        return [_absolute(path)]
    if not glob.has_magic(text):
        raise LoraSqueezeError(f"{text}: no such folder; name folders of adapters, or a pattern in quotes")
    matches = sorted(_absolute(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise LoraSqueezeError(f"the pattern {text!r} matches nothing; look at it with ls")
    adapters: set[Path] = set()
    kept = []
    for match in matches:  # a folder comes before what is in it
        if adapters.isdisjoint(match.parents):
            kept.append(match)
            if _is_adapter(match):
                adapters.add(match)
    return kept


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(path))  # symlinks stay: they are names that somebody has chosen


def _is_adapter(folder: Path) -> bool:
    return any((folder / name).exists() for name in _FILES)


def _adapters(place: Path) -> list[Path]:
    """The folders of adapters at a place or below it."""
    if place.name in _FILES and place.is_file():
        return [place.parent]
    if _is_adapter(place):
        return [place]
    found: list[Path] = []
    for root, names, _ in os.walk(place, onerror=_refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        below = [name for name in names if _is_adapter(Path(root, name))]
        found += [Path(root, name) for name in below]
        names[:] = [name for name in names if name not in below]
    return found


def _refuse(error: OSError) -> None:
    if not isinstance(error, NotADirectoryError):  # a file where a pattern matched one: no adapter
        raise LoraSqueezeError(f"{error.filename} cannot be searched: {error.strerror}") from error


def _check_pattern(text: str, keep_out: Sequence[Path]) -> None:
    """Refuse a pattern that would match the output once it is there."""
    pattern = str(_absolute(Path(text).expanduser()))
    for folder in keep_out:
        if glob.has_magic(text) and fnmatch(str(_absolute(folder)), pattern):
            raise LoraSqueezeError(
                f"the pattern {text!r} matches {folder} too, which is to be written; choose a place beside the adapters"
            )


def _check_apart(places: Iterable[Path], folders: Iterable[Path], keep_out: Sequence[Path]) -> None:
    """Refuse adapters inside one another, and outputs inside inputs or the other way round."""
    real = {place.resolve(): place for place in places}
    for out in (folder.resolve() for folder in keep_out):
        for above in (out, *out.parents):
            if above in real:
                raise LoraSqueezeError(
                    f"{out} is to be written and lies inside the input {real[above]}: the next run would take it for a "
                    "member; choose a place beside the adapters"
                )
        inside = [str(folder) for folder in folders if folder.resolve().is_relative_to(out)]
        if inside:
            raise LoraSqueezeError(f"{listed(inside)} would be overwritten by the output {out}; choose another place")
    known = set(folders)
    nested = [(folder, above) for folder in folders for above in folder.parents if above in known]
    if nested:
        inner, outer = nested[0]
        raise LoraSqueezeError(f"{inner} lies inside {outer}, which is an adapter too; name only one of them")
