"""Files made to harm their reader: how each is made, and what the refusal must say. Without fragments it is read.

Every case is a small file or takes a moment to write; what it announces, or unpacks to, is another matter.
"""

import builtins
import io
import json
import os
import pickle
import posix
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_cases import CONFIG, PICKLE, PREFIX, WEIGHTS, plain_config, plain_tensors, write_folder
from kohya_cases import kohya_tensors, write_kohya
from mlx_cases import WEIGHTS as MLX_WEIGHTS
from mlx_cases import mlx_config, write_mlx

CANARY = "code-was-run"  # the file that a payload makes, beside the folder
REFUSED = ""  # where the text depends on the system
ESCAPE = "\x1b]0;gotcha\x07\x1b[2J\x9b31m\u202e"
Q = f"{PREFIX}layers.0.q_proj"
A_KEY, B_KEY = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"


@dataclass(frozen=True)
class Hostile:
    """A file for one reader.

    Args:
        reader: "adapter", "base", "plan" or "calibration".
        build: makes it below an empty folder, and gives the path to open.
        fragments: parts of the refusal; none where the file must be read.
    """

    reader: str
    build: Callable[[Path], Path]
    fragments: tuple[str, ...]


CASES: dict[str, Hostile] = {}


def case(*fragments: str, reader: str = "adapter") -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    def register(build: Callable[[Path], Path]) -> Callable[[Path], Path]:
        CASES[build.__name__.strip("_")] = Hostile(reader, build, fragments)
        return build

    return register


def add(name: str, build: Callable[[Path], Path], *fragments: str, reader: str = "adapter") -> None:
    CASES[name] = Hostile(reader, build, fragments)


# --- pickles --------------------------------------------------------------------------------------------------------


class Calls:
    """A pickle of this calls a function when it is opened carelessly."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def payloads(place: Path) -> dict[str, Calls]:
    """Calls that make the canary."""
    text = f"open({str(place / CANARY)!r}, 'w')"
    return {
        "system": Calls(posix.system, f"touch {place / CANARY}"),
        "eval": Calls(builtins.eval, text),
        "exec": Calls(builtins.exec, text),
        "mkdir": Calls(os.makedirs, str(place / CANARY)),
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
    }


def write_bin(folder: Path, raw: bytes) -> Path:
    write_folder(folder)
    (folder / WEIGHTS).unlink()
    (folder / PICKLE).write_bytes(raw)
    return folder


def saved(content: object, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


for kind in ("system", "eval", "exec", "mkdir", "getattr"):
    for way in ("zip", "old", "bare"):

        def _runs_code(folder: Path, kind: str = kind, way: str = way) -> Path:
            content = {**plain_tensors(), "x": payloads(folder.parent)[kind]}
            return write_bin(folder, pickle.dumps(content, 2) if way == "bare" else saved(content, way == "zip"))

        add(f"pickle_{kind}_{way}", _runs_code, PICKLE, "could run code", "save the adapter as safetensors")


@case("could run code")
def _pickle_behind_the_end_of_a_sound_one(folder: Path) -> Path:
    """The payload is what the third of the pickles of an old file holds."""
    raw = saved(plain_tensors(), zipped=False)
    first = raw.index(b"\x80\x02", 30)
    return write_bin(folder, raw[:first] + pickle.dumps(payloads(folder.parent)["system"], 2) + raw[first:])


def rezipped(
    change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED, more: Mapping[str, bytes] | None = None
) -> bytes:
    """The archive of a plain adapter with its records changed, and more of them."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(plain_tensors()))) as source, zipfile.ZipFile(file, "w", method) as result:
        for name in source.namelist():
            result.writestr(name, change(name, source.read(name)))
        for name, content in (more or {}).items():
            result.writestr(name, content)
    return file.getvalue()


@case("a compressed record")
def _zip_bomb(folder: Path) -> Path:
    def inflated(name: str, content: bytes) -> bytes:
        text = b"a" * (1 << 25)
        return b"\x80\x02X" + struct.pack("<I", len(text)) + text + b"." if name.endswith("data.pkl") else content

    return write_bin(folder, rezipped(inflated, zipfile.ZIP_DEFLATED))


