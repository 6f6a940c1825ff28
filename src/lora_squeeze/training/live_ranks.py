"""Which rank every module of a live adapter gets: from the rule that was given, and modules that share a rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from torch import Tensor

from lora_squeeze.adaptive import spend
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.moments import Moments, predicted_curve
from lora_squeeze.ranks import Allocation, Limits, Unit, allocation_for, choose, price
from lora_squeeze.training.live import LiveModule
from lora_squeeze.training.other_method import AnyModule


def grouped(modules: Sequence[AnyModule]) -> dict[str, list[AnyModule]]:
    """Modules that share a rank, by the name of the first, in the model's order."""
    groups: dict[str, list[AnyModule]] = {}
    for module in modules:
        groups.setdefault(module.group or module.name, []).append(module)
    return {members[0].name: members for members in groups.values()}


def units_of(
    modules: Sequence[AnyModule], ranks: Sequence[int], spectra: Sequence[Tensor]
) -> list[tuple[Unit, list[AnyModule]]]:
    """What shares a rank, with spectrum and cost, for `lora_squeeze.ranks`.

    Args:
        modules: of one adapter.
        ranks: of their updates.
        spectra: singular values of each, (*copies, n).
    """
    rank = {module.name: own for module, own in zip(modules, ranks, strict=True)}
    S = {module.name: values.reshape(-1, values.shape[-1]) for module, values in zip(modules, spectra, strict=True)}
    return [
        (
            Unit(
                name=name,
                rank=max(rank[m.name] for m in members),
                values=[row for m in members for row in S[m.name].tolist()],
                cost=sum(m.cost for m in members),
                floor=1,
                step=max(m.step for m in members),
            ),
            members,
        )
        for name, members in grouped(modules).items()
    ]


def loss_curve(members: Sequence[AnyModule], moments: Mapping[str, Moments]) -> list[float]:
    """Predicted increase of the loss at each rank from 0 on, summed over the modules that share it.

    Raises:
        LoraSqueezeError: nothing is known about one of them.
    """
    curves = []
    for module in members:
        if module.path not in moments:
            raise LoraSqueezeError(
                f"{module.name}: the loss increase cannot be predicted for this layer; bound the energy instead"
            )
        assert isinstance(module, LiveModule)  # statistics are those of LoRA layers
        curve = predicted_curve(moments[module.path], module.scale)
        curves.append(curve.reshape(-1, curve.shape[-1]).sum(0).tolist())
    return [sum(column) for column in zip_longest(*curves, fillvalue=0.0)]


def target_ranks(
    modules: Sequence[AnyModule],
    present: Sequence[int],
    spectra: Sequence[Tensor],
    rank: int | None,
    energy: float | None,
    params: int | None,
    ranks: Mapping[str, int] | None,
    allocate: Allocation | None,
    moments: Mapping[str, Moments],
) -> dict[str, int]:
    """Rank of each module's update after the squeeze."""
    asked = {key: v for key, v in dict(rank=rank, energy=energy, params=params, ranks=ranks).items() if v is not None}
    if len(asked) != 1:
        raise LoraSqueezeError(f"give one of rank, energy, params or ranks, got {', '.join(asked) or 'none'}")
    if ranks is not None:
        return _named_ranks(modules, present, ranks)
    units = units_of(modules, present, spectra)
    top = max(unit.rank * unit.step for unit, _ in units)
    if rank is not None:
        check_rank(rank, top)
    rule, bare = next(iter(asked)), [unit for unit, _ in units]
    allocate = allocation_for(rule, allocate)
    if allocate == "global" and energy is None and all(m.path in moments for m in modules):
        limits = Limits(floor=1)
        budget = params if rank is None else price(bare, choose(bare, "rank", rank, "uniform", limits))
        chosen = spend(bare, budget or 0, allocate, [loss_curve(members, moments) for _, members in units])
    else:
        chosen = choose(bare, rule, float(rank or energy or params or 0), allocate, Limits(floor=1))
    return {module.name: k for k, (_, members) in zip(chosen, units, strict=True) for module in members}


def check_rank(rank: int, top: int) -> None:
    """Refuse to go up."""
    if rank > top:
        raise LoraSqueezeError(f"rank {rank} is above the present rank {top}; a squeeze only goes down")


def _named_ranks(modules: Sequence[AnyModule], present: Sequence[int], ranks: Mapping[str, int]) -> dict[str, int]:
    unknown = [name for name in ranks if name not in {m.name for m in modules}]
    if unknown:
        raise LoraSqueezeError(f"no module {unknown[0]!r} in the adapter; it has {modules[0].name}, ...")
    target = {}
    for module, own in zip(modules, present, strict=True):
        wanted = ranks.get(module.name, own * module.step)
        if wanted < 1 or wanted % module.step or wanted > own * module.step:
            raise LoraSqueezeError(
                f"{module.name}: rank {wanted} is impossible; it has {own * module.step} now"
                + (f" and needs a multiple of {module.step}" if module.step > 1 else "")
            )
        target[module.name] = wanted // module.step
    for group in {m.group for m in modules if m.group}:
        if len(found := {target[m.name] for m in modules if m.group == group}) > 1:
            raise LoraSqueezeError(f"{group}: PEFT loads these with one rank, got {sorted(found)}")
    return target
