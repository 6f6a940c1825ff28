"""Tables from the rows of bench.training: `python -m bench.training_tables ROWS ...` prints Markdown."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

Row = dict[str, Any]


def read(paths: list[str]) -> list[Row]:
    """All rows of these files."""
    return [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]


def like(rows: list[Row], **key: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]


def spread(values: list[float]) -> str:
    """Mean and standard error."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{mean(values):.4f} ± {error:.4f}"


def state_table(rows: list[Row], task: str) -> list[str]:
    """Each arm at its best rate; the rates tried with the first seed; the loss jumps."""
    lines = [
        "| arm | rate (tried, first seed) | held-out loss | accuracy | loss jump at each squeeze |",
        "|---|---|---|---|---|",
    ]
    found = like(rows, experiment="state", task=task)
    for arm in dict.fromkeys(row["arm"] for row in found):
        mine = like(found, arm=arm)
        first = [row for row in mine if row["seed"] == min(r["seed"] for r in mine)]
        best = min(first, key=lambda row: float(row["loss"]))["rate"]
        tried = ", ".join(f"{row['rate']:g}: {row['loss']:.3f}" for row in first)
        chosen = like(mine, rate=best)
        jumps = zip(*([e["loss_after"] - e["loss_before"] for e in row["history"]] for row in chosen), strict=True)
        told = ", ".join(f"{mean(jump):+.3f}" for jump in jumps) or "-"
        losses, right = [r["loss"] for r in chosen], [r["accuracy"] for r in chosen]
        lines.append(f"| {arm} | {best:g} ({tried}) | {spread(losses)} (n={len(losses)}) | {spread(right)} | {told} |")
    return lines


def truncation_table(rows: list[Row], task: str) -> list[str]:
    """Increase of the held-out loss over the source, by rank and metric; share of the plain mean that is closed."""
    found = like(rows, experiment="truncation", task=task)
    sources = {row["seed"]: row["loss"] for row in like(found, arm="source")}
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in found) if arm != "source"]
    lines = [f"Source: {spread(list(sources.values()))} (n={len(sources)}). Increase over it:", ""]
    lines += ["| rank | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for rank in sorted({row["rank"] for row in found if row["arm"] != "source"}, reverse=True):
        cells = []
        plain = {row["seed"]: row["loss"] - sources[row["seed"]] for row in like(found, arm="plain", rank=rank)}
        for arm in arms:
            mine = {row["seed"]: row["loss"] - sources[row["seed"]] for row in like(found, arm=arm, rank=rank)}
            gap = mean([plain[seed] for seed in mine]) if mine else 0.0
            share = (
                f" (closes {1 - mean(list(mine.values())) / gap:.0%})" if arm != "plain" and mine and gap > 0 else ""
            )
            cells.append(spread(list(mine.values())) + share if mine else "-")
        lines.append(f"| {rank} | " + " | ".join(cells) + " |")
    return lines


def cost_table(rows: list[Row], task: str) -> list[str]:
    """Seconds of a step and bytes by rank, and the squeezes as a share of 1000 steps."""
    lines = ["| rank | s per step | with statistics | optimiser state, MB | factors, MB |", "|---|---|---|---|---|"]
    steps = like(rows, experiment="cost", task=task, arm="step")
    for row in steps:
        lines.append(
            f"| {row['rank']} | {row['seconds']:.3f} | {row['with_statistics'] / row['seconds'] - 1:+.1%} | "
            f"{row['state_bytes'] / 1e6:.1f} | {row['factor_bytes'] / 1e6:.1f} |"
        )
    for row in like(rows, experiment="cost", task=task, arm="squeezes"):
        share = row["seconds"] / (1000 * steps[-1]["seconds"])
        lines += ["", f"Three squeezes: {row['seconds']:.2f} s, {share:.2%} of 1000 steps at the last rank."]
    return lines


def main() -> None:
    """Print all tables that the rows have."""
    rows = read(sys.argv[1:])
    for experiment, table in (("state", state_table), ("truncation", truncation_table), ("cost", cost_table)):
        for task in dict.fromkeys(row["task"] for row in like(rows, experiment=experiment)):
            print(f"## {experiment}, {task}\n")
            print("\n".join(table(rows, task)), end="\n\n")


if __name__ == "__main__":
    main()