@case("a pickle of", "bytes, up to 4194304 are read")
def _pickle_of_many_objects(folder: Path) -> Path:
    objects = b"\x80\x02(" + b"]" * (1 << 23) + b"l."
    return write_bin(folder, rezipped(lambda name, old: objects if name.endswith("data.pkl") else old))


@case("more objects than an adapter has")
def _old_pickle_of_many_objects(folder: Path) -> Path:
    raw = saved(plain_tensors(), zipped=False)
    last = raw.rindex(b"\x80\x02ctorch") if b"\x80\x02ctorch" in raw else raw.rindex(b"\x80\x02}")
    return write_bin(folder, raw[:last] + b"\x80\x02(" + b"]" * (1 << 21) + b"l.")


@case("not a readable PyTorch file")
def _names_in_the_archive_that_lead_out(folder: Path) -> Path:
    paths = {f"../{CANARY}": b"x", f"/tmp/{CANARY}-absolute": b"x", f"archive/../../{CANARY}": b"x"}
    return write_bin(folder, rezipped(lambda name, old: old, more=paths))


@case("has more numbers than the file")
def _tensor_of_one_number_with_a_stride_of_zero(folder: Path) -> Path:
    return write_bin(folder, saved({A_KEY: torch.ones(1).expand(8, 10**9), B_KEY: torch.ones(4, 8)}))


@case("has more numbers than the file")
def _the_same_numbers_under_many_names(folder: Path) -> Path:
    one = torch.ones(1 << 16)
    return write_bin(folder, saved({**plain_tensors(), **{f"x{i}": one for i in range(5000)}}))


@case("expected a dictionary of tensors by name")
def _tensor_without_numbers(folder: Path) -> Path:
    return write_bin(folder, saved({**plain_tensors(), A_KEY: torch.empty(8, 20, device="meta")}))


@case("not a readable PyTorch file")
def _archive_of_nothing(folder: Path) -> Path:
    return write_bin(folder, b"PK\x05\x06" + bytes(18))


@case(PICKLE, "is not opened")
def _pickle_that_pops_an_empty_stack(folder: Path) -> Path:
    return write_bin(folder, rezipped(lambda name, old: b"\x80\x020000." if name.endswith("data.pkl") else old))


# --- safetensors headers --------------------------------------------------------------------------------------------


