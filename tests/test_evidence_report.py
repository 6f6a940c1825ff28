"""The report of the evidence bench on rows whose answers are known: figures, verdicts, gaps, the same bytes again."""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from bench.evidence.methods import DEFAULT_METHODS, METHODS
from bench.evidence.report import curves, tables
from bench.evidence.report.__main__ import main
from bench.evidence.report.estimate import NO, OPEN, YES, Estimate, decide, estimate, number, pooled_deviation, spread
from bench.evidence.report.page import tables_page
from bench.evidence.report.rates import rates_table
from bench.evidence.report.results import ACCURACY, LEARNED, LOSS, Results, gather, labels
from bench.evidence.report.verdicts import DEPENDS, FAILS, HOLDS, UNMEASURED, Verdict, all_verdicts
from bench.evidence.report.verdicts_page import verdicts_page
from lora_squeeze.errors import LoraSqueezeError

Row = dict[str, Any]
RANKS = (16, 8, 4, 2, 1)
SEEDS = (0, 1, 2)
TASKS = tuple(f"task-{letter}" for letter in "abcde")
SEED_NOISE, NOISE = 0.02, 0.001  # of a seed, common to all arms; of a single run
PLAIN = 0.02  # loss above the source, of every arm unless said otherwise
Gap = Callable[[str, int, int], float]  # loss above the source, by method, rank and number of the task


def row(task: str, method: str, rank: int, seed: int, loss: float, **more: Any) -> Row:
    accuracy = 0.9 - loss / 4
    return {
        "kind": "result", "model": "toy", "task": task, "method": method, "rank": rank, "seed": seed, "steps": 100,
        "batch": 8, "source_rank": 64, "rate": 1e-3, "purpose": "final", "part": "test", "loss": loss,
        "accuracy": accuracy, "unit_accuracy": accuracy, "ece": loss / 10, "mce": loss / 5, "ace": loss / 8,
        "units": 500, "examples": 256, "parameters": 10 * rank, "bytes": 40 * rank, "seconds": 10.0 + rank,
        "peak_mib": 900.0, "parameter_steps": 1000 * rank, "energy": None, "commit": "abc",
        "time": "2026-01-01T00:00:00+00:00", "options": {}, **more,
    }  # fmt: skip


def world(
    gap: Gap, methods: tuple[str, ...] = DEFAULT_METHODS, tasks: tuple[str, ...] = TASKS, seeds: tuple[int, ...] = SEEDS
) -> list[Row]:
    """Rows of every arm; the loss is level of the task + noise of the seed + gap + noise of the run."""
    g = random.Random(0)
    rows = []
    for place, task in enumerate(tasks):
        for seed in seeds:
            level = 0.5 + place / 5 + g.gauss(0, SEED_NOISE)
            rows += [row(task, "base", 0, seed, level + 1), row(task, "direct", 64, seed, level)]
            for method in methods:
                for rank in RANKS:
                    loss = level + gap(method, rank, place) + g.gauss(0, NOISE)
                    rows.append(row(task, method, rank, seed, loss))
    return rows


def plain(method: str, rank: int, place: int) -> float:
    return PLAIN


def changed(gaps: dict[str, dict[int, float] | float]) -> Gap:
    """The plain world but for these methods, at all ranks or at some."""

    def gap(method: str, rank: int, place: int) -> float:
        mine = gaps.get(method, PLAIN)
        return mine.get(rank, PLAIN) if isinstance(mine, dict) else mine

    return gap


def only(rows: list[Row]) -> Results:
    report = gather(rows)
    assert len(report.models) == 1
    return report.models[0]


def judged(rows: list[Row], claim: str) -> dict[str, Verdict]:
    """The verdicts on a claim, by measure."""
    found = {v.measure.field: v for v in all_verdicts(only(rows)) if v.claim == claim}
    assert found
    return found


# --- means, errors, decisions -----------------------------------------------------------------------------------------


def test_seeds_are_averaged_within_a_task_before_the_tasks() -> None:
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 7.0, ("c", 0): 4.0}
    found = estimate(values)
    assert found is not None and found.by_task == {"a": 2.0, "b": 7.0, "c": 4.0} and found.runs == 4
    assert found.mean == pytest.approx(mean([2, 7, 4])) and found.error == pytest.approx(stdev([2, 7, 4]) / 3**0.5)


