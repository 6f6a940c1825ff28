"""The header of a safetensors file: checked JSON to entries, and entries to JSON. No file is touched here.

A file is: 8 bytes N (unsigned, little-endian), N bytes of JSON, then the data of all tensors without holes.
The JSON maps each name to ``{"dtype", "shape", "data_offsets": [begin, end]}`` and ``__metadata__`` to strings.
"""

import gc
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lora_squeeze.errors import LoraSqueezeError

# In the order in which the library lays out the data (then by name): wide types first, so that every tensor is aligned.
DTYPES: dict[str, torch.dtype] = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_SIZE = 2**63 - 1  # torch counts elements and bytes in signed 64 bits
_MAX_DIMS = 64  # more than torch's own operations take
_METADATA = "__metadata__"
_MAX_NAME = 4096  # characters of a tensor's name; models have up to 200


def quoted(text: object, limit: int = 120) -> str:
    """Text of unknown origin made safe to print: quoted, control characters escaped, cut after ``limit`` characters."""
    try:
        shown = repr(str(text)[: limit + 1])
    except (RecursionError, ValueError):  # lists in lists; a number of more digits than Python writes
        shown = repr(f"{type(text).__name__} beyond showing")
    return shown if len(shown) <= limit + 2 else f"{shown[: limit + 1]}...{shown[0]}"


def printable(text: str) -> str:
    """Text of unknown origin without what a terminal or an editor would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: ``nbytes`` bytes from the absolute offset ``begin`` of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def damaged(found: str) -> LoraSqueezeError:
    """The refusal of a file that departs from the format."""
    return LoraSqueezeError(f"{found}; the file is damaged or incomplete: download or export it again")


def not_safetensors(head: bytes, length: int, size: int) -> LoraSqueezeError:
    """What a file is that does not begin as safetensors does, and what to do about it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return LoraSqueezeError("this is a git-lfs pointer, not the weights; run `git lfs pull` in its repository")
    if text.startswith(b"<"):
        return LoraSqueezeError("this is a web page saved in place of weights; download the file itself")
    if head.startswith(b"PK") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return LoraSqueezeError("this is a PyTorch pickle, not safetensors; name it .bin")
    if head.startswith(b"GGUF"):
        return LoraSqueezeError("this is a GGUF file, not safetensors; name it .gguf")
    if len(head) < 10:
        return damaged(f"the file has {len(head)} bytes, too short for safetensors")
    if length > MAX_HEADER_BYTES:
        return damaged(f"header of {length} bytes announced, {MAX_HEADER_BYTES} allowed: not a safetensors file")
    if length > size - 8:
        return damaged(f"header of {length} bytes announced in a file of {size} bytes")
    return damaged(f"the header begins with {quoted(head[8:9].decode('latin-1'))} in place of '{{'")


