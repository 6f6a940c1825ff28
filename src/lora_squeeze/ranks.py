"""Which rank for which module: one rank, a bound on the error, or a budget.

With S the singular values of a module's update, E_i = S_i^2 and k the rank kept:

==============  ==================================================================================================
rule            smallest k with
==============  ==================================================================================================
rank            k = min(rank, r)
energy e        sum_{i<=k} E_i >= e * sum E_i
error x         sum_{i>k} E_i <= x^2 * sum E_i, that is |dW - dW_k| <= x |dW|
sv_ratio p      every S_i > S_1 / p is kept, at least one
sv_cumulative q sum_{i<=k} S_i >= q * sum S_i
sv_fro f        sum_{i<=k} E_i >= f^2 * sum E_i
params, size    the most energy under a budget of parameters or bytes
==============  ==================================================================================================

Where a rule applies: "each" module meets the bound with its own rank; "uniform" is one rank for all modules; "global"
spends one budget where a parameter keeps the most energy.

"global" takes directions in the order of energy per parameter. The gains of a module fall with the rank, so this is
optimal for every budget that the order meets exactly. That holds too where only some ranks are allowed: from one of
them to the next, the gain per direction is a mean over a stretch of a falling row, and these means fall. A remainder
too small for the next step goes to the best ones that still fit, or the step is taken first and the rest follows,
whichever keeps more. This is not exact: the optimum keeps at most twice as much, and less than one step more. Steps
are wide on a ladder such as 8, 16, 32, 64 and where one rank is for many modules.

The sv_ rules are those of the kohya resize script, by their definition: that script keeps one direction too many.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from lora_squeeze.errors import LoraSqueezeError

Allocation = Literal["each", "uniform", "global"]
ALLOCATIONS: tuple[str, ...] = get_args(Allocation)
TOGETHER = ("uniform", "global")  # those of one budget for all modules, as training has it
RULES = ("rank", "energy", "error", "params", "size", "sv_ratio", "sv_cumulative", "sv_fro")
_RETRIES = 3  # orders tried for a budget beside the plain one
_DEFAULT_ALLOCATION: dict[str, Allocation] = {"rank": "uniform", "params": "global", "size": "global"}


@dataclass(frozen=True)
class Unit:
    """Modules that share one rank: usually one; the experts of a stack, or tied modules, are several.

    Args:
        name: for messages.
        rank: source rank, or the number of directions where that is less.
        values: singular values of each member, descending.
        cost: price of one unit of rank, in parameters or bytes: the unit of the budget.
        floor: smallest rank allowed; 0 lets the module leave the adapter.
        step: ranks of this unit count `step` times in a uniform rank (grouped convolutions).
    """

    name: str
    rank: int
    values: Sequence[Sequence[float]]
    cost: int
    floor: int = 0
    step: int = 1

    def energies(self) -> list[float]:
        """Energy gained by each direction, summed over the members, descending."""
        return [sum(s * s for s in column) for column in itertools.zip_longest(*self.values, fillvalue=0.0)]


@dataclass(frozen=True)
class Limits:
    """What every rank must be, as files count it.

    Args:
        floor: at least this, where the source rank allows it.
        ceiling: at most this.
        multiple_of: a multiple of this, or the source rank.
        choices: one of these, or 0 where a module may leave; None: any.
    """

    floor: int = 0
    ceiling: int | None = None
    multiple_of: int = 1
    choices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.choices is not None and (not self.choices or min(self.choices) < 1):
            raise LoraSqueezeError(f"allowed ranks must be whole numbers from 1, got {list(self.choices)}")
        if self.floor < 0 or self.multiple_of < 1 or (self.ceiling is not None and self.ceiling < max(1, self.floor)):
            raise LoraSqueezeError(
                f"impossible limits: min_rank {self.floor}, max_rank {self.ceiling}, multiple_of {self.multiple_of}"
            )
        if self.ceiling is not None and self.ceiling < self.multiple_of:
            raise LoraSqueezeError(f"max_rank {self.ceiling} is below multiple_of {self.multiple_of}")

    def ladder(self, unit: Unit) -> list[int]:
        """The ranks this unit may take, ascending."""
        if self.ceiling is not None and self.ceiling < unit.step:
            raise LoraSqueezeError(
                f"{unit.name}: max_rank {self.ceiling} is impossible, "
                f"its {unit.step} groups need at least one rank each"
            )
        top = unit.rank if self.ceiling is None else min(unit.rank, self.ceiling // unit.step)
        low = min(max(-(-self.floor // unit.step), unit.floor), top)
        multiple = self.multiple_of // math.gcd(self.multiple_of, unit.step)
        rungs = {k for k in range(0, top + 1, multiple) if k >= low} | ({top} if top == unit.rank else set())
        if self.choices is not None:
            rungs = {k for k in rungs if k == 0 or k * unit.step in self.choices}
            if not rungs - {0}:
                raise LoraSqueezeError(
                    f"{unit.name}: none of the allowed ranks {', '.join(map(str, self.choices))} is from "
                    f"{max(low, 1) * unit.step} to {top * unit.step}, which its source rank {unit.rank * unit.step} "
                    "and the other limits leave; allow one that is"
                )
        if not rungs - {0}:
            raise LoraSqueezeError(
                f"{unit.name}: no rank from {max(low, 1) * unit.step} to {top * unit.step} is a multiple of "
                f"{self.multiple_of}; raise max_rank or lower multiple_of or min_rank"
            )
        return sorted(rungs)


def allocation_for(rule: str, allocate: Allocation | None) -> Allocation:
    """The allocation meant: the given one if it makes sense with the rule, else the rule's default."""
    if rule not in RULES:
        raise LoraSqueezeError(f"unknown rule {rule!r}: choose one of {', '.join(RULES)}")
    if allocate is None:
        return _DEFAULT_ALLOCATION.get(rule, "each")
    if allocate not in ALLOCATIONS:
        raise LoraSqueezeError(f"unknown allocation {allocate!r}: choose one of {', '.join(ALLOCATIONS)}")
    if (rule.startswith("sv_") and allocate == "global") or (rule in ("params", "size") and allocate == "each"):
        raise LoraSqueezeError(f"{rule} cannot be allocated {allocate!r}")
    return allocate


