"""Find an adapter, a local folder or file or a repository on the Hugging Face Hub, and read it in its format."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import gguf_lora, mlx, peft

_FILES = (peft.CONFIG_NAME, peft.WEIGHTS_NAME, peft.PICKLE_NAME, mlx.WEIGHTS_NAME)
_WANTED = (*_FILES, *peft.COMPANIONS, "README.md")
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


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
        adapter: a folder with adapter_config.json, of PEFT or of mlx-lm, a weights file in such a folder, a GGUF
            adapter of llama.cpp, or a hub id such as "user/adapter". What exists on disk is never looked up on the hub.
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
        return gguf_lora.load(path)
    return mlx.load(path) if mlx.matches(path) else peft.load(path)


def locate(
    adapter: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The folder of an adapter, or its GGUF file, fetched if it is on the hub. Arguments and errors as for `load`."""
    path = Path(adapter).expanduser()
    if not path.exists():
        if not HUB_ID.fullmatch(str(adapter)) or path.is_symlink():
            raise LoraSqueezeError(f"{adapter}: no such folder, and not the form of a hub id (user/name)")
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        path = download(str(adapter), [prefix + name for name in _WANTED], revision, token, cache_dir)
    elif path.name in _FILES:
        path = path.parent
    elif gguf_lora.matches(path) and not subfolder:
        return path
    elif not path.is_dir():
        raise LoraSqueezeError(
            f"{path}: expected the folder of a PEFT adapter, with {peft.CONFIG_NAME} and {peft.WEIGHTS_NAME}, the "
            "folder of an mlx-lm adapter, or a GGUF file"
        )
    if subfolder:
        path = path / subfolder
    if not (path / peft.CONFIG_NAME).exists():
        raise LoraSqueezeError(_nothing_in(path))
    return path


def _nothing_in(path: Path) -> str:
    inner = sorted(p.parent.name for p in path.glob(f"*/{peft.CONFIG_NAME}")) if path.is_dir() else []
    if inner:
        return f"{path}: no {peft.CONFIG_NAME} here, but in its folders {', '.join(inner[:5])}; name one of them"
    return f"{path}: no {peft.CONFIG_NAME}; is this the folder of a PEFT adapter?"


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
