"""Rows in the shape in which tables and verdicts ask for them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.evidence.methods import METHODS, SOURCE
from bench.evidence.rows import LOCAL, SETTING, Row, read_rows
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.scores import aurac

BASE = ("base", 0)
Arm = tuple[str, int]  # method, rank; rank 0 where a method has none
Run = tuple[str, int]  # task, seed
_KEY = ("task", "method", "rank", "seed", "purpose")
_NEEDED = (*_KEY, "model", "loss", "accuracy")


@dataclass(frozen=True)
class Measure:
    """One figure of a row, and how it is written.

    Args:
        field: its name in the row.
        title: with unit.
        factor, digits: of the number that is shown.
        sign: 1 if larger is better, -1 if smaller is.
        relative: whether differences are told as shares of what the source gains on the base model on that task.
    """

    field: str
    title: str
    factor: float
    digits: int
    sign: int
    relative: bool = False


ACCURACY = Measure("accuracy", "accuracy, %", 100, 2, 1)
UNITS = Measure("unit_accuracy", "units right, %", 100, 2, 1)
LOSS = Measure("loss", "loss, nats a unit", 1, 4, -1)
LEARNED = Measure("loss", "loss, % of what the source gains on the base model", 100, 2, -1, relative=True)
LEAST = {ACCURACY: 0.10, LEARNED: 0.0}  # what the source must gain for a task to count


@dataclass
class Results:
    """All rows of one model with one budget.

    Args:
        setting: model, steps, batch, source rank and the origin of the base model's weights.
        cells: final rows by (task, seed), then by (method, rank); those of a (task, seed) have one precision and build.
        tuning: rows of learning rates tried.
    """

    setting: Mapping[str, Any]
    cells: dict[Run, dict[Arm, Row]] = field(default_factory=dict)
    tuning: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The model, alone."""
        return str(self.setting["model"])

    @property
    def title(self) -> str:
        """The model and its budget."""
        steps, batch, rank = (self.setting[name] for name in SETTING[1:4])
        budget = f"{steps} steps" + (f" of {batch} examples" if batch is not None else "")
        parts = [self.name, *([budget] if steps is not None else []), *([f"source rank {rank}"] if rank else [])]
        precisions = {str(p) for cell in self.cells.values() for row in cell.values() if (p := row.get("precision"))}
        parts += [" and ".join(sorted(precisions))] if precisions else []
        return ", ".join(parts)

    @cached_property
    def arms(self) -> list[Arm]:
        """Methods and ranks that have a row, in the order of tables: by method, high ranks first."""
        return sorted({arm for cell in self.cells.values() for arm in cell}, key=self.place)

    @staticmethod
    def place(arm: Arm) -> tuple[int, str, int]:
        """Sorts the base model first, then the methods of the bench in their order, then all others by name."""
        known = [BASE[0], *METHODS]
        return known.index(arm[0]) if arm[0] in known else len(known), arm[0], -arm[1]

    @property
    def source(self) -> Arm:
        """What squeezes begin with: direct training at the source rank."""
        ranks = [rank for method, rank in self.arms if method == SOURCE]
        return SOURCE, self.setting["source_rank"] or max(ranks, default=0)

    @property
    def tasks(self) -> list[str]:
        """Tasks that have a final row."""
        return sorted({task for task, _ in self.cells})

    def ranks(self, *methods: str) -> list[int]:
        """Target ranks at which each of these methods has a row, high ranks first."""
        found = [{rank for m, rank in self.arms if m == method and 0 < rank} for method in methods]
        below = [rank for rank in set.intersection(*found) if rank < self.source[1]] if found else []
        return sorted(below, reverse=True)

    def core(self) -> list[str]:
        """The methods of the main tables."""
        present = {method for method, _ in self.arms}
        return [method for method in METHODS if method in present]

    def further(self) -> list[str]:
        """All others but the base model."""
        return [m for m in dict.fromkeys(method for method, _ in self.arms) if m not in (*METHODS, BASE[0])]

    def core_ranks(self) -> list[int]:
        """Target ranks of the main tables: all that any core method has."""
        return sorted({rank for method in self.core() for rank in self.ranks(method)}, reverse=True)

    def core_arms(self) -> list[Arm]:
        """The source, and the core methods at the ranks that they have."""
        return [self.source, *((method, rank) for method in self.core() for rank in self.ranks(method))]

    def balanced(self, arms: Iterable[Arm]) -> list[Run]:
        """The (task, seed) that have all of these."""
        wanted = list(arms)
        return sorted(run for run, cell in self.cells.items() if all(arm in cell for arm in wanted))

    def values(self, arm: Arm, name: str, runs: Iterable[Run]) -> dict[Run, float]:
        """One figure of an arm, by (task, seed); NaN where the row has none."""
        return {run: _number(self.cells[run][arm].get(name)) for run in runs}

    def gains(self, arm: Arm, other: Arm, measure: Measure, runs: Iterable[Run]) -> dict[Run, float]:
        """How much better an arm is than another, by (task, seed)."""
        return self.better(*(self.values(a, measure.field, runs) for a in (arm, other)), measure)

    def better(self, mine: Mapping[Run, float], theirs: Mapping[Run, float], measure: Measure) -> dict[Run, float]:
        """How much better the first values are, by (task, seed)."""
        gains = {run: measure.sign * (mine[run] - theirs[run]) for run in mine}
        if not measure.relative:
            return gains
        sizes = {task: self.gained(task, measure) for task in {task for task, _ in gains}}
        return {run: gain / sizes[run[0]] for run, gain in gains.items()}

    def gained(self, task: str, measure: Measure) -> float:
        """What the source gains, mean over the seeds: by accuracy, on the better of base model and commonest answer."""
        runs = [run for run in self.balanced([BASE, self.source]) if run[0] == task]
        base, source = (self.values(arm, measure.field, runs) for arm in (BASE, self.source))
        if measure is ACCURACY:
            base = {run: max(base[run], _number(self.cells[run][BASE].get("commonest", 0.0))) for run in runs}
        return sum(measure.sign * (source[run] - base[run]) for run in runs) / len(runs) if runs else math.nan

    def learned(self, measure: Measure) -> list[str]:
        """The tasks on which the source gains something, or by accuracy 10 points: the others can tell nothing."""
        return [task for task in self.tasks if self.gained(task, measure) > LEAST[measure]]

    def areas(self, method: str, ranks: Sequence[int], measure: Measure, runs: Iterable[Run]) -> dict[Run, float]:
        """AURAC over these ranks on the log2 axis, by (task, seed)."""
        rising = sorted(ranks)
        heights = {run: [_number(self.cells[run][method, r].get(measure.field)) for r in rising] for run in runs}
        return {run: aurac(rising, h) if all(map(math.isfinite, h)) else math.nan for run, h in heights.items()}

    def never(self) -> list[Arm]:
        """What the main tables have a cell for and no task a row."""
        wanted = [BASE, self.source, *((method, rank) for method in self.core() for rank in self.core_ranks())]
        return [arm for arm in wanted if arm not in self.arms]

    def missing(self) -> dict[Run, list[Arm]]:
        """What a (task, seed) lacks of what another has: every core arm and the base model, for every task and seed.

        A further method is asked for on the tasks alone that it has been run on.
        """
        seeds = sorted({seed for _, seed in self.cells})
        wanted = [arm for arm in (BASE, *self.core_arms()) if arm in self.arms]
        found: dict[Run, list[Arm]] = {}
        for task in self.tasks:
            here = {arm for run, cell in self.cells.items() if run[0] == task for arm in cell}
            more = [arm for arm in self.arms if arm in here and arm not in wanted]
            for seed in seeds:
                absent = [arm for arm in [*wanted, *more] if arm not in self.cells.get((task, seed), {})]
                if absent:
                    found[task, seed] = absent
        return found


