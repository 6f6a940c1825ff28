"""Choosing ranks: every rule against its definition, budgets against brute force."""

import itertools
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from factor_cases import quick
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.ranks import (
    ALLOCATIONS,
    RULES,
    Limits,
    Unit,
    allocation_for,
    choose,
    needs_spectra,
    shortest_head,
)

SLACK = 1 + 1e-8  # for the rounding of sums


def spectra(size: int = 6, least: int = 1) -> st.SearchStrategy[list[float]]:
    values = st.floats(1e-3, 10.0) | st.sampled_from([1.0, 0.5, 0.0])
    return st.lists(values, min_size=least, max_size=size).map(lambda row: sorted(row, reverse=True))


Plan = list[tuple[Any, ...]]


@st.composite
def some_units(draw: st.DrawFn, equal_costs: bool = False, free: bool = False) -> Plan:
    """Arguments of up to three units; with `free`, without floors and steps of their own."""
    plan = []
    common = draw(st.integers(1, 9))
    for i in range(draw(st.integers(1, 3))):
        values = draw(spectra(5))
        rows = [values, *([draw(spectra(len(values), len(values)))] if not free and draw(st.booleans()) else [])]
        cost = common if equal_costs else draw(st.integers(1, 9))
        floor, step = (0, 1) if free else (draw(st.integers(0, 1)), draw(st.sampled_from([1, 1, 2, 3])))
        plan.append((f"unit{i}", len(values), rows, cost, floor, step))
    return plan


def made(plan: Plan) -> list[Unit]:
    """Made in the test, not in the strategy: the type checker of this suite looks at random items of a list."""
    return [Unit(*arguments) for arguments in plan]


def pick(
    units: Sequence[Unit], rule: str, value: float, allocate: str | None = None, limits: Limits | None = None
) -> list[int]:
    return choose(units, rule, float(value), allocate, limits)  # type: ignore[arg-type]


def price(units: Sequence[Unit], ranks: Sequence[int]) -> int:
    return sum(unit.cost * k for unit, k in zip(units, ranks, strict=True))


def energy(units: Sequence[Unit], ranks: Sequence[int]) -> float:
    return math.fsum(s * s for unit, k in zip(units, ranks, strict=True) for row in unit.values for s in row[:k])


def total(units: Sequence[Unit]) -> float:
    return energy(units, [unit.rank for unit in units])


def every_choice(units: Sequence[Unit]) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(unit.rank + 1) for unit in units)))


def in_greedy_order(units: Sequence[Unit]) -> list[tuple[int, float, int]]:
    """(unit, energy, cost) of all directions with energy, the most energy per cost first."""
    steps = [(i, e, units[i].cost) for i, unit in enumerate(units) for e in unit.energies() if e > 0]
    return sorted(steps, key=lambda step: -step[1] / step[2])


# --- one spectrum ---------------------------------------------------------------------------------------------------


def one(rule: str, value: float, S: Sequence[float], **limits: int) -> int:
    return pick([Unit("unit", len(S), [S], 1)], rule, value, limits=Limits(**limits))[0]


KEPT: dict[str, Callable[[Sequence[float], int, float], tuple[float, float]]] = {
    # rule -> (what k keeps, what must be kept at least)
    "energy": lambda S, k, e: (math.fsum(s * s for s in S[:k]), e * math.fsum(s * s for s in S)),
    "error": lambda S, k, x: (-math.fsum(s * s for s in S[k:]), -x * x * math.fsum(s * s for s in S)),
    "sv_cumulative": lambda S, k, q: (math.fsum(S[:k]), q * math.fsum(S)),
    "sv_fro": lambda S, k, f: (math.fsum(s * s for s in S[:k]), f * f * math.fsum(s * s for s in S)),
}


@quick
@given(spectra(), st.sampled_from(list(KEPT)), st.floats(0.01, 0.999))
def test_each_module_meets_its_bound_with_the_smallest_rank(S: list[float], rule: str, value: float) -> None:
    k = one(rule, value, S)
    room = 1e-8 * (math.fsum(s * s for s in S) + math.fsum(S))
    kept, needed = KEPT[rule](S, k, value)
    assert kept >= needed - room
    if k:
        kept, needed = KEPT[rule](S, k - 1, value)
        assert kept < needed + room


