"""More hostile files: those of kohya and LyCORIS, GGUF, shards, plans, statistics, and what is no file at all."""

import json
import math
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from adapter_cases import CONFIG, PICKLE, WEIGHTS, write_folder
from hostile_cases import CASES as CASES
from hostile_cases import DIRECTION, ESCAPE, REFUSED, add, case, container, entry, write_bin
from kohya_cases import kohya_tensors, write_kohya
from mlx_cases import WEIGHTS as MLX_WEIGHTS
from mlx_cases import write_mlx

# --- kohya and LyCORIS ----------------------------------------------------------------------------------------------


@case("lora_unet_q", "a LoKr for a matrix of 1000000 x 1000000", "no model has such a layer")
def _kronecker_product_of_a_trillion(folder: Path) -> Path:
    folder.mkdir()
    return write_kohya(
        folder / "a.safetensors",
        {"lora_unet_q.lokr_w1": torch.ones(1000, 1000), "lora_unet_q.lokr_w2": torch.ones(1000, 1000)},
    )


@case("a LoHa for a matrix of 50000 x 50000", "no model has such a layer")
def _product_by_element_of_a_trillion(folder: Path) -> Path:
    folder.mkdir()
    factors = {f"lora_unet_q.hada_w{i}_{side}": torch.ones(s) for i in (1, 2) for side, s in SIDES.items()}
    return write_kohya(folder / "a.safetensors", {key: t.half() for key, t in factors.items()})


SIDES = {"a": (50_000, 224), "b": (224, 50_000)}


@case("alpha must be a finite number")
def _alpha_without_value(folder: Path) -> Path:
    folder.mkdir()
    return write_kohya(folder / "a.safetensors", kohya_tensors(alpha=float("nan")))


# --- GGUF -----------------------------------------------------------------------------------------------------------


