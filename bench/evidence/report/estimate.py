"""Means over tasks with their standard errors, and when a difference counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from bench.evidence.report.results import Run

YES, NO, OPEN = "yes", "no", "undecided"


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


def decide(found: Estimate | None, noise: float) -> str:
    """Whether what is estimated lies above 0.

    Returns:
        "yes": the mean is above 0 beyond doubt, and more tasks are above 0 than below; "no": the same below 0;
        "undecided": anything else, and whenever there is no standard error. Beyond doubt: more standard errors than
        Student's t exceeds in 2.5 % of draws.
    """
    if found is None or found.error is None or math.isnan(found.error):
        return OPEN
    for sign, answer in ((1, YES), (-1, NO)):
        most = sum(sign * value > 0 for value in found.by_task.values()) > len(found.by_task) / 2
        if most and sign * found.mean > noise * found.error:
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
