"""What a sum of adapters consists of: which updates of whom make a module, and which carried tensors come along.

Nothing is added here; tensors are read only to see whether carried ones are equal.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_squeeze.adapter import Adapter, Extra, Module, common_dtype
from lora_squeeze.errors import LoraSqueezeError


@dataclass(frozen=True)
class Part:
    """One adapter's share of a module or of a carried tensor.

    Args:
        adapter: its position, from 0.
        key: name of the module, or key of the tensor, in that adapter.
        weight: what it is multiplied with.
    """

    adapter: int
    key: str
    weight: float = 1.0


@dataclass(frozen=True)
class Joined:
    """The facts of a sum.

    Args:
        modules: name -> Module with the rank of the sum, in the order of the first adapter that has it.
        parts: name -> what is added.
        extras: key -> carried tensor.
        origins: key -> what it is made of: one tensor; for a bias of B, those of all parts.
        carriers: positions of the adapters whose carried tensors may be taken.
        notes: what a person should know.
    """

    modules: dict[str, Module]
    parts: dict[str, list[Part]]
    extras: dict[str, Extra]
    origins: dict[str, list[Part]]
    carriers: tuple[int, ...]
    notes: tuple[str, ...]


def join(
    adapters: Sequence[Adapter], weights: Mapping[str, tuple[float, ...]], scale: float, extras_from: int | None
) -> Joined:
    """Bring adapters together by module name.

    Args:
        adapters: at least one.
        weights: module name -> one weight per adapter.
        scale: s of every module of the sum.
        extras_from: the adapter, counted from 1, that carried tensors are taken from; None: from all that count.

    Raises:
        LoraSqueezeError: modules of one name that cannot be added, carried tensors that differ.
    """
    parts: dict[str, list[Part]] = {}
    modules: dict[str, Module] = {}
    used = [i for i, a in enumerate(adapters) if any(row[i] for name, row in weights.items() if name in a.modules)]
    for name, row in weights.items():
        having = [i for i in used if name in adapters[i].modules]
        counting = [i for i in having if row[i]] or having[:1]  # all weights zero: it stays, as an update of zero
        members = [adapters[i].modules[name] for i in counting]
        for i, module in zip(counting[1:], members[1:], strict=True):
            _check_alike(members[0], module, counting[0], i)
        parts[name] = [Part(i, name, row[i]) for i in counting]
        modules[name] = _sum_of(members, [row[i] for i in counting], scale)
    active = {part.adapter for found in parts.values() for part in found}
    carriers = tuple(sorted(active)) if extras_from is None else (extras_from - 1,)
    extras, origins, notes = _carried(adapters, carriers)
    for name in modules:
        extra, found = _bias(adapters, parts[name], modules[name], scale)
        if extra is not None:
            extras[extra.name], origins[extra.name] = extra, found
    return Joined(modules, parts, extras, origins, carriers, (*_bases(adapters, sorted(active)), *notes))


def _check_alike(one: Module, other: Module, i: int, j: int) -> None:
    """Refuse two updates of one name that are not matrices of one shape of one kind of layer."""

    def facts(module: Module) -> tuple[Any, ...]:
        return module.kind, module.out_features, module.in_features, module.copies, module.kernel

    def words(module: Module) -> str:
        size = f"{module.out_features} x {module.in_features}"
        return f"{module.kind} {size}{f', kernel {list(module.kernel)}' if module.kernel else ''}" + (
            f", {module.copies} copies" if module.copies > 1 else ""
        )

    if facts(one) != facts(other):
        raise LoraSqueezeError(
            f"{one.name}: adapter {i + 1} has {words(one)}, adapter {j + 1} has {words(other)}: updates of different "
            "layers cannot be added; are the adapters made for the same base model?"
        )


def _sum_of(members: Sequence[Module], weights: Sequence[float], scale: float) -> Module:
    """The module that concatenated factors make; they are read in float32 at least."""
    dtype = members[0].dtype
    for member in members[1:]:
        dtype = common_dtype(dtype, member.dtype)
    rank = sum(member.rank for member in members)
    wide = 8 if torch.float64 in (member.dtype for member in members) else 4
    alone = members[0].total if len(members) == 1 else None  # of a sum, not known without its numbers
    total = None if alone is None else alone * weights[0] ** 2
    whole = replace(members[0], rank=rank, scale=scale, dtype=dtype, total=total)
    source_bytes = whole.parameters * wide + sum(max(m.size_bytes, m.source_bytes) for m in members)
    return replace(whole, source_bytes=source_bytes)


def _bias(
    adapters: Sequence[Adapter], parts: Sequence[Part], module: Module, scale: float
) -> tuple[Extra | None, list[Part]]:
    """The bias of B in the sum: s b = sum_i w_i s_i b_i, since readers multiply it with the scale of its layer."""
    made: Extra | None = None
    found = []
    for part in parts:
        adapter = adapters[part.adapter]
        for key, extra in adapter.extras.items():
            if extra.module == part.key:
                found.append(Part(part.adapter, key, part.weight * adapter.modules[part.key].scale / scale))
                dtype = extra.dtype if made is None else common_dtype(made.dtype, extra.dtype)
                made = replace(extra if made is None else made, dtype=dtype, factor=1.0, module=module.name)
    return made, found


def _carried(
    adapters: Sequence[Adapter], carriers: Sequence[int]
) -> tuple[dict[str, Extra], dict[str, list[Part]], list[str]]:
    """Carried tensors by key: equal ones once, those of one adapter as they are, different ones refused."""
    owners: dict[str, list[Part]] = {}
    for i in carriers:
        for key, extra in adapters[i].extras.items():
            if extra.module is None:
                # PEFT spells the tensors of a wrapped layer otherwise; it is the same tensor.
                owners.setdefault(key.replace(".base_layer", ""), []).append(Part(i, key))
    extras, origins, alone = {}, {}, {}
    for key, found in owners.items():
        first, *others = found
        extra = adapters[first.adapter].extras[first.key]
        for other in others:
            if not _equal(adapters[first.adapter], first.key, adapters[other.adapter], other.key):
                one, two = first.adapter + 1, other.adapter + 1
                raise LoraSqueezeError(
                    f"{key}: adapters {one} and {two} carry different tensors here ({extra.kind}), which are no "
                    "updates that could be added; take the carried tensors of one adapter with "
                    f"extras_from={one} (--extras-from {one})"
                )
        extras[key], origins[key] = replace(extra, name=key), [first]
        if len(found) < len(carriers):
            alone[extra.kind, tuple(part.adapter + 1 for part in found)] = key
    notes = [
        f"{kind}: tensors of adapter {' and '.join(map(str, who))} alone ({key}, ...), carried as they are, unweighted"
        for (kind, who), key in alone.items()
    ]
    return extras, origins, notes


def _equal(one: Adapter, key: str, other: Adapter, other_key: str) -> bool:
    mine, theirs = one.extras[key], other.extras[other_key]
    if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
        return False
    return _digest(one, key) == _digest(other, other_key)


def _digest(adapter: Adapter, key: str) -> bytes:
    """Of the numbers in order: sources may cut them into different pieces."""
    digest = hashlib.sha256()
    for piece in adapter.pieces(key):
        digest.update(piece.contiguous().view(torch.uint8).numpy().data)
    return digest.digest()


def _bases(adapters: Sequence[Adapter], active: Sequence[int]) -> Iterator[str]:
    """A note where the base models have different names; a folder and a hub id may be the same model."""
    names = [str(adapters[i].config.get("base_model_name_or_path") or "") for i in active]
    known = {name.rstrip("/").rpartition("/")[2].lower(): name for name in reversed(names) if name}
    if len(known) > 1:
        yield (
            f"the adapters name different base models ({', '.join(sorted(known.values()))}); "
            "a sum is sound only if they are one"
        )
