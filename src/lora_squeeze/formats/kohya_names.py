"""From the names of kohya, ComfyUI and LyCORIS files to those of diffusers: unet.down_blocks.0.attentions.0....

docs/formats-kohya-names.md is the specification. A layer of the original model that is several in diffusers (q, k and v
of Flux) is taken apart without a decomposition: the parts have the same A and the rows of B that are theirs, less the
columns that are zero in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Module, Progress
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.kohya_keys import Layout
from lora_squeeze.formats.kohya_maps import choose, fitting
from lora_squeeze.formats.kohya_maps.layer import Architecture, Layer, Place
from lora_squeeze.formats.lycoris import PLAIN
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.lowrank import LowRank

_SPLIT = '"split_qkv": "True"'  # as sd-scripts writes the settings of a training


@dataclass(frozen=True)
class Cut:
    """What a module takes of one in the file.

    Args:
        name: of the module in the file.
        start, stop: its rows of B.
        columns: its columns of B and rows of A; None for all.
        swapped: whether the halves of its rows change places.
    """

    name: str
    start: int
    stop: int
    columns: tuple[int, ...] | None = None
    swapped: bool = False

    def of(self, update: LowRank) -> LowRank:
        """The update of the part."""
        B, A = update.B[self.start : self.stop], update.A
        if self.columns is not None:
            B, A = B[:, self.columns], A[list(self.columns)]
        return LowRank(swap_halves(B) if self.swapped else B, A, update.scale)


@dataclass(frozen=True, eq=False)
class Renamed:
    """Source of an adapter under other names: reads each module of its parent once per batch."""

    parent: Adapter
    cuts: Mapping[str, Cut]

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules."""
        names = list(dict.fromkeys(self.cuts[module.name].name for module in modules))
        read = self.parent.source.updates([self.parent.modules[name] for name in names])
        found = dict(zip(names, read, strict=True))
        return [cut.of(found[cut.name]) for cut in (self.cuts[module.name] for module in modules)]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor of the parent."""
        return self.parent.source.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file that all of it comes from."""
        return self.parent.source.digest()


@dataclass(frozen=True)
class NamedFormat:
    """Of an adapter under names that no file of its format has: it is written after a conversion.

    Args:
        name: of the format that it was read in.
        home: the file that it is read from.
    """

    name: str
    home: Path | None = None

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse: see `save`."""
        raise LoraSqueezeError(
            f"{quoted(path)}: the modules of this {self.name} adapter have the names of diffusers, under which no "
            "reader of the format finds them; convert it to a format first"
        )

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Refuse."""
        self.check_target(path, force=force)

    def overhead_bytes(self, adapter: Adapter) -> int:
        """None are known before there is a format."""
        return 0


def neutral(adapter: Adapter, architecture: str | None = None) -> Adapter:
    """The adapter of a kohya, ComfyUI or LyCORIS file under the names of diffusers, component in front.

    Args:
        adapter: as `lora_squeeze.formats.kohya.load` reads it.
        architecture: sd1, sd2, sdxl, sd3 or flux; default: the one that has all names of the file.

    Returns:
        A lazy Adapter with the same dW. It cannot be saved before it is given a format. Carried tensors keep their
        keys.

    Raises:
        LoraSqueezeError: a name that is none of the architecture, or of none that is known; a name that means different
            layers in two of them; two names of one layer; a module whose shape is not the layer's; a kernel that
            neither the file nor the name shows.

    Notes:
        Exact. The names alone decide, except that the factors of layers which are taken apart are read once, one layer
        at a time, for the rank of the parts: 45 MB of a rank-16 adapter of Flux in 16 bits. A part that is all zero is
        left out, unless all parts are.

    Example:
        >>> neutral(kohya.load(path)).modules  # doctest: +SKIP
        {'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q': Module(...), ...}
    """
    places = choose(adapter.modules, architecture, Architecture.places)
    kernels = _kernels(adapter, fitting(adapter.modules, architecture, Architecture.places))
    modules: dict[str, Module] = {}
    cuts: dict[str, Cut] = {}
    fused = 0
    for name, module in adapter.modules.items():
        place: Place = places[name]
        fused += len(place.targets) > 1
        for target, cut in _cuts(adapter, module, place).items():
            if target in modules:
                raise LoraSqueezeError(
                    f"{quoted(name)} and {quoted(cuts[target].name)} are both the layer {target}; readers take one of "
                    "them or both: remove one"
                )
            cuts[target], modules[target] = cut, _module(target, module, cut, kernels[name])
    return replace(
        adapter,
        modules=modules,
        source=Renamed(adapter, cuts),
        format=NamedFormat(adapter.format.name, adapter.format.home),
        notes=(*adapter.notes, *(_notes(adapter, fused) if fused else ())),
    )


