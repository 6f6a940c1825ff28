"""The figures of a demonstration, as picture: loss and accuracy against the rank and the size of the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lora_squeeze.demo.result import DemoResult, Row, size_text

_SQUEEZED, _SOURCE, _BASE = "#1f5fbf", "#2f8f4e", "#8a8a8a"


def draw(result: DemoResult, path: Path) -> None:
    """Write the picture as PNG, without a display and without touching the state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.0, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    rows = sorted(result.squeezed, key=lambda row: row.rank)
    _draw_loss(loss, result, rows)
    _draw_accuracy(accuracy, result, rows)
    for axes in (loss, accuracy):
        axes.set_xticks(range(len(rows)), [f"{row.rank}\n{size_text(row.size_bytes)}" for row in rows])
        axes.set_xlabel("rank and file size after the squeeze")
        axes.margins(x=0.06)
        axes.grid(axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    source = f"{result.source.rank} ({size_text(result.source.size_bytes)})"
    figure.suptitle(f"One LoRA trained at rank {source}, squeezed; {result.held_out} held-out words")
    draft = path.with_name(f".{path.name}.new")
    figure.savefig(draft, dpi=130, format="png")
    draft.replace(path)


def _draw_loss(axes: Any, result: DemoResult, rows: list[Row]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    places = range(len(rows))
    axes.plot(places, [row.score.loss for row in rows], "o-", color=_SQUEEZED, label="squeezed")
    axes.axhline(result.base.score.loss, color=_BASE, linestyle=":", label="base model")
    axes.axhline(result.source.score.loss, color=_SOURCE, linestyle="--", label=f"source, rank {result.source.rank}")
    for place, row in zip(places, rows, strict=True):
        if row.energy is not None:
            axes.annotate(
                f"{row.energy:.0%}",
                (place, row.score.loss),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=_SQUEEZED,
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("loss, nats per token (log)")
    axes.set_title("Loss (numbers: energy kept)", fontsize=10)
    axes.legend(frameon=False, fontsize=9)


def _draw_accuracy(axes: Any, result: DemoResult, rows: list[Row]) -> None:
    places = range(len(rows))
    for name, marker, values, level in (
        ("tokens", "o-", [row.score.token_accuracy for row in rows], result.source.score.token_accuracy),
        ("whole words", "s-", [row.score.word_accuracy for row in rows], result.source.score.word_accuracy),
    ):
        alpha = 1.0 if name == "whole words" else 0.5
        axes.plot(places, [100 * value for value in values], marker, color=_SQUEEZED, alpha=alpha, label=name)
        axes.axhline(100 * level, color=_SOURCE, linestyle="--", alpha=alpha)
    axes.axhline(100 * result.base.score.word_accuracy, color=_BASE, linestyle=":")
    axes.set_ylim(bottom=-2.0)
    axes.set_ylabel("right, %")
    axes.set_title("Accuracy (dashed: source; dotted: words of the base model)", fontsize=10)
    axes.legend(frameon=False, fontsize=9)
