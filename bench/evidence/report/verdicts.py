"""The claims about LoRA-Squeeze, and by which rule each is judged.

The claims are those of the paper (arXiv 2602.10993), (a) to (d), and two of this project, (e) and (f). The rules were
written before there were results.

What is compared is the gain of one arm over another on the same task and seed: difference of accuracy, or of loss with
the sign turned, so that more is better. Losses of tasks differ, so theirs is told as a share of what the source gains
on the base model on that task: 1 % of a task that is learned easily counts as much as 1 % of another. A task counts by
loss if the source is better than the base model, and by accuracy if it is 10 points above both the base model and the
commonest answer: below that, nothing can be told apart.

Seeds are averaged within a task. `decide` answers for each rank whether a quantity lies above 0: "yes" if its mean is
above 0 beyond doubt (the two-sided test of Student at 5 %) and more tasks are above than below, "no" if the same holds
below, else "undecided". Then, unless its own text says otherwise, a claim

- holds, if the answer is yes at every rank that counts;
- does not hold, if the answer is no at every rank that counts;
- depends, in all other cases; the answers at the single ranks say on what.

A claim whose arms have no task and seed in common is "not measured". Every claim uses all tasks and seeds that have all
arms of that claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from bench.evidence.methods import SCHEDULES, SOURCE
from bench.evidence.report.estimate import (
    NO,
    OPEN,
    YES,
    Estimate,
    decide,
    estimate,
    number,
    pooled_deviation,
    spread,
)
from bench.evidence.report.results import ACCURACY, BASE, LEARNED, Arm, Measure, Results, Run

MODERATE = 4  # times smaller than the source, at most
NOISE_SHARE = 0.05  # of what the source gains: no more is noise
EXTREME = 2  # rank, at most
RECOVERED = 0.9
SLACK = 1.0  # standard errors that In-Squeeze may be below direct training
MORE_BYTES = 1.01  # plans of more than this share of the bytes of one rank for all are not compared
EQUAL = 1e-5  # of the loss
HOLDS, FAILS, DEPENDS, UNMEASURED = "holds", "does not hold", "depends", "not measured"
SAME, NOTHING = "the same adapter", "no gap beyond noise"


@dataclass(frozen=True)
class Verdict:
    """The answer to one claim.

    Args:
        claim: letter, and what tells apart the several forms of a claim.
        measure: by which it is judged.
        outcome: holds, does not hold, depends, or not measured.
        because: the answers at the single ranks.
        tasks, runs: number of tasks, and of (task, seed).
        head, rows: table of the figures that decide.
    """

    claim: str
    measure: Measure
    outcome: str
    because: str = ""
    tasks: int = 0
    runs: int = 0
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def moderate(results: Results, measure: Measure) -> Verdict:
    """(a) At moderate compression Post-Squeeze is within noise of the source.

    Ranks that count: from source rank / 4 on; the next lower one is told. Noise is what another seed does to the
    source: the standard deviation of the source over seeds, pooled over tasks, but no more than 5 % of what the source
    gains. The quantity is the gain of post over the source plus this noise; the answer is yes if post is, beyond doubt,
    no further below the source than the noise. With one seed nothing is decided. How often post is better than direct
    training at its rank is told, and decides nothing.
    """
    shown = [rank for rank in results.ranks("post", SOURCE) if 2 * rank * MODERATE >= results.source[1]]
    runs = _runs(results, shown, measure, "post", SOURCE)
    noise = _noise(results, measure, runs)
    answers, rows = {}, []
    for rank in shown if runs else []:
        gain = _gain(results, ("post", rank), results.source, measure, runs)
        over = results.gains(("post", rank), (SOURCE, rank), measure, runs)
        answer = OPEN if noise is None else decide(gain.plus(noise))
        if rank * MODERATE >= results.source[1]:
            answers[rank] = answer
        wins = f"{sum(value > 0 for value in over.values())} of {len(over)}"
        told = "-" if noise is None else number(noise, measure.digits, measure.factor)
        rows.append([str(rank), _told(gain, measure), told, _told(estimate(over), measure), wins, answer])
    head = ["rank", "post over source", "noise of the source", "post over direct", "better than direct", "within noise"]
    return _verdict("a", measure, answers, runs, head, rows)


def extreme(results: Results, measure: Measure) -> Verdict:
    """(b) At extreme compression Post-Squeeze collapses: it is worse than direct training at the same rank.

    Ranks that count: 1 and 2. The quantity is the gain of direct over post.
    """
    ranks = [rank for rank in results.ranks("post", SOURCE) if rank <= EXTREME]
    runs = _runs(results, ranks, measure, "post", SOURCE)
    answers, rows = {}, []
    for rank in ranks if runs else []:
        gain = _gain(results, (SOURCE, rank), ("post", rank), measure, runs)
        answers[rank] = decide(gain)
        rows.append([str(rank), _told(gain, measure), _most(gain), answers[rank]])
    return _verdict("b", measure, answers, runs, ["rank", "direct over post", "tasks", "worse"], rows)


def recovery(results: Results, reference: str) -> Verdict:
    """(c) A few more steps, Cont-Squeeze, recover at least 90 % of what Post-Squeeze loses.

    Judged by loss, once against direct training at the same rank and once against the source. Ranks that count: those
    with something to recover, at which post is worse than the reference by the rule of `decide`. The quantity is
    0.1 post + 0.9 reference - cont, above 0 where more than 90 % of (post - reference) are recovered. The share that is
    told is the one of the mean losses.
    """
    ranks = results.ranks("post", "cont", SOURCE)
    runs = _runs(results, ranks, LEARNED, "post", "cont", SOURCE)
    answers: dict[int, str] = {}
    rows = []
    for rank in ranks if runs else []:
        other = results.source if reference == "source" else (SOURCE, rank)
        gap = _gain(results, other, ("post", rank), LEARNED, runs)
        back = results.gains(("cont", rank), ("post", rank), LEARNED, runs)
        lost = results.gains(other, ("post", rank), LEARNED, runs)
        beyond = _estimated({run: back[run] - RECOVERED * lost[run] for run in runs})
        answers[rank] = decide(beyond) if decide(gap) == YES else NOTHING
        share = f"{_estimated(back).mean / gap.mean:.0%}" if answers[rank] != NOTHING else "-"
        rows.append([str(rank), _told(gap, LEARNED), share, _told(beyond, LEARNED), _most(beyond), answers[rank]])
    head = ["rank", f"{reference} over post", "recovered", "beyond 90 %", "tasks", "at least 90 %"]
    return _verdict(f"c, against {reference}", LEARNED, answers, runs, head, rows)


def best_curve(results: Results, measure: Measure, method: str) -> Verdict:
    """(d) In-Squeeze has the best curve of quality over size; each allocation of steps is judged on its own.

    Two parts. (1) The gain in AURAC (log2 axis, all ranks; by loss, the area under the curve of loss) over each of
    direct, post and cont: yes if it is above 0 for all of them, no if it is below 0 for any, by the rule of `decide`.
    (2) At every rank the gain over direct is at least -1 standard error of that gain: no if direct is better at any
    rank by the rule of `decide`. The claim holds if both parts are yes, does not hold if either is no, else depends.
    """
    rivals = [SOURCE, "post", "cont"]
    ranks = results.ranks(method, *rivals)
    runs = _runs(results, ranks, measure, method, *rivals)
    claim = f"d, {method}"
    if not runs:
        return Verdict(claim, measure, UNMEASURED)
    mine = results.areas(method, ranks, measure, runs)
    rows, first = [], {}
    for rival in rivals:
        theirs = results.areas(rival, ranks, measure, runs)
        gain = _estimated(results.better(mine, theirs, measure))
        first[f"AURAC over {rival}"] = decide(gain)
        rows.append([f"AURAC over {rival}", _told(gain, measure), _most(gain), decide(gain)])
    second = {}
    for rank in ranks:
        gain = _gain(results, (method, rank), (SOURCE, rank), measure, runs)
        second[f"rank {rank}"] = _not_below(gain)
        rows.append([f"rank {rank} over direct", _told(gain, measure), _most(gain), second[f"rank {rank}"]])
    parts = [_part(first.values()), _part(second.values())]
    outcome = HOLDS if parts == [YES, YES] else FAILS if NO in parts else DEPENDS
    head = ["comparison", "gain", "tasks", "answer"]
    return Verdict(claim, measure, outcome, _because({**first, **second}), _tasks(runs), len(runs), head, rows)


def free_gain(results: Results) -> Verdict:
    """(e) Truncation in the metric of the data closes a part of the gap between Post-Squeeze and the source, for free.

    Judged by loss. Ranks that count: those with a gap, at which post is worse than the source by the rule of `decide`.
    The quantity is the gain of post-data over post. The share that is told is the one of the mean losses.
    """
    ranks = results.ranks("post", "post-data")
    runs = _runs(results, ranks, LEARNED, "post", "post-data")
    answers, rows, shares = {}, [], []
    for rank in ranks if runs else []:
        gap = _gain(results, results.source, ("post", rank), LEARNED, runs)
        gain = _gain(results, ("post-data", rank), ("post", rank), LEARNED, runs)
        answers[rank] = decide(gain) if decide(gap) == YES else NOTHING
        if answers[rank] != NOTHING:
            shares.append(gain.mean / gap.mean)
        share = f"{shares[-1]:.0%}" if answers[rank] != NOTHING else "-"
        rows.append([str(rank), _told(gap, LEARNED), share, _told(gain, LEARNED), _most(gain), answers[rank]])
    if shares:
        rows.append(["mean", "", f"{sum(shares) / len(shares):.0%}", "", "", ""])
    head = ["rank", "source over post", "closed", "post-data over post", "tasks", "closes a part"]
    return _verdict("e", LEARNED, answers, runs, head, rows)


def rank_per_module(results: Results, measure: Measure, plan: str, uniform: str) -> Verdict:
    """(f) At equal bytes, a rank for each module is better than one rank for all.

    Judged for plan against post, and for plan-data against post-data. The quantity is the gain of the plan. A rank at
    which both have the same loss (to 1e-5 of it) on every task and seed does not count: there the plan is the uniform
    one. Plans with more than 1.01 times the bytes, on the mean, are undecided.
    """
    ranks = results.ranks(plan, uniform)
    runs = _runs(results, ranks, measure, plan, uniform)
    answers: dict[int, str] = {}
    rows = []
    for rank in ranks if runs else []:
        gain = _gain(results, (plan, rank), (uniform, rank), measure, runs)
        sizes = [results.values((method, rank), "bytes", runs) for method in (plan, uniform)]
        bytes_ratio = sum(sizes[0][run] / sizes[1][run] for run in runs) / len(runs)
        losses = [results.values((method, rank), "loss", runs) for method in (plan, uniform)]
        if all(math.isclose(losses[0][run], losses[1][run], rel_tol=EQUAL) for run in runs):
            answers[rank] = SAME
        else:
            answers[rank] = decide(gain) if bytes_ratio <= MORE_BYTES else OPEN
        rows.append([str(rank), f"{bytes_ratio:.3f}", _told(gain, measure), _most(gain), answers[rank]])
    head = ["rank", "bytes, times", f"{plan} over {uniform}", "tasks", "better"]
    return _verdict(f"f, {plan} over {uniform}", measure, answers, runs, head, rows)


CLAIMS: dict[str, Callable[..., Verdict]] = {  # by letter: their docstrings say the rules
    "a": moderate,
    "b": extreme,
    "c": recovery,
    "d": best_curve,
    "e": free_gain,
    "f": rank_per_module,
}


def all_verdicts(results: Results) -> Iterator[Verdict]:
    """Every claim in each of its forms; by accuracy and by loss where it can be judged by both."""
    both = (ACCURACY, LEARNED)
    yield from (moderate(results, measure) for measure in both)
    yield from (extreme(results, measure) for measure in both)
    yield from (recovery(results, reference) for reference in (SOURCE, "source"))
    yield from (best_curve(results, measure, method) for method in SCHEDULES for measure in both)
    yield free_gain(results)
    for pair in (("plan", "post"), ("plan-data", "post-data")):
        yield from (rank_per_module(results, measure, *pair) for measure in both)


def _runs(results: Results, ranks: Sequence[int], measure: Measure, *methods: str) -> list[Run]:
    """The (task, seed) that have base, source and these methods at all ranks, of the tasks that count."""
    arms = [BASE, results.source, *((method, rank) for method in methods for rank in ranks)]
    counted = results.learned(measure)
    return [run for run in results.balanced(arms) if run[0] in counted] if ranks else []


def _noise(results: Results, measure: Measure, runs: Sequence[Run]) -> float | None:
    source = results.values(results.source, measure.field, runs)
    deviation = pooled_deviation(results.better(source, dict.fromkeys(source, 0.0), measure))
    if deviation is None:
        return None
    gained = [1.0 if measure.relative else results.gained(task, measure) for task in {task for task, _ in runs}]
    return min(deviation, NOISE_SHARE * sum(gained) / len(gained))


def _gain(results: Results, arm: Arm, other: Arm, measure: Measure, runs: Sequence[Run]) -> Estimate:
    return _estimated(results.gains(arm, other, measure, runs))


def _estimated(values: dict[Run, float]) -> Estimate:
    found = estimate(values)
    assert found is not None, "claims without runs end before"
    return found


def _not_below(gain: Estimate) -> str:
    """Whether a gain is from minus one standard error on; no, if it is below 0 by the rule of `decide`."""
    if gain.error is None or math.isnan(gain.error):
        return OPEN
    return YES if gain.mean >= -SLACK * gain.error else NO if decide(gain) == NO else OPEN


def _part(answers: Collection[str]) -> str:
    """Yes if all are, no if any is."""
    return NO if NO in answers else YES if all(answer == YES for answer in answers) else OPEN


def _verdict(
    claim: str, measure: Measure, answers: dict[int, str], runs: Sequence[Run],
    head: Sequence[str], rows: Sequence[Sequence[str]],
) -> Verdict:  # fmt: skip
    """From the answers at single ranks, by the rule at the top."""
    if not runs:
        return Verdict(claim, measure, UNMEASURED)
    counted = [answer for answer in answers.values() if answer in (YES, NO, OPEN)]
    outcome = DEPENDS
    if counted and all(answer == YES for answer in counted):
        outcome = HOLDS
    elif counted and all(answer == NO for answer in counted):
        outcome = FAILS
    because = _because({f"rank {rank}": answer for rank, answer in answers.items()})
    return Verdict(claim, measure, outcome, because, _tasks(runs), len(runs), head, rows)


def _because(answers: dict[str, str]) -> str:
    """ "yes: rank 16, rank 8; undecided: rank 4"."""
    kinds = dict.fromkeys(answers.values())
    return "; ".join(f"{kind}: {', '.join(where for where, a in answers.items() if a == kind)}" for kind in kinds)


def _tasks(runs: Sequence[Run]) -> int:
    return len({task for task, _ in runs})


def _told(found: Estimate | None, measure: Measure) -> str:
    return spread(found, measure.digits, measure.factor, signed=True)


def _most(found: Estimate) -> str:
    return f"{found.above} of {len(found.by_task)}"