@pytest.mark.parametrize(
    ("rule", "value", "S", "rank"),
    [
        ("sv_cumulative", 0.9, [0.9, 0.05, 0.05], 1),  # not one too many
        ("sv_cumulative", 0.95, [0.9, 0.05, 0.05], 2),
        ("sv_cumulative", 1.0, [0.9, 0.05, 0.05], 3),
        ("sv_ratio", 2.0, [3.0, 2.0, 1.0, 0.5], 2),  # strictly above 1.5
        ("sv_ratio", 2.0, [3.0, 1.5, 1.0, 0.5], 1),  # 1.5 is not above 1.5
        ("sv_ratio", 1.0, [3.0, 2.0], 1),  # at least one
        ("sv_fro", 0.9, [3.0, 1.0, 0.1], 1),  # 9 / 10.01 is above 0.81
        ("energy", 0.9, [3.0, 1.0], 1),  # exactly 0.9, whatever 1 - 0.9 rounds to
        ("energy", 0.91, [3.0, 1.0], 2),
        ("error", 0.0, [1.0, 1e-3, 1e-17], 2),  # everything above rounding noise
        ("energy", 1.0, [1.0, 1e-6, 1e-12, 1e-17], 3),
        ("energy", 1e-6, [1.0, 1.0], 1),
    ],
)
def test_the_rules_by_example(rule: str, value: float, S: list[float], rank: int) -> None:
    assert one(rule, value, S) == rank


@pytest.mark.parametrize("rule", ["energy", "error", "sv_ratio", "sv_cumulative", "sv_fro"])
def test_a_zero_spectrum_needs_no_rank_but_keeps_its_floor(rule: str) -> None:
    value = 2.0 if rule == "sv_ratio" else 0.5
    assert one(rule, value, [0.0, 0.0, 0.0]) == 0
    assert one(rule, value, [0.0, 0.0, 0.0], floor=2) == 2


@pytest.mark.parametrize("rule", ["energy", "error", "sv_ratio", "sv_cumulative", "sv_fro"])
def test_more_energy_never_costs_less_rank(rule: str) -> None:
    S = [12.0 - i for i in range(12)]
    values = [1 + i * 0.25 for i in range(50)] if rule == "sv_ratio" else [0.01 + i * 0.019 for i in range(50)]
    ranks = [one(rule, value, S) for value in values]
    assert ranks == sorted(ranks, reverse=rule == "error") and len(set(ranks)) > 5


@quick
@given(spectra(), st.floats(0.0, 1.0))
def test_the_shortest_head_is_the_shortest(weights: list[float], lost: float) -> None:
    k = shortest_head(weights, lost)
    room = 1e-8 * math.fsum(weights)
    assert math.fsum(weights[k:]) <= lost * math.fsum(weights) + room
    assert k == 0 or math.fsum(weights[k - 1 :]) > lost * math.fsum(weights) - room


# --- one rank for all -----------------------------------------------------------------------------------------------


@quick
@given(some_units(free=True), st.integers(1, 8))
def test_one_rank_for_all_leaves_smaller_modules_as_they_are(plan: Plan, rank: int) -> None:
    units = made(plan)
    bare = [Unit(unit.name, unit.rank, [], unit.cost) for unit in units]
    assert not needs_spectra("rank", "uniform")
    assert pick(bare, "rank", rank) == [min(rank, unit.rank) for unit in units]


@quick
@given(some_units(free=True), st.sampled_from(list(KEPT)), st.floats(0.01, 0.999))
def test_a_uniform_rank_is_the_smallest_that_every_module_is_content_with(plan: Plan, rule: str, value: float) -> None:
    units = made(plan)
    ranks = pick(units, rule, value, "uniform")
    alone = [pick([unit], rule, value)[0] for unit in units]
    assert ranks == [min(max(alone), unit.rank) for unit in units]


def test_members_of_a_unit_are_content_with_its_rank() -> None:
    unit = Unit("experts", 4, [[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.0]], 1)
    assert pick([unit], "energy", 0.99) == [3]
    assert unit.energies() == [2.0, 1.0, 1.0, 0.0]


