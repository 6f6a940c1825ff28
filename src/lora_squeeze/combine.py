"""Adapters added up, subtracted, and given room: every update is a sum of products, so sums stay products.

    sum_i w_i s_i B_i A_i = s [w_1 s_1/s B_1, w_2 s_2/s B_2, ...] [A_1; A_2; ...]

The factors stand side by side, of any ranks; then the sum is squeezed like any other adapter. The `out x in` matrix is
never formed. TIES and DARE choose among the entries of that matrix, so they are the exception (`combine_dense`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from operator import index
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.combine_dense import METHODS as DENSE
from lora_squeeze.combine_dense import combine_dense, seed_of
from lora_squeeze.combine_join import Joined, Part, join
from lora_squeeze.combine_weights import ByModule, weights_by_module
from lora_squeeze.conversion import in_format
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.guarded import Guarded
from lora_squeeze.formats.peft import PeftFormat
from lora_squeeze.formats.peft_union import united
from lora_squeeze.lowrank import LowRank
from lora_squeeze.ranks import RULES
from lora_squeeze.report import Report

METHODS = ("sum", *DENSE)


def merge(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | ByModule | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    method: str = "sum",
    density: float | None = None,
    extras_from: int | None = None,
    seed: int = 0,
    **dials: Any,
) -> Adapter:
    """One adapter whose update of every module is the weighted sum of those of several: sum_i w_i dW_i.

    Ranks, scales, dtypes and modules may differ; a module that an adapter does not have adds nothing. The result is
    lazy, as that of a squeeze: one batch of modules is in memory at a time.

    Args:
        adapters: one or more adapters of one base model. The first gives settings, companion files and the format;
            those of other formats are converted to it, see `lora_squeeze.convert`.
        weights: one number per adapter, negative and zero too; or patterns of module names with such lists, see
            `lora_squeeze.combine_weights`. Default 1 for each: the sum, not the mean.
        base: the base model, where one of these conversions needs it.
        method: "sum" (exact, default), "ties", "dare" or "dare-ties": `lora_squeeze.combine_dense` defines them.
        density: share of the entries that ties, dare and dare-ties keep, in (0, 1].
        extras_from: the adapter, counted from 1, whose carried tensors (trained heads, embeddings, biases) are taken.
            Default: those of all, where equal tensors count once and different ones are refused.
        seed: of the entries that dare drops; and of the rows that fill a module up to the rank of its group.
        dials: any of `lora_squeeze.squeeze`, such as rank=16 or size="10MB". Without one the sum is kept whole, at the
            sum of the ranks.

    Returns:
        A new Adapter; `residual(result.report)` says how far it is from the sum.

    Raises:
        LoraSqueezeError: no adapters, weights of another number or all zero, modules of one name that differ in shape
            or kind, carried tensors that differ, settings that no one adapter can have, a dial that `squeeze` refuses.

    Notes:
        The sum is exact up to the rounding of the result's dtype, at the cost of a squeeze at the sum of the ranks. The
        other methods form dW of every adapter, out * in numbers each, and decompose a matrix of full rank:
        O(out in min(out, in)) per module; for large models on a GPU only.

    Example:
        >>> merge([style, subject], [0.7, 0.5], rank=16).save("both")  # doctest: +SKIP
    """
    _check(adapters, method, density, extras_from)
    whole = summed(adapters, weights, base=base, method=method, density=density, extras_from=extras_from, seed=seed)
    return _squeezed(whole, method, seed, dials)


def summed(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | ByModule | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    method: str = "sum",
    density: float | None = None,
    extras_from: int | None = None,
    seed: int = 0,
) -> Adapter:
    """The sum of `merge` before its squeeze: factors side by side, at the sum of the ranks. Arguments as there."""
    formats = [adapter.format for adapter in adapters]
    adapters = [in_format(adapter, formats[0].name, base) for adapter in adapters]
    names = list(dict.fromkeys(name for adapter in adapters for name in adapter.modules))
    rows = weights_by_module(weights, len(adapters), names)
    used = [any(row[i] for name, row in rows.items() if name in a.modules) for i, a in enumerate(adapters)]
    if not any(used):
        raise LoraSqueezeError("all weights are zero, which leaves nothing to add; give at least one other number")
    # An adapter without weight is as if it were not there: its modules make none of the sum's.
    names = [name for name in names if any(on and name in a.modules for on, a in zip(used, adapters, strict=True))]
    first = adapters[used.index(True)]
    scale = first.default_scale if first.default_scale > 0 else 1.0
    joined = join(adapters, {name: rows[name] for name in names}, scale, extras_from)
    config = dict(first.config)
    if isinstance(first.format, PeftFormat):
        joined, config = united(adapters, joined, scale)
    else:
        _check_settings([adapter for adapter, on in zip(adapters, used, strict=True) if on])
    step: dict[str, Any] = {"step": "merge", "adapters": len(adapters), "method": method}
    step["weights"] = "by module" if isinstance(weights, Mapping) else list(next(iter(rows.values())))
    if density is not None:
        step |= {"density": density, "seed": seed}
        joined = replace(joined, modules={name: _full(m, len(adapters)) for name, m in joined.modules.items()})
    return replace(
        first,
        modules=joined.modules,
        extras=joined.extras,
        source=Sum(tuple(adapters), joined, scale, method, density or 1.0, seed),
        format=Guarded((first.format, *formats)),
        config=config,
        default_scale=scale,
        dropped=(),
        history=(step,),
        companions=first.companions if extras_from is None else adapters[extras_from - 1].companions,
        notes=joined.notes,
    )


def subtract(minuend: Adapter, subtrahend: Adapter, **options: Any) -> Adapter:
    """The difference of two adapters, squeezed by any dial: what the first does beyond the second.

    An adapter that was trained from another one, minus that one, is what the training added: rank 2 r, squeezed back to
    r by rank=r. `lora_squeeze.combine_pair.load_pair` reads those of PiSSA and its like.

    Args:
        minuend: the adapter to subtract from; gives settings and companion files.
        subtrahend: the adapter that is subtracted.
        options: as for `merge`.

    Returns:
        A new Adapter: `merge` with the weights 1 and -1.

    Raises:
        LoraSqueezeError: as `merge`.
    """
    return merge([minuend, subtrahend], [1.0, -1.0], **options)


def rank_up(adapter: Adapter, rank: int, *, seed: int = 0) -> Adapter:
    """The same updates at a higher rank: for a server that takes one rank only, or with room for further training.

    New columns of B are zero and new rows of A are random as in a fresh LoRA, so that they add nothing and can learn.

    Args:
        adapter: what to pad.
        rank: rank of every module of the result, as files count it.
        seed: of the new rows.

    Returns:
        A new lazy Adapter.

    Raises:
        LoraSqueezeError: the adapter has this rank or more already, or the groups of a convolution do not divide it.

    Notes:
        Exact: dW does not change but for one rounding of B where the scale of a module has to be rewritten.
    """
    rank = index(rank)
    highest = max(adapter.modules.values(), key=lambda module: module.rank * module.step)
    if rank < adapter.rank:
        raise LoraSqueezeError(
            f"rank_up to {rank}: {highest.name} has rank {adapter.rank} already; to make it smaller use squeeze"
        )
    if all(module.rank * module.step == rank for module in adapter.modules.values()):
        raise LoraSqueezeError(f"nothing to do: every module has rank {rank} already; ask for a higher one")
    for module in adapter.modules.values():
        if rank % module.step:
            raise LoraSqueezeError(
                f"{module.name}: its {module.step} groups do not divide rank {rank}; ask for a multiple"
            )
    modules = {name: _wider(module, rank // module.step) for name, module in adapter.modules.items()}
    step = {"step": "rank-up", "rank": rank, "seed": seed}
    return replace(adapter, modules=modules, source=Padded(adapter, seed), history=(*adapter.history, step))


@dataclass(frozen=True)
class Residual:
    """How far what is written is from what was asked for.

    Args:
        error: |sum - written| / |sum| over all modules together.
        worst: the same of the module that has most.
        module: its name.
    """

    error: float
    worst: float
    module: str


def residual(report: Report) -> Residual:
    """The residual of a merge from the report of its result; with the rounding to 16 bits once it has been saved."""
    lost = {row.name: math.hypot(row.discarded, row.rounding or 0.0) for row in report.rows}
    shares = {row.name: lost[row.name] / row.norm if row.norm else 0.0 for row in report.rows}
    norm = math.hypot(*(row.norm for row in report.rows))
    worst = max(shares, key=lambda name: shares[name])
    return Residual(math.hypot(*lost.values()) / norm if norm else 0.0, shares[worst], worst)


def _check(adapters: Sequence[Adapter], method: str, density: float | None, extras_from: int | None) -> None:
    if not adapters:
        raise LoraSqueezeError("no adapters to merge: give at least one")
    if method not in METHODS:
        raise LoraSqueezeError(f"unknown method {method!r} of merging: choose one of {', '.join(METHODS)}")
    if (density is None) != (method == "sum"):
        raise LoraSqueezeError(
            "the sum keeps all entries: leave out density, or choose one of " + ", ".join(DENSE)
            if method == "sum"
            else f"{method} keeps a share of the entries: give density, such as 0.2"
        )
    if density is not None and not 0 < density <= 1:
        raise LoraSqueezeError(f"density must be above 0 and at most 1, got {density}")
    if extras_from is not None and not 1 <= extras_from <= len(adapters):
        raise LoraSqueezeError(
            f"extras_from must be from 1 to {len(adapters)}, the number of adapters; got {extras_from}"
        )


def _check_settings(adapters: Sequence[Adapter]) -> None:
    """Refuse modules that the first adapter's settings may not name; only those of PEFT are united."""
    first = adapters[0]
    for adapter in adapters[1:]:
        new = next((name for name in adapter.modules if name not in first.modules), None)
        if new is not None and adapter.config != first.config:
            raise LoraSqueezeError(
                f"{new}: the first adapter does not have this module, and by its settings readers of the format "
                f"{first.format.name} may not look for it; give the adapter that has it first, or convert all to PEFT"
            )


