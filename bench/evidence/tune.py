"""Learning rates: each method at each rank finds its own, on the validation data of one task.

The grid is 1, 3, 10, 30, ... times a power of ten. A search begins at a guess and its two neighbours, and walks until
the best rate has been tried on both sides; the loss is taken as falling and then rising in the rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.evidence.rows import Row, like

GUESS = 3e-4
LOWEST, HIGHEST = 1e-6, 1e1


def on_grid(step: int) -> float:
    """The rate of this place on the grid: 0 is 1e-3, 1 is 3e-3, 2 is 1e-2, -1 is 3e-4."""
    tens, half = divmod(step, 2)
    return float(f"{3 if half else 1}e{tens - 3}")


def place(rate: float) -> int:
    """The nearest place on the grid."""
    return round(2 * (math.log10(rate) + 3))


def next_rates(tried: Sequence[Row], guess: float = GUESS) -> list[float]:
    """The rates to try next; none when the best one is known.

    Args:
        tried: finished runs of one method at one rank, with `rate` and `loss`.
        guess: where to begin.
    """
    losses = mean_losses(tried)
    if not losses:
        return [on_grid(place(guess) + step) for step in (-1, 0, 1)]
    best = place(min(losses, key=losses.__getitem__))
    around = [on_grid(step) for step in (best - 1, best + 1)]
    return [rate for rate in around if rate not in losses and LOWEST <= rate <= HIGHEST]


def mean_losses(rows: Sequence[Row]) -> dict[float, float]:
    """Mean loss at each rate; a loss that is no number is worse than all others."""
    found: dict[float, list[float]] = {}
    for row in rows:
        loss = float(row["loss"])
        found.setdefault(float(row["rate"]), []).append(loss if math.isfinite(loss) else math.inf)
    return {rate: sum(losses) / len(losses) for rate, losses in found.items()}


def chosen_rate(tuned: Sequence[Row], method: str, rank: int) -> float:
    """The rate of the lowest mean loss on validation data.

    Args:
        tuned: finished runs of one model with one budget.
        method, rank: of which the rate is wanted.

    Raises:
        SystemExit: nothing has been tried for this method and rank.
    """
    losses = mean_losses(like(tuned, method=method, rank=rank))
    if not losses:
        raise SystemExit(f"no learning rate for {method} at rank {rank}: tune first, or give --rate")
    return min(sorted(losses), key=losses.__getitem__)
