"""The tables of this record's README, from its rows.

PYTHONPATH=. python records/2026-12-01-stages/compare.py
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from bench.evidence.report.estimate import decide, estimate, spread
from bench.evidence.rows import Row, read_rows

RANKS = (8, 2)
MEASURES = {"loss": 1, "accuracy": 100}
PAIRS = (
    ("in-proportional", "in-equal"),
    ("in-proportional-restart", "in-equal-restart"),
    ("in-proportional", "in-proportional-restart"),
)


def main() -> None:
    for rate in ("3e-4", "1e-3"):
        rows = read_rows([Path(__file__).with_name(f"rate-{rate}.jsonl")])
        found: dict[tuple[str, str, int], Row] = {
            (row["task"], row["method"], row["rank"]): row for row in rows if row["kind"] == "result"
        }
        tasks = sorted({task for task, _, _ in found})
        for method in dict.fromkeys(method for _, method, _ in found if method != "base"):
            for measure, factor in MEASURES.items():
                means = [mean(factor * found[task, method, rank][measure] for task in tasks) for rank in RANKS]
                print(f"{rate} {method} {measure}:", *(f"{value:.3f}" for value in means))
        for one, other in PAIRS:
            for measure, factor in MEASURES.items():
                gains = {
                    (task, 0): mean(
                        found[task, one, rank][measure] - found[task, other, rank][measure] for rank in RANKS
                    )
                    for task in tasks
                }
                gain = estimate(gains)
                print(
                    f"{rate} {one} - {other}, {measure}:",
                    spread(gain, 3, factor, signed=True),
                    f"above 0: {decide(gain)}",
                )


if __name__ == "__main__":
    main()