def entry(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def container(header: bytes | Mapping[str, Any], data: bytes = bytes(16)) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def with_weights(name: str, raw: bytes, *fragments: str) -> None:
    """The same weights file for the readers of a PEFT folder, an mlx-lm folder, one file, base weights, statistics."""

    def peft(folder: Path) -> Path:
        write_folder(folder)
        (folder / WEIGHTS).write_bytes(raw)
        return folder

    def mlx(folder: Path) -> Path:
        write_mlx(folder)
        (folder / MLX_WEIGHTS).write_bytes(raw)
        return folder

    def base(folder: Path) -> Path:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(raw)
        return folder

    def one(folder: Path) -> Path:
        folder.mkdir()
        (folder / "a.safetensors").write_bytes(raw)
        return folder / "a.safetensors"

    add(f"{name}_peft", peft, *fragments)
    add(f"{name}_mlx", mlx, *fragments)
    add(f"{name}_file", one, *fragments)
    add(f"{name}_base", base, *fragments, reader="base")
    add(f"{name}_statistics", one, *fragments, reader="calibration")


with_weights("length_of_everything", b"\xff" * 7 + b"\x7f" + b"{" * 92, "header of 9223372036854775807 bytes")
with_weights("length_of_a_terabyte", (1 << 40).to_bytes(8, "little") + b"{" * 92, "header of 1099511627776 bytes")
with_weights("tensor_of_exabytes", container({"a": entry(shape=[10**9, 10**9])}), "takes 4000000000000000000 bytes")
with_weights("tensor_of_many_dimensions", container({"a": entry(shape=[1] * 10**5)}), "too large for any tensor")
with_weights("negative_offset", container({"a": entry(offsets=[-16, 0])}), "a number below 0")
with_weights("offset_of_4000_digits", container({"a": entry(offsets=[0, 10**4000])}), "above 2**63 - 1")
with_weights(
    "number_of_a_million_digits",
    container(b'{"a":{"dtype":"F32","shape":[' + b"1" * 10**5 + b'],"data_offsets":[0,16]}}'),
    "not UTF-8 JSON",
)
with_weights("overlap", container({"a": entry(), "b": entry(offsets=[8, 24])}, bytes(24)), "overlaps by 8 bytes")
with_weights("same_key_twice", container(b'{"a":{},"a":{}}'), "'a' occurs twice")
with_weights("nul_in_a_name", container({"a\0b": entry()}), "'\\x00' in its name")
with_weights("escape_in_a_name", container({ESCAPE: entry()}), "'\\x1b' in its name")
with_weights("deep_header", container(b'{"a":' + b"[" * 10**6), "not UTF-8 JSON")
# As deep as it can be parsed: showing it takes as much of the stack again.
with_weights("deepest_header", container(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"), "not by a JSON object")
with_weights("header_of_many_lists", container(b'{"a":[' + b"[]," * 300_000 + b"[]]}"), "not by a JSON object")
with_weights("bad_metadata", container({"__metadata__": {"a": [ESCAPE]}, "a": entry()}), "not a string")


@case("not UTF-8 JSON", reader="base")
def _header_of_holes(folder: Path) -> Path:
    """A file of 100 MB that takes no place on the disk."""
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write((99_000_000).to_bytes(8, "little") + b"{")
        file.truncate(99_000_008)
    return folder


@case()
def _names_that_are_paths(folder: Path) -> Path:
    """They are names of modules and nothing else."""
    tensors = {}
    for path in (f"../../{CANARY}", f"/tmp/{CANARY}", "~/.bashrc", "a/../b", "C:\\x", "$(touch x)", "%s%n{0}"):
        tensors[f"{PREFIX}{path}.lora_A.weight"] = torch.ones(2, 4)
        tensors[f"{PREFIX}{path}.lora_B.weight"] = torch.ones(4, 2)
    return write_folder(folder, tensors)


DIRECTION = "a\u202eb"


@case("a name of 1000000 characters, up to 4096 are read")
def _name_without_end(folder: Path) -> Path:
    return write_folder(folder, {**plain_tensors(), "a" * 10**6: torch.ones(2)})


@case("'\\u202e' in its name", "rename the tensor")
def _change_of_direction_in_a_name(folder: Path) -> Path:
    return write_folder(folder, {**plain_tensors(), f"{DIRECTION}.bias": torch.ones(2)})


@case("'\\u202e' in its name", "rename the tensor")
def _change_of_direction_in_a_name_of_mlx(folder: Path) -> Path:
    return write_mlx(folder, {f"{DIRECTION}.lora_a": torch.ones(4, 2), f"{DIRECTION}.lora_b": torch.ones(2, 4)})


@case("'\\u202e' in its name", "rename the tensor")
def _change_of_direction_in_a_name_of_kohya(folder: Path) -> Path:
    folder.mkdir()
    return write_kohya(folder / "a.safetensors", {**kohya_tensors(), DIRECTION: torch.ones(2)})


@case()
def _history_with_escapes(folder: Path) -> Path:
    steps = [{"step": ESCAPE, "rule": "\ud800", ESCAPE: [[["x"]]]}]
    return write_folder(folder, metadata={"lora_squeeze": json.dumps(steps)})


@case("factor A holds NaN or infinity")
def _numbers_without_value(folder: Path) -> Path:
    return write_folder(folder, {**plain_tensors(), A_KEY: torch.full((8, 20), float("inf"))})


@case()
def _numbers_next_to_zero(folder: Path) -> Path:
    return write_folder(folder, {key: tensor * 1e-42 for key, tensor in plain_tensors().items()})


@case()
def _numbers_without_dimension_and_without_number(folder: Path) -> Path:
    empty = torch.empty(0, 2**31)
    return write_folder(folder, {**plain_tensors(), "scalar": torch.tensor(1.0), "empty": empty})


@case("no model has so many parameters")
def _wrappers_around_wrappers(folder: Path) -> Path:
    tensors = {}
    for depth in range(150):
        inner = f"{PREFIX}experts{'.base_layer' * depth}"
        tensors |= {f"{inner}.lora_A.weight": torch.ones(8, 2), f"{inner}.lora_B.weight": torch.ones(2, 8)}
    return write_folder(folder, tensors, plain_config(target_modules=[], target_parameters=["experts.w1"]))


# --- configurations -------------------------------------------------------------------------------------------------


def with_config(name: str, changes: Mapping[str, Any], *fragments: str) -> None:
    add(name, lambda folder: write_folder(folder, config=plain_config(**changes)), *fragments)


def with_text_config(name: str, raw: bytes, *fragments: str) -> None:
    def build(folder: Path) -> Path:
        write_folder(folder)
        (folder / CONFIG).write_bytes(raw)
        return folder

    add(name, build, *fragments)


SLOW = ("(a+)+$", "(a|a)*$", "(.*)*$", "(a|aa)+$", "(.*a){25}$", ".*" * 40 + "x", "(?:(?:a{1,200}){1,200}){1,200}x")


def long_name(folder: Path, **changes: Any) -> Path:
    """An adapter whose one module has a name that such expressions take ages for."""
    path = f"{PREFIX}{'a' * 1000}!"
    factors = {f"{path}.lora_A.weight": torch.ones(8, 4), f"{path}.lora_B.weight": torch.ones(4, 8)}
    return write_folder(folder, factors, plain_config(**changes))


for i, expression in enumerate(SLOW):
    for field in ("rank_pattern", "alpha_pattern"):
        add(f"slow_{field}_{i}", lambda folder, e=expression, f=field: long_name(folder, **{f: {e: 3}}))
    add(
        f"slow_targets_{i}",
        lambda folder, e=expression: long_name(folder, target_modules=e, target_parameters=["x.y"]),
    )

with_config("back_reference", {"rank_pattern": {r"(a)\1": 3}}, "an expression with a groupref")
with_config("flags_inside", {"rank_pattern": {"(?i)q": 3}}, "rank_pattern", "not a regular expression")
with_config("escape_in_an_expression", {"rank_pattern": {f"(?{ESCAPE}": 3}}, "not a regular expression")
with_config("expression_without_end", {"target_modules": "(a|" * 50_000}, "characters; up to 100000 are read")
with_config("expressions_without_end", {"rank_pattern": {f"{i}.*": 3 for i in range(30_000)}}, "write names in their")
with_config("many_names", {"rank_pattern": {f"^layers\\.{i}\\.x": 3 for i in range(60_000)}})
with_config("many_places_of_dots", {"rank_pattern": {".".join("x" * (n + 1)) + "y" * n: 3 for n in range(1000)}})
with_config("hundred_thousand_keys", {f"key{i}": 0 for i in range(10**5)})
with_text_config(
    "million_keys", b"{" + b",".join(b'"key%07d":0' % i for i in range(10**6)) + b"}", "more than 10000000"
)
with_config("many_targets", {"target_modules": [f"x{i}" for i in range(10**5)], "target_parameters": ["a.b"]})
with_config("deep_value", {"auto_mapping": json.loads("[" * 900 + "]" * 900)}, "nested more than 50 deep")
for i, sign in enumerate(("\x1b[2J", "\ud800", "\u202e")):
    with_config(f"parameter_name_{i}", {"target_parameters": [f"q_proj.{sign}"]}, "target_parameters", "in its name")
with_config("kind_of_escapes", {"peft_type": ESCAPE * 10**5}, "peft_type is '\\x1b]0;")
with_config("field_of_escapes", {f"use_{ESCAPE}": True}, "unknown field 'use_\\x1b]0;")
with_config("rank_of_4000_digits", {"r": 10**4000}, "r must be a whole number")
with_config("alpha_beyond_reckoning", {"lora_alpha": 9e299}, "lora_alpha must be a finite number")
with_config("alpha_at_the_limit", {"lora_alpha": 9e99})
with_config("excluded_by_a_number", {"exclude_modules": 3}, "exclude_modules must be an expression or a list of names")
with_config(
    "paths_in_fields",
    {"base_model_name_or_path": f"../../{CANARY}", "revision": "/etc/passwd", "auto_mapping": {"x": "/etc/passwd"}},
)


@case()
def _many_saved_modules_and_tensors(folder: Path) -> Path:
    names = [".".join("a" * 30) + f".{i}" for i in range(2000)]
    beside = {f"{'a.' * 40}{i}.weight": torch.ones(1) for i in range(1500)}
    return write_folder(folder, {**plain_tensors(), **beside}, plain_config(modules_to_save=names))


@case("lora_parameters: rank must be a whole number")
def _mlx_rank_of_4000_digits(folder: Path) -> Path:
    return write_mlx(folder, config=mlx_config(lora_parameters={"rank": 10**4000, "scale": 1.0}))
