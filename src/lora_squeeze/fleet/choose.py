"""Which rank for which member: the least weighted loss under the memory rule of a server.

The loss of a member at rank k is the share of its energy that is cut off:

    loss_a(k) = sum over modules of sum_{i>k} S_i^2 / sum over modules of sum_i S_i^2

and that of the fleet is sum_a w_a loss_a(k_a) / sum_a w_a.

Padded slots: N slots of rank R take N * slot_bytes(R), whatever ranks the adapters in them have. So the largest R that
fits is taken, but no more than the largest source rank needs, and every adapter keeps min(source rank, R): no other
choice loses less. Where each adapter is kept at its own size, in a server without slots or in the host's memory, one
budget is spent where it saves the most weighted loss per byte, as `lora_squeeze.ranks` does it for the modules of one
adapter.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.members import Member
from lora_squeeze.ranks import Limits, Unit, choose
from lora_squeeze.servers import Server

Losses = Mapping[str, Sequence[float]]  # member -> share of energy lost at rank 1, 2, ..., its own rank


@dataclass(frozen=True)
class Budget:
    """What there is to spend.

    Args:
        memory: bytes for adapters on the device.
        slots: adapters that are there at once, with a server that has slots.
        itemsize: bytes of one number there.
        slot_parameters: numbers in one slot per unit of rank.
        host_memory: bytes for all adapters outside the device, each at its own rank; None: no matter.
    """

    memory: int
    slots: int
    itemsize: int
    slot_parameters: int
    host_memory: int | None = None

    def slot_bytes(self, rank: int) -> int:
        """Bytes of one slot."""
        return rank * self.slot_parameters * self.itemsize

    def slots_fit(self, rank: int) -> int:
        """Slots of this rank in the memory."""
        return self.memory // self.slot_bytes(rank)


@dataclass(frozen=True)
class Point:
    """The fleet with no member above one rank.

    Args:
        rank: of the server's slots; without slots, the largest of any member.
        bytes: needed on the device.
        slot_bytes: of one slot; None without slots.
        slots_fit: slots of this size that fit in the memory; None without slots.
        fits: whether the memory is enough.
        loss: weighted loss of the fleet.
        worst: the member that loses most; "" if none loses anything.
        worst_loss: what it loses.
        chosen: whether this is the server's rank.
    """

    rank: int
    bytes: int
    slot_bytes: int | None
    slots_fit: int | None
    fits: bool
    loss: float
    worst: str
    worst_loss: float
    chosen: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """Ranks for a fleet.

    Args:
        max_rank: what the server's slots have; None without slots.
        ranks: member -> rank.
        loss: weighted loss of the fleet.
        bytes: needed on the device.
        host_bytes: bytes of all members at their ranks.
        curve: one point for each rank that the server could have.
    """

    max_rank: int | None
    ranks: Mapping[str, int]
    loss: float
    bytes: int
    host_bytes: int
    curve: tuple[Point, ...]


def choose_ranks(
    members: Mapping[str, Member], losses: Losses, weights: Mapping[str, float], server: Server, budget: Budget
) -> Choice:
    """The rank of the server's slots, and the rank of every member.

    Args:
        members: name -> Member.
        losses: of every member.
        weights: of every member, above 0.
        server: whose rules count.
        budget: what there is.

    Raises:
        LoraSqueezeError: a budget that is too small for any choice, with the smallest that is possible.

    Notes:
        Optimal for padded slots. A budget at own ranks is spent greedily: optimal but for a remainder that is too small
        for the next rank of some member. There every module is priced as if it had its member's largest rank: members
        whose modules have different ranks may take less than the budget.
    """
    table = _Table(members, losses, weights)
    top = max(member.rank for member in members.values())
    padded = server.keeps == "padded"
    rungs = _rungs(members, server, budget, top)
    max_rank = _slot_rank(table, server, budget, rungs) if padded else None
    ceiling = top if max_rank is None else max_rank
    ranks = {name: min(member.rank, ceiling) for name, member in members.items()}
    limit, option = (budget.host_memory, "--host-memory") if padded else (budget.memory, "--memory")
    if limit is not None and table.bytes(ranks, budget.itemsize) > limit:
        ranks = table.spend(limit, ceiling, budget.itemsize, option)
        if max_rank is not None:  # no slot larger than some adapter needs
            max_rank = next(rank for rank in rungs if rank >= max(ranks.values()))
    host = table.bytes(ranks, budget.itemsize)
    curve = tuple(_point(table, padded, budget, rank, rank == max_rank) for rank in rungs)
    device = host if max_rank is None else budget.slots * budget.slot_bytes(max_rank)
    return Choice(max_rank, ranks, table.loss(ranks), device, host, curve)


def loss_at(losses: Sequence[float], rank: int) -> float:
    """Share of energy that a member loses at this rank."""
    return losses[rank - 1] if rank < len(losses) else 0.0


@dataclass(frozen=True)
class _Table:
    """The members and their losses, and what follows for given ranks."""

    members: Mapping[str, Member]
    losses: Losses
    weights: Mapping[str, float]

    @property
    def floor(self) -> int:
        """The smallest rank that all members can have."""
        return max(member.floor for member in self.members.values())

    def capped(self, rank: int) -> dict[str, int]:
        """No member above this rank."""
        return {name: min(member.rank, rank) for name, member in self.members.items()}

    def loss(self, ranks: Mapping[str, int]) -> float:
        """Weighted mean."""
        lost = math.fsum(self.weights[name] * loss_at(self.losses[name], rank) for name, rank in ranks.items())
        return lost / math.fsum(self.weights[name] for name in ranks)

    def bytes(self, ranks: Mapping[str, int], itemsize: int) -> int:
        """All members together at these ranks."""
        return itemsize * sum(self.members[name].parameters(rank) for name, rank in ranks.items())

    def spend(self, limit: int, ceiling: int, itemsize: int, option: str) -> dict[str, int]:
        """One budget over all members."""
        least = itemsize * sum(member.floor * member.parameters_per_rank for member in self.members.values())
        if least > limit:
            raise LoraSqueezeError(
                f"{limit:,} bytes ({option}) are too little for {len(self.members)} adapters: at their smallest ranks "
                f"they take {least:,}; give more memory, or fewer adapters"
            )
        units = [self._unit(name, itemsize) for name in self.members]
        found = choose(units, "size", limit, "global", Limits(ceiling=ceiling))
        return dict(zip(self.members, found, strict=True))

    def _unit(self, name: str, itemsize: int) -> Unit:
        """One member as `ranks.choose` takes it: the energies of its directions are shares of its weight."""
        member, losses = self.members[name], self.losses[name]
        gains = [before - after for before, after in zip([1.0, *losses], losses, strict=False)]
        energies = [self.weights[name] * gain for gain in _descending(gains)] if any(losses) else []
        values = [[math.sqrt(energy) for energy in energies]]
        return Unit(name, member.rank, values, member.parameters_per_rank * itemsize, member.floor)


def _descending(gains: Iterable[float]) -> list[float]:
    """Gains whose running sums are the least concave ones above the given: stretches where they rise are averaged.

    The groups of a convolution win energy only at every so many ranks; a greedy choice must see beyond the next one.
    """
    stretches: list[tuple[float, int]] = []
    for gain in gains:
        total, length = max(gain, 0.0), 1
        while stretches and total * stretches[-1][1] > stretches[-1][0] * length:
            total, length = total + stretches[-1][0], length + stretches[-1][1]
            stretches.pop()
        stretches.append((total, length))
    return [total / length for total, length in stretches for _ in range(length)]


def _rungs(members: Mapping[str, Member], server: Server, budget: Budget, top: int) -> list[int]:
    """The ranks that slots can have, up to the first that is enough for all; without slots, those worth a look."""
    if server.limits:
        return list(server.limits[: bisect.bisect_left(server.limits, top) + 1])
    rungs = {2**i for i in range(top.bit_length()) if 2**i <= top} | {top}
    rungs |= {member.rank for member in members.values()} if len(members) <= 100 else set()
    if server.keeps == "padded":
        largest = budget.memory // (budget.slots * budget.slot_bytes(1))
        rungs |= {min(largest, top)} if largest else set()
    return sorted(rungs)


def _slot_rank(table: _Table, server: Server, budget: Budget, rungs: Sequence[int]) -> int:
    """The largest rank whose slots fit."""
    possible = [rank for rank in rungs if rank >= table.floor]
    if not possible:
        name = next(name for name, member in table.members.items() if member.floor == table.floor)
        raise LoraSqueezeError(
            f"{name} cannot have less than rank {table.floor}, {server.name} takes no rank above {rungs[-1]}; leave it "
            "out, or choose another engine"
        )
    fitting = [rank for rank in possible if budget.slots <= budget.slots_fit(rank)]
    if not fitting:
        least = possible[0]
        raise LoraSqueezeError(
            f"{budget.memory:,} bytes (--memory) are too little for {budget.slots} slots: at the smallest rank, "
            f"{least}, they take {budget.slots * budget.slot_bytes(least):,}; {budget.slots_fit(least)} slots of that "
            "rank fit: give more memory, or fewer --slots"
        )
    return fitting[-1]


def _point(table: _Table, padded: bool, budget: Budget, rank: int, chosen: bool) -> Point:
    ranks = table.capped(rank)
    lost = {name: loss_at(table.losses[name], rank) for name in ranks}
    worst = max(lost, key=lost.__getitem__)
    needed = budget.slots * budget.slot_bytes(rank) if padded else table.bytes(ranks, budget.itemsize)
    return Point(
        rank=rank,
        bytes=needed,
        slot_bytes=budget.slot_bytes(rank) if padded else None,
        slots_fit=budget.slots_fit(rank) if padded else None,
        fits=needed <= budget.memory,
        loss=table.loss(ranks),
        worst=worst if lost[worst] else "",
        worst_loss=lost[worst],
        chosen=chosen,
    )
