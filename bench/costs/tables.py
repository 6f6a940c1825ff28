"""From rows to a page of Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.evidence.rows import Row, read_rows
from bench.tables import table

_TITLES = {"smollm2": "SmolLM2-135M, bfloat16 products", "minilm": "MiniLM-L6, bfloat16 products"}
_LEGEND = """Each figure after the fifth column is a multiple of the LoRA's in that row, measured in the same process.

- LoRA: its rank, the one with the nearest number of trained numbers; "numbers" is the method's count over that
  LoRA's. Where the LoRA has rank 1 and "numbers" is below 1, the method trains fewer than any LoRA can.
- step: median milliseconds, on one thread, of forward, backward, AdamW and controller, and the ratio of the medians of
  steps taken in turns with the LoRA's; in brackets the quartiles of the ratios of single rounds.
- with rare: the same with the work that comes once in many steps spread over them: LIFT's choice of entries every 400,
  rank pruning every 20, Maestro's cut every 100.
- saved: bytes kept for the backward pass in the whole model, each storage once, without parameters, buffers and the
  copies of weights that autocast makes; "in layers": the part kept inside of the adapted layers; "copies": those
  copies (less where a method keeps the weight itself).
- optimiser, file: bytes of AdamW's state and of the saved adapter (MiniLM: with its head in the file). PEFT writes the
  random bases of VeRA and RandLoRA into the file unless told not to.
- held: MB of frozen tensors that the method keeps in memory beside the base model: bases, masks, indices."""


def page(folder: Path) -> str:
    """The tables of all models that were measured into a folder."""
    parts = ["# What the methods cost", _LEGEND]
    for path in sorted(folder.glob("*.jsonl")):
        rows = read_rows([path])
        runs = [row for row in rows if row["kind"] == "machine"]
        found = [row for row in rows if row["kind"] == "cost"]
        if not runs or not found:
            continue
        parts += [f"## {_TITLES.get(path.stem, path.stem)}", costs_table(found), _settings(found)]
        parts.append(
            "\n".join(f"- `{run['command']}`, commit {run['commit']}, load {_load(run)}" for run in runs)
        )  # fmt: skip
    return "\n\n".join(parts) + "\n"


def costs_table(rows: Sequence[Row]) -> str:
    """One line for each method."""
    head = (
        "method", "trained", "LoRA", "numbers", "step, ms", "step", "with rare", "saved", "in layers", "copies",
        "optimiser", "file", "held, MB",
    )  # fmt: skip
    return table(head, [_line(row) for row in rows])


def _line(row: Row) -> tuple[str, ...]:
    low, high = row["ratio_quartiles"]
    rare = row.get("rare")
    with_rare = ""
    if rare:
        with_rare = f"{row['ratio'] * (1 + rare['seconds'] / rare['every'] / row['seconds']):.2f}"
    times = [_over(row, name) for name in ("saved_bytes", "saved_in_layers_bytes", "copies_bytes")]
    return (
        row["method"], f"{row['numbers']:,}".replace(",", " "), f"r {row['lora_rank']}", _over(row, "numbers"),
        f"{1e3 * row['seconds']:.0f}", f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})", with_rare, *times,
        _over(row, "state_bytes"), _over(row, "file_bytes"), f"{row['frozen_bytes'] / 1e6:.1f}",
    )  # fmt: skip


def _over(row: Row, name: str) -> str:
    other = row[f"lora_{name}"]
    return f"{row[name] / other:.2f}" if other else "-"


def _settings(rows: Sequence[Row]) -> str:
    given = [f"{row['method']} `{json.dumps(row['settings'])}`" for row in rows if row["settings"]]
    return f"Settings other than the defaults: {', '.join(given)}."


def _load(run: Row) -> Any:
    return run["load_at_start"][0] if run.get("load_at_start") else "unknown"
