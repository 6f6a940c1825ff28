"""Adapter: the updates of one adapter by module name, the tensors beside them, and where all of it comes from.

An Adapter is frozen and lazy. It holds facts (names, ranks, scales, shapes); tensors are read when asked for, a batch
of modules at a time, so an adapter of any size costs the memory of one batch. `squeeze` gives another lazy Adapter,
whose factors are computed when it is saved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank

if TYPE_CHECKING:
    from lora_squeeze.report import Report

BATCH_BYTES = 16 * 2**20  # factors read, squeezed and written together

Progress = Callable[[int, int], None]  # bytes done, bytes in all
Kind = Literal["linear", "conv", "embedding", "experts"]


@dataclass(frozen=True)
class Module:
    """What is known of one module's update without reading it.

    Args:
        name: dotted path in the base model, without prefixes; unique in the adapter.
        rank: r of its LowRank.
        scale: s of its LowRank.
        dtype: dtype of the stored factors.
        out_features, in_features: rows and columns of dW (a convolution has in * kernel columns).
        copies: independent updates stacked in one tensor (experts, groups of a convolution).
        kind: the layer's kind, as far as the file tells.
        group: modules with the same group keep one common rank; None is a group of its own.
        floor: smallest rank it may take; 0 means that it may leave the adapter.
        step: ranks counted by the file per rank of the LowRank (groups of a convolution).
        kernel: sizes of a convolution's kernel, as far as the file shows them; () for other layers.
        layout: what the format needs to write it again.
        source_bytes: bytes of the factors that it is computed from, where these are more than its own.
        total: squared Frobenius norm of the whole update, where the LowRank is only the leading part of it.
    """

    name: str
    rank: int
    scale: float
    dtype: torch.dtype
    out_features: int
    in_features: int
    copies: int = 1
    kind: Kind = "linear"
    group: str | None = None
    floor: int = 0
    step: int = 1
    kernel: tuple[int, ...] = ()
    layout: Any = None
    source_bytes: int = 0
    total: float | None = None

    @property
    def parameters_per_rank(self) -> int:
        """Numbers stored per unit of rank: copies * (out + in)."""
        return self.copies * (self.out_features + self.in_features)

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        return self.rank * self.parameters_per_rank

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        return self.parameters * self.dtype.itemsize


@dataclass(frozen=True)
class Extra:
    """A tensor that is carried along unchanged: a full embedding, a trained head, a bias, trained token rows.

    Args:
        name: key in the file.
        kind: "embedding", "module to save", "trainable tokens", "bias", "lora bias" or "other".
        cause: why it is in the file, for a person.
        module: for "lora bias", the module whose scale it is multiplied with by readers.
        factor: what the stored tensor is multiplied with on reading (a change of that scale).
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    kind: str
    cause: str
    module: str | None = None
    factor: float = 1.0

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable  # the type checker of the test suite asks isinstance
class Source(Protocol):
    """Where an adapter's tensors come from: a file, memory, or the squeeze of another adapter."""

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules, in order."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The numbers of one carried tensor in order, as flat tensors of bounded size."""

    def digest(self) -> str | None:
        """sha256 of the file that this comes from, None if it does not come from a file."""