def test_with_one_task_the_error_is_that_of_the_seeds_and_with_one_run_there_is_none() -> None:
    found = estimate({("a", 0): 1.0, ("a", 1): 3.0, ("a", 2): 8.0})
    assert found is not None and found.error == pytest.approx(stdev([1, 3, 8]) / 3**0.5)
    single = estimate({("a", 0): 1.0})
    assert single is not None and single.error is None and spread(single, 2) == "1.00 ± -"
    assert estimate({}) is None and spread(None, 2) == "-"


def test_noise_of_seeds_is_pooled_over_tasks() -> None:
    values = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 10.0, ("b", 1): 14.0, ("b", 2): 12.0, ("c", 0): 99.0}
    squares = stdev([1, 3]) ** 2 * 1 + stdev([10, 14, 12]) ** 2 * 2
    assert pooled_deviation(values) == pytest.approx((squares / 3) ** 0.5)
    assert pooled_deviation({("a", 0): 1.0, ("b", 0): 2.0}) is None


@pytest.mark.parametrize(
    ("center", "error", "tasks", "answer"),
    [
        (1.0, 0.23, [1, 1, 1], YES),  # 1 / 4.30
        (1.0, 0.24, [1, 1, 1], OPEN),
        (-1.0, 0.23, [-1, -1, 1], NO),
        (1.0, 0.01, [0, 0, 0, 1], YES),  # equal on a task: for neither
        (1.0, 0.1, [5, -1, -1], OPEN),
        (1.0, 0.1, [1, -1], OPEN),
        (0.0, 0.0, [0, 0], OPEN),
        (1.0, None, [1], OPEN),
        (1.0, float("nan"), [1, 1], OPEN),
        (float("nan"), float("nan"), [1, 1], OPEN),
    ],
)
def test_a_difference_counts_beyond_doubt_and_on_most_tasks(
    center: float, error: float | None, tasks: list[float], answer: str
) -> None:
    by_task = {str(i): float(value) for i, value in enumerate(tasks)}
    assert decide(Estimate(center, error, by_task, len(tasks))) == answer
    assert decide(None) == OPEN


def test_numbers_have_no_minus_zero() -> None:
    assert number(-0.00001, 2) == "0.00" and number(-0.00001, 2, signed=True) == "+0.00"
    assert number(0.12345, 1, 100) == "12.3" and number(float("inf"), 2) == "inf" and number(float("nan"), 2) == "nan"


# --- verdicts: true, false, undecided ---------------------------------------------------------------------------------

