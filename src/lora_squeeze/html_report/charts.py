"""The charts of the page, from the JSON of a report, as Plotly figures.

Plotly, since its Python package brings the whole of its JavaScript along: the page needs no network, then or later. The
smaller bundles of that JavaScript are not in the package. Colours of text and grid are left to the page, which knows
whether it is shown light or dark.
"""

from __future__ import annotations

import html
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go  # type: ignore[import-untyped]

_LABEL = 26  # characters of a name on an axis; the whole one is in the table
_MARGIN = {"l": 52, "r": 8, "t": 8, "b": 44}


def charts(data: Mapping[str, Any]) -> dict[str, go.Figure]:
    """Id of the element on the page -> figure.

    Args:
        data: what `inspect --json` prints.
    """
    cells, others = layers(data["modules"])
    ranks = heat_map(cells) if cells else bars(data["modules"])
    rest = {"chart-others": bars(others)} if cells and others else {}
    return {"chart-energy": energy_curves(data), "chart-ranks": ranks, **rest}


def energy_curves(data: Mapping[str, Any]) -> go.Figure:
    """Energy kept against the rank: all modules with one rank, with the best ranks of the same size, and by kind."""
    figure = go.Figure()
    for kind in data["kinds"] if len(data["kinds"]) > 1 else ():
        ranks = list(range(1, len(kind["energy_at_rank"]) + 1))
        figure.add_scatter(
            x=ranks, y=_percent(kind["energy_at_rank"]), name=_safe(kind["name"]), mode="lines", line_width=1.2
        )
    best, curve = data["best_curve"], data["curve"]
    figure.add_scatter(
        x=[point["rank"] for point in best],
        y=_percent([point["energy"] for point in best]),
        name="best rank for each, same size",
        mode="lines+markers",
        line={"dash": "dot", "width": 2},
        meta="text",
    )
    figure.add_scatter(
        x=[point["rank"] for point in curve],
        y=_percent([point["energy"] for point in curve]),
        name="all modules, one rank",
        mode="lines",
        line_width=3,
        meta="text",
    )
    figure.update_traces(hovertemplate="rank %{x}: %{y:.2f} %<extra>%{fullData.name}</extra>")
    ticks = [2**n for n in range(24) if 2**n <= curve[-1]["rank"]]
    figure.update_xaxes(title="rank", type="log", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    figure.update_yaxes(title="energy kept, %")
    figure.update_layout(height=420, legend={"orientation": "h", "y": -0.18, "yanchor": "top"}, margin=_MARGIN)
    return _plain(figure)


def heat_map(cells: Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]) -> go.Figure:
    """Entropy rank by layer and kind of module; the mean where several modules share a cell."""
    numbers = sorted({layer for row in cells.values() for layer in row})
    found = [[row.get(layer) for layer in numbers] for row in cells.values()]
    figure = go.Figure(
        go.Heatmap(
            x=[str(layer) for layer in numbers],
            y=list(range(len(cells))),
            z=[[cell and _mean([m["entropy_rank"] for m in cell]) for cell in row] for row in found],
            customdata=[[cell and _hover(cell) for cell in row] for row in found],
            hovertemplate="layer %{x}, %{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale="Viridis",
            xgap=1,
            ygap=1,
            colorbar={"title": {"text": "entropy rank", "side": "right"}, "thickness": 10},
        )
    )
    labels = [_safe(_short(kind)) for kind in cells]
    figure.update_xaxes(title="layer", type="category", nticks=8)
    figure.update_yaxes(tickvals=list(range(len(cells))), ticktext=labels, autorange="reversed", automargin=True)
    figure.update_layout(height=110 + 26 * len(cells), margin=_MARGIN)
    return _plain(figure)


def bars(modules: Sequence[Mapping[str, Any]]) -> go.Figure:
    """Entropy rank of each module, for adapters whose modules are not numbered by layer."""
    figure = go.Figure(
        go.Bar(
            x=[module["entropy_rank"] for module in modules],
            y=list(range(len(modules))),
            orientation="h",
            customdata=[_hover([module]) for module in modules],
            hovertemplate="%{customdata}<extra></extra>",
        )
    )
    labels = [_safe(_short(module["name"])) for module in modules]
    figure.update_xaxes(title="entropy rank", rangemode="tozero")
    figure.update_yaxes(tickvals=list(range(len(modules))), ticktext=labels, autorange="reversed", automargin=True)
    figure.update_layout(height=90 + 22 * len(modules), margin=_MARGIN)
    return _plain(figure)


def layers(
    modules: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, dict[int, list[Mapping[str, Any]]]], list[Mapping[str, Any]]]:
    """Kind of module -> layer -> modules, and the modules that stand in no layer.

    The first number in a name is the layer, what follows the kind; further numbers (experts, blocks in a stage) become
    "*". Where an adapter has several stacks of layers, the kind begins with the name of the stack.
    """
    split = [(module, *_split(module["name"])) for module in modules]
    stacks = {stack for _, stack, layer, _ in split if layer is not None}
    cells: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    others = []
    for module, stack, layer, kind in split:
        if layer is None:
            others.append(module)
        else:
            cells[kind if len(stacks) == 1 else f"{stack}.*.{kind}"][layer].append(module)
    return {kind: dict(row) for kind, row in cells.items()}, others


def _split(name: str) -> tuple[str, int | None, str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if _is_number(part):
            return ".".join(parts[:i]), int(part), ".".join("*" if _is_number(p) else p for p in parts[i + 1 :])
    return name, None, ""


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 10


def _hover(modules: Sequence[Mapping[str, Any]]) -> str:
    """What is told of a module, or of several under one cell."""
    name = modules[0]["name"] if len(modules) == 1 else f"{len(modules)} modules such as {modules[0]['name']}"
    entropy, stable = (_mean([module[key] for module in modules]) for key in ("entropy_rank", "stable_rank"))
    ninety = max(module["rank_for_energy"]["0.95"] for module in modules)
    return (
        f"{_safe(name[:120])}<br>entropy rank {entropy:.2f}, stable rank {stable:.2f}<br>"
        f"95 % of the energy at rank {ninety} of {max(module['rank'] for module in modules)}"
    )


def _plain(figure: go.Figure) -> go.Figure:
    """Without what asks for a mouse, and without colours of its own behind."""
    figure.update_layout(template="none", dragmode=False, paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
    figure.update_layout(hoverlabel={"align": "left"}, font={"size": 12})
    figure.update_xaxes(fixedrange=True, zeroline=False, title_standoff=6)
    figure.update_yaxes(fixedrange=True, zeroline=False, title_standoff=6)
    return figure


def _safe(text: str) -> str:
    """Text that Plotly, which knows a few tags, shows as it is."""
    return html.escape(text)


def _short(text: str) -> str:
    return text if len(text) <= _LABEL else f"…{text[1 - _LABEL :]}"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]