# --- budgets against brute force ------------------------------------------------------------------------------------


def test_one_rank_for_layers_that_count_in_different_steps() -> None:
    """Half of the energy takes rank 4 of the first; rank 4 of the second, in steps of 3, is one of them."""
    units = [Unit("a", 3, [[1.0] * 3], 1, step=2), Unit("b", 2, [[1.0] * 2], 1, step=3)]
    assert pick(units, "energy", 0.5, "uniform") == [2, 1] == pick(units, "rank", 4)


@quick
@given(some_units(equal_costs=True, free=True), st.integers(1, 150))
def test_a_budget_is_spent_optimally_where_all_directions_cost_the_same(plan: Plan, budget: int) -> None:
    units = made(plan)
    assume(budget >= units[0].cost)
    ranks = pick(units, "params", budget)
    best = max(energy(units, k) for k in every_choice(units) if price(units, k) <= budget)
    assert price(units, ranks) <= budget
    assert energy(units, ranks) * SLACK >= best


@quick
@given(some_units(free=True), st.data())
def test_a_budget_that_the_greedy_order_meets_is_spent_optimally(plan: Plan, data: st.DataObject) -> None:
    units = made(plan)
    order = in_greedy_order(units)
    assume(order)
    budget = sum(cost for _, _, cost in order[: data.draw(st.integers(1, len(order)))])
    assume(budget >= min(unit.cost for unit in units))
    ranks = pick(units, "params", budget)
    best = max(energy(units, k) for k in every_choice(units) if price(units, k) <= budget)
    assert price(units, ranks) <= budget and energy(units, ranks) * SLACK >= best


@quick
@given(some_units(free=True), st.integers(1, 150))
def test_any_budget_is_kept_and_missed_by_less_than_one_direction(plan: Plan, budget: int) -> None:
    """What the optimum has more is below the energy of the first direction that no longer fits."""
    units = made(plan)
    assume(budget >= min(unit.cost for unit in units))
    ranks = pick(units, "params", budget)
    assert price(units, ranks) <= budget
    left, missed = budget, 0.0
    for _, gain, cost in in_greedy_order(units):
        if cost > left:
            missed = gain
            break
        left -= cost
    best = max(energy(units, k) for k in every_choice(units) if price(units, k) <= budget)
    assert best <= (energy(units, ranks) + missed) * SLACK


def test_what_is_left_goes_to_cheaper_directions() -> None:
    """The second direction of `dear` does not fit; the ones of `cheap` come after it in the order, and do."""
    units = [Unit("dear", 2, [[10.0, 9.0]], 10), Unit("cheap", 4, [[1.0, 1.0, 1.0, 1.0]], 2)]
    assert pick(units, "params", 15) == [1, 2]


@quick
@given(some_units(free=True), st.integers(1, 6))
def test_a_rank_spent_globally_costs_no_more_and_keeps_no_less(plan: Plan, rank: int) -> None:
    units = made(plan)
    uniform, spread = pick(units, "rank", rank), pick(units, "rank", rank, "global")
    assert price(units, spread) <= price(units, uniform)
    if len({unit.cost for unit in units}) == 1:
        assert energy(units, spread) * SLACK >= energy(units, uniform)


@quick
@given(some_units(free=True), st.sampled_from(["energy", "error"]), st.floats(0.01, 0.999))
def test_a_global_bound_is_met_by_the_shortest_greedy_prefix(plan: Plan, rule: str, value: float) -> None:
    units = made(plan)
    assume(total(units) > 0)
    needed = value if rule == "energy" else 1 - value**2
    ranks = pick(units, rule, value, "global")
    assert energy(units, ranks) >= needed * total(units) / SLACK
    kept = spent = 0.0
    for _, gain, cost in in_greedy_order(units):
        if kept >= needed * total(units) / SLACK:
            break
        kept, spent = kept + gain, spent + cost
    # Directions of one gain per cost may come in any order: then prefixes differ by at most one of them.
    assert price(units, ranks) <= spent + max(unit.cost for unit in units) - 1
    steps = in_greedy_order(units)
    if len({round(gain / cost, 9) for _, gain, cost in steps}) == len(steps):
        assert price(units, ranks) == spent