AT_8 = 2 * SEED_NOISE  # well beyond what another seed does
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a true": ("a", {"post": 0.0}, HOLDS, "yes: rank 16"),
    "a false": ("a", {"post": {16: AT_8, 8: AT_8}}, FAILS, "no: rank 16"),
    "a at higher ranks": ("a", {"post": {16: 0.0, 8: AT_8}}, HOLDS, "yes: rank 16"),
    "b true": ("b", {"post": {2: 0.1, 1: 0.3}}, HOLDS, "yes: rank 2, rank 1"),
    "b false": ("b", {"post": {2: 0.0, 1: 0.0}}, FAILS, "no: rank 2, rank 1"),
    "b undecided": ("b", {}, DEPENDS, "undecided: rank 2, rank 1"),
    "b in part": ("b", {"post": {2: 0.02, 1: 0.3}}, DEPENDS, "undecided: rank 2; yes: rank 1"),
    "c true": (
        "c, against direct", {"post": {2: 0.1, 1: 0.3}, "cont": 0.02}, HOLDS,
        "no gap beyond noise: rank 16, rank 8, rank 4; yes: rank 2, rank 1",
    ),
    "c false": (
        "c, against direct", {"post": {2: 0.12, 1: 0.32}, "cont": {2: 0.05, 1: 0.11}}, FAILS,
        "no gap beyond noise: rank 16, rank 8, rank 4; no: rank 2, rank 1",
    ),
    "c nothing to recover": (
        "c, against direct", {"post": 0.02}, DEPENDS, "no gap beyond noise: rank 16, rank 8, rank 4, rank 2, rank 1",
    ),
    "c against the source, true": (
        "c, against source", {"post": 0.3, "cont": 0.005}, HOLDS, "yes: rank 16, rank 8, rank 4, rank 2, rank 1",
    ),
    "c against the source, false": (
        "c, against source", {"post": 0.3, "cont": 0.05}, FAILS, "no: rank 16, rank 8, rank 4, rank 2, rank 1",
    ),
    "e true": ("e", {"post": 0.1, "post-data": 0.07}, HOLDS, "yes: rank 16, rank 8, rank 4, rank 2, rank 1"),
    "e false": ("e", {"post": 0.1, "post-data": 0.12}, FAILS, "no: rank 16, rank 8, rank 4, rank 2, rank 1"),
    "e without a gap": (
        "e", {"post": -0.02, "post-data": -0.04}, DEPENDS,
        "no gap beyond noise: rank 16, rank 8, rank 4, rank 2, rank 1",
    ),
    "f true": (
        "f, plan over post", {"plan": -0.01}, HOLDS, "yes: rank 16, rank 8, rank 4, rank 2, rank 1",
    ),
    "f false": (
        "f, plan-data over post-data", {"plan-data": 0.05}, FAILS, "no: rank 16, rank 8, rank 4, rank 2, rank 1",
    ),
    "f in part": (
        "f, plan over post", {"plan": {16: 0.05, 8: -0.01}}, DEPENDS,
        "no: rank 16; yes: rank 8; undecided: rank 4, rank 2, rank 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("claim", "gaps", "outcome", "because"), CASES.values(), ids=CASES)
def test_a_planted_effect_is_found_by_every_measure(
    claim: str, gaps: dict[str, Any], outcome: str, because: str
) -> None:  # fmt: skip
    rows = world(changed(gaps))
    for verdict in judged(rows, claim).values():
        assert (verdict.outcome, verdict.because) == (outcome, because), verdict.rows
        assert verdict.tasks == len(TASKS) and verdict.runs == len(TASKS) * len(SEEDS)


IN_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "best everywhere": ({"in-equal": 0.0}, HOLDS),
    "worse than direct": ({"in-equal": 0.05}, FAILS),
    "worse than cont alone": ({"in-equal": 0.0, "cont": -0.02}, FAILS),
    "worse than post alone": ({"in-equal": 0.0, "post": -0.02}, FAILS),
    "a tie": ({}, DEPENDS),
    "the best area, but far below direct at one rank": ({"in-equal": dict.fromkeys(RANKS, -0.1) | {4: 0.04}}, FAILS),
}


@pytest.mark.parametrize(("gaps", "outcome"), IN_CASES.values(), ids=IN_CASES)
def test_squeezing_while_training_is_judged_by_its_whole_curve(gaps: dict[str, Any], outcome: str) -> None:
    for verdict in judged(world(changed(gaps)), "d, in-equal").values():
        assert verdict.outcome == outcome, verdict.rows


@pytest.mark.parametrize(
    ("behind", "outcome", "answer"), [(0.005, HOLDS, "yes"), (0.03, DEPENDS, "undecided")], ids=["within", "beyond"]
)
def test_while_training_may_be_one_error_below_direct_at_a_rank(behind: float, outcome: str, answer: str) -> None:
    """Tasks that differ by 0.05 up and down leave an error of about 0.022 over five tasks."""

    def gap(method: str, rank: int, place: int) -> float:
        if method != "in-equal":
            return PLAIN
        return PLAIN + (behind + (0.05, -0.05, 0.05, -0.05, 0.0)[place] if rank == 4 else -0.1)

    for verdict in judged(world(gap), "d, in-equal").values():
        found = {line[0]: line[-1] for line in verdict.rows}
        assert (verdict.outcome, found["rank 4 over direct"]) == (outcome, answer), verdict.rows


def test_losses_are_told_as_shares_of_what_the_source_gains() -> None:
    """One task with losses ten times as large, and an effect of one twentieth there, decides no more than its share."""
    rows = world(changed({"post": {2: 0.1, 1: 0.1}}))
    for r in rows:
        r["loss"] *= 10 if r["task"] == TASKS[0] else 1
    (line,) = (line for line in judged(rows, "b")["loss"].rows if line[0] == "1")
    assert line[1].startswith("+8.0") and line[3] == "yes"
    assert judged(rows, "b")["loss"].outcome == HOLDS


