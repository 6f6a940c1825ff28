"""The pictures: accuracy and loss against the rank, means and single tasks.

A family of methods has a colour (Okabe and Ito's, which colour-blind people can tell apart), a method within it a line
and a marker of its own, so that nothing hangs on colour alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.evidence.report.estimate import Estimate, estimate, number
from bench.evidence.report.results import ACCURACY, BASE, LOSS, Arm, Measure, Results, Run

_COLUMNS = 4  # of small pictures
_WIDTH = 0.24  # octaves over which the points of one rank are spread, so that their error bars do not hide each other
_GREY = "#7f7f7f"
_LEGEND_LINE, _LEGEND_LETTER = 0.6, 0.07  # inches


@dataclass(frozen=True)
class _Look:
    color: str
    line: str
    marker: str


_LOOKS = {
    "direct": _Look("#000000", "-", "o"),
    "post": _Look("#D55E00", "-", "v"),
    "post-data": _Look("#D55E00", "--", "^"),
    "plan": _Look("#CC79A7", "-", "<"),
    "plan-data": _Look("#CC79A7", "--", ">"),
    "cont": _Look("#009E73", "-", "s"),
    "cont-data": _Look("#009E73", "--", "D"),
    "in-adaptive": _Look("#0072B2", ":", "*"),
}
for _rates, _color in {
    "": "#0072B2",
    "-restart": "#E69F00",
    "-rising": "#56B4E9",
    "-restart-rising": "#F0E442",
}.items():
    _LOOKS["in-equal" + _rates] = _Look(_color, "-", "P")
    _LOOKS["in-proportional" + _rates] = _Look(_color, "--", "X")
_OTHERS = [_Look(_GREY, line, marker) for line in ("-", "--", ":") for marker in ("h", "d", "p", "8")]


def draw_all(models: Sequence[Results], folder: Path) -> dict[str, list[str]]:
    """Write all pictures as PNG.

    Returns:
        Names of the pictures that are there, by the title of what they show: "means" or the model's title.
    """
    found: dict[str, list[str]] = {}
    means = [(results, runs) for results in models if (runs := results.balanced(results.core_arms()))]
    for measure in (ACCURACY, LOSS):
        if means:
            found.setdefault("means", []).append(_draw_means(means, measure, folder / f"means-{measure.field}.png"))
        for place, results in enumerate(models):
            if results.cells:
                name = f"{_safe(results.name)}{f'-{place + 1}' * _again(models, place)}-{measure.field}.png"
                found.setdefault(results.title, []).append(_draw_tasks(results, measure, folder / name))
    return found


def _draw_means(models: Sequence[tuple[Results, list[Run]]], measure: Measure, path: Path) -> str:
    """One panel for each model; bars are standard errors of the difference from the source, paired."""
    figure, panels = _figure(1, len(models), 5.2, 4.6)
    for (results, runs), axes in zip(models, panels, strict=True):
        point = partial(_beside_source, results, runs, measure)
        _curves(axes, results, results.core(), results.core_ranks(), measure, point)
        _level(axes, point(results.source), measure, f"source, rank {results.source[1]}")
        base = point(BASE) if all(BASE in results.cells[run] for run in runs) else None
        count = len({task for task, _ in runs})
        axes.set_title(f"{results.title}\n{count} task{'s' * (count != 1)}; {_below(base, measure)}", fontsize=10)
        axes.set_ylabel(measure.title)
    _finish(figure, panels, "bars: standard error of the difference from the source")
    _save(figure, path)
    return path.name


def _beside_source(results: Results, runs: Sequence[Run], measure: Measure, arm: Arm) -> Estimate | None:
    """Mean of an arm, with the error of its difference from the source: that of the mean says how tasks differ."""
    if arm not in results.arms:
        return None
    values, whole = (results.values(a, measure.field, runs) for a in (arm, results.source))
    mean, paired = estimate(values), estimate({run: values[run] - whole[run] for run in runs})
    return None if mean is None or paired is None else replace(mean, error=paired.error)


def _draw_tasks(results: Results, measure: Measure, path: Path) -> str:
    """One small panel for each task; bars are standard errors over seeds."""
    tasks = results.tasks
    columns = min(_COLUMNS, len(tasks))
    figure, panels = _figure(math.ceil(len(tasks) / columns), columns, 3.3, 2.9)
    ranks = sorted({rank for _, rank in results.arms if 0 < rank < results.source[1]}, reverse=True)
    for task, axes in zip(tasks, panels, strict=False):
        point = partial(_of_task, results, task, measure)
        _curves(axes, results, [*results.core(), *results.further()], ranks, measure, point)
        _level(axes, point(results.source), measure, f"source, rank {results.source[1]}")
        axes.set_title(f"{task}\n{_below(point(BASE), measure)}", fontsize=9)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    shown = panels[: len(tasks)]
    for axes in shown[::columns]:
        axes.set_ylabel(measure.title)
    _finish(figure, shown, f"{results.title}; bars: standard error over seeds")
    _save(figure, path)
    return path.name


def _of_task(results: Results, task: str, measure: Measure, arm: Arm) -> Estimate | None:
    """Mean of an arm over the seeds of a task."""
    runs = [run for run, cell in results.cells.items() if run[0] == task and arm in cell]
    return estimate(results.values(arm, measure.field, runs))


def _curves(
    axes: Any, results: Results, methods: Sequence[str], ranks: Sequence[int], measure: Measure,
    point: Callable[[Arm], Estimate | None],
) -> None:  # fmt: skip
    looks = _looks(results)
    for place, method in enumerate(methods):
        found = {rank: p for rank in sorted(ranks) if (p := point((method, rank))) is not None and _finite(p)}
        if not found:
            continue
        shift = _WIDTH * (place / max(1, len(methods) - 1) - 0.5)
        look = looks[method]
        axes.errorbar(
            [math.log2(rank) + shift for rank in found],
            [p.mean * measure.factor for p in found.values()],
            yerr=[_bar(p) * measure.factor for p in found.values()],
            color=look.color, linestyle=look.line, marker=look.marker, markersize=5, linewidth=1.4, elinewidth=0.9,
            label=method,
        )  # fmt: skip
    axes.set_xticks([math.log2(rank) for rank in ranks], [str(rank) for rank in ranks])
    axes.set_xlabel("rank")
    axes.margins(x=0.06)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _level(axes: Any, found: Estimate | None, measure: Measure, label: str) -> None:
    """A line across: the source has no place on this axis."""
    if found is not None and _finite(found):
        axes.axhline(found.mean * measure.factor, color=_GREY, linestyle="--", linewidth=1.2, label=label, zorder=1)


def _below(base: Estimate | None, measure: Measure) -> str:
    """The base model in words: most often a line for it would take all room from the others."""
    return f"base model: {'-' if base is None else number(base.mean, measure.digits, measure.factor)}"


def _looks(results: Results) -> Mapping[str, _Look]:
    others = [method for method in results.further() if method not in _LOOKS]
    return _LOOKS | {method: _OTHERS[i % len(_OTHERS)] for i, method in enumerate(others)}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure without a display and without the state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns + 0.4, height * rows + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _finish(figure: Any, panels: Sequence[Any], title: str) -> None:
    """One legend for all panels, below them."""
    handles: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(title, fontsize=10)
    each = _LEGEND_LINE + _LEGEND_LETTER * max(map(len, handles), default=0)
    columns = max(1, min(len(handles), int(figure.get_figwidth() / each)))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _save(figure: Any, path: Path) -> None:
    """The same bytes for the same picture: no version, no date."""
    figure.savefig(path, dpi=120, format="png", metadata={"Software": None})


def _finite(found: Estimate) -> bool:
    return math.isfinite(found.mean)


def _bar(found: Estimate) -> float:
    """Half the length of an error bar; none where the error is not known."""
    return found.error if found.error is not None and math.isfinite(found.error) else 0.0


def _again(models: Sequence[Results], place: int) -> bool:
    """Whether a model before has the same name, with another budget."""
    return any(results.name == models[place].name for results in models[:place])


def _safe(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "_" for c in name)
