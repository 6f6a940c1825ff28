"""Reading and streaming writing of the safetensors container.

Why not the safetensors library: it writes only from tensors that are all in memory, its memory-mapped handle counts the
whole file as resident, and it accepts what must be refused here (identical duplicate keys, unknown entry fields, NUL in
names, absurd shapes, files without tensors). A file written here is, byte for byte, what the library writes, but for
metadata in sorted order and spaces where more room was reserved for it than used.
"""

import contextlib
import hashlib
import os
import stat
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import (
    MAX_HEADER_BYTES,
    Entry,
    damaged,
    header_json,
    is_text,
    layout,
    not_safetensors,
    parse_header,
    quoted,
)

PIECE_BYTES = 16 * 2**20  # what is in memory when a large tensor is copied; a multiple of every dtype's size
_MAX_CALL = 1 << 30  # some systems refuse to read or write more than 2 GiB in one call


class TensorFile:
    """A safetensors file whose header is read and checked; tensor data is read only when asked for.

    The file stays open until ``close()`` (or the end of the object), so what is read does not change when another file
    takes its place on disk.

    Args:
        path: the file.

    Attributes:
        entries: name -> Entry, in the order of the header.
        metadata: the strings under ``__metadata__``.
        size_bytes: size of the whole file.

    Raises:
        LoraSqueezeError: not a regular file, not safetensors, or any departure from the format.

    Notes:
        No memory map: resident memory is the header plus the tensors asked for.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._fd, self.size_bytes = open_regular(self.path)
        self._closer = weakref.finalize(self, os.close, self._fd)
        try:
            self.entries, self.metadata = parse_header(*self._header())
        except LoraSqueezeError as error:
            self.close()
            raise LoraSqueezeError(f"{quoted(self.path)}: {error}") from None

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; reading is no longer possible."""
        self._closer()

    def read(self, name: str) -> Tensor:
        """Read one tensor into memory of its own.

        Raises:
            LoraSqueezeError: no such tensor, the file is closed, or it has become shorter since it was opened.
        """
        entry = self._entry(name)
        return self._read(name, entry.begin, entry.nbytes).view(entry.dtype).reshape(entry.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The numbers of one tensor in order, as flat tensors of at most PIECE_BYTES: for copying large ones.

        Raises:
            LoraSqueezeError: as ``read``.
        """
        entry = self._entry(name)
        for done in range(0, entry.nbytes, PIECE_BYTES):
            yield self._read(name, entry.begin + done, min(PIECE_BYTES, entry.nbytes - done)).view(entry.dtype)

    def _entry(self, name: str) -> Entry:
        entry = self.entries.get(name)
        if entry is None:
            raise LoraSqueezeError(
                f"{quoted(self.path)}: no tensor {quoted(name)} among the {len(self.entries)} it holds"
            )
        return entry

    def _read(self, name: str, begin: int, nbytes: int) -> Tensor:
        buffer = torch.empty(nbytes, dtype=torch.uint8)
        got = self._fill(bytes_of(buffer), begin)
        if got < nbytes:
            raise LoraSqueezeError(
                f"{quoted(self.path)}: tensor {quoted(name)}: the file ends after {got} of {nbytes} bytes; "
                "it was shortened while in use: get the file again"
            )
        return buffer

    def sha256(self) -> str:
        """SHA-256 of the whole file as hexadecimal digits, in one pass with a buffer of 1 MiB."""
        digest = hashlib.sha256()
        view = memoryview(bytearray(1 << 20))
        offset = 0
        while got := self._fill(view, offset):
            digest.update(view[:got])
            offset += got
        return digest.hexdigest()

    def _fill(self, view: memoryview, offset: int) -> int:
        """Read from ``offset`` until ``view`` is full or the file ends; number of bytes read."""
        if not self._closer.alive:  # the descriptor may belong to another file by now
            raise LoraSqueezeError(f"{quoted(self.path)}: the file is closed; open it again to read from it")
        done = 0
        try:
            while done < len(view):
                got = os.preadv(self._fd, [view[done : done + _MAX_CALL]], offset + done)
                if got == 0:
                    break
                done += got
        except OSError as error:
            raise LoraSqueezeError(f"{quoted(self.path)}: cannot be read: {error.strerror}") from error
        return done

    def _header(self) -> tuple[bytes, int]:
        """The JSON bytes and the size of the file behind its length field."""
        head = bytearray(512)
        head = head[: self._fill(memoryview(head), 0)]
        if not head:
            raise damaged("the file is empty")
        length = int.from_bytes(head[:8], "little")
        if len(head) < 10 or length > min(MAX_HEADER_BYTES, self.size_bytes - 8) or head[8:9] != b"{":
            raise not_safetensors(bytes(head), length, self.size_bytes)
        raw = bytearray(length)
        if self._fill(memoryview(raw), 8) < length:
            raise damaged(f"the file ends inside its header of {length} bytes")
        return bytes(raw), self.size_bytes - 8


def bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous uint8 tensor, not a copy."""
    array: Any = tensor.numpy()  # an ndarray is a buffer, which its type does not say before Python 3.12
    return memoryview(array)


def open_regular(path: Path) -> tuple[int, int]:
    """Open a regular file for reading, never waiting on a pipe or touching a device; descriptor and size."""
    try:
        _check_regular(path, os.stat(path).st_mode)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # ValueError: NUL in the path
        if isinstance(error, LoraSqueezeError):
            raise
        raise LoraSqueezeError(f"{quoted(path)}: cannot be opened: {getattr(error, 'strerror', error)}") from error
    try:
        info = os.fstat(fd)  # the path may have been replaced since the first look
        _check_regular(path, info.st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd, info.st_size


def read_regular(path: Path, limit: int) -> bytes:
    """The first bytes, at most ``limit``, of a regular file; never waits on a pipe."""
    fd, _ = open_regular(path)
    try:
        with open(fd, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise LoraSqueezeError(f"{quoted(path)}: cannot be read: {error.strerror}") from error


def _check_regular(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe" if stat.S_ISFIFO(mode) else "a device or socket"
        raise LoraSqueezeError(f"{quoted(path)}: this is {kind}, not a regular file; put the file itself in its place")


class TensorFileWriter:
    """Write a safetensors file tensor by tensor; shapes are known first, data and metadata come later.

    Args:
        path: the file, which must not exist.
        entries: name -> (dtype, shape) of every tensor.
        reserve_metadata: bytes kept free in the header for the JSON text of the metadata given to ``close``, beyond
            the entry ``"format": "pt"`` that is always there; what is not used is filled with spaces.

    Raises:
        LoraSqueezeError: the file exists or cannot be written, or an entry cannot be stored.

    Notes:
        Memory: one tensor. The bytes depend on the arguments only, not on the order of writing. Used as a context
        manager, an exception leaves no file.

    >>> with TensorFileWriter(path, {"a": (torch.float32, (2, 3))}) as file:  # doctest: +SKIP
    ...     file.write("a", torch.zeros(2, 3))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        reserve_metadata: int = 0,
    ) -> None:
        self.path = Path(path)
        try:
            self._entries = layout(entries)
        except LoraSqueezeError as error:
            raise LoraSqueezeError(f"{quoted(self.path)}: {error}") from None
        self._reserve = reserve_metadata
        self._room = -(-(len(header_json(self._entries, {})) + reserve_metadata) // 8) * 8  # alignment of the data
        if self._room > MAX_HEADER_BYTES:
            raise LoraSqueezeError(
                f"{quoted(self.path)}: {len(self._entries)} tensors and {reserve_metadata} bytes of metadata need a "
                f"header of {self._room} bytes, {MAX_HEADER_BYTES} allowed; write fewer tensors or less metadata"
            )
        self._missing = set(self._entries)
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except (OSError, ValueError) as error:
            raise self._failed(error) from error
        self._fd = fd
        self._closer = weakref.finalize(self, os.close, fd)
        self._settled = False  # True once the file is whole, or gone

    def __enter__(self) -> "TensorFileWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._discard()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place, in any order.

        Raises:
            LoraSqueezeError: name not announced or written already, other dtype or shape, the disk refuses.
        """
        where, entry = self._announced(name)
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise LoraSqueezeError(
                f"{where}: announced as {entry.dtype} {list(entry.shape)}, got {tensor.dtype} {list(tensor.shape)}; "
                "announce what is written"
            )
        self._write_at(where, entry.begin, tensor)
        self._missing.discard(name)

    def write_pieces(self, name: str, pieces: Iterable[Tensor]) -> None:
        """Write one tensor from its numbers in order, in pieces of any shape, as ``TensorFile.pieces`` gives them.

        Raises:
            LoraSqueezeError: as ``write``; the pieces do not add up to the announced tensor.
        """
        where, entry = self._announced(name)
        done = 0
        for piece in pieces:
            size = piece.numel() * piece.element_size()
            if piece.dtype != entry.dtype or done + size > entry.nbytes:
                raise LoraSqueezeError(f"{where}: a piece is {piece.dtype}, {done + size} of {entry.nbytes} bytes")
            self._write_at(where, entry.begin + done, piece)
            done += size
        if done != entry.nbytes:
            raise LoraSqueezeError(f"{where}: the pieces end after {done} of {entry.nbytes} bytes; give all of it")
        self._missing.discard(name)

    def _announced(self, name: str) -> tuple[str, Entry]:
        """How errors call the tensor, and its place."""
        where = f"{quoted(self.path)}: tensor {quoted(name)}"
        entry = self._entries.get(name)
        if self._settled:
            raise LoraSqueezeError(f"{where}: the file is closed; write all tensors before closing it")
        if entry is None:
            raise LoraSqueezeError(f"{where}: not announced when the file was opened; name it there")
        if name not in self._missing:
            raise LoraSqueezeError(f"{where}: written already; write each tensor once")
        return where, entry

    def _write_at(self, where: str, begin: int, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_meta:
            raise LoraSqueezeError(
                f"{where}: {tensor.layout} on {tensor.device} holds no dense data; make it dense first"
            )
        dense = tensor.detach().to("cpu").resolve_neg().contiguous()
        flat = dense.as_strided((dense.numel(),), (1,))  # a single element is contiguous at any stride, view() wants 1
        self._pwrite(bytes_of(flat.view(torch.uint8)), 8 + self._room + begin)

    def close(self, metadata: Mapping[str, str] | None = None) -> None:
        """Write the header and make the file durable; after a failure there is no file. Closing twice does nothing.

        Args:
            metadata: strings for ``__metadata__``; ``"format"`` is set to ``"pt"``.

        Raises:
            LoraSqueezeError: a tensor is missing, or the metadata does not fit in its reserve or is not strings.
        """
        if self._settled:
            return
        try:
            self._finish(dict(metadata or {}))
        except BaseException:
            self._discard()
            raise

    def _finish(self, metadata: dict[str, str]) -> None:
        if self._missing:
            name = min(self._missing)
            raise LoraSqueezeError(
                f"{quoted(self.path)}: {len(self._missing)} of {len(self._entries)} tensors were not written, "
                f"the first is {quoted(name)}; write every tensor before closing the file"
            )
        if bad := [key for key, value in metadata.items() if not (is_text(key) and is_text(value))]:
            raise LoraSqueezeError(f"{quoted(self.path)}: metadata {quoted(bad[0])} is not text; store strings only")
        header = header_json(self._entries, metadata)
        if len(header) > self._room:
            needed = len(header) - len(header_json(self._entries, {}))
            raise LoraSqueezeError(
                f"{quoted(self.path)}: the metadata needs {needed} bytes, {self._reserve} were reserved; reserve more"
            )
        header = self._room.to_bytes(8, "little") + header.ljust(self._room)
        self._pwrite(memoryview(header), 0)
        try:
            os.fsync(self._fd)
            self._closer()
        except OSError as error:
            raise self._failed(error) from error
        self._settled = True

    def _pwrite(self, view: memoryview, offset: int) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._fd, view[done : done + _MAX_CALL], offset + done)
        except OSError as error:
            raise self._failed(error) from error

    def _discard(self) -> None:
        """Remove the file, unless it was closed whole."""
        if not self._settled:
            self._settled = True
            with contextlib.suppress(OSError):  # what made the writing fail is the error to report
                self._closer()
            with contextlib.suppress(OSError):
                self.path.unlink()

    def _failed(self, error: Exception) -> LoraSqueezeError:
        reason = getattr(error, "strerror", None) or error
        return LoraSqueezeError(f"{quoted(self.path)}: cannot be written: {reason}; choose another place or make room")


def save_file(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors that are in memory already; see TensorFileWriter."""
    entries = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    reserve = len(header_json({}, metadata)) - len(header_json({}, {}))
    with TensorFileWriter(path, entries, reserve) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)
        file.close(metadata)