def swap_halves(B: Tensor) -> Tensor:
    """The second half of the rows before the first: scale and shift for shift and scale."""
    return B.roll(len(B) // 2, 0)


def part_rows(layer: Layer, in_features: int) -> list[tuple[int, int]]:
    """First row, and the one after the last, of every part of a layer that is several in diffusers."""
    ends = list(accumulate((rows * in_features for rows in layer.parts), initial=0))
    return list(pairwise(ends))


def _kernels(adapter: Adapter, fitting: Mapping[str, Mapping[str, Place]]) -> dict[str, tuple[int, ...]]:
    """The kernel of every module: as the file shows it, else that of the layer."""
    kernels = {name: module.kernel for name, module in adapter.modules.items()}
    for name, module in adapter.modules.items():
        known = {key: places[name].layer.kernel for key, places in fitting.items()}
        kernel, *others = dict.fromkeys(known.values())
        if module.kernel or (others and _is_plain(module)):  # plain factors of a convolution mostly show that they are
            continue
        if others:
            one, other = (next(key for key in known if known[key] == each) for each in (kernel, others[0]))
            raise LoraSqueezeError(
                f"{quoted(name)} is a convolution in {one if kernel else other} and a linear layer in "
                f"{other if kernel else one}, and the file does not show which; say which model it is for with "
                f"architecture={one!r} or {other!r} (--architecture)"
            )
        if module.in_features % prod(kernel):
            raise LoraSqueezeError(
                f"{quoted(name)} has {module.in_features} columns, which are no multiple of the kernel "
                f"{' x '.join(map(str, kernel))} of this layer: is it of another architecture?"
            )
        kernels[name] = kernel
    return kernels


def _is_plain(module: Module) -> bool:
    return not isinstance(module.layout, Layout) or module.layout.form == PLAIN


def _notes(adapter: Adapter, fused: int) -> Iterator[str]:
    yield f"{fused} layers are several in diffusers: taken apart, without a decomposition"
    if _SPLIT in adapter.metadata.get("ss_network_args", ""):
        yield (
            "trained with split_qkv: sd-scripts trains the parts with alpha / (rank of a part), all readers of the "
            "file take alpha / (rank of the whole), a third (linear1: a quarter) of it; this is what is converted"
        )


def _cuts(adapter: Adapter, module: Module, place: Place) -> dict[str, Cut]:
    """Neutral name -> what it takes of a module."""
    layer, rows = place.layer, module.out_features
    if len(place.targets) == 1:
        swapped = layer.swapped(rows, module.in_features)
        return {place.targets[0]: Cut(module.name, 0, rows, swapped=swapped)}
    spans = part_rows(layer, module.in_features)
    if rows != spans[-1][1] or module.kernel:
        raise LoraSqueezeError(
            f"{quoted(module.name)} is {rows} x {module.in_features}, and a layer of {len(spans)} parts has "
            f"{spans[-1][1]} rows: is it of another architecture?"
        )
    B = adapter.source.updates([module])[0].B
    used = {target: _columns(B[a:b]) for target, (a, b) in zip(place.targets, spans, strict=True)}
    kept = any(used.values())  # a new adapter has B = 0, and all of its modules
    return {
        target: Cut(module.name, a, b, None if not kept or len(used[target]) == module.rank else used[target])
        for target, (a, b) in zip(place.targets, spans, strict=True)
        if used[target] or not kept
    }


def _columns(B: Tensor) -> tuple[int, ...]:
    """The columns that are not all zero."""
    return tuple(torch.nonzero((B.float() if B.dtype.itemsize == 1 else B).ne(0).any(0)).flatten().tolist())


def _module(name: str, module: Module, cut: Cut, kernel: tuple[int, ...]) -> Module:
    whole = cut.columns is None and (cut.start, cut.stop) == (0, module.out_features)
    return replace(
        module,
        name=name,
        rank=module.rank if cut.columns is None else len(cut.columns),
        out_features=cut.stop - cut.start,
        kind="conv" if kernel else module.kind,
        kernel=kernel,
        layout=None,
        source_bytes=module.source_bytes if whole else max(module.size_bytes, module.source_bytes),
    )