def _squeezed(whole: Adapter, method: str, seed: int, dials: Mapping[str, Any]) -> Adapter:
    """The sum at the size that the dials say; without a rule, whole."""
    given = {name: value for name, value in dials.items() if value is not None}
    if "method" in given:  # of the truncation: it is exact here
        raise LoraSqueezeError("method is that of the merge; the truncation is always exact")
    if any(name in given for name in (*RULES, "max_rank", "plan")):
        return whole.squeeze(**given, seed=seed)
    if method != "sum":
        raise LoraSqueezeError(f"{method} makes updates of full rank: say how small, such as rank=16 (--rank 16)")
    return replace(whole.squeeze(**given, rank=whole.rank, seed=seed), history=whole.history)


def _full(module: Module, count: int) -> Module:
    """A module whose update is made as a matrix, and kept with an identity as its second factor."""
    whole = replace(module, rank=min(module.out_features, module.in_features))
    matrices = 4 * module.copies * module.out_features * module.in_features * (2 * count + 1)
    return replace(whole, source_bytes=max(matrices + 4 * whole.parameters, module.source_bytes))


def _wider(module: Module, rank: int) -> Module:
    return replace(module, rank=rank, source_bytes=max(module.size_bytes, module.source_bytes))


@dataclass(frozen=True, eq=False)
class Sum:
    """Source of a sum: reads the adapters and puts their factors side by side, in float32 at least.

    The squeeze that follows rounds once, to the dtype of the module.
    """

    adapters: tuple[Adapter, ...]
    joined: Joined
    scale: float
    method: str
    density: float
    seed: int

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The sums of these modules."""
        read: dict[tuple[int, str], LowRank] = {}
        for i, adapter in enumerate(self.adapters):
            wanted = [p.key for m in modules for p in self.joined.parts[m.name] if p.adapter == i]
            if wanted:
                found = adapter.source.updates([adapter.modules[key] for key in wanted])
                read.update(zip([(i, key) for key in wanted], found, strict=True))
        return [self._sum(module, self.joined.parts[module.name], read) for module in modules]

    def _sum(self, module: Module, parts: Sequence[Part], read: Mapping[tuple[int, str], LowRank]) -> LowRank:
        updates = [read[part.adapter, part.key] * part.weight for part in parts]
        if self.method == "sum":
            whole = _side_by_side(updates, self.scale)
            missing = module.rank > whole.rank  # of a group: filled up to the common rank
            return whole.rank_up(module.rank, seed_of(self.seed, module.name, 0)) if missing else whole
        seeds = [seed_of(self.seed, module.name, part.adapter) for part in parts]
        dW = combine_dense([u.dense().float() for u in updates], self.method, self.density, seeds) / self.scale
        rows, columns = dW.shape[-2:]
        eye = torch.eye(min(rows, columns)).expand(*dW.shape[:-2], -1, -1)
        return LowRank(dW, eye, self.scale) if rows > columns else LowRank(eye, dW, self.scale)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor, as it is; or the sum of the biases of B."""
        parts, extra = self.joined.origins[name], self.joined.extras[name]
        if extra.module is None:
            yield from self.adapters[parts[0].adapter].pieces(parts[0].key)
            return
        total = torch.zeros(extra.shape, dtype=torch.float64)
        for part in parts:
            total += part.weight * self.adapters[part.adapter].extra(part.key).double()
        yield total.to(extra.dtype).flatten()

    def digest(self) -> str | None:
        """sha256 over the digests of the files, one after the other as text; None if one of them has none."""
        found = [adapter.source.digest() for adapter in self.adapters]
        known = [digest for digest in found if digest is not None]
        return sha256("".join(known).encode()).hexdigest() if len(known) == len(found) else None


def _side_by_side(updates: Sequence[LowRank], scale: float) -> LowRank:
    inner = torch.float64 if torch.float64 in (update.dtype for update in updates) else torch.float32
    B = torch.cat([update.B.to(inner) * (update.scale / scale) for update in updates], -1)
    return LowRank(B, torch.cat([update.A.to(inner) for update in updates], -2), scale)


@dataclass(frozen=True, eq=False)
class Padded:
    """Source of a rank-up: reads its parent and pads."""

    parent: Adapter
    seed: int

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules with new directions; each module has rows of its own."""
        found = self.parent.source.updates([self.parent.modules[module.name] for module in modules])
        return [
            update.rank_up(module.rank, seed_of(self.seed, module.name, 0))
            for module, update in zip(modules, found, strict=True)
        ]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor of the parent."""
        return self.parent.source.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file that all of it comes from."""
        return self.parent.source.digest()
