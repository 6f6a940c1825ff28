"""Adaptive squeezes: when to look, and the ranks against brute force over all choices."""

import itertools
import math
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
from factor_cases import quick
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_squeeze.adaptive import LEAST_SAVING, Adaptive
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.ranks import Unit, choose

SLACK = 1e-8  # for the rounding of sums
STEPS = 100
EARLY, LATE = 10, 80  # a look before the deadline, and the deadline
ALLOCATIONS = st.sampled_from(["global", "uniform"])
SHARES = st.sampled_from([0.5, 0.9, 0.99, 0.999, 1.0]) | st.floats(0.3, 1.0)

Plan = list[tuple[Any, ...]]


@st.composite
def plans(draw: st.DrawFn, equal_costs: bool = False, groups: bool = False) -> Plan:
    """Arguments of two or three units, made in the test: the type checker of this suite looks at random items."""
    common = draw(st.integers(1, 9))
    plan = []
    for i in range(draw(st.integers(2, 3))):
        values = sorted(draw(st.lists(st.floats(1e-3, 10.0), min_size=1, max_size=6)), reverse=True)
        floor, step = (draw(st.integers(0, 1)), draw(st.sampled_from([1, 1, 2, 3]))) if groups else (0, 1)
        plan.append(
            (f"unit{i}", len(values), [values], common if equal_costs else draw(st.integers(1, 9)), floor, step)
        )
    return plan


def made(plan: Plan) -> list[Unit]:
    return [Unit(*arguments) for arguments in plan]


def price(units: Sequence[Unit], ranks: Sequence[int]) -> int:
    return sum(unit.cost * k for unit, k in zip(units, ranks, strict=True))


def present(units: Sequence[Unit]) -> int:
    return price(units, [unit.rank for unit in units])


def energy(units: Sequence[Unit], ranks: Sequence[int]) -> float:
    return math.fsum(s * s for unit, k in zip(units, ranks, strict=True) for row in unit.values for s in row[:k])


def total(units: Sequence[Unit]) -> float:
    return energy(units, [unit.rank for unit in units])


def every_choice(units: Sequence[Unit]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(1, unit.rank + 1) for unit in units))


