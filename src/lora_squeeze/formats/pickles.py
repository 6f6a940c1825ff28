"""PyTorch's pickles, opened such that neither code runs nor a small file fills the memory.

`weights_only` sees to the first. For the second, torch believes what the file says: a record of the archive may be
compressed a thousandfold, a tensor of a billion numbers may be one number with a stride of zero, and every byte of a
pickle may make an object of sixty.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import check_name, no_collector, quoted

_MAX_PICKLE_BYTES = 2**22  # of the pickle in an archive: some 25,000 tensors
_MAX_READS = 2**19  # of a file before PyTorch 1.6, in which the pickle has no length: about three for each object
_SHARED = 4  # how often the same numbers may be in a file under different names, on average: tied weights


class _Metered(io.BufferedReader):
    """A file that may be read only so many times, and has no descriptor with which to get around that."""

    _left = _MAX_READS

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")

    def read(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        self._count()
        return super().readline(size)

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise ValueError("more objects than an adapter has")


def load_pickle(path: Path, *, zipped: bool) -> Any:
    """What a file of `torch.save` holds, with the tensors of an archive mapped into memory.

    Args:
        path: the file.
        zipped: whether it is an archive, as since PyTorch 1.6.

    Raises:
        pickle.UnpicklingError: it holds more than tensors.
        Exception: of any kind, for a damaged file.
    """
    if not zipped:
        with _Metered(io.FileIO(path)) as file, no_collector():
            return torch.load(file, map_location="cpu", weights_only=True)
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise ValueError("a compressed record, which PyTorch does not write")
            if record.filename.endswith("data.pkl") and record.file_size > _MAX_PICKLE_BYTES:
                raise ValueError(f"a pickle of {record.file_size} bytes, up to {_MAX_PICKLE_BYTES} are read")
    with no_collector():
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def check_pickled(found: object, size: int) -> None:
    """Refuse what is no dictionary of plain tensors, or says to be larger than the file.

    Args:
        found: what was loaded.
        size: bytes of the file.

    Raises:
        LoraSqueezeError: with what was found.
    """
    if not isinstance(found, dict) or not all(isinstance(name, str) and _is_plain(t) for name, t in found.items()):
        raise LoraSqueezeError("expected a dictionary of tensors by name")
    if not found:
        raise LoraSqueezeError("the file holds no tensors; download or export it again")
    total = 0
    for name, tensor in found.items():
        check_name(name)
        total += tensor.nbytes
        if tensor.nbytes > tensor.untyped_storage().nbytes() or total > _SHARED * size:
            raise LoraSqueezeError(
                f"tensor {quoted(name)} of shape {quoted(list(tensor.shape))} has more numbers than the file, which "
                f"repeats them; save a copy of it (tensor.clone())"
            )


def _is_plain(found: object) -> bool:
    """Whether it is a dense tensor that holds its numbers."""
    plain = type(found) in (Tensor, torch.nn.Parameter)
    return plain and isinstance(found, Tensor) and found.layout == torch.strided and found.device.type == "cpu"
