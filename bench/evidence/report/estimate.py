"""Means over tasks with their standard errors, and when a difference counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.evidence.report.results import Run

YES, NO, OPEN = "yes", "no", "undecided"
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18)  # 97.5 %, by degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A mean over tasks.

    Args:
        mean: of the tasks, each the mean of its seeds.
        error: standard error over tasks, or over seeds where there is one task; None with a single value.
        by_task: the mean of each task.
        runs: number of (task, seed).
    """

    mean: float
    error: float | None
    by_task: Mapping[str, float]
    runs: int

    @property
    def above(self) -> int:
        """Number of tasks above 0."""
        return sum(value > 0 for value in self.by_task.values())

    @property
    def surely(self) -> float:
        """Standard errors that are beyond doubt: 97.5 % of Student's t lie below."""
        freedom = (len(self.by_task) if len(self.by_task) > 1 else self.runs) - 1
        return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else 1.96 + 2.6 / freedom

    def plus(self, number: float) -> Estimate:
        """The same, moved."""
        moved = {task: value + number for task, value in self.by_task.items()}
        return replace(self, mean=self.mean + number, by_task=moved)


def estimate(values: Mapping[Run, float]) -> Estimate | None:
    """Mean and standard error of values by (task, seed); None where there are none."""
    if not values:
        return None
    tasks = sorted({task for task, _ in values})
    seeds = {task: [values[run] for run in sorted(values) if run[0] == task] for task in tasks}
    by_task = {task: average(found) for task, found in seeds.items()}
    units = list(by_task.values()) if len(tasks) > 1 else seeds[tasks[0]]
    error = deviation(units)
    return Estimate(
        average(list(by_task.values())), None if error is None else error / math.sqrt(len(units)), by_task, len(values)
    )


def decide(found: Estimate | None) -> str:
    """Whether what is estimated lies above 0.

    Returns:
        "yes": the mean is above 0 beyond doubt, and more tasks are above 0 than below; "no": the same below 0;
        "undecided": anything else, and whenever there is no standard error. Beyond doubt: more standard errors than
        Student's t exceeds in 2.5 % of draws.
    """
    if found is None or found.error is None or math.isnan(found.error):
        return OPEN
    for sign, answer in ((1, YES), (-1, NO)):
        most = sum((value > 0) - (value < 0) for value in found.by_task.values()) * sign > 0
        if most and sign * found.mean > found.surely * found.error:
            return answer
    return OPEN


def pooled_deviation(values: Mapping[Run, float]) -> float | None:
    """Standard deviation over seeds within a task, pooled over the tasks with several; None without any."""
    squares, freedom = 0.0, 0
    for task in sorted({task for task, _ in values}):
        found = [values[run] for run in sorted(values) if run[0] == task]
        center = average(found)
        squares += sum((value - center) ** 2 for value in found)
        freedom += len(found) - 1
    return math.sqrt(squares / freedom) if freedom else None


def average(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def deviation(values: list[float]) -> float | None:
    """Standard deviation of a sample; None with a single value."""
    if len(values) < 2:
        return None
    center = average(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1))


def number(value: float, digits: int, factor: float = 1, *, signed: bool = False) -> str:
    """A number as text."""
    rounded = round(value * factor, digits) + 0.0  # no minus zero
    return f"{rounded:{'+' if signed else ''}.{digits}f}"


def spread(found: Estimate | None, digits: int, factor: float = 1, *, signed: bool = False) -> str:
    """Mean ± standard error as text; "-" for what there is not."""
    if found is None:
        return "-"
    error = "-" if found.error is None else number(found.error, digits, factor)
    return f"{number(found.mean, digits, factor, signed=signed)} ± {error}"