@quick
@given(some_units(free=True), st.integers(1, 150))
def test_a_uniform_budget_buys_the_largest_rank_that_fits(plan: Plan, budget: int) -> None:
    units = made(plan)
    options = [[min(k, unit.rank) for unit in units] for k in range(1, 6)]
    assume(price(units, options[0]) <= budget)
    ranks = pick(units, "params", budget, "uniform")
    assert ranks == [option for option in options if price(units, option) <= budget][-1]


@quick
@given(some_units(), st.sampled_from(["uniform", "global"]), st.sampled_from(["params", "size"]))
def test_an_impossible_budget_names_the_smallest_possible(plan: Plan, allocate: str, rule: str) -> None:
    """And that number works, while one less does not."""
    units = made(plan)
    units = [Unit(u.name, u.rank, [[s + 1 for s in row] for row in u.values], u.cost, u.floor, u.step) for u in units]
    try:
        pick(units, rule, 1, allocate)
        return
    except LoraSqueezeError as error:
        found = re.search(r"a budget of 1 (.*) is too small: the smallest possible is ([\d,]+)$", str(error))
    assert found and found[1] == ("parameters" if rule == "params" else "bytes")
    least = int(found[2].replace(",", ""))
    ranks = pick(units, rule, least, allocate)
    assert price(units, ranks) <= least and any(ranks)
    with pytest.raises(LoraSqueezeError, match="too small"):
        pick(units, rule, least - 1, allocate)


# --- limits ---------------------------------------------------------------------------------------------------------


@st.composite
def some_limits(draw: st.DrawFn) -> tuple[Any, ...]:
    """Arguments of Limits: made in the test, as units are."""
    ceiling = draw(st.none() | st.integers(1, 12))
    multiple = draw(st.integers(1, min(4, ceiling or 4)))
    floor = draw(st.integers(0, ceiling or 4))
    choices = draw(st.none() | st.sets(st.integers(1, 9), min_size=1))
    return floor, ceiling, multiple, None if choices is None else tuple(sorted(choices))


@quick
@given(some_units(), some_limits(), st.sampled_from(RULES), st.sampled_from(ALLOCATIONS), st.floats(0.05, 0.95))
def test_every_rank_is_within_its_limits(
    plan: Plan, bounds: tuple[Any, ...], rule: str, allocate: str, value: float
) -> None:
    """As files count it (rank times step): at most the ceiling, a multiple or the source rank, at least the floor."""
    units, limits = made(plan), Limits(*bounds)
    scaled = {"rank": 1 + int(value * 6), "params": 1 + int(value * 150), "size": 1 + int(value * 150), "sv_ratio": 3}
    try:
        ranks = pick(units, rule, scaled.get(rule, value), allocate, limits)
    except LoraSqueezeError as error:
        assert re.search(
            r"too small|cannot be allocated|is a multiple of|groups need at least one rank each|allowed ranks",
            str(error),
        )
        return
    for unit, k in zip(units, ranks, strict=True):
        assert 0 <= k <= unit.rank
        assert k * unit.step % limits.multiple_of == 0 or k == unit.rank
        assert limits.choices is None or k == 0 or k * unit.step in limits.choices
        assert limits.ceiling is None or k * unit.step <= limits.ceiling
        top = unit.rank if limits.ceiling is None else min(unit.rank, limits.ceiling // unit.step)
        assert k * unit.step >= min(limits.floor, top * unit.step) and k >= min(unit.floor, top)


def test_a_ceiling_below_the_number_of_groups_is_refused() -> None:
    unit = Unit("conv", 8, [[1.0] * 8], 1, floor=1, step=4)
    with pytest.raises(
        LoraSqueezeError, match="conv: max_rank 3 is impossible, its 4 groups need at least one rank each"
    ):
        pick([unit], "energy", 0.5, limits=Limits(ceiling=3))


def test_a_step_counts_as_files_count_it() -> None:
    """A convolution of 4 groups has 4 ranks in the file for one of each group."""
    unit = Unit("conv", 8, [[1.0] * 8], 1, floor=1, step=4)
    assert pick([unit], "rank", 16) == [4]
    assert pick([unit], "rank", 19) == [4]
    assert pick([unit], "energy", 1.0, limits=Limits(ceiling=8, multiple_of=8)) == [2]
    assert pick([unit], "energy", 0.01, limits=Limits(floor=8)) == [2]
    assert pick([unit], "energy", 0.01, limits=Limits(multiple_of=8)) == [2]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((-1, None, 1), "impossible limits: min_rank -1"),
        ((0, 0, 1), "impossible limits: min_rank 0, max_rank 0"),
        ((4, 3, 1), "impossible limits: min_rank 4, max_rank 3"),
        ((0, None, 0), "multiple_of 0"),
        ((0, 7, 8), "max_rank 7 is below multiple_of 8"),
    ],
)
def test_impossible_limits_are_refused(values: tuple[int, int | None, int], text: str) -> None:
    with pytest.raises(LoraSqueezeError, match=text):
        Limits(*values)


