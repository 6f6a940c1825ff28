"""Learning rates: which were tried, which was chosen, which were used."""

from __future__ import annotations

from collections.abc import Mapping

from bench.evidence.report.results import Arm, Results, method_name
from bench.evidence.rows import Row
from bench.evidence.tune import mean_losses
from bench.tables import table


def rates_table(results: Results) -> str:
    """One line for each method and rank, with the mean validation loss at each rate; "" if none were tried.

    The chosen rate is the one of the lowest mean. One at the end of what was tried is marked, since the best may lie
    beyond; so is one that is not the rate of the results.
    """
    tried: dict[Arm, list[Row]] = {}
    for row in results.tuning:
        tried.setdefault((method_name(row), row["rank"]), []).append(row)
    rows = []
    for arm in sorted(tried, key=results.place):
        losses = mean_losses(tried[arm])
        counts = {rate: sum(row["rate"] == rate for row in tried[arm]) for rate in losses}
        told = ", ".join(f"{rate:g}: {losses[rate]:.4f}{_count(counts, rate)}" for rate in sorted(losses))
        best = min(sorted(losses), key=losses.__getitem__)
        end = " (end)" if best in (min(losses), max(losses)) else ""
        used = sorted({_rate(cell[arm]) for cell in results.cells.values() if arm in cell})
        differs = " (differs)" if used and used != [f"{best:g}"] else ""
        rows.append([arm[0], str(arm[1] or "-"), told, f"{best:g}{end}", (", ".join(used) or "-") + differs])
    return table(["method", "rank", "rate: mean validation loss", "chosen", "used"], rows) if rows else ""


def _count(counts: Mapping[float, int], rate: float) -> str:
    """How many runs a mean is of, where it is not one."""
    return f" (n={counts[rate]})" if counts[rate] > 1 else ""


def _rate(row: Row) -> str:
    return "-" if row.get("rate") is None else f"{row['rate']:g}"
