"""One target per reader: any bytes are either refused in one harmless line, or read, squeezed, written and read again.

A target takes the content of the files that its reader opens, several files packed into one input (see `pack`), and
raises `Broken` or lets another exception through where the promise does not hold.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.base_model import open_base
from lora_squeeze.calibration_file import Calibration
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.gguf_names import open_gguf_base
from lora_squeeze.plan import Plan
from lora_squeeze.readers import check
from lora_squeeze.sources import open_source

MAX_MESSAGE = 1000  # characters
_SEPARATOR = b"\n--8<--\n"

Target = Callable[[bytes], None]


class Broken(AssertionError):
    """A promise of a reader that did not hold."""


def pack(parts: Sequence[bytes]) -> bytes:
    """Several files as one input."""
    return _SEPARATOR.join(parts)


def unpack(data: bytes, count: int) -> list[bytes]:
    """The parts of an input; those that are missing are empty."""
    parts = data.split(_SEPARATOR, count - 1)
    return parts + [b""] * (count - len(parts))


def is_harmless(text: str) -> bool:
    """Whether it holds nothing that a terminal obeys: controls, changes of direction, half pairs, ends of lines."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


def check_message(error: LoraSqueezeError) -> None:
    """A refusal is one line of bounded length in which no character commands a terminal."""
    text = str(error)
    if not is_harmless(text) or len(text) > MAX_MESSAGE:
        raise Broken(f"a refusal of {len(text)} characters, harmless: {is_harmless(text)}: {text[:300]!a}")


def _scratch() -> Path:
    """A new folder, in memory where the system has such a place."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="lora-squeeze-fuzz-", dir=shared if os.access(shared, os.W_OK) else None))


def _within(files: dict[str, bytes], use: Callable[[Path], None]) -> None:
    """Write the files into a new folder `in` and hand it on; nothing else may be in the place afterwards."""
    place = _scratch()
    try:
        folder = place / "in"
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
        use(folder)
        stray = [path.name for path in place.iterdir() if path.name not in ("in", "out")]
        if stray or sorted(path.name for path in folder.iterdir()) != sorted(files):
            raise Broken(f"files were left behind: {stray} or in the source")
        if any((folder / name).read_bytes() != content for name, content in files.items()):
            raise Broken("the source was changed")
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _adapter(path: Path, load: Callable[[Path], Adapter] | None = None) -> None:
    """Load, read every update, squeeze to rank 1, write, and load what was written."""
    out = path.parent.parent / "out" if path.is_file() else path.parent / "out"
    try:
        adapter = (load or lora_squeeze.load)(path)
    except LoraSqueezeError as error:
        return check_message(error)
    for note in adapter.notes:
        if not is_harmless(note):
            raise Broken(f"a note is not harmless: {note[:300]!a}")
    for name, module in adapter.modules.items():
        if not is_harmless(name):
            raise Broken(f"the name of a module is not harmless: {name[:300]!a}")
        try:
            update = adapter.update(name)
        except LoraSqueezeError as error:
            check_message(error)
            continue
        B, A = update.B, update.A
        if B.shape[-2:] != (module.out_features, module.rank) or A.shape[-2:] != (module.rank, module.in_features):
            raise Broken(f"{name[:100]!a}: {module.rank} announced, factors {B.shape} and {A.shape}")
    try:
        small = adapter.squeeze(rank=1)
        small.save(out)
    except LoraSqueezeError as error:
        check_message(error)
        if out.exists():
            raise Broken("a refused save left something behind") from error
        return None
    again = lora_squeeze.load(out)
    if sorted(again.modules) != sorted(small.modules):  # a file is in the order of its keys
        raise Broken(f"written {list(small.modules)[:3]}, read {list(again.modules)[:3]}")
    return None


def _peft(data: bytes) -> None:
    config, weights = unpack(data, 2)
    _within({"adapter_config.json": config, "adapter_model.safetensors": weights}, _adapter)


def _peft_bin(data: bytes) -> None:
    config, weights = unpack(data, 2)
    _within({"adapter_config.json": config, "adapter_model.bin": weights}, _adapter)


def _method(data: bytes) -> None:
    """PEFT's other methods, as far as no base model is needed."""
    config, weights = unpack(data, 2)
    files = {"adapter_config.json": config, "adapter_model.safetensors": weights}
    _within(files, lambda folder: _adapter(folder, open_source))


def _check(path: Path) -> None:
    try:
        verdicts = check(path)
    except LoraSqueezeError as error:
        return check_message(error)
    texts = [text for verdict in verdicts for found in verdict.findings for text in (found.text, found.cure)]
    for text in texts:
        if not is_harmless(text):
            raise Broken(f"a finding is not harmless: {text[:300]!a}")
    return None


def _check_folder(data: bytes) -> None:
    config, weights = unpack(data, 2)
    _within({"adapter_config.json": config, "adapter_model.safetensors": weights}, _check)


def _check_file(data: bytes) -> None:
    _within({"adapter.safetensors": data}, lambda folder: _check(folder / "adapter.safetensors"))


def _gguf_base(data: bytes) -> None:
    def use(folder: Path) -> None:
        try:
            base = open_gguf_base(folder / "base.gguf")
            base.rows_of("blk.0.attn_q", 4)
        except LoraSqueezeError as error:
            check_message(error)

    _within({"base.gguf": data}, use)


def _mlx(data: bytes) -> None:
    config, weights = unpack(data, 2)
    _within({"adapter_config.json": config, "adapters.safetensors": weights}, _adapter)


def _one_file(name: str) -> Target:
    return lambda data: _within({name: data}, lambda folder: _adapter(folder / name))


def _read_all(tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        tensor.double().sum()


def _base(data: bytes) -> None:
    index, one, two = unpack(data, 3)
    name = "model.safetensors"

    def use(folder: Path) -> None:
        try:
            model = open_base(folder)
            for key in model.facts:
                _read_all(list(model.pieces(key)))
        except LoraSqueezeError as error:
            check_message(error)

    shards = {"model-1.safetensors": one, "model-2.safetensors": two}
    _within({name: one} if not index else {f"{name}.index.json": index, **shards}, use)


def _plan(name: str) -> Target:
    def use(folder: Path) -> None:
        try:
            plan = Plan.load(folder / name)
            plan.save(folder.parent / "out" / name)
        except LoraSqueezeError as error:
            return check_message(error)
        if repr(Plan.load(folder.parent / "out" / name)) != repr(plan):  # as text: NaN is equal to nothing
            raise Broken("a plan is read in another way after it was written")
        return None

    return lambda data: _within({name: data}, use)


def _calibration(data: bytes) -> None:
    def use(folder: Path) -> None:
        try:
            statistics = Calibration.load(folder / "statistics.safetensors")
            for moments in statistics.moments.values():
                _read_all([moments.C, moments.F])
        except LoraSqueezeError as error:
            check_message(error)

    _within({"statistics.safetensors": data}, use)


TARGETS: dict[str, Target] = {
    "peft": _peft,
    "peft_bin": _peft_bin,
    "peft_method": _method,
    "mlx": _mlx,
    "gguf": _one_file("adapter.gguf"),
    "single_file": _one_file("adapter.safetensors"),  # diffusers, kohya, ComfyUI, LyCORIS
    "check_folder": _check_folder,
    "check_file": _check_file,
    "gguf_base": _gguf_base,
    "base_model": _base,
    "plan_toml": _plan("plan.toml"),
    "plan_json": _plan("plan.json"),
    "calibration": _calibration,
}
