"""Markdown tables of the rows of bench.prediction: `python -m bench.prediction_tables *.jsonl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.prediction import ALONE, RANKS

Row = dict[str, Any]


def main() -> None:
    rows = [json.loads(line) for path in sys.argv[1:] for line in Path(path).read_text().splitlines()]
    for task in dict.fromkeys(row["task"] for row in rows if "task" in row):
        _tables(task, [row for row in rows if row.get("task") == task])


def _tables(task: str, rows: list[Row]) -> None:
    sources = {row["seed"]: row for row in rows if row["experiment"] == "source"}
    budgets = [row for row in rows if row["experiment"] == "budget"]
    losses = [row["loss"] for row in sources.values()]
    print(f"**{task}.** Source, held out: {_mean(losses)}, {len(sources)} seeds. Increase of the held-out loss:\n")
    print(f"| arm | {' | '.join(f'rank {rank}' for rank in RANKS)} |\n|---|{'---|' * len(RANKS)}")
    for arm in dict.fromkeys(row["arm"] for row in budgets):
        cells = [_mean(_increases(budgets, sources, arm, rank, "loss")) for rank in RANKS]
        print(f"| {arm} | {' | '.join(cells)} |")
    print()
    _prediction([row for row in rows if row["experiment"] == "prediction"])


def _prediction(rows: list[Row]) -> None:
    if not rows:
        return
    print("On the examples asked, first seed, one rank for all: measured, and predicted as slope + curvature.\n")
    print("| rank | measured | predicted | slope | curvature |\n|---|---|---|---|---|")
    for row in (row for row in rows if "module" not in row):
        total = row["straight"] + row["curved"]
        print(f"| {row['rank']} | {row['measured']:.4f} | {total:.4f} | {row['straight']:.4f} | {row['curved']:.4f} |")
    print("\nModules cut alone: rank correlation with the measured change.\n")
    print("| rank | modules | predicted | slope | curvature | energy lost | sum measured | sum predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for rank in ALONE:
        found = [row for row in rows if row["rank"] == rank and "module" in row]
        measured, straight, curved, lost = (
            [r[key] for r in found] for key in ("measured", "straight", "curved", "lost")
        )
        total = [one + other for one, other in zip(straight, curved, strict=True)]
        cells = [f"{_spearman(values, measured):.2f}" for values in (total, straight, curved, lost)]
        print(f"| {rank} | {len(found)} | {' | '.join(cells)} | {sum(measured):.4f} | {sum(total):.4f} |")
    print()


def _increases(rows: Sequence[Row], sources: dict[int, Row], arm: str, rank: int, key: str) -> list[float]:
    return [row[key] - sources[row["seed"]][key] for row in rows if (row["arm"], row["rank"]) == (arm, rank)]


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    found = torch.tensor(values, dtype=torch.float64)
    return f"{found.mean():.4f}" + (f" ± {found.std() / len(values) ** 0.5:.4f}" if len(values) > 1 else "")


def _spearman(left: Sequence[float], right: Sequence[float]) -> float:
    ranks = [torch.tensor(values, dtype=torch.float64).argsort().argsort().double() for values in (left, right)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


if __name__ == "__main__":
    main()
