"""Write one file, all or nothing: under a hidden name beside the target, then moved into its place."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.folder import explained, hidden_name, is_alive, make_parents, sigterm_raises, sync
from lora_squeeze.formats.safetensors_header import quoted


def check_target(target: Path, *, force: bool, home: Path | None = None) -> None:
    """Refuse a file that `replace_file` would refuse at its start.

    Args:
        target: the file to write.
        force: it may be replaced.
        home: the file or folder that is read from, whose files are never replaced.

    Raises:
        LoraSqueezeError: it is a folder, a file of the source, or it exists and `force` is not given.
    """
    if home is not None:
        check_source(target, home)
    if target.is_dir():
        raise LoraSqueezeError(f"{quoted(target)} is a folder; name the file to be written in it")
    if os.path.lexists(target) and not force:
        raise LoraSqueezeError(
            f"{quoted(target)} exists already and nothing was written; choose another name, or replace it with --force "
            "(force=True)"
        )


def check_source(target: Path, home: Path) -> None:
    """Refuse the file or folder that is read from, and a file in that folder."""
    real = target.resolve()
    if real == home:
        what = "folder" if real.is_dir() else "file"
        raise LoraSqueezeError(f"{quoted(target)} is the {what} that the adapter is read from; choose another output")
    if real.is_file() and real.parent == home:
        raise LoraSqueezeError(
            f"{quoted(target)} is a file of the folder that the adapter is read from, which is left as it is; choose "
            "another output"
        )


@contextmanager
def replace_file(target: Path, *, force: bool) -> Iterator[Path]:
    """Give a name to write a new file under, which takes the place of `target` when the block ends.

    After an exception in the block, Ctrl-C or SIGTERM, nothing has changed and nothing is left behind; after SIGKILL
    the target is wholly old or wholly new, and the next call for it removes what was left.

    Args:
        target: the file to make; missing parents are made too. A symlink is followed.
        force: replace an existing file.

    Raises:
        LoraSqueezeError: as `check_target`; or the system refuses a step, with its reason.
    """
    real = target.resolve()
    draft = hidden_name(real)
    made: list[Path] = []
    with sigterm_raises():
        try:
            with explained(real):
                check_target(target, force=force)
                _clear_stale(real)
                make_parents(real.parent, made)
            with explained(real, only_below=draft):
                yield draft
            with explained(real):
                check_target(target, force=force)  # it may have come since the first look
                sync(draft)
                os.replace(draft, real)
                sync(real.parent)
        finally:
            with suppress(FileNotFoundError, NotADirectoryError):
                draft.unlink()
            for parent in reversed(made):
                with suppress(OSError):  # not empty: the file is in place, or another writer uses it
                    os.rmdir(parent)


def _clear_stale(target: Path) -> None:
    """Remove what writers of this target left behind when they were killed."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(\d{1,18})-[0-9a-f]{8}\.lora-squeeze")
    with suppress(OSError):  # no parent yet, or no right to list it: then there is nothing to see, or it shows later
        for name in os.listdir(target.parent):
            match = pattern.fullmatch(name)
            if match and int(match[1]) != os.getpid() and not is_alive(int(match[1])):
                target.with_name(name).unlink()
