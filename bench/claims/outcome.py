"""What an experiment returns, and the few statistics that all of them share."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.evidence.tune import GUESS, next_rates

Row = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One claim and what came of it.

    Args:
        claim: a sentence that can be false, with its bound.
        figures: what was measured, with errors where there are seeds.
        holds: None where the measurement does not decide.
    """

    claim: str
    figures: str
    holds: bool | None


@dataclass
class Outcome:
    """Rows of numbers and what they say.

    Args:
        rows: each has "part", the experiment it belongs to, and columns of its own.
        findings: what they say.
        seconds: that it took, where it goes on from a run that was cut; None: since it was started.
    """

    rows: list[Row] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    seconds: float | None = None


def best_rate(loss_at: Callable[[float], float], guess: float = GUESS) -> float:
    """The learning rate of the lowest loss on the grid 1, 3, 10, ...: walks until it has been tried on both sides.

    Args:
        loss_at: trains with a rate and gives a loss on validation data; no number is worse than every number.
        guess: where to begin.
    """
    tried: list[Row] = []
    while rates := next_rates(tried, guess):
        tried += [{"rate": rate, "loss": loss_at(rate)} for rate in rates]
    losses = {float(row["rate"]): row["loss"] if math.isfinite(row["loss"]) else math.inf for row in tried}
    return min(sorted(losses), key=losses.__getitem__)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over seeds and its standard error; the error of one value is no number."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.fmean(values), error


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the differences of paired runs: the same seed, the same data."""
    return mean_and_error([a - b for a, b in zip(ours, theirs, strict=True)])


def shown(mean: float, error: float, digits: int = 3) -> str:
    """A mean with its error, for people."""
    return f"{mean:.{digits}f} ± {error:.{digits}f}"
