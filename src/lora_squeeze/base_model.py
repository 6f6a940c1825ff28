"""The weights of a base model: a folder with safetensors, single or in shards, or a repository on the hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.formats.safetensors_io import TensorFile, read_regular
from lora_squeeze.hub import HUB_ID, download

_NAMES = ("model", "diffusion_pytorch_model")  # what transformers and diffusers call the weights
_INDEX_BYTES = 100 * 2**20


@dataclass(frozen=True)
class BaseModel:
    """Base weights, read a piece of one tensor at a time.

    Args:
        name: what reports call the model.
        facts: key -> dtype and shape of every tensor.
        files: key -> the file that holds it.
    """

    name: str
    facts: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    files: Mapping[str, TensorFile] = field(repr=False)

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The numbers of one tensor in order, as flat tensors of bounded size."""
        return self.files[key].pieces(key)


def open_base(model: str | os.PathLike[str], *, revision: str | None = None) -> BaseModel:
    """Open the weights of a base model. Reads the headers of its files; tensors come piece by piece when asked for.

    Args:
        model: folder of the base model with its safetensors files, or a hub id such as user/model, of which only these
            files are fetched. Figures against the base weights are added: size of the update, what a merge in bfloat16
            loses, copies of embeddings.
        revision: branch, tag or commit on the hub.

    Returns:
        BaseModel.

    Raises:
        LoraSqueezeError: nothing there, no safetensors, a missing shard, or a damaged file.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if not HUB_ID.fullmatch(str(model)) or path.is_symlink():
            raise LoraSqueezeError(f"{model}: no such folder, and not the form of a hub id (user/name)")
        patterns = [f"{name}{end}" for name in _NAMES for end in ("*.safetensors", ".safetensors.index.json")]
        path = download(str(model), patterns, revision=revision)
    elif not path.is_dir():
        raise LoraSqueezeError(f"{path}: expected the folder of a base model, with its safetensors files")
    files = {name: TensorFile(path / name) for name in _file_names(path)}
    keys = {key: file for file in files.values() for key in file.entries}
    return BaseModel(
        name=str(model),
        facts={key: (file.entries[key].dtype, file.entries[key].shape) for key, file in keys.items()},
        files=keys,
    )


def _file_names(folder: Path) -> list[str]:
    """The files that together are the model: the single one, those of the index, or the only one there is."""
    for name in _NAMES:
        if (folder / f"{name}.safetensors").exists():
            return [f"{name}.safetensors"]
        index = folder / f"{name}.safetensors.index.json"
        if index.exists():
            return _shards(folder, index)
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found
    raise LoraSqueezeError(
        f"{folder}: "
        + (
            f"{len(found)} safetensors files and no index that says which belong together"
            if found
            else "no safetensors"
        )
        + "; expected model.safetensors, or shards with model.safetensors.index.json"
    )


def _shards(folder: Path, index: Path) -> list[str]:
    try:
        names = set(json.loads(read_regular(index, _INDEX_BYTES))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, LoraSqueezeError):
            raise
        raise LoraSqueezeError(f"{quoted(index)}: no readable index of shards; get the file again") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise LoraSqueezeError(f"{quoted(index)}: names {quoted(name)}, which is no file beside it")
        if not os.path.exists(folder / name):  # unlike Path.exists, False for a name too long
            raise LoraSqueezeError(f"{quoted(index)}: the shard {quoted(name)} is missing; get the model again")
    return sorted(names)
