"""Schedules: sums, floors and ranks by their definitions, shares against a search over all rivals."""

import itertools
import json
import math
import re
from fractions import Fraction
from typing import Any

import pytest
from factor_cases import quick
from hypothesis import assume, given
from hypothesis import strategies as st

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.schedule import MODES, SPACINGS, WEIGHTS, Schedule, make_schedule

ENDS = st.tuples(st.integers(1, 300), st.integers(1, 300)).map(sorted).filter(lambda pair: pair[0] < pair[1])
ALLOTMENTS = st.sampled_from(list(WEIGHTS))


def falls(numbers: tuple[int, ...]) -> bool:
    return all(low < high for high, low in itertools.pairwise(numbers))


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(LoraSqueezeError) as caught:
        make_schedule(*arguments, **options)
    return str(caught.value)


Plan = tuple[tuple[int, ...], tuple[int, ...]]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Arguments of a schedule, which is made in the test: the type checker of this suite looks at random items."""
    ranks = sorted(draw(st.sets(st.integers(1, 128), min_size=2, max_size=7)), reverse=True)
    steps = [draw(st.integers(1, 40)) for _ in ranks[:-1]]
    return tuple(ranks), (*steps, draw(st.integers(0, 40)))


# --- the schedule ---------------------------------------------------------------------------------------------------


@quick
@given(plans())
def test_every_step_is_trained_at_the_rank_of_its_stage(plan: Plan) -> None:
    """Replayed step by step: before step t + 1 the rank is that of the stage in which this step lies."""
    schedule = Schedule(*plan)
    lived = [rank for rank, steps in zip(schedule.ranks, schedule.steps, strict=True) for _ in range(steps)]
    assert [schedule.rank_after(step) for step in range(schedule.total_steps)] == lived
    assert schedule.rank_after(schedule.total_steps) == schedule.ranks[-1]


@quick
@given(plans())
def test_the_rank_changes_at_the_boundaries_and_nowhere_else(plan: Plan) -> None:
    schedule = Schedule(*plan)
    steps = range(1, schedule.total_steps + 1)
    changes = [step for step in steps if schedule.stage_after(step) != schedule.stage_after(step - 1)]
    assert tuple(changes) == schedule.boundaries
    assert schedule.stage_after(0) == 0
    for i, boundary in enumerate(schedule.boundaries):
        assert (schedule.stage_after(boundary - 1), schedule.stage_after(boundary)) == (i, i + 1)


@quick
@given(plans(), st.integers(0, 1000))
def test_beyond_the_last_step_the_target_rank_holds(plan: Plan, more: int) -> None:
    schedule = Schedule(*plan)
    assert schedule.rank_after(schedule.total_steps + more) == schedule.ranks[-1]


@quick
@given(plans())
def test_a_schedule_survives_a_checkpoint(plan: Plan) -> None:
    schedule = Schedule(*plan)
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule


@pytest.mark.parametrize(
    ("ranks", "steps", "text"),
    [
        ((8,), (10,), "needs two or more stages with a rank and a number of steps each: ranks 8, steps 10"),
        ((), (), "ranks none, steps none"),
        ((8, 4), (10,), "ranks 8, 4, steps 10"),
        ((8, 8), (5, 5), "ranks must fall from stage to stage and be at least 1, got 8, 8"),
        ((4, 8), (5, 5), "ranks must fall from stage to stage and be at least 1, got 4, 8"),
        ((8, 0), (5, 5), "ranks must fall from stage to stage and be at least 1, got 8, 0"),
        ((8, 4), (0, 5), "every stage needs at least 1 step, only the last may have 0, got 0, 5"),
        ((8, 4, 2), (5, 0, 5), "every stage needs at least 1 step, only the last may have 0, got 5, 0, 5"),
        ((8, 4), (5, -1), "every stage needs at least 1 step, only the last may have 0, got 5, -1"),
    ],
)
def test_impossible_schedules_are_refused(ranks: tuple[int, ...], steps: tuple[int, ...], text: str) -> None:
    with pytest.raises(LoraSqueezeError, match=f"{re.escape(text)}$"):
        Schedule(ranks, steps)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, "a schedule has the keys ranks and steps, found none"),
        ({"ranks": [8, 4]}, "a schedule has the keys ranks and steps, found ranks"),
        ({"ranks": [8, 4], "steps": [5, 5], "alpha": 1}, "found ranks, steps, alpha"),
        ({"ranks": [8, 4.0], "steps": [5, 5]}, r"ranks must be a list of whole numbers, got [8, 4.0]"),
        ({"ranks": [8, 4], "steps": 10}, "steps must be a list of whole numbers, got 10"),
        ({"ranks": [4, 8], "steps": [5, 5]}, "ranks must fall"),
    ],
)
def test_a_damaged_checkpoint_is_refused(data: dict[str, Any], text: str) -> None:
    with pytest.raises(LoraSqueezeError, match=re.escape(text)):
        Schedule.from_json(data)


def test_steps_before_the_start_are_refused() -> None:
    with pytest.raises(LoraSqueezeError, match="finished steps count from 0, got -1"):
        Schedule((8, 4), (5, 5)).rank_after(-1)


# --- ranks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1, 2, 3, 5])
@pytest.mark.parametrize("halvings", [1, 2, 4, 6])
def test_ranks_are_halved_by_default(target: int, halvings: int) -> None:
    schedule = make_schedule(target << halvings, target, 1000)
    assert schedule.ranks == tuple(target << i for i in range(halvings, -1, -1))


@quick
@given(ENDS)
def test_by_default_there_are_as_many_squeezes_as_halvings_are_needed(ends: list[int]) -> None:
    target, source = ends
    for spacing in SPACINGS:
        squeezes = len(make_schedule(source, target, 1000, ranks=spacing).ranks) - 1
        assert target * 2**squeezes >= source > target * 2 ** (squeezes - 1)


@quick
@given(ENDS, st.sampled_from(SPACINGS), st.data())
def test_any_number_of_squeezes_that_fits_gives_falling_ranks(
    ends: list[int], spacing: str, data: st.DataObject
) -> None:
    target, source = ends
    squeezes = data.draw(st.integers(1, source - target))
    ranks = make_schedule(source, target, 1000, ranks=spacing, squeezes=squeezes).ranks
    assert len(ranks) == squeezes + 1 and (ranks[0], ranks[-1]) == (source, target)
    assert falls(ranks), ranks


@quick
@given(ENDS, st.sampled_from(SPACINGS))
def test_as_many_squeezes_as_possible_lower_the_rank_by_one_each(ends: list[int], spacing: str) -> None:
    target, source = ends
    ranks = make_schedule(source, target, 1000, ranks=spacing, squeezes=source - target).ranks
    assert ranks == tuple(range(source, target - 1, -1))


@quick
@given(ENDS, st.data())
def test_linear_ranks_have_equal_differences_up_to_rounding(ends: list[int], data: st.DataObject) -> None:
    target, source = ends
    squeezes = data.draw(st.integers(1, source - target))
    ranks = make_schedule(source, target, 1000, ranks="linear", squeezes=squeezes).ranks
    differences = [high - low for high, low in itertools.pairwise(ranks)]
    assert max(differences) - min(differences) <= 1


@quick
@given(ENDS, st.data())
def test_geometric_ranks_follow_their_formula_where_it_falls_strictly(ends: list[int], data: st.DataObject) -> None:
    target, source = ends
    squeezes = data.draw(st.integers(1, min(6, source - target)))
    formula = tuple(round(source * (target / source) ** (i / squeezes)) for i in range(squeezes + 1))
    assume(falls(formula))
    assert make_schedule(source, target, 1000, squeezes=squeezes).ranks == formula


def test_listed_ranks_follow_the_source_rank() -> None:
    assert make_schedule(64, 3, 100, ranks=[48, 10, 3]).ranks == (64, 48, 10, 3)


@pytest.mark.parametrize("ranks", [[64, 8], [32, 32, 8], [16, 32, 8], [32, 16], [8, 4], []])
def test_listed_ranks_that_do_not_lead_to_the_target_are_refused(ranks: list[int]) -> None:
    text = "ranks must list the ranks after the source rank 64, falling, the last one the target rank 8, got "
    assert refusal(64, 8, 100, ranks=ranks) == text + (", ".join(map(str, ranks)) or "none")


@quick
@given(ENDS, st.sampled_from(SPACINGS))
def test_too_many_squeezes_are_refused_with_the_largest_number_possible(ends: list[int], spacing: str) -> None:
    target, source = ends
    most = source - target
    for squeezes in (0, most + 1):
        assert refusal(source, target, 1000, ranks=spacing, squeezes=squeezes) == (
            f"squeezes must be from 1 to {most} between rank {source} and rank {target}, got {squeezes}"
        )


# --- steps ----------------------------------------------------------------------------------------------------------


@quick
@given(ENDS, ALLOTMENTS, st.integers(10, 20_000), st.data())
def test_the_steps_sum_to_the_total_and_keep_the_floor(
    ends: list[int], steps: str, total: int, data: st.DataObject
) -> None:
    target, source = ends
    least = data.draw(st.integers(1, total // 10))  # at most 9 halvings below rank 300, so 10 stages
    schedule = make_schedule(source, target, total, steps=steps, min_steps=least)
    assert schedule.total_steps == sum(schedule.steps) == total
    assert min(schedule.steps) >= least


@quick
@given(ENDS, ALLOTMENTS, st.integers(10, 20_000), st.data())
def test_the_steps_are_ordered_as_the_weights(ends: list[int], steps: str, total: int, data: st.DataObject) -> None:
    least = data.draw(st.integers(1, total // 10))
    allotted = list(make_schedule(ends[1], ends[0], total, steps=steps, min_steps=least).steps)
    assert allotted == sorted(allotted, reverse=steps != "inverse")
    if steps == "equal":
        assert max(allotted) - min(allotted) <= 1


@quick
@given(ENDS, ALLOTMENTS, st.integers(300, 20_000))
def test_without_a_floor_at_work_every_stage_is_within_one_step_of_its_share(
    ends: list[int], steps: str, total: int
) -> None:
    schedule = make_schedule(ends[1], ends[0], total, steps=steps, min_steps=1)
    weight = {
        "equal": lambda r: 1.0,
        "proportional": float,
        "sqrt": math.sqrt,
        "inverse": lambda r: 1 / r,
    }[steps]
    weights = [weight(rank) for rank in schedule.ranks]
    shares = [total * w / math.fsum(weights) for w in weights]
    assume(min(shares) >= 1)
    for allotted, share in zip(schedule.steps, shares, strict=True):
        assert abs(allotted - share) < 1 + 1e-6


@pytest.mark.parametrize("steps", ["proportional", "inverse"])
@pytest.mark.parametrize("least", [1, 3, 5])
@pytest.mark.parametrize("total", [20, 23, 29])
def test_the_steps_are_the_nearest_to_their_shares_of_all_that_keep_sum_and_floor(
    steps: str, least: int, total: int
) -> None:
    """Among all step lists of this sum, none with this floor is nearer to the shares that the stages above it have."""
    schedule = make_schedule(8, 1, total, steps=steps, min_steps=least)
    weights = [Fraction(rank) if steps == "proportional" else Fraction(1, rank) for rank in schedule.ranks]
    # The level at which max(least, level * weight) spends all: sought among the sets of stages above the floor.
    ideals = []
    for size in range(1, 5):
        for above in itertools.combinations(range(4), size):
            level = (total - least * (4 - size)) / sum(weights[i] for i in above)
            ideal = [max(Fraction(least), level * weight) for weight in weights]
            ideals += [ideal] if sum(ideal) == total else []
    rivals = [rival for rival in itertools.product(range(least, total), repeat=4) if sum(rival) == total]

    def distance(plan: tuple[int, ...]) -> Fraction:
        return sum(((n - share) ** 2 for n, share in zip(plan, ideals[0], strict=True)), Fraction(0))

    assert ideals and distance(schedule.steps) == min(map(distance, rivals))


@quick
@given(ENDS, ALLOTMENTS, st.integers(30, 5000), st.booleans(), st.data())
def test_the_last_stage_gets_its_own_number_and_the_others_share_the_rest(
    ends: list[int], steps: str, total: int, train: bool, data: st.DataObject
) -> None:
    target, source = ends
    assume(source > 2 * target)
    last = data.draw(st.integers(1, total // 2)) if train else 0
    schedule = make_schedule(
        source, target, total, steps=steps, min_steps=1, last_steps=last or None, train_after_last=train
    )
    assert schedule.steps[-1] == last and schedule.total_steps == total
    weights = [WEIGHTS[steps](rank) for rank in schedule.ranks[:-1]]
    shares = [weight * (total - last) / sum(weights) for weight in weights]
    assume(min(shares) >= 1)  # otherwise the floor of one step is at work
    assert all(abs(n - share) < 1 for n, share in zip(schedule.steps[:-1], shares, strict=True))


def test_listed_steps_are_taken_as_they_are() -> None:
    assert make_schedule(64, 16, 100, steps=[10, 20, 70]).steps == (10, 20, 70)
    assert make_schedule(64, 16, 100, steps=[10, 90, 0]).steps == (10, 90, 0)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        ([10, 20, 71], "steps must sum to the 100 steps of the training, got 101"),
        ([30, 70], "steps must list one number for each of the 3 ranks 64, 32, 16, got 2"),
        ([0, 20, 80], "every stage needs at least 1 step, only the last may have 0, got 0, 20, 80"),
    ],
)
def test_listed_steps_that_do_not_fit_are_refused(steps: list[int], text: str) -> None:
    assert refusal(64, 16, 100, steps=steps) == text


@quick
@given(ENDS, st.integers(1, 400), st.integers(1, 300), st.booleans())
def test_a_schedule_longer_than_the_training_is_refused_and_the_numbers_it_names_work(
    ends: list[int], total: int, least: int, train: bool
) -> None:
    target, source = ends
    options: dict[str, Any] = {"train_after_last": train}
    try:
        make_schedule(source, target, total, min_steps=least, **options)
        return
    except LoraSqueezeError as error:
        text = str(error)
    assert text.startswith("the schedule is longer than the training")
    needed = re.search(r"= (\d+) steps, the training has (\d+)", text)
    assert needed and int(needed[2]) == total < int(needed[1])
    assert make_schedule(source, target, int(needed[1]), min_steps=least, **options)
    assert "longer" in refusal(source, target, int(needed[1]) - 1, min_steps=least, **options)
    possible = re.search(r"min_steps to at most (\d+)", text)
    if possible:
        assert make_schedule(source, target, total, min_steps=int(possible[1]), **options)
        assert "longer" in refusal(source, target, total, min_steps=int(possible[1]) + 1, **options)
    else:
        assert "longer" in refusal(source, target, total, min_steps=1, **options)


def test_the_papers_floor_costs_the_large_stages_in_proportion() -> None:
    """10 000 steps from rank 64 to 1: in proportion, the lowest ranks would get fewer than 200."""
    plain = make_schedule(64, 1, 10_000, steps="proportional", min_steps=1)
    floored = make_schedule(64, 1, 10_000, steps="proportional", min_steps=200)
    assert [n < 200 for n in plain.steps] == [n == 200 for n in floored.steps]
    for i in range(plain.steps.index(next(n for n in plain.steps if n < 200)) - 1):
        assert abs(floored.steps[i] - 2 * floored.steps[i + 1]) <= 2


@quick
@given(ENDS, st.integers(10, 20_000), st.one_of(st.none(), st.integers(1, 5)))
def test_by_default_steps_are_proportional_and_every_stage_has_a_twentieth(
    ends: list[int], total: int, last: int | None
) -> None:
    schedule = make_schedule(ends[1], ends[0], total, last_steps=last)
    floor = max(1, round(total / 20)) if len(schedule.steps) <= 20 else 1
    if last is None:
        assert schedule == make_schedule(ends[1], ends[0], total, steps="proportional", min_steps=floor)
    else:  # a shorter last stage may be asked for
        assert schedule.steps[-1] == last and min(schedule.steps[:-1]) >= min(floor, (total - last) // 10)


def test_the_default_floor_gives_way_where_the_stages_are_many() -> None:
    assert make_schedule(64, 1, 100, squeezes=63).steps[-1] == 1
    assert make_schedule(2, 1, 2).steps == (1, 1)


# --- modes ----------------------------------------------------------------------------------------------------------


@quick
@given(ENDS, st.integers(1, 20_000))
def test_post_trains_at_the_source_rank_and_squeezes_at_the_end(ends: list[int], total: int) -> None:
    schedule = make_schedule(ends[1], ends[0], total, mode="post")
    assert schedule == Schedule((ends[1], ends[0]), (total, 0))
    assert schedule.boundaries == (total,)
    assert schedule == make_schedule(ends[1], ends[0], total, squeezes=1, train_after_last=False)


@quick
@given(ENDS, st.integers(2, 20_000))
def test_cont_trains_one_twentieth_at_the_target_rank(ends: list[int], total: int) -> None:
    schedule = make_schedule(ends[1], ends[0], total, mode="cont")
    assert schedule.ranks == (ends[1], ends[0]) and schedule.total_steps == total
    assert schedule.steps[1] >= 1
    assert abs(schedule.steps[1] - total / 20) <= 0.5 or schedule.steps[1] == 1


@quick
@given(ENDS, st.integers(2, 20_000), st.data())
def test_cont_is_in_with_one_squeeze(ends: list[int], total: int, data: st.DataObject) -> None:
    last = data.draw(st.integers(1, total - 1))
    schedule = make_schedule(ends[1], ends[0], total, mode="cont", last_steps=last)
    assert schedule.steps == (total - last, last)
    assert schedule == make_schedule(ends[1], ends[0], total, squeezes=1, last_steps=last)


OPTIONS: dict[str, Any] = {
    "ranks": "linear",
    "squeezes": 1,
    "steps": "inverse",
    "min_steps": 2,
    "last_steps": 7,
    "train_after_last": False,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_used_or_refused_by_name(mode: str, name: str) -> None:
    option = {name: OPTIONS[name]}
    if name in MODES[mode]:
        # Proportional, since a floor of 2 steps changes nothing in equal stages.
        base = {"steps": "proportional"} if mode == "in" else {}
        assert make_schedule(64, 1, 100, mode=mode, **base | option) != make_schedule(64, 1, 100, mode=mode, **base)
        return
    homes = " or ".join(repr(other) for other in MODES if name in MODES[other])
    expected = f"{name} is no option of mode {mode!r}: leave it out, or use mode {homes}"
    assert refusal(64, 1, 100, mode=mode, **option) == expected


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((8, 8, 100), "nothing to squeeze: source and target rank are both 8; choose a lower target rank"),
        (
            (8, 16, 100),
            "target rank 16 is above source rank 8: choose a target below 8, or train at a source rank above",
        ),
        ((8, 0, 100), "target rank and total steps must be at least 1, got rank 0 and 100 steps"),
        ((8, 4, 0), "target rank and total steps must be at least 1, got rank 4 and 0 steps"),
    ],
)
def test_ends_that_make_no_schedule_are_refused_in_every_mode(mode: str, arguments: Any, text: str) -> None:
    assert refusal(*arguments, mode=mode).startswith(text)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"mode": "pre"}, "unknown mode 'pre': choose one of post, cont, in"),
        ({"ranks": "cubic"}, "unknown ranks 'cubic': choose geometric or linear, or list the ranks"),
        (
            {"steps": "most"},
            "unknown steps 'most': choose one of equal, proportional, sqrt, inverse, or list the steps",
        ),
        ({"min_steps": 0}, "min_steps must be at least 1, got 0"),
        ({"last_steps": 0}, "last_steps must be at least 1, got 0: without training at the target rank, use mode"),
        ({"last_steps": 0, "mode": "cont"}, "last_steps must be at least 1, got 0"),
        ({"last_steps": 5, "min_steps": 6}, "last_steps 5 is below min_steps 6: raise it or lower min_steps"),
        ({"last_steps": 5, "train_after_last": False}, "last_steps 5 contradicts train_after_last=False"),
        ({"squeezes": 1, "ranks": [8]}, "squeezes contradicts explicit ranks"),
        ({"steps": [25] * 4, "min_steps": 2}, "min_steps contradicts explicit steps"),
        ({"steps": [25] * 4, "last_steps": 25}, "last_steps contradicts explicit steps"),
        ({"steps": [25] * 4, "train_after_last": False}, "train_after_last contradicts explicit steps"),
        (
            {"last_steps": 98},
            "3 x 1 (min_steps) + 98 after the last squeeze = 101 steps, the training has 100; "
            "train longer, or plan fewer squeezes, or lower last_steps",
        ),
        (
            {"mode": "cont", "last_steps": 100},
            "1 x 1 (min_steps) + 100 after the last squeeze = 101 steps, the training "
            "has 100; train longer, or lower last_steps",
        ),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], text: str) -> None:
    assert text in refusal(64, 8, 100, **options)
