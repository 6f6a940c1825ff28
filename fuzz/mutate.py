"""Mutations that know a little of the formats: without them almost every input fails at its first length field.

A safetensors file is its JSON header with a length in front and data of a length that the header tells; both are made
to fit again after most mutations, so that what lies behind the first checks is reached.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

from fuzz.targets import pack, unpack

_WORDS = (
    b"0", b"1", b"-1", b"2", b"3", b"9223372036854775807", b"18446744073709551616", b"1e308", b"1e-320", b"NaN",
    b"Infinity", b"null", b"true", b"[]", b"{}", b'""', b"[[[[", b'"\\ud800"', b'"\\u001b[31m"', b'"\\u202e"', b"\x00",
    b"\x1b[2J", b"\xff\xfe", b"..", b"/etc/passwd", b"(a+)+$", b".*.*.*.*", b"(?i)", b"\\1", b"0.1", b".lora_A",
    b".lora_B.bias", b".base_layer", b".out_proj", b".experts.0.", b".alpha", b"F16", b"BF16", b"F8_E4M3", b"I64",
    b"BOOL", b"F64", b"lokr_w1", b"hada_w1_a", b"diff", b"__metadata__", b"use_rslora", b"init_lora_weights",
    b"rank_pattern", b"alpha_pattern", b"target_parameters", b"modules_to_save", b"exclude_modules", b"\xff" * 8,
    b"\x00" * 8, b"\x01\x00\x00\x00\x00\x00\x00\x80", b"]", b"}", b",", b":", b"= 0x" + b"f" * 5000, b"'''", b'"""',
)  # fmt: skip
_NUMBERS = (0, 1, -1, 2, 3, 5, 8, 2**31, 2**62, 2**63, 2**64, 1e308, 1e-320, 0.5, float("nan"), float("inf"), True)
_VALUES: tuple[Any, ...] = (*_NUMBERS, None, "", "q", "F16", "F64", "BOOL", "\x1b[31m", "\ud800", "(a+)+$", [], {}, [1])
_SIZES = {"64": 8, "32": 4, "16": 2}  # bytes of a number by the digits of its dtype


def mutate(data: bytes, random: random.Random, max_size: int = 1 << 16) -> bytes:
    """One input made from another.

    Args:
        data: an input of any target.
        random: where choices come from.
        max_size: bytes of the longest result.
    """
    parts = unpack(data, data.count(b"\n--8<--\n") + 1)
    at = random.randrange(len(parts))
    for _ in range(random.choice((1, 1, 2, 4))):
        parts[at] = _part(parts[at], random)
    return pack(parts)[:max_size]


def _part(part: bytes, random: random.Random) -> bytes:
    header = _header(part)
    if header is None:
        return _text(part, random) if random.random() < 0.5 or not _is_json(part) else _object(part, random)
    body = part[8 + len(header) :]
    if random.random() < 0.15:
        return _text(part, random)
    if random.random() < 0.3:
        return len(header).to_bytes(8, "little") + header + _text(body, random)[: len(body)].ljust(len(body), b"\0")
    header = _text(header, random) if random.random() < 0.3 else _object(header, random)
    if random.random() < 0.8:
        header, body = _laid_out(header, body)
    return len(header).to_bytes(8, "little") + header + body


def _header(part: bytes) -> bytes | None:
    """The JSON of a safetensors file."""
    length = int.from_bytes(part[:8], "little")
    return part[8 : 8 + length] if part[8:9] == b"{" and length <= len(part) - 8 else None


def _is_json(part: bytes) -> bool:
    return part[:1] == b"{" and b'"' in part


def _text(part: bytes, random: random.Random) -> bytes:
    """Bytes changed without a look at what they mean."""
    at, end = sorted(random.randrange(len(part) + 1) for _ in range(2))
    end = min(end, at + random.choice((1, 2, 8, 40)))
    word = random.choice(_WORDS)
    return random.choice(
        (
            lambda: part[:at] + bytes([random.randrange(256)]) + part[at + 1 :],
            lambda: part[:at] + word + part[at:],
            lambda: part[:at] + word + part[end:],
            lambda: part[:at] + part[end:],
            lambda: part[:end] + part[at:end] * random.choice((1, 2, 50)) + part[end:],
            lambda: _other_number(part, random),
        )
    )()


def _other_number(part: bytes, random: random.Random) -> bytes:
    found = list(re.finditer(rb"-?\d+(\.\d+)?", part))
    if not found:
        return part
    where = random.choice(found)
    return part[: where.start()] + str(random.choice(_NUMBERS)).encode() + part[where.end() :]


def _object(part: bytes, random: random.Random) -> bytes:
    """JSON with one value, or one key, changed."""
    try:
        tree = json.loads(part)
    except (ValueError, RecursionError):
        return _text(part, random)
    places: list[tuple[Any, Any]] = []
    _collect(tree, places, 3)
    if not places:
        return _text(part, random)
    node, key = random.choice(places)
    kind = random.randrange(4)
    if kind == 0 and isinstance(node, dict):
        node[random.choice((f"{key}x", key.replace("0", "1"), key[:-1], key + ".bias", "\x1b" + key))] = node.pop(key)
    elif kind == 1 and isinstance(node, dict):
        node[key + random.choice(("2", ".v", ".lora_A.weight"))] = node[key]
    elif kind == 2:
        del node[key]
    elif isinstance(node[key], int) and random.random() < 0.5:
        node[key] += random.choice((-1, 1))
    else:
        node[key] = random.choice(_VALUES)
    return json.dumps(tree).encode()


def _collect(node: Any, places: list[tuple[Any, Any]], depth: int) -> None:
    keys = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in keys if depth else ():
        places.append((node, key))
        _collect(node[key], places, depth - 1)


def _laid_out(header: bytes, body: bytes) -> tuple[bytes, bytes]:
    """Header and data of tensors that follow one another, where the shapes are small enough for that."""
    try:
        tree = json.loads(header)
        end = 0
        for name, entry in tree.items():
            if name != "__metadata__":
                size = _SIZES.get(entry["dtype"][-2:], 1)
                for n in entry["shape"]:
                    size *= int(n)
                entry["data_offsets"] = [end, end + size]
                end += size
        if not 0 <= end <= 1 << 14:
            return header, body
        return json.dumps(tree).encode(), body[:end].ljust(end, b"\x3c")
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
        return header, body