def labels(models: Sequence[Results]) -> list[str]:
    """Short names of these: the model alone, where it comes with one budget."""
    names = [results.name for results in models]
    return [results.name if names.count(results.name) == 1 else results.title for results in models]


@dataclass(frozen=True)
class Report:
    """All that a report is made from.

    Args:
        models: results by model and budget, in order.
        machines: rows of kind "machine".
        duplicates: number of rows left out because an earlier one has the same key.
    """

    models: list[Results]
    machines: list[Row]
    duplicates: int


def read(paths: Sequence[Path]) -> Report:
    """Sort the rows of these files.

    Of rows with one key the first counts, by the time in the row, so that the order of files does not matter. A (task,
    seed) that was begun with two precisions or builds has the rows of those with which it has most.

    Raises:
        LoraSqueezeError: a file that is not there, a result without one of the figures that are needed, or results of
            several learning rates as those of one arm.
    """
    for path in paths:
        if not path.is_file():
            raise LoraSqueezeError(f"{path}: no such file of rows")
    return gather(read_rows(paths))


def gather(rows: Iterable[Row]) -> Report:
    """The same from rows in memory."""
    ordered = sorted(rows, key=lambda row: (str(row.get("time", "")), json.dumps(row, sort_keys=True)))
    models: dict[tuple[Any, ...], Results] = {}
    kept = _fullest(ordered)
    seen: dict[str, Any] = {}
    duplicates = 0
    for row in ordered:
        if row.get("kind") != "result":
            continue
        absent = [name for name in _NEEDED if row.get(name) is None]
        if absent:
            raise LoraSqueezeError(f"a result has no {', '.join(absent)}: {json.dumps(row)[:200]}")
        local = [row.get(name) for name in LOCAL]
        if row["purpose"] != "tune" and local != kept[_run(row)]:
            continue
        setting = tuple(row.get(name) for name in SETTING)
        rate = row.get("rate") if row["purpose"] == "tune" else None
        key = json.dumps([setting, local, [row[name] for name in _KEY], row.get("options"), rate], sort_keys=True)
        if key in seen:
            duplicates += 1
            if seen[key] != row.get("rate"):
                raise LoraSqueezeError(f"results of one arm with two learning rates; leave one out: {key}")
        else:
            seen[key] = row.get("rate")
            _put(models.setdefault(setting, Results(dict(zip(SETTING, setting, strict=True)))), row)
    for results in models.values():
        _refuse_mixed(results)
    order = sorted(models, key=lambda setting: [(part is not None, part) for part in setting])
    machines = [row for row in ordered if row.get("kind") == "machine"]
    return Report([models[setting] for setting in order], machines, duplicates)