def test_tasks_that_the_source_does_not_learn_do_not_count() -> None:
    rows = world(changed({"post": {2: 0.1, 1: 0.3}}))
    for r in rows:
        if r["method"] == "base" and r["task"] == TASKS[0]:
            r["loss"] = 0.1  # better than the source
        if r["method"] == "base" and r["task"] == TASKS[1]:
            r["accuracy"] += 0.2  # 25 points below the source, then 5
        if r["method"] == "base" and r["task"] == TASKS[2]:
            r["commonest"] = 0.6
    results = only(rows)
    assert results.learned(LEARNED) == list(TASKS[1:]) and results.learned(ACCURACY) == [TASKS[0], *TASKS[3:]]
    assert {m: v.tasks for m, v in judged(rows, "b").items()} == {"loss": 4, "accuracy": 3}
    page = verdicts_page([results])
    assert "toy, tasks that do not count by accuracy, since the source learns too little: task-b, task-c." in page
    assert "toy, tasks that do not count by loss, since the source learns too little: task-a." in page


def test_beyond_doubt_is_what_student_says() -> None:
    """Draws without an effect are decided in about 5 % of cases, with few tasks as with many."""
    g = random.Random(1)
    for tasks in (3, 5, 20):
        decided = 0
        for _ in range(4000):
            found = estimate({(str(task), 0): g.gauss(0, 1) for task in range(tasks)})
            assert found is not None and found.error is not None
            decided += abs(found.mean) > found.surely * found.error
        assert 0.035 < decided / 4000 < 0.065, tasks


def test_a_run_without_its_source_is_in_no_verdict() -> None:
    rows = world(plain)
    del rows[next(i for i, r in enumerate(rows) if r["rank"] == 64)]
    assert {v.runs for v in all_verdicts(only(rows)) if v.outcome != UNMEASURED} == {len(TASKS) * len(SEEDS) - 1}


def test_each_allocation_is_judged_on_its_own() -> None:
    rows = world(changed({"in-equal": 0.0, "in-proportional": 0.1}))
    assert {v.outcome for v in judged(rows, "d, in-equal").values()} == {HOLDS}
    assert {v.outcome for v in judged(rows, "d, in-proportional").values()} == {FAILS}
    assert {v.outcome for v in judged(rows, "d, in-adaptive").values()} == {UNMEASURED}


@pytest.mark.parametrize("claim", ["a", "b", "c, against direct", "d, in-equal", "e", "f, plan over post"])
def test_effects_that_change_their_sign_from_task_to_task_decide_nothing(claim: str) -> None:
    """As large as the planted ones, but upwards on some tasks and downwards on others."""

    def gap(method: str, rank: int, place: int) -> float:
        return PLAIN + (0.1, -0.1, 0.1, -0.1, 0.0)[place] * (method in ("post", "cont", "in-equal"))

    assert {v.outcome for v in judged(world(gap), claim).values()} == {DEPENDS}


def test_one_run_decides_nothing() -> None:
    rows = world(changed({"post": 0.5, "in-equal": -0.5}), tasks=TASKS[:1], seeds=(0,))
    for verdict in all_verdicts(only(rows)):
        assert verdict.outcome in (DEPENDS, UNMEASURED), verdict.claim


def test_with_one_seed_the_noise_of_the_source_is_unknown() -> None:
    verdicts = judged(world(changed({"post": 0.0}), seeds=(0,)), "a")
    assert {v.because for v in verdicts.values()} == {"undecided: rank 16"}


def test_a_plan_that_is_the_uniform_one_does_not_count() -> None:
    rows = world(changed({"plan": -0.01}))
    post = {(r["task"], r["seed"]): r for r in rows if (r["method"], r["rank"]) == ("post", 1)}
    for r in rows:
        if (r["method"], r["rank"]) == ("plan", 1):
            r |= {name: post[r["task"], r["seed"]][name] for name in ("loss", "accuracy")}
    verdict = judged(rows, "f, plan over post")["loss"]
    assert verdict.outcome == HOLDS and verdict.because.endswith("the same adapter: rank 1")


def test_a_plan_with_more_bytes_is_undecided() -> None:
    rows = world(changed({"plan": -0.01}))
    for r in rows:
        r["bytes"] *= 1.02 if r["method"] == "plan" else 1
    verdict = judged(rows, "f, plan over post")["loss"]
    assert verdict.outcome == DEPENDS and verdict.because.startswith("undecided: rank 16")


