"""Energy and size at every rank: what a squeeze of an adapter would keep, without doing it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.dials import groups_of, unit_of
from lora_squeeze.post_squeeze import Measurement
from lora_squeeze.ranks import Unit, choose


@dataclass(frozen=True)
class Point:
    """An adapter at one choice of ranks.

    Args:
        rank: the uniform rank asked for, or whose number of parameters is the budget.
        largest_rank: the largest rank of any module: what a server must accept.
        energy: share of the squared singular values kept, all modules together.
        mean_energy, min_energy: mean and least over the modules of the share that each keeps.
        size_bytes: bytes of the factors, in the dtype that they are stored in.
    """

    rank: int
    largest_rank: int
    energy: float
    mean_energy: float
    min_energy: float
    size_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The point as JSON-ready data."""
        return {
            "rank": self.rank,
            "largest_rank": self.largest_rank,
            "energy": self.energy,
            "mean_energy": self.mean_energy,
            "min_energy": self.min_energy,
            "bytes": self.size_bytes,
        }


@dataclass(frozen=True, eq=False)
class Tradeoff:
    """What any choice of ranks keeps and costs.

    Args:
        groups: modules that share one rank.
        units: spectrum and cost in parameters of each group.
        lost: module -> share of its energy that is lost at 0, 1, 2, ... directions.
        weights: module -> its share of the energy of the adapter.
        top: the largest rank of the adapter.
    """

    groups: Sequence[Sequence[Module]]
    units: Sequence[Unit]
    lost: Mapping[str, Sequence[float]]
    weights: Mapping[str, float]
    top: int

    @classmethod
    def of(cls, adapter: Adapter, measured: Mapping[str, Measurement]) -> Tradeoff:
        """From the singular values of all modules."""
        groups = groups_of(adapter)
        spectra = {name: found.values for name, found in measured.items()}
        total = math.fsum(measured[name].total for name in adapter.modules)
        return cls(
            groups=groups,
            units=[unit_of(group, spectra, "params", None) for group in groups],
            lost={name: lost_shares(pooled(measured[name].values)) for name in adapter.modules},
            weights={name: measured[name].total / total if total else 0.0 for name in adapter.modules},
            top=adapter.rank,
        )

    @cached_property
    def uniform(self) -> list[Point]:
        """One rank for all modules, for every rank up to the adapter's own: what `squeeze(rank=...)` gives."""
        return [
            self._point(rank, [min(max(rank // unit.step, 1), unit.rank) for unit in self.units])
            for rank in range(1, self.top + 1)
        ]

    @cached_property
    def best(self) -> list[Point]:
        """The parameters of a uniform rank, spent where they keep the most: `squeeze(rank=..., allocate="global")`.

        At ranks 1, 2, 4, 8, ... only: each is a search through all directions of all modules.
        """
        ranks = [2**n for n in range(self.top.bit_length())]
        return [self._point(rank, choose(self.units, "rank", rank, "global")) for rank in ranks]

    def _point(self, rank: int, chosen: Sequence[int]) -> Point:
        lost: list[tuple[float, float]] = []  # weight and share
        size = largest = 0
        for group, k in zip(self.groups, chosen, strict=True):
            for module in group:
                shares = self.lost[module.name]
                lost.append((self.weights[module.name], shares[k] if k < min(module.rank, len(shares)) else 0.0))
                size += k * module.parameters_per_rank * module.dtype.itemsize
                largest = max(largest, k * module.step)
        return Point(
            rank=rank,
            largest_rank=largest,
            energy=1.0 - math.fsum(weight * share for weight, share in lost),
            mean_energy=1.0 - math.fsum(share for _, share in lost) / len(lost),
            min_energy=1.0 - max(share for _, share in lost),
            size_bytes=size,
        )


def pooled(values: Sequence[Sequence[float]]) -> list[float]:
    """Energy of each direction, summed over the copies, as multiples of the largest square; zeros for a zero update."""
    largest = max((s for row in values for s in row[:1]), default=0.0) or 1.0
    return [math.fsum((s / largest) ** 2 for s in column) for column in zip(*values, strict=True)]


def lost_shares(energies: Sequence[float]) -> list[float]:
    """Share of the energy after the first 0, 1, 2, ... directions, summed from the small end; all 0 for no energy."""
    tails = [0.0, *itertools.accumulate(reversed(energies))]
    total = tails[-1] or 1.0
    return [tail / total for tail in reversed(tails)]