def test_limits_without_a_multiple_between_them_are_refused_by_name() -> None:
    units = [Unit("small", 6, [[1.0] * 6], 1), Unit("model.q_proj", 16, [[1.0] * 16], 1)]
    with pytest.raises(LoraSqueezeError, match=r"model.q_proj: no rank from 5 to 7 is a multiple of 4; raise max_rank"):
        pick(units, "energy", 0.5, limits=Limits(5, 7, 4))
    assert pick(units[:1], "energy", 0.5, limits=Limits(5, 7, 4)) == [6], "its source rank is allowed"


def test_allowed_ranks_are_kept_to() -> None:
    units = [Unit("wide", 64, [[0.9**i for i in range(64)]], 3), Unit("small", 12, [[1.0] * 12], 1)]
    served = Limits(choices=(8, 16, 32))
    assert pick(units, "rank", 20, limits=served) == [16, 8]
    assert pick(units, "energy", 0.9, limits=served) == [16, 8], "the next one above, or the highest there is"
    assert pick(units, "params", 3 * 16 + 8, limits=served) == [16, 8]
    assert pick(units, "params", 3 * 16 + 8, "uniform", served) == [16, 8]
    assert pick(units, "params", 3 * 16 + 7, "uniform", served) == [8, 8]


@pytest.mark.parametrize("choices", [(), (0, 8), (-1,)])
def test_allowed_ranks_are_whole_numbers_from_1(choices: tuple[int, ...]) -> None:
    with pytest.raises(LoraSqueezeError, match=r"allowed ranks must be whole numbers from 1, got \["):
        Limits(choices=choices)


def test_no_allowed_rank_within_reach_is_refused_by_name() -> None:
    unit = Unit("model.v_proj", 4, [[1.0] * 4], 1)
    with pytest.raises(
        LoraSqueezeError, match=r"model.v_proj: none of the allowed ranks 8, 16 is from 1 to 4, which its source rank 4"
    ):
        pick([unit], "energy", 0.5, limits=Limits(choices=(8, 16)))
    with pytest.raises(LoraSqueezeError, match="rank 4 is below all allowed ranks 8, 16"):
        pick([Unit("q_proj", 32, [[1.0] * 32], 1)], "rank", 4, limits=Limits(choices=(8, 16)))


# --- how far from the best ------------------------------------------------------------------------------------------


def best_energy(units: Sequence[Unit], ladders: Sequence[Sequence[int]], budget: int) -> float:
    choices = [ks for ks in itertools.product(*ladders) if price(units, ks) <= budget]
    return max(energy(units, ks) for ks in choices)


@quick
@given(some_units(free=True), st.integers(1, 150), st.sets(st.integers(1, 5), min_size=1))
def test_on_any_ladder_a_budget_keeps_more_than_half_of_the_best(plan: Plan, budget: int, rungs: set[int]) -> None:
    units, limits = made(plan), Limits(choices=(1, *sorted(rungs - {1})))
    assume(budget >= min(unit.cost for unit in units))
    ranks = pick(units, "params", budget, limits=limits)
    best = best_energy(units, [limits.ladder(unit) for unit in units], budget)
    assert price(units, ranks) <= budget
    assert energy(units, ranks) * SLACK >= best / 2