def test_the_figures_of_a_verdict_are_those_of_the_rows() -> None:
    rows = world(changed({"post": {2: 0.1, 1: 0.3}}))
    losses = {(r["task"], r["seed"], r["method"], r["rank"]): r["loss"] for r in rows}

    def means(method: str, rank: int) -> list[float]:
        return [mean(losses[task, seed, method, rank] for seed in SEEDS) for task in TASKS]

    gaps = [a - b for a, b in zip(means("post", 1), means("direct", 1), strict=True)]
    told = f"{100 * mean(gaps):+.2f} ± {100 * stdev(gaps) / len(TASKS) ** 0.5:.2f}"  # the source gains 1 nat
    assert list(judged(rows, "b")["loss"].rows[1]) == ["1", told, "5 of 5", "yes"]
    recovered = (mean(means("post", 1)) - mean(means("cont", 1))) / mean(gaps)
    assert judged(rows, "c, against direct")["loss"].rows[-1][2] == f"{recovered:.0%}"
    closed = [
        (mean(means("post", r)) - mean(means("post-data", r))) / (mean(means("post", r)) - mean(means("direct", 64)))
        for r in RANKS
    ]
    e = judged(rows, "e")["loss"]
    assert [line[2] for line in e.rows] == [*(f"{share:.0%}" for share in closed), f"{mean(closed):.0%}"]


# --- tables -----------------------------------------------------------------------------------------------------------


def parsed(text: str) -> dict[str, dict[str, str]]:
    """A Markdown table by first cell and head."""
    lines = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[0] == "|"]
    return {line[0]: dict(zip(lines[0], line, strict=True)) for line in lines[2:]}


def reference(rows: list[Row], tasks: tuple[str, ...], figure: Callable[[dict[tuple[str, int], Row]], float]) -> str:
    """Mean ± standard error over these tasks of a figure of the cells of one task and seed."""
    values = []
    for task in tasks:
        cells = [
            {(r["method"], r["rank"]): r for r in rows if (r["task"], r["seed"]) == (task, seed)} for seed in SEEDS
        ]
        values.append(mean(100 * figure(cell) for cell in cells if len(cell) == 42))
    return f"{mean(values):.2f} ± {stdev(values) / len(values) ** 0.5:.2f}"


def test_cells_are_means_over_tasks_and_aurac_is_that_of_the_curve() -> None:
    rows = world(changed({"post": {2: 0.1, 1: 0.3}}))
    results = only(rows)
    runs = results.balanced(results.core_arms())
    found = parsed(tables.values_table(results, ACCURACY, runs))
    assert list(found) == list(DEFAULT_METHODS)
    assert list(found["post"]) == ["method", "16", "8", "4", "2", "1", "AURAC"]
    assert found["post"]["1"] == reference(rows, TASKS, lambda cell: cell["post", 1]["accuracy"])

    def area(cell: dict[tuple[str, int], Row]) -> float:
        heights = [cell["post", rank]["accuracy"] for rank in RANKS]
        return float(sum(heights) - (heights[0] + heights[-1]) / 2) / (len(RANKS) - 1)

    assert found["post"]["AURAC"] == reference(rows, TASKS, area)
    paired = parsed(tables.values_table(results, ACCURACY, runs, against="direct"))
    difference = reference(rows, TASKS, lambda cell: cell["post", 1]["accuracy"] - cell["direct", 1]["accuracy"])
    assert paired["post"]["1"] == difference and "direct" not in paired


def test_a_task_that_lacks_an_arm_is_in_no_mean_and_is_listed() -> None:
    rows = world(plain)
    rows = [r for r in rows if not (r["task"] == "task-b" and (r["method"], r["rank"]) == ("cont", 4))]
    results = only(rows)
    runs = results.balanced(results.core_arms())
    kept = tuple(task for task in TASKS if task != "task-b")
    found = parsed(tables.values_table(results, ACCURACY, runs))
    assert found["direct"]["8"] == reference(rows, kept, lambda cell: cell["direct", 8]["accuracy"])
    page = tables_page(gather(rows), {})
    assert "Means over 4 of 5 tasks (task-a, task-c, task-d, task-e), seeds of each: 3" in page
    assert "Left out, since they lack methods, ranks or all common seeds: task-b." in page
    listed = [f"- task-b, seed {seed}: cont 4" for seed in SEEDS]
    assert tables.missing_list(results).splitlines() == listed and all(line in page for line in listed)


def test_a_seed_that_lacks_an_arm_leaves_its_task_the_others() -> None:
    rows = world(plain)
    rows = [r for r in rows if (r["task"], r["seed"], r["method"], r["rank"]) != ("task-b", 1, "cont", 4)]
    page = tables_page(gather(rows), {})
    assert "Means over 5 of 5 tasks" in page and "seeds of each: 2 to 3" in page
    found = parsed(tables.values_table(only(rows), ACCURACY, only(rows).balanced(only(rows).core_arms())))
    assert found["direct"]["8"] == reference(rows, TASKS, lambda cell: cell["direct", 8]["accuracy"])
    assert "- task-b, seed 1: cont 4" in page and "(n=2)" in page


