"""Find an adapter, a local folder or file or a repository on the Hugging Face Hub, and read it in its format."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import diffusers, gguf_lora, kohya, mlx, peft
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.formats.safetensors_io import TensorFile

_FILES = (peft.CONFIG_NAME, peft.WEIGHTS_NAME, peft.PICKLE_NAME, mlx.WEIGHTS_NAME)
_PIPELINE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers writes into a folder
_WANTED = (*_FILES, *peft.COMPANIONS, _PIPELINE_NAME, "README.md")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_FILE = re.compile(r"^(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/(?P<file>[^*?\[\]\\]+\.(safetensors|gguf))$")
# Formats of one file each, told by what is in it: whether a file is one of them, and its reader.
_SINGLE: tuple[tuple[Callable[[Path], bool], Callable[[Path], Adapter]], ...] = (
    (gguf_lora.matches, gguf_lora.load),
    (diffusers.matches, diffusers.load),  # first: a file of it without header strings is one of kohya's too
    (kohya.matches, kohya.load),
)


def load(
    adapter: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Open an adapter. Reads its configuration and the header of its weights; tensors are read when they are needed.

    Args:
        adapter: a folder with adapter_config.json, of PEFT or of mlx-lm; a weights file in such a folder; a safetensors
            file of diffusers, kohya, ComfyUI or LyCORIS, a GGUF adapter of llama.cpp, or a folder with one such file; a
            hub id such as "user/adapter", or a file there, "user/adapter/style.safetensors". What exists on disk is
            never looked up on the hub.
        subfolder: folder inside it, for adapters saved under a name.
        revision: branch, tag or commit on the hub.
        token: access token for the hub; default the one stored by `hf auth login`.
        cache_dir: where the hub's files are kept; default the hub's cache.

    Returns:
        Adapter.

    Raises:
        LoraSqueezeError: nothing there, a damaged file, or a kind of adapter that cannot be squeezed soundly.

    Example:
        >>> lora_squeeze.load("my-adapter").squeeze(rank=8).save("my-adapter-r8")  # doctest: +SKIP
    """
    path = locate(adapter, subfolder=subfolder, revision=revision, token=token, cache_dir=cache_dir)
    if path.is_file():
        return next(read for matches, read in _SINGLE if matches(path))(path)
    return mlx.load(path) if mlx.matches(path) else peft.load(path)


def locate(
    adapter: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder of an adapter, or its only file, fetched if it is on the hub. Arguments and errors as for `load`."""
    path = Path(adapter).expanduser()
    if not path.exists():
        if match := _HUB_FILE.fullmatch(str(adapter)):
            path = download(match["id"], [match["file"]], revision, token, cache_dir) / match["file"]
            if not path.is_file():
                raise LoraSqueezeError(f"{match['id']}: the repository has no file {quoted(match['file'])}")
        elif not HUB_ID.fullmatch(str(adapter)) or path.is_symlink():
            raise LoraSqueezeError(f"{adapter}: no such folder, and not the form of a hub id (user/name)")
        else:
            prefix = f"{subfolder.strip('/')}/" if subfolder else ""
            path = download(str(adapter), [prefix + name for name in _WANTED], revision, token, cache_dir)
    if path.name in _FILES and not path.is_dir():
        path = path.parent
    if subfolder:
        path = path / subfolder
    if not path.is_file() and not (path / peft.CONFIG_NAME).exists():
        path = _only_file(path)
    if not path.is_dir() and not any(matches(path) for matches, _ in _SINGLE):
        keys = list(TensorFile(path).entries) if path.suffix == ".safetensors" else []
        raise LoraSqueezeError(
            f"{path}: expected the folder of a PEFT adapter, with {peft.CONFIG_NAME} and {peft.WEIGHTS_NAME}, the "
            "folder of an mlx-lm adapter, a GGUF file, or a safetensors file with keys of diffusers, kohya or LyCORIS"
            + (f"; found {quoted(keys[0])}" if keys else "")
        )
    return path


def _only_file(folder: Path) -> Path:
    """The adapter in a folder without a configuration: what diffusers writes, or the only file there is."""
    if (folder / _PIPELINE_NAME).exists():
        return folder / _PIPELINE_NAME
    inner = sorted(p.parent.name for p in folder.glob(f"*/{peft.CONFIG_NAME}"))
    if inner:
        names = ", ".join(quoted(name)[1:-1] for name in inner[:5])
        raise LoraSqueezeError(f"{folder}: no {peft.CONFIG_NAME} here, but in its folders {names}; name one of them")
    files = sorted(path for path in folder.glob("*") if path.suffix in (".safetensors", ".gguf"))
    if len(files) == 1 and files[0].name not in _FILES:
        return files[0]
    if len(files) > 1:
        names = ", ".join(quoted(path.name)[1:-1] for path in files[:5])
        raise LoraSqueezeError(f"{folder}: no {peft.CONFIG_NAME} here, but {names}; name the file that is meant")
    raise LoraSqueezeError(f"{folder}: no {peft.CONFIG_NAME}; is this the folder of a PEFT adapter?")


def download(
    repository: str,
    patterns: Sequence[str],
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The files of a hub repository that match one of the patterns, in a folder of the hub's cache.

    Raises:
        LoraSqueezeError: no such repository, no access, no network and not in the cache.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                allow_patterns=list(patterns),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise LoraSqueezeError(
            f"{repository}: no such folder here, and the hub did not give it "
            f"({(str(error).strip().splitlines() or [type(error).__name__])[0]:.160})"
        ) from error
