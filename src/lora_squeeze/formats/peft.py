"""PEFT adapters: a folder with adapter_config.json and adapter_model.safetensors (or .bin).

docs/formats.md is the specification of what is read and written here.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Module, Progress, rescaled
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.folder import check_target, replace_folder
from lora_squeeze.formats.history import read_history
from lora_squeeze.formats.model_card import CARD_NAME, model_card
from lora_squeeze.formats.peft_config import CONFIG_NAME as CONFIG_NAME
from lora_squeeze.formats.peft_config import read_config, squeezed_config
from lora_squeeze.formats.peft_keys import PREFIX, Layout, parse
from lora_squeeze.formats.pickles import check_pickled, load_pickle
from lora_squeeze.formats.safetensors_header import not_safetensors, quoted
from lora_squeeze.formats.safetensors_io import PIECE_BYTES, TensorFile, read_regular
from lora_squeeze.formats.streaming import check_finite, header_bound, write_tensors
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


@runtime_checkable
class Tensors(Protocol):
    """A weights file: names, dtypes and shapes at once, data when asked for."""

    metadata: dict[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Its numbers in order, as flat tensors of bounded size."""

    def sha256(self) -> str:
        """Digest of the file."""


class PickleFile:
    """adapter_model.bin: a pickle, opened through `weights_only`, which runs no code; tensors are memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, str] = {}
        head = read_regular(path, 512)
        if head.startswith(b"version https://git-lfs") or head.lstrip().startswith(b"<"):
            raise LoraSqueezeError(f"{quoted(path)}: {not_safetensors(head, 0, len(head))}")
        try:
            tensors = load_pickle(path, zipped=head.startswith(b"PK"))
        except pickle.UnpicklingError as error:
            # Only the name is taken from torch's message, which goes on to explain how to switch the check off.
            name = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise LoraSqueezeError(
                f"{quoted(path)}: this pickle holds more than tensors{f' ({name[1]})' if name else ''} and is not "
                "opened, since it could run code; save the adapter as safetensors where it comes from"
            ) from None
        except Exception as error:  # of a damaged pickle torch makes errors of any kind
            raise LoraSqueezeError(
                f"{quoted(path)}: not a readable PyTorch file ({_first_line(error)}); download or export it again"
            ) from None
        try:
            check_pickled(tensors, path.stat().st_size)
        except LoraSqueezeError as error:
            raise LoraSqueezeError(f"{quoted(path)}: {error}") from None
        self._tensors: dict[str, Tensor] = {name: tensor.detach() for name, tensor in tensors.items()}

    @property
    def shapes(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        return self._tensors[name]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Its numbers in order."""
        tensor = self._tensors[name]
        return iter(tensor.reshape(-1).split(PIECE_BYTES // tensor.element_size()))

    def sha256(self) -> str:
        """Digest of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    return quoted((str(error).splitlines() or [type(error).__name__])[0])


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

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.file.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file."""
        return self.file.sha256()


def load(folder: Path, *, of_pair: bool = False) -> Adapter:
    """The adapter in a folder. Reads the configuration and the header of the weights; tensors come later.

    Args:
        folder: with the configuration and the weights.
        of_pair: it will be subtracted from, or by, the other of a trained and an initial adapter, see `read_config`.

    Raises:
        LoraSqueezeError: a missing or damaged file, or a kind of adapter that cannot be squeezed soundly.
    """
    config = read_config(folder, of_pair=of_pair)
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
    companions, strange = beside(folder)
    return Adapter(
        modules=modules,
        extras=extras,
        source=PeftSource(file),
        format=PeftFormat(home=folder.resolve()),
        config=config,
        default_scale=_default_scale(config, top),
        metadata=dict(file.metadata),
        history=read_history(file.metadata),
        companions=companions,
        notes=(*notes, *strange),
    )


def beside(folder: Path, names: Sequence[str] = (CARD_NAME, *COMPANIONS)) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of these names that may be copied, and a note of every other."""
    found = [folder / name for name in names if (folder / name).is_file()]
    strange = [path for path in found if not belongs(path)]
    notes = tuple(f"{path.name}: a link that leads out of the folder; it is not copied" for path in strange)
    return tuple(path for path in found if path not in strange), notes


def belongs(path: Path) -> bool:
    """Whether a file beside the weights may be copied: no link that leads out of the folder.

    A link in a downloaded folder may lead to any file of the user, which would then be published with the result. The
    hub's cache has links too, but into a folder of its own: <repository>/snapshots/<commit>/x to <repository>/blobs/y.
    """
    real, folder = path.resolve(), path.parent.resolve()
    repositories = [top for top in folder.parents if top.name == "snapshots"]
    homes = [folder, *(top.parent / "blobs" for top in repositories[:1])]
    return any(real.is_relative_to(home) for home in homes)


def _default_scale(config: Mapping[str, Any], rank: int) -> float:
    alpha = config.get("lora_alpha", 8)
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


@dataclass(frozen=True)
class PeftFormat:
    """Writes an adapter as a PEFT folder.

    Args:
        home: the folder that the adapter is read from: never written to, whatever `force` says.
    """

    name: str = "peft"
    home: Path | None = None

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse the source's own folder, and what cannot be replaced."""
        if self.home is not None and path.resolve() == self.home:
            raise LoraSqueezeError(f"{quoted(path)} is the folder that the adapter is read from; choose another output")
        check_target(path, force=force)

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write config, weights, model card and companions; one batch of modules is in memory at a time."""
        self.check_target(path, force=force)
        config = _config(adapter)
        with replace_folder(path, force=force, owned=OWNED) as staging:
            _write_weights(adapter, staging / WEIGHTS_NAME, progress)
            (staging / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            _write_companions(adapter, staging)

    def overhead_bytes(self, adapter: Adapter) -> int:
        """Header and metadata: an upper bound of what the weights file holds beside its tensors."""
        return header_bound(adapter, _entries(adapter))


def _write_weights(adapter: Adapter, path: Path, progress: Progress | None) -> None:
    """Write the tensors, all with the one scale of the configuration."""
    scale = _scale(adapter)

    def stored(module: Module, update: LowRank) -> dict[str, Tensor]:
        update = update.with_scale(scale)
        check_finite(module, update.A, update.B)
        return dict(zip(module.layout.new_keys(module.kind), _stored(module, update), strict=True))

    def carried(extra: Extra) -> tuple[str, Iterator[Tensor]]:
        pieces = adapter.pieces(extra.name)
        if extra.module is not None and (ratio := adapter.modules[extra.module].scale / scale) != 1:
            pieces = (rescaled(extra.name, piece, ratio) for piece in pieces)
        return _new_key(extra.name, adapter), pieces

    write_tensors(path, adapter, _entries(adapter), stored, progress, carried=carried)


def _entries(adapter: Adapter) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor in the new file."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in adapter.modules.values():
        for key, shape in zip(module.layout.new_keys(module.kind), factor_shapes(module), strict=True):
            entries[key] = (module.dtype, shape)
    for name, extra in adapter.extras.items():
        entries[_new_key(name, adapter)] = (extra.dtype, extra.shape)
    return entries


def factor_shapes(module: Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of A and B in the file."""
    rank, copies = module.rank, module.copies
    if module.kind == "conv":
        channels = module.in_features
        for size in module.kernel:
            channels //= size
        return (rank * copies, channels, *module.kernel), (
            module.out_features * copies,
            rank,
            *(1 for _ in module.kernel),
        )
    if module.kind == "experts":
        return (copies * rank, module.in_features), (module.out_features, rank * copies)
    return (rank, module.in_features), (module.out_features, rank)


def _stored(module: Module, update: LowRank) -> tuple[Tensor, Tensor]:
    """A and B as the file packs them."""
    a_shape, b_shape = factor_shapes(module)
    B = update.B.permute(1, 2, 0) if module.kind == "experts" else update.B
    return update.A.reshape(a_shape), B.reshape(b_shape)


def _new_key(name: str, adapter: Adapter) -> str:
    """The key of a carried tensor in the new file, in today's spelling."""
    extra = adapter.extras[name]
    if extra.module is not None:
        return f"{PREFIX}{adapter.modules[extra.module].layout.path}.lora_B.bias"
    return name if name.startswith("base_model.") else PREFIX + name


def _scale(adapter: Adapter) -> float:
    """The one scale that is written for all modules."""
    return adapter.default_scale if adapter.default_scale > 0 else 1.0


def _config(adapter: Adapter) -> dict[str, Any]:
    ranks = {
        module.layout.pattern: module.rank * module.step
        for module in adapter.modules.values()
        if module.layout.pattern is not None
    }
    config = squeezed_config(adapter.config, ranks, _scale(adapter), adapter.dropped)
    if adapter.dropped and all(module.kind == "experts" for module in adapter.modules.values()):
        config["target_modules"] = []  # target_parameters alone: PEFT warns of target modules that it does not find
    return config


def _write_companions(adapter: Adapter, staging: Path) -> None:
    card = ""
    for path in adapter.companions:
        try:
            if path.name == CARD_NAME:
                card = path.read_text(encoding="utf-8")
            else:
                shutil.copyfile(path, staging / path.name)  # in pieces, whatever its size
        except (OSError, UnicodeDecodeError) as error:
            raise LoraSqueezeError(f"{quoted(path)}: cannot be copied ({error})") from error
    # What the header tells of earlier steps may be text that UTF-8 cannot hold.
    (staging / CARD_NAME).write_text(model_card(adapter, card), encoding="utf-8", errors="replace")