def test_an_arm_without_any_row_is_a_dash_and_is_listed() -> None:
    rows = [r for r in world(plain) if (r["method"], r["rank"]) != ("cont", 4) and r["method"] != "base"]
    results = only(rows)
    found = parsed(tables.values_table(results, ACCURACY, results.balanced(results.core_arms())))
    assert found["cont"]["4"] == "-" and found["cont"]["8"] != "-"
    assert tables.missing_list(results) == "- nowhere: base; cont 4"
    page = tables_page(gather(rows), {})
    assert "AURAC: mean over ranks 1, 2, 8, 16 on the log2 axis" in page and "Base model: -. Source" in page


def test_calibration_and_cost_are_paired_with_direct_and_the_source() -> None:
    rows = world(changed({"post": 0.3}))
    results = only(rows)
    runs = results.balanced(results.core_arms())
    text = tables.calibration_table(results, runs)
    line = next(line for line in text.splitlines() if re.match(r"\| post +\| +1 \|", line))
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells[2] == reference(rows, TASKS, lambda cell: cell["post", 1]["ece"])
    assert cells[3] == "+" + reference(rows, TASKS, lambda cell: cell["post", 1]["ece"] - cell["direct", 1]["ece"])
    assert cells[7] == "+" + reference(rows, TASKS, lambda cell: cell["post", 1]["mce"] - cell["direct", 64]["mce"])
    cost = tables.cost_table(results, runs)
    line = next(line for line in cost.splitlines() if re.match(r"\| direct +\| +16 \|", line))
    cells = [cell.strip() for cell in line.strip("| ").split("|")]
    assert cells == ["direct", "16", "160", "0.001", f"{26 / 74:.3f} ± 0.000", "0.250 ± 0.000", "900", "-"]


def test_with_one_seed_single_tasks_have_no_error_and_means_over_tasks_do() -> None:
    page = tables_page(gather(world(plain, seeds=(0,))), {})
    means, single = page.split("### Single tasks")
    assert "± -" not in means and re.search(r"\d ± - ", single) and "±  " not in page


def test_a_diverged_run_is_shown_and_decides_nothing() -> None:
    rows = world(changed({"post": 0.3}))
    rows[next(i for i, r in enumerate(rows) if (r["method"], r["rank"]) == ("post", 1))]["loss"] = float("nan")
    results = only(rows)
    found = parsed(tables.values_table(results, LOSS, results.balanced(results.core_arms())))
    assert found["post"]["1"] == "nan ± nan"
    assert judged(rows, "b")["loss"].because == "yes: rank 2; undecided: rank 1"


def test_other_methods_stand_beside_direct_on_the_tasks_they_have() -> None:
    """And do not take the other tasks out of the main tables."""
    options = {"options": {"r": 256}}
    rows = world(plain)
    direct = {(r["task"], r["seed"], r["rank"]): r["loss"] for r in rows if r["method"] == "direct"}
    for task in TASKS[:2]:
        for seed in SEEDS:
            rows.append(row(task, "peft:VERA", 0, seed, direct[task, seed, 64] + 0.25, **options))
            rows.append(row(task, "peft:VERA squeezed", 8, seed, direct[task, seed, 8] + 0.5, **options))
    found = parsed(tables.further_table(only(rows)))
    assert list(found) == ['peft:VERA squeezed {"r": 256}', 'peft:VERA {"r": 256}']
    for line, beside, gap in zip(found.values(), ("direct 8", "direct 64"), ("+0.5000", "+0.2500"), strict=True):
        assert (line["beside"], line["tasks, runs"]) == (beside, "2, 6") and line["minus"] == f"{gap} ± 0.0000"
    page = tables_page(gather(rows), {})
    assert "Means over 5 of 5 tasks" in page and tables.missing_list(only(rows)) == "Nothing."


# --- learning rates ---------------------------------------------------------------------------------------------------


def tried(rate: float, loss: float, method: str = "direct", seed: int = 0) -> Row:
    return row("task-a", method, 8, seed, loss, rate=rate, purpose="tune", part="validation")


