"""Squeezes decided while training: from the spectrum, or from a predicted loss, with a deadline for the budget.

The budget is what a uniform target rank costs over all modules. At every look before the deadline:

1. The ranks wanted are the cheapest that keep the share `energy` of the squared singular values, or, with `loss`, those
   whose predicted increase of the loss stays within it.
2. If they cost less than the budget, the budget is spent instead: it is the end point, and training goes on.
3. The squeeze happens if it saves at least 1/8 of the present parameters: each one costs a decomposition of all modules
   and moves the state of the optimiser.

At the deadline, and after it, the budget holds whatever the spectrum says. Ranks never rise, and every module keeps at
least rank 1.

Each squeeze is measured against the update it finds: n squeezes at energy e may lose up to about n (1 - e), less what
training puts back. A spectrum from the first steps says little, since the update is still one or two gradients; the
budget bounds what can be cut off wrongly then, and a larger `every` waits longer. This rule is ours, it stands in no
paper.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.ranks import Allocation, Limits, Unit, check_together, price
from lora_squeeze.ranks import choose as choose_ranks

LEAST_SAVING = Fraction(1, 8)  # of the present parameters, before the deadline
DEFAULT_ENERGY = 0.999
_LIMITS = Limits(floor=1)  # a module that leaves cannot come back, and training may still need it


@dataclass(frozen=True)
class Adaptive:
    """When to squeeze, and to which ranks.

    Args:
        rank: target: the budget is the parameters of this uniform rank over all modules.
        total_steps: optimiser steps of the whole training.
        energy: share of the squared singular values that one squeeze must keep, over all modules together; of each
            module where the ranks are uniform.
        loss: bound on the predicted increase of the loss by one squeeze, in units of the loss; takes the place of
            `energy`, and `choose` then needs loss curves.
        every: look every so many steps; default a twentieth of total_steps, at least 1.
        deadline: finished steps after which the budget holds in any case; default 80 % of total_steps, so that the
            last fifth trains at the final ranks.
        allocate: "global" gives each module its own rank, "uniform" one rank to all.

    Raises:
        LoraSqueezeError: a value out of range, another allocation, or both energy and loss.

    Example:
        >>> plan = Adaptive(rank=2, total_steps=100)
        >>> units = [Unit("q", 4, [[8.0, 4.0, 0.1, 0.1]], cost=10), Unit("v", 4, [[1.0, 0.5, 0.2, 0.1]], cost=10)]
        >>> budget = plan.budget(units)
        >>> budget, plan.due(5), plan.choose(5, units, budget)
        (40, True, [2, 2])
    """

    rank: int
    total_steps: int
    energy: float = DEFAULT_ENERGY
    loss: float | None = None
    every: int | None = None
    deadline: int | None = None
    allocate: Allocation = "global"

    def __post_init__(self) -> None:
        if min(self.rank, self.total_steps) < 1:
            raise LoraSqueezeError(
                f"rank and total_steps must be at least 1, got rank {self.rank} and {self.total_steps} steps"
            )
        if not 0 < self.energy <= 1:
            raise LoraSqueezeError(f"energy must be in (0, 1], got {self.energy}")
        if self.loss is not None and not 0 <= self.loss < math.inf:
            raise LoraSqueezeError(f"loss must be a number from 0, got {self.loss}")
        if self.loss is not None and self.energy != DEFAULT_ENERGY:
            raise LoraSqueezeError(f"loss {self.loss} takes the place of energy {self.energy}: leave one of them out")
        if self.every is not None and self.every < 1:
            raise LoraSqueezeError(f"every must be at least 1 step, got {self.every}")
        if self.deadline is not None and not 1 <= self.deadline <= self.total_steps:
            raise LoraSqueezeError(f"deadline must be from 1 to the {self.total_steps} steps, got {self.deadline}")
        check_together(self.allocate)

    @property
    def interval(self) -> int:
        """Steps between two looks: `every`, or its default."""
        return max(1, self.total_steps // 20) if self.every is None else self.every

    @property
    def deadline_step(self) -> int:
        """Finished steps after which the budget holds: `deadline`, or its default."""
        return max(1, self.total_steps * 4 // 5) if self.deadline is None else self.deadline

    def due(self, step: int) -> bool:
        """Whether to look once `step` steps are finished: at every interval, and at the deadline.

        Looks go on after the deadline, for a run resumed with ranks that are still too high. Ask `met` first: it saves
        the decompositions once the budget is met.
        """
        return step > 0 and (step % self.interval == 0 or step == self.deadline_step)

    def budget(self, units: Sequence[Unit]) -> int:
        """Parameters of the target rank: sum of cost * min(rank / step, source rank).

        Args:
            units: at their source ranks, so before the first squeeze; `values` may be empty. Keep the number, also in
                checkpoints: after a squeeze the source ranks are gone.

        Raises:
            LoraSqueezeError: no module is above the target rank.
        """
        budget = price(units, choose_ranks(units, "rank", self.rank, "uniform", _LIMITS))
        if self.met(units, budget):
            top = max((unit.rank * unit.step for unit in units), default=0)
            raise LoraSqueezeError(
                f"nothing to squeeze: the target rank is {self.rank}, the highest source rank {top}; choose a lower "
                f"target rank, or train at a higher source rank"
            )
        return budget

    def met(self, units: Sequence[Unit], budget: int) -> bool:
        """Whether the present ranks are within the budget: then no more looks are needed. `values` may be empty."""
        return price(units, [unit.rank for unit in units]) <= budget

    def choose(
        self,
        step: int,
        units: Sequence[Unit],
        budget: int,
        loss_curves: Sequence[Sequence[float]] | None = None,
    ) -> list[int] | None:
        """The ranks to squeeze to now.

        Args:
            step: finished optimiser steps.
            units: at their present ranks, with their present singular values; costs in parameters.
            budget: from `budget`, at the source ranks.
            loss_curves: with `loss`: [i][k] is the predicted increase of the loss if unit i alone is squeezed to rank
                k, for k from 0 to its present rank; never rising, the last one 0.

        Returns:
            One rank per unit, at most the present one and at least 1, or None: no squeeze now.

        Raises:
            LoraSqueezeError: curves missing, not asked for, or of another form; a budget too small for rank 1.

        Notes:
            The predicted increases are added over the units, as if their errors did not interact. Greedy in the order
            of energy, or loss, per parameter: exact up to one step of that order. While every singular value is 0,
            nothing is squeezed before the deadline, and at the deadline the ranks are uniform.
        """
        self._check_curves(units, loss_curves)
        least = price(units, [_LIMITS.ladder(unit)[0] for unit in units])
        if budget < least:
            raise LoraSqueezeError(f"a budget of {budget:,} parameters is too small: rank 1 everywhere is {least:,}")
        if self.met(units, budget):
            return None
        trained = any(s > 0 for unit in units for row in unit.values for s in row)
        if step >= self.deadline_step:
            return spend(units, budget, self.allocate if trained else "uniform", loss_curves)
        if not trained:
            return None
        ranks = self._within_bound(units, budget, loss_curves)
        present = price(units, [unit.rank for unit in units])
        return ranks if present - price(units, ranks) >= LEAST_SAVING * present else None

    def _within_bound(
        self, units: Sequence[Unit], budget: int, loss_curves: Sequence[Sequence[float]] | None
    ) -> list[int]:
        """The cheapest ranks within the bound, or those of the budget where they would cost less than it."""
        if self.loss is None or loss_curves is None:
            ranks = choose_ranks(units, "energy", self.energy, self.allocate, _LIMITS)
        elif self.allocate == "global":
            return _descend(units, loss_curves, budget, self.loss)
        else:
            ranks = _uniform_within(units, loss_curves, self.loss)
        return ranks if price(units, ranks) >= budget else spend(units, budget, self.allocate, loss_curves)

    def _check_curves(self, units: Sequence[Unit], loss_curves: Sequence[Sequence[float]] | None) -> None:
        if (self.loss is None) != (loss_curves is None):
            raise LoraSqueezeError(
                "loss_curves are missing: the bound on the loss needs one for each unit"
                if loss_curves is None
                else "loss_curves are given, but there is no bound on the loss: set loss, or leave them out"
            )
        if loss_curves is None:
            return
        if len(loss_curves) != len(units):
            raise LoraSqueezeError(f"loss_curves must be one for each of {len(units)} units, got {len(loss_curves)}")
        for unit, curve in zip(units, loss_curves, strict=True):
            room = 1e-9 * max(map(abs, curve), default=0.0)  # for the rounding of whoever summed it
            falls = all(after <= before + room for before, after in itertools.pairwise(curve))
            if len(curve) != unit.rank + 1 or not falls or not abs(curve[-1]) <= room or not math.isfinite(room):
                raise LoraSqueezeError(
                    f"{unit.name}: a loss curve has a finite number for each rank from 0 to {unit.rank}, never rising, "
                    f"the last one 0; got {len(curve)} numbers: {list(curve)[:8]}"
                )


def spend(
    units: Sequence[Unit], budget: int, allocate: Allocation, loss_curves: Sequence[Sequence[float]] | None = None
) -> list[int]:
    """Ranks for a budget, spent where it keeps the most energy, or the lowest predicted loss where curves are known.

    Args:
        units, budget, loss_curves: as for `Adaptive.choose`.
        allocate: "global" or "uniform"; curves count with "global" only.

    Returns:
        One rank per unit, at least 1.
    """
    if allocate == "global" and loss_curves is not None:
        return _descend(units, loss_curves, budget, math.inf)
    return choose_ranks(units, "params", budget, allocate, _LIMITS)


def _uniform_within(units: Sequence[Unit], curves: Sequence[Sequence[float]], allowed: float) -> list[int]:
    """The smallest uniform rank whose predicted rise of the loss is allowed."""

    def at(rank: int) -> list[int]:
        return choose_ranks(units, "rank", rank, "uniform", _LIMITS)

    def fits(rank: int) -> bool:
        return math.fsum(curve[k] - curve[-1] for curve, k in zip(curves, at(rank), strict=True)) <= allowed

    options = range(1, max(unit.rank * unit.step for unit in units) + 1)
    return at(options[bisect.bisect_left(options, True, key=fits)])


def _descend(units: Sequence[Unit], curves: Sequence[Sequence[float]], budget: int, allowed: float) -> list[int]:
    """Cut ranks where a parameter costs the least loss, until the budget is met or nothing more is allowed.

    A curve need not be convex: the cuts go along its lower convex hull, from vertex to vertex. A cut that goes too far
    is made as far as it may.
    """
    ranks = [unit.rank for unit in units]
    lows = [_LIMITS.ladder(unit)[0] for unit in units]
    spent = price(units, ranks)
    heap: list[tuple[float, int, int]] = []

    def offer(i: int) -> None:
        """The next vertex below: the cut of the smallest rise per rank, the shorter one where two are equal."""
        top, curve = ranks[i], curves[i]
        rises = [((curve[k] - curve[top]) / (top - k), -k) for k in range(lows[i], top)]
        if rises:
            rise, k = min(rises)
            heapq.heappush(heap, (rise / units[i].cost, i, -k))

    for i in range(len(units)):
        offer(i)
    while heap and spent > budget:
        _, i, vertex = heapq.heappop(heap)
        top, curve = ranks[i], curves[i]
        enough = top + (budget - spent) // units[i].cost  # the highest rank with which the budget is met
        cuts = range(max(vertex, enough), top)
        rank = next((k for k in cuts if curve[k] - curve[top] <= allowed), top)
        ranks[i], spent, allowed = rank, spent - (top - rank) * units[i].cost, allowed - (curve[rank] - curve[top])
        if rank == vertex:
            offer(i)
    return ranks