def gguf(tensors: int, fields: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + rest


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def number(key: str, kind: int, raw: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + raw


def with_gguf(name: str, raw: bytes, *fragments: str) -> None:
    def build(folder: Path) -> Path:
        folder.mkdir()
        (folder / "a.gguf").write_bytes(raw)
        return folder / "a.gguf"

    add(name, build, *fragments)


def tensor(name: str, *dims: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


ARRAY = struct.Struct("<IQ")
ADAPTER = number("general.type", 8, text("adapter")) + number("adapter.type", 8, text("lora"))
with_gguf("gguf_tensors_without_end", gguf(2**64 - 1, 0), "the name of a tensor takes 8 bytes")
with_gguf("gguf_fields_without_end", gguf(0, 2**63), "the name of a field takes 8 bytes")
with_gguf("gguf_name_without_end", gguf(1, 1, struct.pack("<Q", 2**63)), "takes 9223372036854775808 bytes")
with_gguf("gguf_array_without_end", gguf(0, 1, number("a", 9, ARRAY.pack(10, 2**61))), "takes 18446744073709551616")
with_gguf("gguf_texts_without_end", gguf(0, 1, number("a", 9, ARRAY.pack(8, 2**63))), "takes 8 bytes")
with_gguf("gguf_array_in_array", gguf(0, 1, number("a", 9, ARRAY.pack(9, 1))), "an array of the type 9")
with_gguf("gguf_million_texts", gguf(0, 1, number("a", 9, ARRAY.pack(8, 10**6) + bytes(8 * 10**6))), "'adapter'")
with_gguf(
    "gguf_many_fields",
    gguf(0, 10**5, b"".join(number(f"{i:x}", 7, b"\0") for i in range(10**5))),
    "100000 fields announced, up to 65536 are read",
)
with_gguf("gguf_escapes", gguf(0, 1, number("general.type", 8, text(ESCAPE))), "general.type is '\\x1b]0;")
with_gguf("gguf_escape_in_a_name", gguf(1, 0, tensor(ESCAPE, 1)), "'\\x1b' in its name")
with_gguf(
    "gguf_change_of_direction_in_a_name",
    gguf(1, 2, ADAPTER + tensor(DIRECTION, 0) + bytes(24)),
    "'\\u202e' in its name",
)
with_gguf("gguf_exabytes", gguf(1, 0, tensor("a", 2**62, 2**62)), "ends at")
with_gguf("gguf_dimensions", gguf(1, 0, text("a") + struct.pack("<I", 2**32 - 1)), "4294967295 dimensions")
for value in (0, 3, 2**31):
    with_gguf(
        f"gguf_alignment_{value}",
        gguf(0, 1, number("general.alignment", 4, struct.pack("<I", value))),
        f"general.alignment is {value}, not a power of two",
    )

# --- shards, plans, statistics --------------------------------------------------------------------------------------


def with_index(name: str, content: bytes | Mapping[str, Any], *fragments: str) -> None:
    def build(folder: Path) -> Path:
        folder.mkdir()
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "model.safetensors.index.json").write_bytes(raw)
        (folder.parent / "secret.safetensors").write_bytes(container({"a": entry()}))
        return folder

    add(name, build, *fragments, reader="base")


for i, path in enumerate(("../secret.safetensors", "/etc/passwd", "a/../../secret.safetensors", "..", "a\0b")):
    with_index(f"shard_path_{i}", {"weight_map": {"a": path}}, REFUSED)
with_index("shard_of_a_long_name", {"weight_map": {"a": "x" * 5000}}, "is missing")
with_index("shard_of_escapes", {"weight_map": {"a": ESCAPE}}, "is missing")
with_index("shard_of_a_number", {"weight_map": {"a": 3}}, "names '3', which is no file beside it")
with_index("deep_index", b'{"weight_map":' + b"[" * 10**6, "no readable index")
with_index("many_shards", {"weight_map": {f"k{i}": f"model-{i}.safetensors" for i in range(10**5)}}, "is missing")


def with_plan(name: str, content: str, *fragments: str, suffix: str = "toml") -> None:
    def build(folder: Path) -> Path:
        folder.mkdir()
        (folder / f"plan.{suffix}").write_text(content, encoding="utf-8", errors="surrogatepass")
        return folder / f"plan.{suffix}"

    add(name, build, *fragments, reader="plan")


with_plan("plan_deep", "format = 1\nasked = { a = " + "[" * 10**5, "no readable TOML")
with_plan("plan_deep_json", '{"format": 1, "asked": ' + "[" * 10**5, "no readable TOML, or JSON", suffix="json")
with_plan("plan_rank_of_4000_digits", f"format = 1\n[modules]\na = -{10**4000}\n", "a number of more than 64 bits")
with_plan("plan_hexadecimal", f"format = 0x{'f' * 5000}\n", "a number of more than 64 bits")
with_plan("plan_long_dtype", f'format = 1\ndtype = "{"x" * 5000}"\n', "dtype of a plan must be one of")
with_plan("plan_of_escapes", f'format = 1\n"{"x" * 5000}" = 1\n', "unknown key 'xxx")
with_plan(
    "plan_same_key_at_the_end",
    "{" + "".join(f'"{i}": 0,' for i in range(300_000)) + '"299999": 1}',
    "the key '299999' occurs twice",
    suffix="json",
)
with_plan("plan_many_rows", "format = 1\n[modules]\n" + "".join(f"m{i} = 1\n" for i in range(20_000)))


def with_statistics(name: str, facts: Any, *fragments: str) -> None:
    def build(folder: Path) -> Path:
        folder.mkdir()
        header = {"__metadata__": {"calibration": facts if isinstance(facts, str) else json.dumps(facts)}}
        (folder / "a.safetensors").write_bytes(container({**header, "a": entry()}))
        return folder / "a.safetensors"

    add(name, build, *fragments, reader="calibration")


FACTS = {"format": 1, "loss": 1.0, "examples": 3, "data": "d", "base": "b", "source_sha256": None, "rows": {}}
with_statistics("statistics_infinite", {**FACTS, "examples": math.inf}, "no statistics of a calibration")
with_statistics("statistics_deep", "[" * 10**6, "no statistics of a calibration")
with_statistics("statistics_paths", {**FACTS, "rows": {"../../x": 1}}, "no tensor '../../x.C'")
with_statistics("statistics_escapes", {**FACTS, "rows": {ESCAPE: 1}}, "no tensor '\\x1b]0;")


@case()
def _card_of_line_ends(folder: Path) -> Path:
    write_folder(folder)
    (folder / "README.md").write_text("\n" * 10**6 + "<!-- lora-squeeze -->" * 10**5)
    return folder


@case("no adapter_config.json here, but in its folders \\x1b]0;")
def _folder_of_escapes(folder: Path) -> Path:
    write_folder(folder / ESCAPE)
    return folder


@case("no adapter_config.json here, but \\x1b]0;")
def _files_of_escapes(folder: Path) -> Path:
    folder.mkdir()
    for i in range(2):
        (folder / f"{ESCAPE}{i}.gguf").touch()
    return folder


@case("not a regular file", reader="plan")
def _plan_is_a_pipe(folder: Path) -> Path:
    folder.mkdir()
    os.mkfifo(folder / "plan.toml")
    return folder / "plan.toml"


@case("not a regular file", reader="plan")
def _plan_is_zeros_without_end(folder: Path) -> Path:
    folder.mkdir()
    (folder / "plan.toml").symlink_to("/dev/zero")
    return folder / "plan.toml"


# --- what is no file ------------------------------------------------------------------------------------------------

PLACES: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "config": ("adapter", write_folder, CONFIG),
    "weights": ("adapter", write_folder, WEIGHTS),
    "bin": ("adapter", lambda folder: write_bin(folder, b""), PICKLE),
    "mlx_config": ("adapter", write_mlx, CONFIG),
    "mlx_weights": ("adapter", write_mlx, MLX_WEIGHTS),
}


def replaced(name: str, what: str, put: Callable[[Path, Path], object], *fragments: str) -> None:
    reader, write, file = PLACES[name]

    def build(folder: Path) -> Path:
        write(folder)
        (folder / file).unlink()
        put(folder, folder / file)
        return folder

    add(f"{name}_is_{what}", build, *fragments, reader=reader)


def _secret(folder: Path, path: Path) -> None:
    (folder.parent / "secret").write_text("root:x:0:0:top secret:/root:/bin/sh\n")
    path.symlink_to("../secret")


for name in PLACES:
    if name != "mlx_config":  # by which the format is told
        replaced(name, "a_pipe", lambda _, path: os.mkfifo(path), "a pipe, not a regular file")
        replaced(name, "zeros_without_end", lambda _, path: path.symlink_to("/dev/zero"), "a device or socket")
    replaced(name, "a_link_to_a_secret", _secret, REFUSED)
    replaced(name, "a_circle_of_links", lambda _, path: path.symlink_to(path.name), REFUSED)


@case()
def _weights_linked_as_in_the_cache_of_the_hub(folder: Path) -> Path:
    snapshot, blobs = folder / "snapshots" / "1a2b", folder / "blobs"
    write_folder(snapshot)
    (snapshot / "tokenizer.json").write_text("{}")
    blobs.mkdir()
    for i, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(i))
        path.symlink_to(f"../../blobs/{i}")
    return snapshot


@case()
def _tokenizer_is_a_link_to_a_secret(folder: Path) -> Path:
    write_folder(folder)
    _secret(folder, folder / "tokenizer.json")
    (folder / "README.md").symlink_to("../secret")
    return folder
