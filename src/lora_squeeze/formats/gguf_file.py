"""Reading and streaming writing of the GGUF container, versions 2 and 3, little-endian.

Why not the reader of the gguf package: it believes the lengths in the file (an array announced in a file of 49 bytes
fills the memory), and it maps the file, which counts as resident as a whole. Fields are kept here as bytes, so that a
field that means nothing to us is written as it was read.

A file is: magic, version, number of tensors, number of fields; the fields; the tensors' names, shapes, types and
offsets; padding; the data, every tensor padded to the alignment. Shapes are written last dimension first.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import check_name, damaged, not_safetensors, quoted
from lora_squeeze.formats.safetensors_io import PIECE_BYTES, bytes_of, open_regular

MAGIC = b"GGUF"
ALIGNMENT_KEY = "general.alignment"
_VERSION, _ALIGNMENT = 3, 32
_MAX_ALIGNMENT = 1 << 16
_MAX_HEADER_BYTES = 2**25  # that of a whole model with a large vocabulary is half as long
_MAX_FIELDS, _MAX_TENSORS = 2**16, 2**18
_MAX_DIMS = 4
_STRING, _ARRAY, _UINT32, _FLOAT32 = 8, 9, 4, 6
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class Encoding:
    """How numbers are stored: `nbytes` bytes for each `block` numbers of a row; None: not as a dtype of torch."""

    name: str
    code: int
    dtype: torch.dtype | None
    block: int
    nbytes: int


Q8_0 = Encoding("q8_0", 8, None, 32, 34)
_ENCODINGS = (
    Encoding("f32", 0, torch.float32, 1, 4),
    Encoding("f16", 1, torch.float16, 1, 2),
    Encoding("bf16", 30, torch.bfloat16, 1, 2),
    Q8_0,
)
_BY_CODE = {encoding.code: encoding for encoding in _ENCODINGS}
_BY_DTYPE = {encoding.dtype: encoding for encoding in _ENCODINGS if encoding.dtype}


@dataclass(frozen=True)
class Field:
    """One field: its type and its bytes in the file, behind the type."""

    type: int
    raw: bytes

    @property
    def value(self) -> Any:
        """A number, truth value or text; None for an array."""
        if self.type == _STRING:
            return self.raw[8:].decode("utf-8", "replace")
        return None if self.type == _ARRAY else struct.unpack(f"<{_SCALARS[self.type]}", self.raw)[0]

    @property
    def is_float32(self) -> bool:
        """Whether it is a number of this type."""
        return self.type == _FLOAT32

    @classmethod
    def text(cls, text: str) -> Field:
        """A text."""
        raw = text.encode("utf-8")
        return cls(_STRING, struct.pack("<Q", len(raw)) + raw)

    @classmethod
    def float32(cls, value: float) -> Field:
        """A number of single precision."""
        return cls(_FLOAT32, struct.pack("<f", value))

    @classmethod
    def uint32(cls, value: int) -> Field:
        """A whole number from 0."""
        return cls(_UINT32, struct.pack("<I", value))

    @classmethod
    def uint32s(cls, values: Sequence[int]) -> Field:
        """An array of whole numbers from 0."""
        return cls(_ARRAY, struct.pack(f"<IQ{len(values)}I", _UINT32, len(values), *values))


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `nbytes` bytes from the absolute offset `begin`; shape with the last dimension last."""

    encoding: Encoding
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class GgufFile:
    """A GGUF file whose fields and tensor list are read and checked; tensor data is read only when asked for.

    The file stays open, so what is read does not change when another file takes its place on disk.

    Attributes:
        fields: key -> Field, in file order.
        tensors: name -> Entry, in file order.

    Raises:
        LoraSqueezeError: not a regular file, not GGUF, a kind of number that is not read, or any departure from the
            format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd, size = open_regular(path)
        weakref.finalize(self, os.close, self._fd)
        try:
            with open(self._fd, "rb", closefd=False) as file:
                self.fields, self.tensors = _Header(file, size).read()
        except LoraSqueezeError as error:
            raise LoraSqueezeError(f"{quoted(path)}: {error}") from None

    def read(self, name: str) -> Tensor:
        """One tensor in memory of its own; q8_0 as float32."""
        entry = self.tensors[name]
        data = self._read(name, entry.begin, entry.nbytes)
        if entry.encoding.dtype is not None:
            return data.view(entry.encoding.dtype).reshape(entry.shape)
        blocks = data.reshape(-1, Q8_0.nbytes)
        scales = blocks[:, :2].contiguous().view(torch.float16).float()
        return (scales * blocks[:, 2:].view(torch.int8)).reshape(entry.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The numbers of one tensor in order, as flat tensors of at most PIECE_BYTES; q8_0 as bytes."""
        entry = self.tensors[name]
        for done in range(0, entry.nbytes, PIECE_BYTES):
            data = self._read(name, entry.begin + done, min(PIECE_BYTES, entry.nbytes - done))
            yield data if entry.encoding.dtype is None else data.view(entry.encoding.dtype)

    def sha256(self) -> str:
        """SHA-256 of the whole file as hexadecimal digits."""
        digest = hashlib.sha256()
        offset = 0
        while piece := os.pread(self._fd, 1 << 20, offset):
            digest.update(piece)
            offset += len(piece)
        return digest.hexdigest()

    def _read(self, name: str, begin: int, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        view, done = bytes_of(buffer), 0
        try:
            while done < nbytes and (got := os.preadv(self._fd, [view[done:]], begin + done)):
                done += got
        except OSError as error:
            raise LoraSqueezeError(f"{quoted(self.path)}: cannot be read: {error.strerror}") from error
        if done < nbytes:
            raise LoraSqueezeError(
                f"{quoted(self.path)}: tensor {quoted(name)}: the file ends after {done} of {nbytes} bytes; "
                "it was shortened while in use: get the file again"
            )
        return buffer


def read_model_header(path: Path) -> tuple[dict[str, Field], dict[str, tuple[int, ...]]]:
    """Fields and shapes of the tensors of a base model, whose numbers may be of any kind.

    Raises:
        LoraSqueezeError: not a GGUF file, or a damaged one.
    """
    descriptor, size = open_regular(path)
    with open(descriptor, "rb") as file:
        try:
            fields, listed = _Header(file, size).listed()
        except LoraSqueezeError as error:
            raise LoraSqueezeError(f"{quoted(path)}: {error}") from None
    return fields, {name: shape for name, (shape, _, _) in listed.items()}


class _Header:
    """A cursor over the bytes before the data, which never goes beyond the file or the limit."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self._at = file, size, 0

    def read(self) -> tuple[dict[str, Field], dict[str, Entry]]:
        """The fields and the tensors."""
        fields, listed = self.listed()
        alignment = alignment_of(fields)
        infos = {name: self._encoded(f"tensor {quoted(name)}", *info) for name, info in listed.items()}
        return fields, self._placed(infos, alignment)

    def listed(self) -> tuple[dict[str, Field], dict[str, tuple[tuple[int, ...], int, int]]]:
        """The fields, and shape, kind of number and offset of every tensor as they are written down."""
        count, number_of_fields = self._start()
        fields: dict[str, Field] = {}
        for _ in range(number_of_fields):
            key = self._text("the name of a field")
            if len(fields) == _MAX_FIELDS:
                raise damaged(f"{number_of_fields} fields announced, up to {_MAX_FIELDS} are read")
            if key in fields:
                raise damaged(f"the field {quoted(key)} occurs twice")
            kind = self._number("I", f"the type of field {quoted(key)}")
            fields[key] = Field(kind, self._value(kind, f"field {quoted(key)}"))
        infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
        for _ in range(count):
            name = self._text("the name of a tensor")
            check_name(name)
            if len(infos) == _MAX_TENSORS:
                raise damaged(f"{count} tensors announced, up to {_MAX_TENSORS} are read")
            if name in infos:
                raise damaged(f"the tensor {quoted(name)} occurs twice")
            infos[name] = self._info(f"tensor {quoted(name)}")
        return fields, infos

    def _start(self) -> tuple[int, int]:
        head = self._file.read(512)
        self._file.seek(0)
        if not head.startswith(MAGIC):
            if head.startswith(b"version https://git-lfs") or head.lstrip().startswith(b"<"):
                raise not_safetensors(head, 0, len(head))
            raise damaged(f"not a GGUF file: it begins with {quoted(head[:4].decode('latin-1'))} in place of 'GGUF'")
        self._bytes(4, "the magic")
        version = self._number("I", "the version")
        if version & 0xFFFF == 0:
            raise LoraSqueezeError("the file is big-endian; convert it with gguf-convert-endian from the gguf package")
        if version not in (2, 3):
            raise LoraSqueezeError(f"GGUF version {version}; versions 2 and 3 are read: convert the adapter again")
        return self._number("Q", "the number of tensors"), self._number("Q", "the number of fields")

    def _bytes(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise damaged(f"{what} takes {count} bytes, the file has {self._size - self._at} left")
        if self._at + count > _MAX_HEADER_BYTES:
            raise damaged(f"{what} reaches beyond the {_MAX_HEADER_BYTES} bytes allowed before the data")
        data = self._file.read(count)
        if len(data) < count:
            raise damaged(f"the file ends inside {what}")
        self._at += count
        return data

    def _number(self, code: str, what: str) -> int:
        return int(struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}"), what))[0])

    def _text(self, what: str) -> str:
        raw = self._bytes(self._number("Q", what), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(f"{what} is not UTF-8: {quoted(raw)}") from None

    def _value(self, kind: int, what: str) -> bytes:
        """The bytes of a value, checked to end where it says."""
        if kind in _SCALARS:
            return self._bytes(struct.calcsize(f"<{_SCALARS[kind]}"), what)
        if kind == _STRING:
            length = self._bytes(8, what)
            return length + self._bytes(int.from_bytes(length, "little"), what)
        if kind != _ARRAY:
            raise damaged(f"{what} has the type {kind}, which GGUF does not have")
        head = self._bytes(12, what)
        item, count = struct.unpack("<IQ", head)
        if item in _SCALARS:
            return head + self._bytes(struct.calcsize(f"<{_SCALARS[item]}") * count, what)
        if item != _STRING:
            raise damaged(f"{what} is an array of the type {item}, which GGUF does not have")
        strings = bytearray(head)  # not a list of them: small objects take many times their bytes
        for _ in range(count):
            length = self._bytes(8, what)
            strings += length
            strings += self._bytes(int.from_bytes(length, "little"), what)
        return bytes(strings)

    def _info(self, what: str) -> tuple[tuple[int, ...], int, int]:
        dims = self._number("I", what)
        if not 1 <= dims <= _MAX_DIMS:
            raise damaged(f"{what} has {dims} dimensions, 1 to {_MAX_DIMS} are possible")
        shape = tuple(self._number("Q", what) for _ in range(dims))[::-1]
        return shape, self._number("I", what), self._number("Q", what)

    @staticmethod
    def _encoded(what: str, shape: tuple[int, ...], code: int, offset: int) -> tuple[Encoding, tuple[int, ...], int]:
        encoding = _BY_CODE.get(code)
        if encoding is None:
            known = ", ".join(encoding.name for encoding in _ENCODINGS)
            raise LoraSqueezeError(f"{what} has the ggml type {code}; {known} are read: convert the adapter to one")
        if shape[-1] % encoding.block:
            raise damaged(f"{what} is {encoding.name} with rows of {shape[-1]}, no multiple of {encoding.block}")
        return encoding, shape, offset

    def _placed(self, infos: Mapping[str, tuple[Encoding, tuple[int, ...], int]], alignment: int) -> dict[str, Entry]:
        """The tensors must follow one another, each padded, in the order of the list: llama.cpp takes no other file."""
        start, entries, end = padded(self._at, alignment), {}, 0
        for name, (encoding, shape, offset) in infos.items():
            if offset != padded(end, alignment):
                raise damaged(f"tensor {quoted(name)} is at {offset}, expected at {padded(end, alignment)}")
            nbytes = math.prod(shape) // encoding.block * encoding.nbytes
            end = offset + nbytes
            if start + end > self._size:
                raise damaged(f"tensor {quoted(name)} ends at {start + end} of the {self._size} bytes of the file")
            entries[name] = Entry(encoding, shape, start + offset, nbytes)
        if self._size > start + padded(end, alignment):
            raise damaged(f"{self._size - start - end} bytes follow the last tensor")
        return entries


def alignment_of(fields: Mapping[str, Field]) -> int:
    """What every tensor begins at a multiple of, in bytes."""
    field = fields.get(ALIGNMENT_KEY)
    if field is None:
        return _ALIGNMENT
    value: int = field.value if field.type == _UINT32 else 0
    if not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise damaged(f"{ALIGNMENT_KEY} is {field.value!r:.80}, not a power of two up to {_MAX_ALIGNMENT}")
    return value


def padded(size: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // alignment) * alignment


def header_bytes(fields: Mapping[str, Field], entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """All that comes before the data, with the padding.

    Raises:
        LoraSqueezeError: a dtype that is not written.
    """
    alignment, begin = alignment_of(fields), 0
    parts = [MAGIC, struct.pack("<IQQ", _VERSION, len(entries), len(fields))]
    parts += [Field.text(key).raw + struct.pack("<I", field.type) + field.raw for key, field in fields.items()]
    for name, (dtype, shape) in entries.items():
        if dtype not in _BY_DTYPE:
            raise LoraSqueezeError(
                f"tensor {quoted(name)}: a GGUF adapter holds float32, float16 or bfloat16, not {dtype}; ask for "
                "one of these"
            )
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(Field.text(name).raw + dims + struct.pack("<IQ", _BY_DTYPE[dtype].code, begin))
        begin = padded(begin + math.prod(shape) * dtype.itemsize, alignment)
    size = sum(map(len, parts))
    return b"".join([*parts, bytes(padded(size, alignment) - size)])


def write_gguf(
    path: Path,
    fields: Mapping[str, Field],
    entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    pieces: Iterator[Tensor],
) -> None:
    """Write a GGUF file; one piece of data is in memory at a time.

    Args:
        path: the file, which must not exist.
        fields: in the order in which they are written.
        entries: name -> (dtype, shape) of every tensor, in the order of the data.
        pieces: the numbers of all tensors in order; a tensor may come in several pieces, a piece never holds two.

    Raises:
        LoraSqueezeError: a dtype that is not written, or pieces that do not add up to the entries.
        OSError: the system refuses.
    """
    alignment = alignment_of(fields)
    header = header_bytes(fields, entries)
    with path.open("xb") as file:
        file.write(header)
        for name, (dtype, shape) in entries.items():
            size, done = math.prod(shape) * dtype.itemsize, 0
            while done < size:
                piece = next(pieces, None)
                if piece is None or piece.dtype != dtype or done + piece.nbytes > size or not piece.nbytes:
                    raise LoraSqueezeError(f"{quoted(path)}: tensor {quoted(name)}: {done} of {size} bytes came")
                file.write(bytes_of(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)))
                done += piece.nbytes
            file.write(bytes(padded(size, alignment) - size))