@contextmanager
def no_collector() -> Iterator[None]:
    """Without the collector of cycles: what is parsed has none, and its walks slow down what makes many objects.

    A header of 300 000 lists takes 25 times as long with it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def parse_header(raw: bytes, room: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse and check the JSON of a safetensors file.

    Args:
        raw: the JSON bytes.
        room: bytes of the file after its length field: the JSON and the data.

    Returns:
        The entries with absolute offsets in the order of the header, and the metadata.

    Raises:
        LoraSqueezeError: any departure from the format; the message names the tensor.
    """
    try:
        with no_collector():
            header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except LoraSqueezeError:
        raise
    except (ValueError, RecursionError) as error:
        raise damaged(f"the header is not UTF-8 JSON ({quoted(error)})") from None
    if not isinstance(header, dict):
        raise damaged("the header is not a JSON object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise damaged(f"{_METADATA} is not a JSON object")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise damaged(f"{_METADATA} {quoted(key)} is {quoted(value)}, not a string")
        if not is_text(key + value):
            raise damaged(f"{_METADATA} {quoted(key)} holds half of a surrogate pair")
    if not header:
        raise damaged("the file holds no tensors")
    start, size = 8 + len(raw), room - len(raw)
    entries = {name: _parse_entry(name, fields, start, size) for name, fields in header.items()}
    _check_cover(entries, start, size)
    return entries, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; the second of two equal keys would silently win otherwise."""
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise damaged(f"the key {quoted(key)} occurs twice in the header")
        result[key] = value
    return result


def is_text(text: object) -> bool:
    """Whether it is a string that UTF-8 can hold: JSON escapes can spell half a surrogate pair, which it cannot."""
    return isinstance(text, str) and not any("\ud800" <= c <= "\udfff" for c in text)


def check_name(name: str) -> None:
    """Refuse a tensor name that is empty, reserved or not printable."""
    bad = None
    if not name.isprintable():  # quick for the many good names
        bad = next((c for c in name if unicodedata.category(c) in ("Cc", "Cs")), None)
    if name and name != _METADATA and bad is None:
        return
    found = f"{quoted(bad)} in its name" if bad else "a reserved name" if name else "an empty name"
    raise LoraSqueezeError(f"tensor {quoted(name)}: {found}; rename the tensor and write the file again")


def check_shown(names: Iterable[str]) -> None:
    """Refuse names of an adapter that mislead where they are shown, or that take long to take apart.

    That is changes of direction, signs that are not seen, line ends, and names of absurd length.
    """
    for name in names:
        if len(name) > _MAX_NAME:
            raise damaged(f"tensor {quoted(name)}: a name of {len(name)} characters, up to {_MAX_NAME} are read")
        if name.isprintable():
            continue
        if bad := next((c for c in name if unicodedata.category(c) in ("Cf", "Zl", "Zp")), None):
            raise LoraSqueezeError(
                f"tensor {quoted(name)}: {quoted(bad)} in its name; rename the tensor and write the file again"
            )


def _parse_entry(name: str, fields: Any, start: int, size: int) -> Entry:
    """Check one tensor's JSON against itself and the ``size`` bytes of data from ``start``."""
    check_name(name)
    where = f"tensor {quoted(name)}"
    known = ("dtype", "shape", "data_offsets")
    if not isinstance(fields, dict):
        raise damaged(f"{where}: described by {quoted(fields)}, not by a JSON object")
    if missing := [key for key in known if key not in fields]:
        raise damaged(f"{where}: field {quoted(missing[0])} is missing")
    if unknown := [key for key in fields if key not in known]:
        raise damaged(f"{where}: unknown field {quoted(unknown[0])}")
    code = fields["dtype"]
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise LoraSqueezeError(f"{where}: unknown dtype {quoted(code)}; convert it to one of {', '.join(DTYPES)}")
    shape = _sizes(f"{where}: shape", fields["shape"])
    offsets = _sizes(f"{where}: data_offsets", fields["data_offsets"])
    if len(shape) > _MAX_DIMS or math.prod(max(n, 1) for n in shape) * dtype.itemsize > _MAX_SIZE:
        raise damaged(f"{where}: shape {quoted(list(shape))} is too large for any tensor")
    if len(offsets) != 2:
        raise damaged(f"{where}: data_offsets {quoted(list(offsets))} is not a pair")
    begin, end = offsets
    if begin > end:
        raise damaged(f"{where}: data_offsets {[begin, end]} end before they begin")
    if end > size:
        raise damaged(f"{where}: data_offsets {[begin, end]} reach beyond the {size} bytes of data")
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise damaged(f"{where}: {code} of shape {list(shape)} takes {nbytes} bytes, data_offsets give {end - begin}")
    return Entry(dtype, shape, start + begin, nbytes)


def _sizes(what: str, value: Any) -> tuple[int, ...]:
    """A JSON list of sizes; True and 1.0 are no sizes, though Python counts with both."""
    if not isinstance(value, list) or not all(type(n) is int for n in value):
        raise damaged(f"{what} {quoted(value)} is not a list of integers")
    if not all(0 <= n <= _MAX_SIZE for n in value):
        raise damaged(f"{what} {quoted(value)} has a number below 0 or above 2**63 - 1")
    return tuple(value)


def _check_cover(entries: Mapping[str, Entry], start: int, size: int) -> None:
    """The tensors must follow one another through the data without hole, overlap or rest."""
    end, last = start, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)):
        if entry.begin < end:
            raise damaged(f"tensor {quoted(name)}: its data overlaps by {end - entry.begin} bytes with {last}")
        if entry.begin > end:
            raise damaged(f"tensor {quoted(name)}: a hole of {entry.begin - end} bytes between it and {last}")
        end, last = entry.begin + entry.nbytes, f"tensor {quoted(name)}"
    if end != start + size:
        raise damaged(f"{start + size - end} bytes follow the last tensor")


def layout(entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Entry]:
    """Entries with offsets relative to the data, ordered as the library orders them."""
    if not entries:
        raise LoraSqueezeError("no tensors to write; a safetensors file needs at least one")
    for name, (dtype, _) in entries.items():
        check_name(name)
        if dtype not in _CODES:
            raise LoraSqueezeError(
                f"tensor {quoted(name)}: {dtype} cannot be stored; convert it to one of {', '.join(map(str, _CODES))}"
            )
    result: dict[str, Entry] = {}
    begin = 0
    for name, (dtype, shape) in sorted(entries.items(), key=lambda item: (_RANK[item[1][0]], item[0])):
        nbytes = math.prod(shape) * dtype.itemsize
        result[name] = Entry(dtype, tuple(shape), begin, nbytes)
        begin += nbytes
    return result


def header_json(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    """The header as the library spells it, metadata sorted by key."""
    header: dict[str, Any] = {_METADATA: dict(sorted({**metadata, "format": "pt"}.items()))}
    for name, entry in entries.items():
        offsets = [entry.begin, entry.begin + entry.nbytes]
        header[name] = {"dtype": _CODES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