def test_the_rate_of_the_lowest_mean_loss_is_the_chosen_one() -> None:
    rows = [tried(1e-3, 1.0), tried(1e-3, 1.4, seed=1), tried(3e-3, 1.1), tried(3e-4, 1.3)]
    rows += [tried(1e-3, 1.0, "cont"), tried(3e-3, 0.9, "cont")]
    rows += [row("task-a", "direct", 8, 0, 1.0, rate=3e-3), row("task-a", "cont", 8, 0, 1.0, rate=1e-3)]
    found = parsed(rates_table(only(rows)))
    assert found["direct"]["rate: mean validation loss"] == "0.0003: 1.3000, 0.001: 1.2000 (n=2), 0.003: 1.1000"
    assert (found["direct"]["chosen"], found["direct"]["used"]) == ("0.003 (end)", "0.003")
    assert (found["cont"]["chosen"], found["cont"]["used"]) == ("0.003 (end)", "0.001 (differs)")
    inside = parsed(rates_table(only([tried(1e-3, 1.0), tried(3e-3, 1.1), tried(3e-4, 1.3)])))
    assert (inside["direct"]["chosen"], inside["direct"]["used"]) == ("0.001", "-")
    assert rates_table(only(world(plain))) == ""


# --- rows -------------------------------------------------------------------------------------------------------------


def test_validation_rows_are_in_no_table_of_results() -> None:
    rows = world(plain)
    more = [tried(1e-3, 9.0, seed=seed) for seed in SEEDS]
    assert only(rows + more).cells == only(rows).cells and verdicts_page([only(rows + more)]) == verdicts_page(
        [only(rows)]
    )


def test_of_rows_with_one_key_the_first_by_time_counts() -> None:
    late = row("task-a", "direct", 8, 0, 2.0, time="2026-01-02T00:00:00+00:00")
    early = row("task-a", "direct", 8, 0, 1.0)
    for rows in ([late, early], [early, late]):
        report = gather(rows)
        assert report.duplicates == 1
        assert report.models[0].cells["task-a", 0]["direct", 8]["loss"] == 1.0
        page = tables_page(report, {})
        assert "seed and purpose: 1." in page and "1 results on test data, 0 on validation data" in page


def test_one_arm_with_two_learning_rates_is_refused() -> None:
    with pytest.raises(LoraSqueezeError, match=r"two learning rates; leave one out: .*task-a"):
        gather([row("task-a", "direct", 8, 0, 1.0), row("task-a", "direct", 8, 0, 1.0, rate=3e-3)])
    source, post = row("task-a", "direct", 64, 0, 1.0), row("task-a", "post", 8, 0, 1.0, rate=None, source_rate=3e-3)
    with pytest.raises(LoraSqueezeError, match=r"post at rank 8 comes from a source with learning rate 0\.003"):
        gather([source, post])
    gather([source, post | {"source_rate": 1e-3}])


def test_another_budget_is_another_model_and_another_setting_another_method() -> None:
    rows = [row("task-a", "direct", 8, 0, 1.0), row("task-a", "direct", 8, 0, 1.0, steps=200)]
    assert len(gather([*rows, row("task-a", "direct", 8, 0, 1.0, weights="x")]).models) == 3
    report = gather([*rows, row("task-a", "direct", 8, 0, 1.0, options={"x": 1})])
    assert report.duplicates == 0
    titles = ["toy, 100 steps of 8 examples, source rank 64", "toy, 200 steps of 8 examples, source rank 64"]
    assert [results.title for results in report.models] == titles == labels(report.models)
    assert labels(report.models[:1]) == ["toy"]
    assert report.models[0].arms == [("direct", 8), ('direct {"x": 1}', 8)]


def test_a_task_and_seed_has_the_rows_of_one_precision() -> None:
    wide, narrow = {"precision": "float32"}, {"precision": "bfloat16"}
    rows = [
        row("task-a", "direct", 8, 0, 1.0, **wide, time="1"),
        row("task-a", "direct", 8, 0, 2.0, **narrow, time="2"),
        row("task-a", "post", 8, 0, 3.0, **narrow, time="3"),
        row("task-a", "direct", 8, 1, 4.0, **narrow, time="5"),
        row("task-a", "direct", 8, 1, 5.0, **wide, time="4"),
    ]
    report = gather(rows)
    (results,) = report.models
    assert report.duplicates == 0
    assert {arm: row["loss"] for arm, row in results.cells["task-a", 0].items()} == {
        ("direct", 8): 2.0,
        ("post", 8): 3.0,
    }
    assert results.cells["task-a", 1]["direct", 8]["loss"] == 5.0, "the first of equals"
    assert results.title.endswith("bfloat16 and float32")


