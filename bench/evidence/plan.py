"""From what is asked to the jobs that are still to be done."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bench.evidence import methods
from bench.evidence.rows import LOCAL, SETTING, Row, like
from bench.evidence.tune import GUESS, chosen_rate, next_rates
from bench.evidence.work import KEY, PEFT, Job


@dataclass(frozen=True)
class Asked:
    """What a run of the bench is asked for.

    Args:
        model: of `learners`.
        tasks, seeds, methods: for all combinations; for tuning, rates are the best over all tasks and seeds given.
        ranks: target ranks.
        source_rank: of the source and of squeezes while training.
        steps, batch: optimiser steps, and examples a step.
        examples: measured on, of the test or the validation data.
        store: folder for trained sources.
        foreign: "peft:NAME" -> settings of PEFT's configuration; words after the name tell several settings apart.
        rate: for every method, in place of the tuned ones.
        guess: where the search for a learning rate begins.
        weights: of the base model. Rows of others are not rows of this run.
        precision: of the products in training and measuring.
        build: of what is trained before, on each machine anew: the digest of a tower, None where there is none. A task
            with one seed is measured in one precision and with one build as a whole; where another machine has done
            that with others, it is done. Learning rates are of all.
    """

    model: str
    tasks: Sequence[str]
    seeds: Sequence[int]
    methods: Sequence[str]
    ranks: Sequence[int]
    source_rank: int
    steps: int
    batch: int
    examples: int
    store: str
    foreign: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rate: float | None = None
    guess: float = GUESS
    weights: str = ""
    precision: str = ""
    build: str | None = None


def final_jobs(asked: Asked, rows: Sequence[Row]) -> dict[str, Job]:
    """The jobs whose rows are missing, by a name that says what they are: all tasks of the first seed first."""
    jobs: dict[str, Job] = {}
    here = tuple(getattr(asked, name) for name in LOCAL)
    machines = {here, *(tuple(row.get(name) for name in LOCAL) for row in rows if row.get("purpose") == "final")}
    for seed in asked.seeds:
        for task in asked.tasks:
            missing = {
                local: _missing(replace(asked, **dict(zip(LOCAL, local, strict=True))), rows, task, seed)
                for local in machines
            }
            if all(missing.values()):
                jobs |= missing[here]
    return jobs


def _missing(asked: Asked, rows: Sequence[Row], task: str, seed: int) -> dict[str, Job]:
    found = {}
    for job in _cell(asked, rows, task, seed):
        wanted = tuple(w for w in job.wanted if not _done(rows, job, w))
        if wanted:
            found[_name(job)] = _with(job, wanted=wanted)
    return found


def tuning_jobs(asked: Asked, rows: Sequence[Row]) -> dict[str, Job]:
    """The next learning rates to try, of all methods and ranks; none when all are found.

    The others wait for the source, whose rate is what cont goes on from. A search begins at the rate of the rank above,
    at first at that of the source: it waits until that is known.
    """
    mine = _tuned(asked, rows)
    jobs: dict[str, Job] = {}
    source = methods.SOURCE, asked.source_rank
    source_rate: float | None = asked.guess
    known: dict[str, float] = {}  # rate of the rank above, by method
    searched: set[str] = set()
    for method, rank in _arms(asked):
        alone = (method, rank) == source or method.startswith(PEFT)
        tried = [row for row in like(mine, method=method, rank=rank) if row["task"] in asked.tasks]
        if not alone and (source_rate is None or (method in searched and not tried)):
            continue
        guess = asked.guess if alone or source_rate is None else known.get(method, source_rate)
        rates = next_rates(tried, guess) or sorted({float(row["rate"]) for row in tried})
        trials = [
            _tuning_job(asked, mine, task, seed, method, rank, rate)
            for rate, task, seed in itertools.product(rates, asked.tasks, asked.seeds)
        ]
        missing = [job for job in trials if not _done(rows, job, job.wanted[0])]
        for job in missing:
            _add(jobs, job)
        if missing:
            searched.add(method)
        else:
            known[method] = chosen_rate(tried, method, rank)
        if (method, rank) == source:
            source_rate = known.get(method)
    return jobs


def _add(jobs: dict[str, Job], job: Job) -> None:
    """Jobs that only differ in what they derive from one source are one."""
    name = _name(job)
    wanted = (*jobs[name].wanted, *job.wanted) if name in jobs else job.wanted
    jobs[name] = _with(job, wanted=wanted)


def _arms(asked: Asked) -> Iterator[tuple[str, int]]:
    """Methods with a learning rate of their own, and ranks; neighbours in rank are near in rate."""
    if _has_source(asked):
        yield methods.SOURCE, asked.source_rank
    for method in asked.methods:
        if method in methods.TRAINED:
            for rank in asked.ranks:
                yield method, rank
    for method in asked.foreign:
        yield method, 0


def _has_source(asked: Asked) -> bool:
    return any(method == methods.SOURCE or methods.from_source(method) for method in asked.methods)


def _tuned(asked: Asked, rows: Sequence[Row]) -> list[Row]:
    """Trials of learning rates for this model and budget, of any machine."""
    setting = {name: getattr(asked, name) for name in SETTING}
    return like(rows, kind="result", purpose="tune", **setting)


def _tuning_job(
    asked: Asked, rows: Sequence[Row], task: str, seed: int, method: str, rank: int, rate: float
) -> Job:  # fmt: skip
    if method in methods.CONTINUED:
        source = chosen_rate(rows, methods.SOURCE, asked.source_rank)
        trained = (methods.SOURCE, asked.source_rank, source)
    else:
        trained = (method, rank, rate)
    return _job(asked, task, seed, *trained, ((method, rank, rate),), "tune")


def _cell(asked: Asked, rows: Sequence[Row], task: str, seed: int) -> Iterator[Job]:
    """All jobs of one task and seed, the longest first."""
    tuned = _tuned(asked, rows)

    def rate(method: str, rank: int) -> float:
        if asked.rate is not None:
            return asked.rate
        return chosen_rate(tuned, method, rank)

    def job(method: str, rank: int, wanted: Sequence[tuple[str, int, float | None]]) -> Job:
        return _job(asked, task, seed, method, rank, rate(method, rank), tuple(wanted), "final")

    source = methods.SOURCE, asked.source_rank
    derived: list[tuple[str, int, float | None]] = [
        (method, rank, rate(method, rank) if method in methods.CONTINUED else None)
        for method in asked.methods
        if methods.from_source(method)
        for rank in asked.ranks
    ]
    if _has_source(asked):
        yield job(*source, [(*source, rate(*source)), *derived])
    yield _job(asked, task, seed, "base", 0, 0.0, (("base", 0, None),), "final")
    for method in asked.methods:
        if not methods.from_source(method):
            for rank in asked.ranks:
                yield job(method, rank, [(method, rank, rate(method, rank))])
    for method in asked.foreign:
        small = [(f"{method} squeezed", rank, rate(method, 0)) for rank in asked.ranks]
        yield job(method, 0, [(method, 0, rate(method, 0)), *small])


def _job(
    asked: Asked, task: str, seed: int, method: str, rank: int, rate: float,
    wanted: tuple[tuple[str, int, float | None], ...], purpose: str,
) -> Job:  # fmt: skip
    return Job(
        model=asked.model, task=task, seed=seed, method=method, rank=rank, rate=rate, wanted=wanted,
        steps=asked.steps, batch=asked.batch, source_rank=asked.source_rank, purpose=purpose,
        examples=asked.examples, store=asked.store, weights=asked.weights, precision=asked.precision,
        build=asked.build, options=dict(asked.foreign.get(method, {})), packs=not asked.foreign,
    )  # fmt: skip


def _with(job: Job, wanted: tuple[tuple[str, int, float | None], ...]) -> Job:
    return replace(job, wanted=wanted)


def _name(job: Job) -> str:
    return f"{job.model} {job.task} {job.method} {job.rank} seed {job.seed} rate {job.rate:g} {job.purpose}"


def _done(rows: Sequence[Row], job: Job, wanted: tuple[str, int, float | None]) -> bool:
    method, rank, rate = wanted
    same = [name for name in KEY if name not in LOCAL or job.purpose == "final"]
    key: dict[str, Any] = {name: getattr(job, name) for name in same}
    key |= {"method": method, "rank": rank, "rate": rate}
    if methods.from_source(method):
        key["source_rate"] = job.rate
    return bool(like(rows, kind="result", **key))