@pytest.mark.parametrize(("choices", "rank"), [((8, 16, 32, 64), 64), ((1, 2, 4, 8), 8), (None, 8)])
def test_random_budgets_are_spent_nearly_as_well_as_can_be(choices: tuple[int, ...] | None, rank: int) -> None:
    """What the optimum keeps more, as a share of all energy: the bounds are those that the module's text gives."""
    random_ = random.Random(7)
    missed = []
    for _ in range(60):
        units = []
        for i in range(3):
            size, decay = math.exp(random_.gauss(0, 1)), random_.uniform(0.02, 0.3)
            S = [size * math.exp(-decay * j) for j in range(rank)]
            units.append(Unit(f"unit{i}", rank, [S], random_.choice([1, 2, 3, 5, 7, 11, 28])))
        limits = Limits(choices=choices)
        ladders = [limits.ladder(unit) for unit in units]
        least = min(unit.cost * ladder[1] for unit, ladder in zip(units, ladders, strict=True))
        budget = random_.randint(least, price(units, [rank] * 3))
        ranks = pick(units, "params", budget, limits=limits)
        missed.append((best_energy(units, ladders, budget) - energy(units, ranks)) / total(units))
    assert max(missed) < 0.04 and sum(missed) / len(missed) < 1e-3, missed


def test_a_step_that_does_not_fit_at_first_is_taken_first_where_that_keeps_more() -> None:
    """By energy per parameter `crumbs` comes first, and then there is no room for `loaf`."""
    units = [Unit("crumbs", 1, [[1.0]], 1), Unit("loaf", 1, [[9.0]], 100)]
    assert pick(units, "params", 100) == [0, 1]


def test_long_spectra_take_no_longer_than_their_length() -> None:
    unit = Unit("long", 20_000, [[1.0] * 20_000], 1)
    began = time.process_time()
    assert pick([unit], "params", 19_999) == [19_999]
    assert time.process_time() - began < 3


# --- requests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "values", "text"),
    [
        ("rank", (0, -1, 1.5, math.nan, math.inf), "rank must be a whole number from 1"),
        ("energy", (0.0, -0.1, 1.0001, math.nan), r"energy must be in \(0, 1\]"),
        ("error", (-0.1, 1.0, math.nan), r"error must be in \[0, 1\)"),
        ("sv_ratio", (0.99, math.nan, math.inf), "sv_ratio must be at least 1"),
        ("sv_cumulative", (0.0, 1.1, math.nan), r"sv_cumulative must be in \(0, 1\]"),
        ("sv_fro", (0.0, 1.1, math.nan), r"sv_fro must be in \(0, 1\]"),
        ("params", (0, -5, math.nan, math.inf), "params must be at least 1"),
        ("size", (0, -5, math.nan, math.inf), "size must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(rule: str, values: Sequence[float], text: str) -> None:
    for value in values:
        with pytest.raises(LoraSqueezeError, match=f"{text}, got {float(value)}"):
            one(rule, value, [1.0, 0.5])


def test_allocations_have_defaults_and_senseless_ones_are_refused() -> None:
    defaults = {rule: allocation_for(rule, None) for rule in RULES}
    assert defaults == {rule: "each" for rule in RULES} | {"rank": "uniform", "params": "global", "size": "global"}
    for rule, allocate in [("sv_ratio", "global"), ("sv_fro", "global"), ("params", "each"), ("size", "each")]:
        with pytest.raises(LoraSqueezeError, match=f"{rule} cannot be allocated '{allocate}'"):
            allocation_for(rule, allocate)  # type: ignore[arg-type]
    with pytest.raises(LoraSqueezeError, match=r"unknown rule 'knee': choose one of rank, energy"):
        allocation_for("knee", None)
    with pytest.raises(LoraSqueezeError, match=r"unknown allocation 'best': choose one of each, uniform, global"):
        allocation_for.__wrapped__("rank", "best")  # type: ignore[attr-defined]  # past the type checker