def test_lines_of_other_kinds_are_passed_over_and_machines_are_listed() -> None:
    machine = {"kind": "machine", "processor": "toy cpu", "cores": 2, "command": "bench run", "load_at_start": [1.0]}
    report = gather([{"kind": "note"}, {}, machine, machine, row("task-a", "direct", 8, 0, 1.0)])
    page = tables_page(report, {})
    assert len(report.models) == 1 and page.count("toy cpu") == page.count("bench run") == 1


def test_without_what_a_claim_needs_it_is_not_measured() -> None:
    page = verdicts_page([only([row("task-a", "direct", 8, 0, 1.0)])])
    assert page.count("**toy, by accuracy: not measured.**") == 2 and "(depends" not in page
    assert "**toy, in-adaptive, by accuracy: not measured.**" in page, "as no other form of the claim is measured"


def test_forms_of_a_claim_that_no_model_measured_are_left_out_of_the_page() -> None:
    page = verdicts_page([only(world(plain))])
    assert "in-equal" in page and "in-adaptive" not in page


# --- the whole --------------------------------------------------------------------------------------------------------


def written(rows: list[Row], path: Path) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture
def small() -> list[Row]:
    """Two models, one of them with a diverged run, another method, rates tried, and a run that is missing."""
    rows = world(changed({"post": {2: 0.1, 1: 0.3}}), tasks=TASKS[:2], seeds=(0, 1))
    other = [r | {"model": "other"} for r in rows if r["task"] == "task-a"]
    other[5]["loss"] = float("nan")
    rows += other
    rows += [row("task-a", "peft:VERA squeezed", rank, 0, 1.0) for rank in RANKS] + [tried(1e-3, 1.0), rows[0]]
    del rows[30]
    return rows


def test_the_same_rows_in_any_order_give_the_same_bytes(small: list[Row], tmp_path: Path, capsys: Any) -> None:
    contents = []
    for place in range(2):
        random.Random(place).shuffle(small)
        half = len(small) // 2
        files = [written(small[:half], tmp_path / "one.jsonl"), written(small[half:], tmp_path / "two.jsonl")]
        out = tmp_path / f"out-{place}" / "deep"
        main([*map(str, files), "--out", str(out)])
        said = capsys.readouterr().out.splitlines()
        found = {path.name: path.read_bytes() for path in out.iterdir()}
        assert sorted(said) == sorted(str(out / name) for name in found)
        contents.append(found)
    assert contents[0] == contents[1]
    pictures = {f"{name}-{field}.png" for name in ("means", "toy", "other") for field in ("accuracy", "loss")}
    assert set(contents[0]) == pictures | {"tables.md", "verdicts.md"}
    page = contents[0]["tables.md"].decode()
    assert all(f"({name})" in page and contents[0][name].startswith(b"\x89PNG") for name in pictures)
    assert all(b"Software" not in contents[0][name] and b"tIME" not in contents[0][name] for name in pictures)


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    def refusal(*paths: Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, paths), "--out", str(tmp_path / "out")])
        return str(stopped.value)

    assert refusal(tmp_path / "none.jsonl") == f"{tmp_path / 'none.jsonl'}: no such file of rows"
    empty = written([{"kind": "machine"}], tmp_path / "empty.jsonl")
    assert refusal(empty) == f"no results in {empty}"
    broken = written([{"kind": "result", "task": "x", "seed": 0}], tmp_path / "broken.jsonl")
    assert refusal(broken).startswith('a result has no method, rank, purpose, model, loss, accuracy: {"kind": "result"')
    assert not (tmp_path / "out").exists()


def test_every_arm_has_a_look_and_the_legend_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(curves, "_save", lambda figure, path: figures.append(figure))
    results = gather(world(lambda method, rank, place: PLAIN, methods=METHODS)).models
    names = curves.draw_all(results, tmp_path)
    assert {title.partition(",")[0] for title in names} == {"means", "toy"}
    for figure in figures:
        figure.draw_without_rendering()
        (legend,) = figure.legends
        assert {text.get_text() for text in legend.get_texts()} == {*METHODS, "source, rank 64"}
        box = legend.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0
    looks = [curves._LOOKS[method] for method in METHODS]
    assert len(set(looks)) == len(looks)