def _run(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in (*SETTING, "task", "seed"))


def _fullest(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Any]]:
    """The precision and build with which each (task, seed) has most rows, of equal ones the first."""
    counts: dict[tuple[Any, ...], Counter[Any]] = {}
    for row in rows:
        if row.get("kind") == "result" and row.get("purpose") != "tune":
            counts.setdefault(_run(row), Counter())[tuple(map(row.get, LOCAL))] += 1
    return {run: list(count.most_common(1)[0][0]) for run, count in counts.items()}


def method_name(row: Row) -> str:
    """The method, with its settings where it has some: others would be another method."""
    options = row.get("options")
    return str(row["method"]) + (f" {json.dumps(options, sort_keys=True)}" if options else "")


def _put(results: Results, row: Row) -> None:
    if row["purpose"] == "tune":
        results.tuning.append(row)
    else:
        arms = results.cells.setdefault((row["task"], row["seed"]), {})
        arms[method_name(row), row["rank"]] = row


def _refuse_mixed(results: Results) -> None:
    """What is squeezed must come from the source beside it."""
    for (task, seed), cell in results.cells.items():
        source = cell.get(results.source)
        for (method, rank), row in cell.items():
            if source and row.get("source_rate") not in (None, source.get("rate")):
                raise LoraSqueezeError(
                    f"{task}, seed {seed}: {method} at rank {rank} comes from a source with learning rate "
                    f"{row['source_rate']}, the source has {source.get('rate')}; leave one out"
                )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