def check_together(allocate: str) -> None:
    """Refuse any other word than those of `TOGETHER`."""
    if allocate not in TOGETHER:
        raise LoraSqueezeError(f"allocate must be one of {', '.join(TOGETHER)}, got {allocate!r}")


def needs_spectra(rule: str, allocate: Allocation) -> bool:
    """Whether `choose` looks at the singular values, or only at ranks and costs."""
    return allocate == "global" or rule not in ("rank", "params", "size")


def choose(
    units: Sequence[Unit],
    rule: str,
    value: float,
    allocate: Allocation | None = None,
    limits: Limits | None = None,
    fixed: int = 0,
) -> list[int]:
    """The rank of each unit.

    Args:
        units: what shares a rank, with spectrum and cost. `values` may be empty where `needs_spectra` says no.
        rule: one of RULES.
        value: the rule's number: a rank, a share in (0, 1], a ratio >= 1, parameters, or bytes.
        allocate: "each", "uniform" or "global"; default uniform for rank, global for params and size, else each.
            "global" with rank means: the parameters that this uniform rank costs, spent where they keep the most.
        limits: floor, ceiling, multiple of, allowed ranks.
        fixed: bytes of a size that go to the header and to carried tensors, before any factor.

    Returns:
        One rank per unit; 0 means that the module leaves the adapter.

    Raises:
        LoraSqueezeError: a value out of range, or a budget below the smallest possible one, which the message names.
    """
    allocate, limits = allocation_for(rule, allocate), limits or Limits()
    _check_value(rule, value)
    if rule == "rank" and limits.choices is not None and value < min(limits.choices):
        raise LoraSqueezeError(f"rank {int(value)} is below all allowed ranks {', '.join(map(str, limits.choices))}")
    ladders = [limits.ladder(unit) for unit in units]
    if rule in ("params", "size") or (rule == "rank" and allocate == "global"):
        return _under_budget(units, ladders, rule, value, allocate, fixed)
    if rule == "rank":
        return _uniform(units, ladders, int(value))
    if allocate == "global":
        lost = value**2 if rule == "error" else 1 - value
        return _greedy(units, ladders, lost_energy=lost)[0]
    needed = [max(_smallest(rule, value, values) for values in unit.values) for unit in units]
    if allocate == "uniform":
        top = max(k * unit.step for k, unit in zip(needed, units, strict=True))
        # One rank for all, rounded down to steps as in `_uniform`: what a unit needs is a multiple of its step.
        needed = [max(top // unit.step, min(top, 1)) for unit in units]
    return [_rung(ladder, k, down=False) for ladder, k in zip(ladders, needed, strict=True)]


def _check_value(rule: str, value: float) -> None:
    good = {
        "rank": value >= 1 and value == int(value) if math.isfinite(value) else False,
        "energy": 0 < value <= 1,
        "error": 0 <= value < 1,
        "sv_ratio": value >= 1,
        "sv_cumulative": 0 < value <= 1,
        "sv_fro": 0 < value <= 1,
        "params": value >= 1,
        "size": value >= 1,
    }[rule]
    if not good or not math.isfinite(value):
        expected = {"rank": "a whole number from 1", "error": "in [0, 1)", "sv_ratio": "at least 1"}
        default = "at least 1" if rule in ("params", "size") else "in (0, 1]"
        raise LoraSqueezeError(f"{rule} must be {expected.get(rule, default)}, got {value}")


def _smallest(rule: str, value: float, values: Sequence[float]) -> int:
    """The rule's k for one spectrum."""
    if not values or values[0] == 0:
        return 0
    if rule == "sv_ratio":
        return max(1, sum(s > values[0] / value for s in values))
    weights = list(values) if rule == "sv_cumulative" else [s * s for s in values]
    lost = {"energy": 1 - value, "error": value**2, "sv_cumulative": 1 - value, "sv_fro": 1 - value**2}[rule]
    return shortest_head(weights, lost)


def shortest_head(weights: Sequence[float], lost: float) -> int:
    """Smallest k such that the weights after k sum to at most this share of all.

    The tail is summed from its small end, so that a share of exactly 0 keeps every direction above rounding noise; the
    allowance is for the rounding of the share itself (1 - 0.9 is a little below 0.1).
    """
    allowed = (lost * (1 + 1e-9) + 1e-28) * math.fsum(weights)
    tail = 0.0
    for k in range(len(weights), 0, -1):
        tail += weights[k - 1]
        if tail > allowed:
            return k
    return 0


def _rung(ladder: Sequence[int], rank: int, *, down: bool) -> int:
    """The allowed rank nearest to the wanted one, from below or from above."""
    fitting = [k for k in ladder if (k <= rank if down else k >= rank)]
    return (max(fitting) if down else min(fitting)) if fitting else (ladder[0] if down else ladder[-1])


def _uniform(units: Sequence[Unit], ladders: Sequence[Sequence[int]], rank: int) -> list[int]:
    """The largest allowed rank of each unit up to this one; every module stays in the adapter."""
    pairs = zip(units, ladders, strict=True)
    return [_rung([k for k in ladder if k] or ladder, rank // unit.step, down=True) for unit, ladder in pairs]


def _under_budget(
    units: Sequence[Unit],
    ladders: Sequence[Sequence[int]],
    rule: str,
    value: float,
    allocate: Allocation,
    fixed: int,
) -> list[int]:
    if rule == "rank":
        value = price(units, _uniform(units, ladders, int(value)))
    if allocate == "uniform":
        steps = sorted({k * unit.step for unit, ladder in zip(units, ladders, strict=True) for k in ladder if k})
        options = [_uniform(units, ladders, rank) for rank in steps]
        least = price(units, options[0])
    else:
        first = min((unit.cost * next(k for k in ladder if k) for unit, ladder in zip(units, ladders, strict=True)))
        least = max(price(units, [ladder[0] for ladder in ladders]), first)
    budget = int(value) - fixed
    if least > budget:
        what = "bytes" if rule == "size" else "parameters"
        rest = f", {fixed:,} of them for the header and the tensors carried along (embeddings, heads and the like)"
        raise LoraSqueezeError(
            f"a budget of {int(value):,} {what} is too small: the smallest possible is {least + fixed:,}"
            + (rest if fixed else "")
        )
    if allocate == "global":
        return _spend(units, ladders, budget)
    return [option for option in options if price(units, option) <= budget][-1]


def price(units: Sequence[Unit], ranks: Sequence[int]) -> int:
    """What these ranks cost together."""
    return sum(k * unit.cost for k, unit in zip(ranks, units, strict=True))


def _spend(units: Sequence[Unit], ladders: Sequence[Sequence[int]], budget: int) -> list[int]:
    """The greedy ranks, or those with the first step that did not fit taken before all others: the better of the two.

    What comes before that step and the step itself keep more than the optimum, so one of the two keeps half of it.
    """
    energies = [unit.energies() for unit in units]

    def kept(ranks: Sequence[int]) -> float:
        return math.fsum(e for row, k in zip(energies, ranks, strict=True) for e in row[:k])

    best: list[int] = []
    for _ in range(1 + _RETRIES):
        room = budget - price(units, [row[0] for row in ladders])
        ladders = [  # without what has no room even alone
            [k for k in row if (k - row[0]) * unit.cost <= room] for row, unit in zip(ladders, units, strict=True)
        ]
        ranks, missed = _greedy(units, ladders, budget=budget)
        best = max(best or ranks, ranks, key=kept)
        if missed is None:
            break
        ladders = [[k for k in row if i != missed[0] or k >= missed[1]] for i, row in enumerate(ladders)]
    return best


def _greedy(
    units: Sequence[Unit],
    ladders: Sequence[Sequence[int]],
    *,
    budget: int | None = None,
    lost_energy: float | None = None,
) -> tuple[list[int], tuple[int, int] | None]:
    """Climb the ladders in the order of energy per cost, until the budget is spent or the bound is met.

    Also the first step that the budget had no room for: index of the unit, and the rank it would have had.
    """
    energies = [unit.energies() for unit in units]
    ranks = [ladder[0] for ladder in ladders]
    spent, missed = price(units, ranks), None
    total = math.fsum(e for row in energies for e in row)
    allowed = -1.0 if lost_energy is None else (lost_energy * (1 + 1e-9) + 1e-28) * total
    lost = math.fsum(e for row, k in zip(energies, ranks, strict=True) for e in row[k:])

    heap: list[tuple[float, int, int, float, int]] = []
    steps = [itertools.pairwise(ladder) for ladder in ladders]

    def offer(i: int) -> None:
        below, above = next(steps[i], (0, 0))
        gain = math.fsum(energies[i][below:above])
        cost = (above - below) * units[i].cost
        if gain > 0:
            heapq.heappush(heap, (-gain / cost, i, above, gain, cost))

    for i in range(len(units)):
        offer(i)
    while heap and lost > allowed:
        _, i, rank, gain, cost = heapq.heappop(heap)
        if budget is not None and spent + cost > budget:
            missed = missed or (i, rank)
            continue  # this unit is done; a cheaper one may still fit
        ranks[i], spent, lost = rank, spent + cost, lost - gain
        offer(i)
    return ranks, missed