def uniform_choices(units: Sequence[Unit]) -> list[list[int]]:
    return [[min(max(top // u.step, 1), u.rank) for u in units] for top in range(1, 20)]


def budget_of(plan: Adaptive, units: Sequence[Unit]) -> int:
    """The budget, of cases in which there is something to squeeze."""
    assume(any(unit.rank > max(1, plan.rank // unit.step) for unit in units))
    return plan.budget(units)


def worth_it(units: Sequence[Unit], cost: int) -> bool:
    return present(units) - cost >= LEAST_SAVING * present(units)


def convex_curves(units: Sequence[Unit]) -> list[list[float]]:
    """Convex curves: the energy cut off."""
    return [[math.fsum(unit.energies()[k:]) for k in range(unit.rank + 1)] for unit in units]


def bent_curves(units: Sequence[Unit]) -> list[list[float]]:
    """Curves that are seldom convex: the same drops in another order."""
    rows = [[unit.energies()[(k * 5 + 2) % unit.rank] for k in range(unit.rank)] for unit in units]
    return [[math.fsum(row[k:]) for k in range(len(row) + 1)] for row in rows]


def predicted(curves: Sequence[Sequence[float]], ranks: Sequence[int]) -> float:
    return math.fsum(curve[k] for curve, k in zip(curves, ranks, strict=True))


# --- when -----------------------------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 300), st.none() | st.integers(1, 50), st.data())
def test_looks_are_due_at_every_interval_and_at_the_deadline(
    steps: int, every: int | None, data: st.DataObject
) -> None:
    deadline = data.draw(st.none() | st.integers(1, steps))
    plan = Adaptive(rank=4, total_steps=steps, every=every, deadline=deadline)
    interval = every or max(1, steps // 20)
    last = deadline or max(1, math.floor(steps * 4 / 5))
    due = [step for step in range(steps + 1) if plan.due(step)]
    assert due == sorted({*range(interval, steps + 1, interval), last})


@quick
@given(plans(groups=True), st.integers(1, 6))
def test_the_budget_is_what_the_target_rank_costs(plan: Plan, rank: int) -> None:
    units = made([(name, source, [], *rest) for name, source, _, *rest in plan])
    expected = sum(u.cost * min(max(rank // u.step, 1), u.rank) for u in units)
    adaptive = Adaptive(rank=rank, total_steps=STEPS)
    assert budget_of(adaptive, units) == expected
    assert adaptive.met(units, expected) == (present(units) <= expected)


@quick
@given(plans(groups=True))
def test_a_target_that_no_module_exceeds_is_refused(plan: Plan) -> None:
    units = made(plan)
    top = max(unit.rank * unit.step for unit in units)
    with pytest.raises(LoraSqueezeError) as caught:
        Adaptive(rank=top, total_steps=STEPS).budget(units)
    assert str(caught.value) == (
        f"nothing to squeeze: the target rank is {top}, the highest source rank {top}; choose a lower target rank, or "
        f"train at a higher source rank"
    )


# --- every squeeze --------------------------------------------------------------------------------------------------


@quick
@given(plans(groups=True), st.integers(1, 4), SHARES, ALLOCATIONS, st.integers(1, STEPS), st.booleans())
def test_ranks_never_rise_and_no_module_leaves(
    plan: Plan, rank: int, share: float, allocate: str, step: int, by_loss: bool
) -> None:
    units = made(plan)
    bound = {"loss": (1 - share) * total(units)} if by_loss else {"energy": share}
    adaptive = Adaptive(rank, STEPS, allocate=allocate, **bound)  # type: ignore[arg-type]
    budget = budget_of(adaptive, units)
    ranks = adaptive.choose(step, units, budget, bent_curves(units) if by_loss else None)
    if step >= LATE:
        assert ranks is not None and price(units, ranks) <= budget
    if ranks is not None:
        assert all(1 <= k <= unit.rank for k, unit in zip(ranks, units, strict=True))
        assert step >= LATE or worth_it(units, price(units, ranks))
    if ranks is not None and allocate == "uniform":
        assert ranks in uniform_choices(units)


@quick
@given(plans(groups=True), st.integers(1, 4), SHARES, ALLOCATIONS, st.integers(0, 2**32))
def test_over_a_whole_training_the_ranks_fall_to_the_budget(
    plan: Plan, rank: int, share: float, allocate: str, seed: int
) -> None:
    """Whatever the spectra are at each look."""
    draw = Random(seed).random
    units = made(plan)
    adaptive = Adaptive(rank, STEPS, energy=share, allocate=allocate)  # type: ignore[arg-type]
    budget = budget_of(adaptive, units)
    for step in filter(adaptive.due, range(STEPS + 1)):
        values = [sorted((draw() ** 6 for _ in range(unit.rank)), reverse=True) for unit in units]
        units = [Unit(u.name, u.rank, [v], u.cost, u.floor, u.step) for u, v in zip(units, values, strict=True)]
        ranks = adaptive.choose(step, units, budget)
        assert ranks is None or not adaptive.met(units, budget)
        if ranks is not None:
            assert all(1 <= k <= unit.rank for k, unit in zip(ranks, units, strict=True))
            units = [Unit(u.name, k, [], u.cost, u.floor, u.step) for u, k in zip(units, ranks, strict=True)]
        if step >= LATE:
            assert adaptive.met(units, budget)


@quick
@given(plans(), st.integers(1, 4), ALLOCATIONS, st.integers(LATE, STEPS))
def test_from_the_deadline_on_the_budget_is_spent_whatever_the_bound_says(
    plan: Plan, rank: int, allocate: str, step: int
) -> None:
    units = made(plan)
    adaptive = Adaptive(rank, STEPS, energy=1.0, allocate=allocate)  # type: ignore[arg-type]
    budget = budget_of(adaptive, units)
    ranks = adaptive.choose(step, units, budget)
    assert ranks is not None and price(units, ranks) <= budget
    best = max(
        energy(units, k)
        for k in (every_choice(units) if allocate == "global" else uniform_choices(units))
        if price(units, k) <= budget
    )
    if allocate == "uniform" or len({unit.cost for unit in units}) == 1:
        assert energy(units, ranks) >= best * (1 - SLACK)


@quick
@given(plans(), st.integers(1, 4), SHARES, ALLOCATIONS, st.integers(1, STEPS))
def test_ranks_within_the_budget_are_left_alone(plan: Plan, rank: int, share: float, allocate: str, step: int) -> None:
    units = made(plan)
    adaptive = Adaptive(rank, STEPS, energy=share, allocate=allocate)  # type: ignore[arg-type]
    assert adaptive.choose(step, units, present(units)) is None


@pytest.mark.parametrize("allocate", ["global", "uniform"])
def test_a_flat_spectrum_waits_for_the_deadline(allocate: str) -> None:
    units = [Unit(name, 8, [[1.0] * 8], 10) for name in ("q", "v")]
    adaptive = Adaptive(2, STEPS, allocate=allocate)  # type: ignore[arg-type]
    budget = adaptive.budget(units)
    assert [adaptive.choose(step, units, budget) for step in (5, LATE - 1)] == [None, None]
    ranks = adaptive.choose(LATE, units, budget)
    assert ranks is not None and price(units, ranks) == budget


@pytest.mark.parametrize("loss", [None, 1.0])
def test_an_update_of_zero_waits_and_is_squeezed_uniformly_at_the_deadline(loss: float | None) -> None:
    """Its spectrum says that nothing would be lost, since nothing has been learned."""
    units = [Unit("q", 8, [[0.0] * 8], 10), Unit("v", 4, [[0.0] * 4], 20)]
    curves = None if loss is None else [[0.0] * 9, [0.0] * 5]
    adaptive = Adaptive(2, STEPS, loss=loss)
    budget = adaptive.budget(units)
    assert adaptive.choose(EARLY, units, budget, curves) is None
    assert adaptive.choose(LATE, units, budget, curves) == [2, 2]


def test_a_squeeze_must_save_an_eighth() -> None:
    """Two of sixteen ranks are an eighth, one is not."""
    for rank, expected in ((14, [14]), (15, None)):
        unit = Unit("q", 16, [[1.0] * rank + [1e-6] * (16 - rank)], 3)
        adaptive = Adaptive(4, STEPS)
        assert adaptive.choose(EARLY, [unit], adaptive.budget([unit])) == expected


# --- bound on the energy --------------------------------------------------------------------------------------------


@quick
@given(plans(), st.integers(1, 3), SHARES, ALLOCATIONS)
def test_before_the_deadline_the_energy_is_kept(plan: Plan, rank: int, share: float, allocate: str) -> None:
    units = made(plan)
    adaptive = Adaptive(rank, STEPS, energy=share, allocate=allocate)  # type: ignore[arg-type]
    budget = budget_of(adaptive, units)
    ranks = adaptive.choose(EARLY, units, budget)
    assume(ranks is not None)
    assert ranks is not None and energy(units, ranks) >= share * total(units) * (1 - SLACK)


@quick
@given(plans(equal_costs=True), st.integers(1, 3), SHARES)
def test_the_squeeze_is_the_cheapest_that_keeps_the_energy_but_not_below_the_budget(
    plan: Plan, rank: int, share: float
) -> None:
    """Among all ranks, where all directions cost the same; and none is made if even this one saves too little."""
    units = made(plan)
    needed = share * total(units)
    sums = [energy(units, k) for k in every_choice(units)]
    assume(all(abs(kept - needed) > SLACK * needed for kept in sums) or share == 1.0)
    adaptive = Adaptive(rank, STEPS, energy=share)
    budget = budget_of(adaptive, units)
    room = SLACK * SLACK * total(units)
    cheapest = min(price(units, k) for k in every_choice(units) if energy(units, k) >= needed - room)
    ranks = adaptive.choose(EARLY, units, budget)
    aim = max(cheapest, budget)
    assert (ranks is not None) == worth_it(units, aim)
    assert ranks is None or price(units, ranks) == aim


@quick
@given(plans(), st.integers(1, 3), st.sampled_from([0.3, 0.6]), ALLOCATIONS)
def test_what_the_bound_would_leave_unspent_of_the_budget_is_spent(
    plan: Plan, rank: int, share: float, allocate: str
) -> None:
    units = made(plan)
    adaptive = Adaptive(rank, STEPS, energy=share, allocate=allocate)  # type: ignore[arg-type]
    budget = budget_of(adaptive, units)
    ranks = adaptive.choose(EARLY, units, budget)
    assume(ranks is not None)
    wanted = choose(units, "energy", share, allocate)  # type: ignore[arg-type]
    if ranks is not None and price(units, [max(1, k) for k in wanted]) < budget:
        assert ranks == adaptive.choose(LATE, units, budget)


# --- bound on the loss ----------------------------------------------------------------------------------------------


@quick
@given(plans(equal_costs=True), st.integers(1, 3), st.floats(0.001, 0.6))
def test_by_loss_the_squeeze_is_the_cheapest_within_the_bound_but_not_below_the_budget(
    plan: Plan, rank: int, share: float
) -> None:
    """Among all ranks, for convex curves and directions of one cost."""
    units = made(plan)
    curves, loss = convex_curves(units), share * total(units)
    assume(all(abs(predicted(curves, k) - loss) > SLACK * loss for k in every_choice(units)))
    adaptive = Adaptive(rank, STEPS, loss=loss)
    budget = budget_of(adaptive, units)
    aim = max(budget, min(price(units, k) for k in every_choice(units) if predicted(curves, k) <= loss))
    ranks = adaptive.choose(EARLY, units, budget, curves)
    assert (ranks is not None) == worth_it(units, aim)
    if ranks is not None:
        assert price(units, ranks) == aim
        rivals = [predicted(curves, k) for k in every_choice(units) if price(units, k) <= aim]
        assert predicted(curves, ranks) <= min(rivals) + SLACK * total(units)


@quick
@given(plans(), st.integers(1, 3), st.floats(0.0, 0.6), st.booleans())
def test_by_loss_the_bound_holds_and_the_optimum_is_missed_by_less_than_one_cut(
    plan: Plan, rank: int, share: float, convex: bool
) -> None:
    """Any costs, any curves: a cut is one rank of a convex curve, at most the whole unit of another."""
    units = made(plan)
    curves, loss = convex_curves(units) if convex else bent_curves(units), share * total(units)
    adaptive = Adaptive(rank, STEPS, loss=loss)
    budget = budget_of(adaptive, units)
    ranks = adaptive.choose(EARLY, units, budget, curves)
    cheapest = min(price(units, k) for k in every_choice(units) if predicted(curves, k) <= loss + SLACK)
    cut = max(unit.cost if convex else unit.cost * (unit.rank - 1) for unit in units)
    bound = max(cheapest, budget) + cut
    if ranks is None:
        assert not worth_it(units, bound)
        return
    assert predicted(curves, ranks) <= loss + SLACK * total(units)
    assert budget - max(unit.cost for unit in units) < price(units, ranks) <= bound


@quick
@given(plans(equal_costs=True), st.integers(1, 3))
def test_by_loss_the_budget_at_the_deadline_is_the_one_of_the_lowest_loss(plan: Plan, rank: int) -> None:
    units = made(plan)
    curves = convex_curves(units)
    adaptive = Adaptive(rank, STEPS, loss=0.0)
    budget = budget_of(adaptive, units)
    ranks = adaptive.choose(LATE, units, budget, curves)
    best = min(predicted(curves, k) for k in every_choice(units) if price(units, k) <= budget)
    assert ranks is not None and price(units, ranks) <= budget
    assert predicted(curves, ranks) <= best + SLACK * total(units)


@quick
@given(plans(groups=True), st.integers(1, 3), st.floats(0.0, 0.6))
def test_by_loss_a_uniform_rank_is_the_smallest_within_the_bound(plan: Plan, rank: int, share: float) -> None:
    units = made(plan)
    curves, loss = bent_curves(units), share * total(units)
    adaptive = Adaptive(rank, STEPS, loss=loss, allocate="uniform")
    budget = budget_of(adaptive, units)
    ranks = adaptive.choose(EARLY, units, budget, curves)
    smallest = next(k for k in uniform_choices(units) if predicted(curves, k) <= loss)
    if price(units, smallest) >= budget:
        assert ranks == (smallest if worth_it(units, price(units, smallest)) else None)
    elif ranks is not None:
        assert ranks == [k for k in uniform_choices(units) if price(units, k) <= budget][-1]


def test_what_is_cut_first_saves_the_most_parameters_per_loss() -> None:
    """A rank of `dear` costs more loss than one of `cheap`, but less per parameter."""
    units = [Unit("cheap", 4, [[1.0] * 4], 1), Unit("dear", 4, [[1.0] * 4], 10)]
    curves = [[0.4, 0.3, 0.2, 0.1, 0.0], [0.8, 0.6, 0.4, 0.2, 0.0]]
    adaptive = Adaptive(1, STEPS, loss=0.45)
    assert adaptive.choose(EARLY, units, adaptive.budget(units), curves) == [4, 2]


def test_a_cliff_behind_which_a_rank_is_free_is_seen() -> None:
    """Two ranks of `cliff` for 1.0 are cheaper than one of `slope` for 0.7, although its first rank costs 1.0."""
    units = [Unit("cliff", 3, [[1.0] * 3], 1), Unit("slope", 2, [[1.0] * 2], 1)]
    curves = [[9.0, 1.0, 1.0, 0.0], [9.0, 0.7, 0.0]]
    adaptive = Adaptive(1, STEPS, loss=1.0)
    assert adaptive.choose(EARLY, units, adaptive.budget(units), curves) == [1, 2]


def test_a_cut_that_would_cost_too_much_is_made_as_far_as_it_may() -> None:
    """From 4 to 2 is one cut of the hull, for 0.95; with 0.92 allowed, its first rank is still within."""
    units = [Unit("q", 4, [[1.0] * 4], 1), Unit("v", 4, [[1.0] * 4], 1)]
    curves = [[9.0, 2.4, 0.95, 0.9, 0.0], [9.0, 8.0, 7.0, 6.0, 0.0]]
    adaptive = Adaptive(1, STEPS, loss=1.0)
    assert adaptive.choose(EARLY, units, adaptive.budget(units), curves) == [2, 4]
    adaptive = Adaptive(1, STEPS, loss=0.92)
    assert adaptive.choose(EARLY, units, adaptive.budget(units), curves) == [3, 4]


def test_rounding_in_the_sums_of_a_curve_is_no_error() -> None:
    unit = Unit("q", 2, [[1.0, 1e-3]], 1)
    adaptive = Adaptive(1, STEPS, loss=1e-3)
    curve = [1.0 + 1e-6, 1e-6, -1e-17]
    assert adaptive.choose(EARLY, [unit], adaptive.budget([unit]), [curve]) == [1]


# --- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank and total_steps must be at least 1, got rank 0 and 100 steps"),
        ({"total_steps": 0}, "rank and total_steps must be at least 1, got rank 4 and 0 steps"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\], got 1.5"),
        ({"energy": math.nan}, r"energy must be in \(0, 1\], got nan"),
        ({"loss": -1.0}, "loss must be a number from 0, got -1.0"),
        ({"loss": math.inf}, "loss must be a number from 0, got inf"),
        ({"loss": math.nan}, "loss must be a number from 0, got nan"),
        ({"loss": 0.1, "energy": 0.9}, "loss 0.1 takes the place of energy 0.9: leave one of them out"),
        ({"every": 0}, "every must be at least 1 step, got 0"),
        ({"deadline": 0}, "deadline must be from 1 to the 100 steps, got 0"),
        ({"deadline": 101}, "deadline must be from 1 to the 100 steps, got 101"),
        ({"allocate": "each"}, "allocate must be one of uniform, global, got 'each'"),
    ],
)
def test_values_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(LoraSqueezeError, match=f"{text}$"):
        Adaptive(**{"rank": 4, "total_steps": STEPS} | options)


@pytest.mark.parametrize(
    ("loss", "curves", "text"),
    [
        (None, [[1.0, 0.5, 0.0]], "loss_curves are given, but there is no bound on the loss: set loss, or leave them"),
        (0.1, None, "loss_curves are missing: the bound on the loss needs one for each unit"),
        (0.1, [], "loss_curves must be one for each of 1 units, got 0"),
        (0.1, [[]], "q: a loss curve has a finite number for each rank from 0 to 2, .* got 0 numbers: "),
        (0.1, [[0.5, 0.0]], r"q: a loss curve .* got 2 numbers: \[0.5, 0.0\]"),
        (0.1, [[0.5, 0.6, 0.0]], "q: a loss curve .* never rising"),
        (0.1, [[0.5, 0.4, 0.1]], "q: a loss curve .* the last one 0"),
        (0.1, [[math.inf, 0.4, 0.0]], "q: a loss curve has a finite number"),
        (0.1, [[0.5, math.nan, 0.0]], "q: a loss curve has a finite number"),
        (0.1, [[math.nan, 0.5, 0.0]], "q: a loss curve has a finite number"),
    ],
)
def test_curves_that_do_not_fit_are_refused(loss: float | None, curves: Any, text: str) -> None:
    unit = Unit("q", 2, [[1.0, 0.5]], 1)
    with pytest.raises(LoraSqueezeError, match=text):
        Adaptive(1, STEPS, loss=loss).choose(EARLY, [unit], 1, curves)


@pytest.mark.parametrize("step", [EARLY, LATE])
@pytest.mark.parametrize("loss", [None, 0.1])
def test_a_budget_below_rank_1_is_refused_with_the_smallest_possible(step: int, loss: float | None) -> None:
    units = [Unit(name, 2, [[1.0, 0.5]], 1000) for name in ("q", "v")]
    curves = None if loss is None else convex_curves(units)
    with pytest.raises(
        LoraSqueezeError, match=r"a budget of 1,999 parameters is too small: rank 1 everywhere is 2,000$"
    ):
        Adaptive(1, STEPS, loss=loss).choose(step, units, 1999, curves)
    assert Adaptive(1, STEPS, loss=loss).choose(LATE, units, 2000, curves) == [1, 1]
