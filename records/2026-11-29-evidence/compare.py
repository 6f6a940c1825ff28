"""The comparisons of this record's README that are in neither tables.md nor verdicts.md, from its rows.

    PYTHONPATH=. python records/2026-11-29-evidence/compare.py

Gains are paired by task and seed, in % of accuracy and of the loss that the source gains on the base model.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean

from bench.evidence.report.estimate import decide, estimate, spread
from bench.evidence.report.results import ACCURACY, BASE, LEARNED, Results, Run, read
from bench.evidence.rows import read_rows

HERE = Path(__file__).parent
RANKS = (16, 8, 4, 2, 1)
EQUAL, PROPORTIONAL = "in-equal-restart", "in-proportional-restart"
PAIRS = (
    (PROPORTIONAL, EQUAL),
    (PROPORTIONAL, "direct"),
    (EQUAL, "direct"),
    (PROPORTIONAL, "plan-data"),
    (EQUAL, "plan-data"),
    ("post-data", "post"),
    ("plan-data", "post-data"),
    ("cont", "post"),
    ("cont", "post-data"),
)
FAR = 1.4  # times the source's loss


def main() -> None:
    for results in read(sorted(HERE.glob("*.jsonl"))).models:
        for one, other in PAIRS:
            _compare(results, one, other)
        _far(results)
    for name in ("minilm", "smollm2", "vlm"):
        _equal_rates(name)


def _compare(results: Results, one: str, other: str) -> None:
    for measure in (ACCURACY, LEARNED):
        arms = [BASE, results.source, *((method, rank) for method in (one, other) for rank in RANKS)]
        runs = [run for run in results.balanced(arms) if run[0] in results.learned(measure)]
        areas = [results.areas(method, RANKS, measure, runs) for method in (one, other)]
        gains = {"AURAC": results.better(areas[0], areas[1], measure)}
        gains |= {str(rank): results.gains((one, rank), (other, rank), measure, runs) for rank in RANKS}
        told = []
        for where, values in gains.items():
            gain = estimate(values)
            assert gain is not None
            share = f"{gain.above} of {len(gain.by_task)}"
            told.append(f"{where} {spread(gain, 2, measure.factor, signed=True)} ({share}, {decide(gain)})")
        print(f"{results.name}, {one} over {other}, {measure.field}: {'; '.join(told)}")


def _far(results: Results) -> None:
    """Runs whose loss is far above the source's."""
    for method in ("direct", "post", "post-data", "plan", "plan-data", "cont", EQUAL, PROPORTIONAL):
        for rank in RANKS:
            far: list[Run] = [
                run
                for run, arms in sorted(results.cells.items())
                if {(method, rank), results.source} <= arms.keys()
                and arms[method, rank]["loss"] > FAR * arms[results.source]["loss"]
            ]
            if far:
                print(f"{results.name}, {method} {rank}, loss above {FAR} times the source's: {far}")


def _equal_rates(name: str) -> None:
    """Equal and proportional steps at the same learning rate: mean validation loss."""
    losses: dict[tuple[str, int, float], list[float]] = defaultdict(list)
    for row in read_rows([HERE / f"{name}-rates.jsonl"]):
        if row["kind"] == "result":
            losses[row["method"], row["rank"], row["rate"]].append(row["loss"])
    for rate in (1e-4, 3e-4, 1e-3):
        pairs = {
            rank: [round(mean(losses[method, rank, rate]), 3) for method in (PROPORTIONAL, EQUAL)]
            for rank in RANKS
            if all((method, rank, rate) in losses for method in (PROPORTIONAL, EQUAL))
        }
        lower = sum(proportional < equal for proportional, equal in pairs.values())
        print(
            f"{name}, rate {rate}: proportional lower at {lower} of {len(pairs)}, [proportional, equal] by rank {pairs}"
        )


if __name__ == "__main__":
    main()
