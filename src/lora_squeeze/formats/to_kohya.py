"""To a kohya file: the names of kohya's trainer from those of diffusers, and layers joined that are one there.

docs/formats-kohya-names.md is the specification. Several layers become one without a decomposition: the rows of their A
under each other, each row once, and B zero where a part has nothing to do with a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Module, common_dtype
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import check_carries_nothing, common_scale
from lora_squeeze.formats.kohya import ALPHA_KEY, DIFFUSERS_KEY, RANK_KEY, KohyaFormat
from lora_squeeze.formats.kohya_keys import Layout
from lora_squeeze.formats.kohya_maps import choose
from lora_squeeze.formats.kohya_maps.layer import Architecture, Share
from lora_squeeze.formats.kohya_names import part_rows, swap_halves
from lora_squeeze.formats.lycoris import PLAIN
from lora_squeeze.lowrank import LowRank

_SD3 = "lora_unet_joint_blocks_"
_READ = ("lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_te1_")  # by diffusers, of Flux; none of SD3


@dataclass(frozen=True)
class Part:
    """A module of the given adapter in one of the file.

    Args:
        name: of the module.
        start: its first row in the joined layer.
        columns: of B in the joined layer, one for each of its own.
        swapped: whether the halves of its rows change places.
    """

    name: str
    start: int
    columns: tuple[int, ...]
    swapped: bool = False


@dataclass(frozen=True, eq=False)
class Joined:
    """Source of a converted adapter: its parent's updates, renamed or joined."""

    parent: Adapter
    parts: Mapping[str, tuple[Part, ...]]

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules."""
        names = [part.name for module in modules for part in self.parts[module.name]]
        read = self.parent.source.updates([self.parent.modules[name] for name in names])
        found = dict(zip(names, read, strict=True))
        return [self._update(module, found) for module in modules]

    def _update(self, module: Module, found: Mapping[str, LowRank]) -> LowRank:
        first, *others = parts = self.parts[module.name]
        update = found[first.name]
        if not others and len(update.B) == module.out_features:
            return replace(update, B=swap_halves(update.B)) if first.swapped else update
        updates = [found[part.name] for part in parts]
        dtype = reduce(common_dtype, (each.dtype for each in updates))
        # What is multiplied is rounded when it is written, not here.
        if dtype.itemsize == 1 or any(each.scale != module.scale for each in updates):
            dtype = common_dtype(dtype, torch.float32)
        A = torch.zeros(module.rank, module.in_features, dtype=dtype)
        B = torch.zeros(module.out_features, module.rank, dtype=dtype)
        for part, each in zip(parts, updates, strict=True):
            columns = torch.tensor(part.columns)
            A[columns] = each.A.to(dtype)
            own = each.B.to(dtype)
            rows = slice(part.start, part.start + len(own))
            B[rows, columns] = own if each.scale == module.scale else own * (each.scale / module.scale)
        return LowRank(B, A, module.scale)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor of the parent."""
        return self.parent.source.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file that all of it comes from."""
        return self.parent.source.digest()


def adopt(adapter: Adapter, architecture: str | None = None) -> Adapter:
    """The adapter as a kohya file has it: with the names and the layers that sd-scripts has.

    Args:
        adapter: neutral; the component may be missing for the denoiser: `down_blocks.0...` for `unet.down_blocks.0...`.
        architecture: sd1, sd2, sdxl, sd3 or flux; default: the one that has all names, if all that have them write
            them alike. The adapter of a text encoder alone does not tell.

    Returns:
        A lazy Adapter in the format kohya.

    Raises:
        LoraSqueezeError: a name that is none of the architecture; names that several architectures write in different
            ways; a kind of update or a carried tensor that the format does not have.

    Notes:
        Exact. A layer that is joined from several has the sum of their ranks, less the rows of A that they share: to
        count these, the factors of such modules are read once when this is called, one joined layer at a time; if the
        adapter is the result of a squeeze, they are computed once more.

    Example:
        >>> adopt(lora_squeeze.load("pytorch_lora_weights.safetensors")).save("kohya.safetensors")  # doctest: +SKIP
    """
    if isinstance(adapter.format, KohyaFormat):
        return adapter
    _check(adapter)
    shares: Mapping[str, Share] = choose(adapter.modules, architecture, Architecture.shares)
    whole: dict[str, list[str]] = defaultdict(list)
    for name in adapter.modules:
        whole[shares[name].name].append(name)
    modules: dict[str, Module] = {}
    parts: dict[str, tuple[Part, ...]] = {}
    for written, names in whole.items():
        members = sorted(names, key=lambda name: shares[name].index)
        _check_distinct(members, shares)
        modules[written], parts[written] = _joined(adapter, written, members, shares)
    strings = {key: value for key, value in adapter.metadata.items() if key != DIFFUSERS_KEY}
    transformer = any(share.component == "transformer" for share in shares.values())
    renamed = replace(
        adapter,
        modules=modules,
        source=Joined(adapter, parts),
        format=KohyaFormat(),
        config={},
        metadata={**strings, RANK_KEY: "", ALPHA_KEY: ""},  # filled when it is written
        dropped=(),
        companions=(),
        notes=(*adapter.notes, *(_notes(modules) if transformer else ())),
    )
    return replace(renamed, default_scale=common_scale(renamed))


def _notes(names: Collection[str]) -> Iterator[str]:
    """What diffusers does not read of a file for Flux or SD3."""
    none = any(name.startswith(_SD3) for name in names)
    unread = [name for name in names if none or not name.startswith(_READ)]
    if unread:
        first = f"diffusers 0.42 passes over {len(unread)} modules of this file ({unread[0]})"
        yield f"{first}; for it, convert to diffusers"


def _check(adapter: Adapter) -> None:
    check_carries_nothing(adapter, "sd-scripts", "leave them out with extras=False (--without-extras)")
    for module in adapter.modules.values():
        if module.kind not in ("linear", "conv") or module.copies != 1:
            raise LoraSqueezeError(
                f"{module.name} is an update of kind {module.kind} with {module.copies} copies; kohya files have those "
                "of Linear and ungrouped convolution layers only: leave the module out"
            )


def _check_distinct(members: Sequence[str], shares: Mapping[str, Share]) -> None:
    for one, other in pairwise(members):
        if shares[one].index == shares[other].index:
            raise LoraSqueezeError(f"{one} and {other} are two names of one layer; leave one out")


def _joined(
    adapter: Adapter, written: str, members: Sequence[str], shares: Mapping[str, Share]
) -> tuple[Module, tuple[Part, ...]]:
    """The module under its written name, and what it is made of."""
    layer, first = shares[members[0]].layer, adapter.modules[members[0]]
    if len(layer.targets) == 1:
        part = Part(first.name, 0, (), layer.swapped(first.out_features, first.in_features))
        return _module(written, [first], first.rank, first.out_features), (part,)
    found = [adapter.modules[name] for name in members]
    spans = part_rows(layer, first.in_features)
    for module in found:
        start, stop = spans[shares[module.name].index]
        if (module.out_features, module.in_features) != (stop - start, first.in_features) or module.kernel:
            raise LoraSqueezeError(
                f"{module.name} is {module.out_features} x {module.in_features}; as a part of {written} it has to be "
                f"{stop - start} x {first.in_features}"
            )
    columns, rank = _columns(adapter, found)
    parts = tuple(Part(m.name, spans[shares[m.name].index][0], c) for m, c in zip(found, columns, strict=True))
    return _module(written, found, rank, spans[-1][1]), parts


def _columns(adapter: Adapter, modules: Sequence[Module]) -> tuple[list[tuple[int, ...]], int]:
    """For every module the row of the joined A that each of its rows is, and how many there are.

    A row of several modules is there once; one that a module has twice, twice.
    """
    if len(modules) == 1:
        return [tuple(range(modules[0].rank))], modules[0].rank
    factors = [update.A for update in adapter.source.updates(modules)]
    dtype = reduce(common_dtype, (A.dtype for A in factors))
    known: dict[bytes, list[int]] = defaultdict(list)
    columns, rank = [], 0
    for A in factors:
        seen: dict[bytes, int] = defaultdict(int)
        mine = []
        for row in A.to(dtype).contiguous().view(torch.uint8).numpy():
            key = row.tobytes()
            if seen[key] == len(known[key]):
                known[key].append(rank)
                rank += 1
            mine.append(known[key][seen[key]])
            seen[key] += 1
        columns.append(tuple(mine))
    return columns, rank


def _module(written: str, members: Sequence[Module], rank: int, rows: int) -> Module:
    first, scales = members[0], {module.scale for module in members}
    totals = [module.total for module in members]
    layout = Layout(
        form=PLAIN,
        keys=(),
        down_key=f"{written}.lora_down.weight",
        up_key=f"{written}.lora_up.weight",
        ones=tuple(1 for _ in first.kernel),
        alpha=None,
        rank=0,  # not read from a kohya file: every module gets an alpha
        scale=0.0,
    )
    return replace(
        first,
        name=written,
        rank=rank,
        scale=first.scale if len(scales) == 1 else 1.0,
        dtype=reduce(common_dtype, (module.dtype for module in members)),
        out_features=rows,
        group=None,
        floor=0,
        step=1,
        layout=layout,
        total=None if None in totals else sum(total for total in totals if total is not None),
        source_bytes=sum(max(module.size_bytes, module.source_bytes) for module in members),
    )
