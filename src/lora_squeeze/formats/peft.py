"""PEFT adapters: a folder with adapter_config.json and adapter_model.safetensors (or .bin).

docs/formats.md is the specification of what is read and written here.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Module, Progress
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.folder import replace_folder
from lora_squeeze.formats.model_card import CARD_NAME, model_card
from lora_squeeze.formats.peft_config import CONFIG_NAME as CONFIG_NAME
from lora_squeeze.formats.peft_config import read_config, squeezed_config
from lora_squeeze.formats.peft_keys import PREFIX, Layout, parse
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.formats.safetensors_io import TensorFile, TensorFileWriter
from lora_squeeze.lowrank import LowRank

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
OWNED = (CONFIG_NAME, WEIGHTS_NAME, PICKLE_NAME, CARD_NAME)
# Small files that servers and loaders look for beside the weights.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
HISTORY_KEY = "lora_squeeze"
_HISTORY_BYTES = 2048  # room in the header for one more step of history


@runtime_checkable
class Tensors(Protocol):
    """A weights file: names, dtypes and shapes at once, data when asked for."""

    metadata: dict[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor."""

    def sha256(self) -> str:
        """Digest of the file."""


class PickleFile:
    """adapter_model.bin: a pickle, opened through `weights_only`, which runs no code; tensors are memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise LoraSqueezeError(
                f"{path}: this pickle holds more than tensors and is not opened, since it could run code "
                f"({reason:.120}); save the adapter as safetensors where it comes from"
            ) from None
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise LoraSqueezeError(f"{path}: not a readable PyTorch file ({str(error).splitlines()[0]:.120})") from None
        if not isinstance(tensors, dict) or not all(
            isinstance(k, str) and isinstance(t, Tensor) for k, t in tensors.items()
        ):
            raise LoraSqueezeError(f"{path}: expected a dictionary of tensors by name")
        self._tensors: dict[str, Tensor] = tensors

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]

    def sha256(self) -> str:
        """Digest of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class PeftSource:
    """Reads the tensors of one PEFT weights file as updates."""

    file: Tensors

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules; NaN and infinity are found when they are decomposed."""
        return [self._update(module) for module in modules]

    def _update(self, module: Module) -> LowRank:
        layout: Layout = module.layout
        A, B = self.file.read(layout.a_key).to(module.dtype), self.file.read(layout.b_key).to(module.dtype)
        if module.kind == "conv":
            A, B = A.flatten(1), B.flatten(1)
            if module.copies > 1:  # groups: each block of rows of B sees its own rows of A
                A, B = A.unflatten(0, (module.copies, -1)), B.unflatten(0, (module.copies, -1))
        elif module.kind == "experts":  # A: expert slowest; B: expert fastest
            A = A.unflatten(0, (module.copies, module.rank))
            B = B.unflatten(1, (module.rank, module.copies)).permute(2, 0, 1)
        return LowRank(B, A, module.scale)

    def extra(self, name: str) -> Tensor:
        """A carried tensor."""
        return self.file.read(name)

    def digest(self) -> str | None:
        """sha256 of the file."""
        return self.file.sha256()


def load(folder: Path) -> Adapter:
    """The adapter in a folder. Reads the configuration and the header of the weights; tensors come later.

    Raises:
        LoraSqueezeError: a missing or damaged file, or a kind of adapter that cannot be squeezed soundly.
    """
    config = read_config(folder)
    file: Tensors
    if (folder / WEIGHTS_NAME).exists():
        file = opened = TensorFile(folder / WEIGHTS_NAME)
        shapes = {name: (entry.dtype, entry.shape) for name, entry in opened.entries.items()}
    elif (folder / PICKLE_NAME).exists():
        file = pickled = PickleFile(folder / PICKLE_NAME)
        shapes = pickled.shapes
    else:
        raise LoraSqueezeError(f"{folder}: no {WEIGHTS_NAME} and no {PICKLE_NAME}; the adapter is incomplete")
    try:
        modules, extras, notes = parse(shapes, config)
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{folder}: {error}") from None
    first = next(iter(modules.values()))
    top = config.get("r", first.rank)
    return Adapter(
        modules=modules,
        extras=extras,
        source=PeftSource(file),
        format=PeftFormat(),
        config=config,
        default_scale=_default_scale(config, top),
        metadata=dict(file.metadata),
        history=_history(file.metadata),
        companions=tuple(folder / name for name in (CARD_NAME, *COMPANIONS) if (folder / name).is_file()),
        notes=tuple(notes),
    )


def _default_scale(config: Mapping[str, Any], rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


def _history(metadata: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
    try:
        steps = json.loads(metadata.get(HISTORY_KEY, "[]"))
    except ValueError:
        return ()
    return tuple(step for step in steps if isinstance(step, dict)) if isinstance(steps, list) else ()


@dataclass(frozen=True)
class PeftFormat:
    """Writes an adapter as a PEFT folder."""

    name: str = "peft"

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write config, weights, model card and companions; one batch of modules is in memory at a time."""
        keys = {name: module.layout.new_keys(module.kind) for name, module in adapter.modules.items()}
        entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, module in adapter.modules.items():
            for key, shape in zip(keys[name], _shapes(module), strict=True):
                entries[key] = (module.dtype, shape)
        extras = {_new_key(name, adapter): name for name in adapter.extras}
        entries.update({key: (adapter.extras[name].dtype, adapter.extras[name].shape) for key, name in extras.items()})
        config = _config(adapter)
        done, total = 0, adapter.lora_bytes + adapter.extra_bytes
        with replace_folder(path, force=force, owned=OWNED) as staging, ThreadPoolExecutor(1) as pool:
            digest = pool.submit(adapter.source.digest)
            with TensorFileWriter(staging / WEIGHTS_NAME, entries, _reserve(adapter)) as writer:
                for batch in adapter.batches():
                    for module, update in zip(batch, adapter.source.updates(batch), strict=True):
                        A, B = _stored(module, update)
                        a_key, b_key = keys[module.name]
                        writer.write(a_key, A)
                        writer.write(b_key, B)
                        done += module.size_bytes
                    if progress:
                        progress(done, total)
                for key, name in extras.items():
                    writer.write(key, adapter.extra(name))
                    done += adapter.extras[name].size_bytes
                    if progress:
                        progress(done, total)
                writer.close(_metadata(adapter, digest.result()))
            (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            _write_companions(adapter, staging)

    def overhead_bytes(self, adapter: Adapter) -> int:
        """Header and metadata: an upper bound of what the weights file holds beside its tensors."""
        entries = 2 * len(adapter.modules) + len(adapter.extras)
        names = sum(len(key) for m in adapter.modules.values() for key in m.layout.new_keys(m.kind))
        names += sum(len(_new_key(name, adapter)) for name in adapter.extras)
        return 8 + names + 110 * entries + _reserve(adapter)


def _shapes(module: Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B in the file."""
    layout: Layout = module.layout
    rank, copies = module.rank, module.copies
    if module.kind == "conv":
        channels = module.in_features
        for size in layout.kernel:
            channels //= size
        return (rank * copies, channels, *layout.kernel), (
            module.out_features * copies,
            rank,
            *(1 for _ in layout.kernel),
        )
    if module.kind == "experts":
        return (copies * rank, module.in_features), (module.out_features, rank * copies)
    return (rank, module.in_features), (module.out_features, rank)


def _stored(module: Module, update: LowRank) -> tuple[Tensor, Tensor]:
    """A and B as the file packs them."""
    a_shape, b_shape = _shapes(module)
    B = update.B.permute(1, 2, 0) if module.kind == "experts" else update.B
    return update.A.reshape(a_shape), B.reshape(b_shape)


def _new_key(name: str, adapter: Adapter) -> str:
    """The key of a carried tensor in the new file, in today's spelling."""
    extra = adapter.extras[name]
    if extra.module is not None:
        return f"{PREFIX}{adapter.modules[extra.module].layout.path}.lora_B.bias"
    return name if name.startswith("base_model.") else PREFIX + name


def _config(adapter: Adapter) -> dict[str, Any]:
    ranks = {
        module.layout.pattern: module.rank * module.step
        for module in adapter.modules.values()
        if module.layout.pattern is not None
    }
    config = squeezed_config(adapter.config, ranks, adapter.default_scale, adapter.dropped)
    if adapter.dropped and all(module.kind == "experts" for module in adapter.modules.values()):
        config["target_modules"] = []  # target_parameters alone: PEFT warns of target modules that it does not find
    return config


def _metadata(adapter: Adapter, digest: str | None) -> dict[str, str]:
    """The header's strings: those of the source, and the steps done, the last with the digest of its input file."""
    from lora_squeeze import __version__

    *earlier, last = adapter.history or ({"step": "copy"},)
    last = {**last, "source_sha256": digest, "lora_squeeze": __version__}
    return {**adapter.metadata, HISTORY_KEY: json.dumps([*earlier, last], sort_keys=True)}


def _reserve(adapter: Adapter) -> int:
    kept = sum(len(json.dumps([key, value])) for key, value in adapter.metadata.items())
    return kept + 2 * len(json.dumps(list(adapter.history))) + _HISTORY_BYTES


def _write_companions(adapter: Adapter, staging: Path) -> None:
    card = ""
    for path in adapter.companions:
        try:
            if path.name == CARD_NAME:
                card = path.read_text(encoding="utf-8")
            else:
                (staging / path.name).write_bytes(path.read_bytes())
        except (OSError, UnicodeDecodeError) as error:
            raise LoraSqueezeError(f"{quoted(path)}: cannot be copied ({error})") from error
    (staging / CARD_NAME).write_text(model_card(adapter, card), encoding="utf-8")