@runtime_checkable
class Format(Protocol):
    """How an adapter is written: the format that it was read in."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def home(self) -> Path | None:
        """The folder or file that the adapter is read from: never written to, whatever `force` says."""

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse a target that `save` would refuse, before any work is done."""

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write the adapter to `path`."""

    def overhead_bytes(self, adapter: Adapter) -> int:
        """An upper bound of the bytes in the weights file that are not tensors."""


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter.

    Args:
        modules: module name -> Module, in file order.
        extras: key -> Extra, carried along.
        source: reads the tensors.
        format: writes them.
        config: the format's own settings, as read.
        default_scale: the scale of the adapter as a whole (lora_alpha / r); what `alpha="keep"` writes everywhere.
        dropped: modules that a squeeze took to rank 0.
        history: what was done to it, oldest first; written into the file's header.
        metadata: strings of the file's header.
        companions: small files beside the weights that belong to the adapter: model card, tokenizer, chat template.
        notes: things a person should know about the input, one line each.
    """

    modules: Mapping[str, Module]
    source: Source
    format: Format
    extras: Mapping[str, Extra] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    default_scale: float = 1.0
    dropped: tuple[str, ...] = ()
    history: tuple[Mapping[str, Any], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    companions: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.modules:
            raise LoraSqueezeError("the adapter has no LoRA modules: there is nothing to read or squeeze")

    @property
    def rank(self) -> int:
        """The largest rank of any module, as files count it: what a server's max_lora_rank must allow."""
        return max(module.rank * module.step for module in self.modules.values())

    @property
    def parameters(self) -> int:
        """Numbers stored in all factors."""
        return sum(module.parameters for module in self.modules.values())

    @property
    def lora_bytes(self) -> int:
        """Bytes of all factors."""
        return sum(module.size_bytes for module in self.modules.values())

    @property
    def extra_bytes(self) -> int:
        """Bytes of the carried tensors."""
        return sum(extra.size_bytes for extra in self.extras.values())

    def update(self, name: str) -> LowRank:
        """The update of one module."""
        if name not in self.modules:
            raise LoraSqueezeError(
                f"no module {name!r} in this adapter; it has {', '.join(list(self.modules)[:3])}, ..."
            )
        return self.source.updates([self.modules[name]])[0]

    def extra(self, name: str) -> Tensor:
        """One carried tensor."""
        extra = self.extras[name]
        return torch.cat([torch.empty(0, dtype=extra.dtype), *self.pieces(name)]).reshape(extra.shape)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The numbers of one carried tensor in order, as flat tensors of bounded size: embeddings can be gigabytes."""
        factor = self.extras[name].factor
        for piece in self.source.pieces(name):
            yield piece if factor == 1.0 else rescaled(name, piece, factor)

    def batches(self) -> Iterator[list[Module]]:
        """The modules in file order, in lists of about BATCH_BYTES to be read."""
        batch: list[Module] = []
        size = 0
        for module in self.modules.values():
            needed = max(module.size_bytes, module.source_bytes)
            if batch and size + needed > BATCH_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(module)
            size += needed
        yield batch

    @property
    def report(self) -> Report:
        """Spectrum, energy and size of every module; for the result of a squeeze, before and after."""
        from lora_squeeze.report import report

        return report(self)

    def squeeze(self, **options: Any) -> Adapter:
        """The same adapter at a smaller rank: see `lora_squeeze.squeeze`, whose options these are."""
        from lora_squeeze.post_squeeze import squeeze

        return squeeze(self, **options)

    def save(self, path: str | Path, *, force: bool = False, progress: Progress | None = None) -> None:
        """Write the adapter in its format, all or nothing.

        Args:
            path: folder or file to write, as the format has it.
            force: replace what is there.
            progress: called with (bytes done, bytes in all) after every batch of modules.

        Raises:
            LoraSqueezeError: the target exists and `force` is not given, or a tensor cannot be written as asked.
        """
        self.format.save(self, Path(path).expanduser(), force=force, progress=progress)


def rescaled(name: str, piece: Tensor, factor: float) -> Tensor:
    """A part of a carried tensor times a factor, in its dtype.

    Raises:
        LoraSqueezeError: NaN or infinity comes of it.
    """
    found = (piece.double() * factor).to(piece.dtype)
    if not is_finite(found):
        raise LoraSqueezeError(
            f"{name}: it follows the scale of its module, and times {factor:.6g} it holds NaN or infinity, or does not "
            f"fit in {piece.dtype}; store it as float32 in the source if that is sound"
        )
    return found


def is_finite(tensor: Tensor) -> bool:
    """Whether there is no NaN or infinity; the extremes are found many times faster than by isfinite().all()."""
    if not tensor.numel():
        return True
    # torch cannot tell for all kinds of float8
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(low.isfinite() & high.isfinite())


def common_dtype(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """A dtype that holds both; torch does not promote those of one byte."""
    if one == other:
        return one
    return torch.float32 if 1 in (one.itemsize, other.itemsize) else torch.promote_types(one, other)
