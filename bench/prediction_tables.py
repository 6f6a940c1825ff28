"""Markdown tables of the rows of bench.prediction: `python -m bench.prediction_tables *.jsonl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.prediction import ALONE, ARMS, RANKS

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
    for arm in ARMS:
        cells = [_mean(_increases(budgets, sources, arm, rank, "loss")) for rank in RANKS]
        print(f"| {arm} | {' | '.join(cells)} |")
    print("\nOn the examples asked: predicted and measured increase.\n")
    print(f"| arm | {' | '.join(f'rank {rank}' for rank in RANKS)} |\n|---|{'---|' * len(RANKS)}")
    for arm in (arm for arm, (_, aware) in ARMS.items() if aware):
        cells = []
        for rank in RANKS:
            told = [row["predicted"] for row in budgets if (row["arm"], row["rank"]) == (arm, rank)]
            measured = _increases(budgets, sources, arm, rank, "asked")
            cells.append(f"{sum(told) / len(told):.4f}, {sum(measured) / len(measured):.4f}" if told else "")
        print(f"| {arm} | {' | '.join(cells)} |")
    print()
    _modules([row for row in rows if row["experiment"] == "modules"])


def _modules(rows: list[Row]) -> None:
    if not rows:
        return
    print("Modules cut alone, first seed: rank correlation with the measured increase, sum measured / sum predicted.\n")
    print("| rank | modules | predicted loss | energy lost | measured / predicted | measured below 0 |")
    print("|---|---|---|---|---|---|")
    for rank in ALONE:
        found = [row for row in rows if row["rank"] == rank]
        measured, predicted, lost = ([row[key] for row in found] for key in ("measured", "predicted", "lost"))
        print(
            f"| {rank} | {len(found)} | {_spearman(predicted, measured):.2f} | {_spearman(lost, measured):.2f} | "
            f"{sum(measured) / sum(predicted):.1f} | {sum(value < 0 for value in measured)} |"
        )
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
