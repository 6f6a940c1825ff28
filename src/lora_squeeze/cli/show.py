"""What a person sees: tables of a report, progress bars, sizes."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lora_squeeze.adapter import Progress
    from lora_squeeze.report import Report, Row


def size(size_bytes: float) -> str:
    """Bytes for a person, powers of ten."""
    for unit in ("B", "kB", "MB"):
        if abs(size_bytes) < 1000:
            return f"{size_bytes:.4g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.4g} GB"


def console() -> Console:
    """Standard output; in a file or a pipe, lines are as long as they are, so that names can be searched for."""
    return Console(width=None if sys.stdout.isatty() else 10_000)


@contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A bar with the time left on standard error, for what takes longer than it takes to read it; silent in a pipe."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def squeeze_table(report: Report, each: bool) -> Table:
    """Before and after: one line per kind of module (or per module), and the sum."""
    table = Table("module", "rank", "energy kept", "error", "bytes", title_justify="left")
    for name, rows in _lines(report, each):
        table.add_row(name, _change(rows), _share(rows), f"{_error(rows):.4f}", _bytes(rows))
    table.add_section()
    table.add_row("all", _change(report.rows), f"{report.energy:.2%}", f"{report.error:.4f}", _bytes(report.rows))
    return table


def inspect_table(report: Report, each: bool) -> Table:
    """Ranks and how many directions hold 90, 95 and 99 % of the energy."""
    table = Table("module", "rank", "90 %", "95 %", "99 %", "largest s", "norm", "scale", "bytes")
    for name, rows in _lines(report, each):
        marks = [_range([row.rank_for_energy[mark] for row in rows]) for mark in ("0.9", "0.95", "0.99")]
        table.add_row(
            name,
            _range([row.rank for row in rows]),
            *marks,
            f"{max(_largest(row) for row in rows):.3g}",
            f"{sum(row.norm**2 for row in rows) ** 0.5:.3g}",
            _range([row.scale for row in rows]),
            size(sum(row.size_bytes for row in rows)),
        )
    return table


def bytes_lines(report: Report, after: bool) -> list[str]:
    """Where the bytes are, and why the ones that are not LoRA are there."""
    lora = size(report.lora_bytes)
    lines = [f"LoRA factors {lora} -> {size(report.lora_bytes_after)}" if after else f"LoRA factors {lora}"]
    for kind, count in report.extra_bytes.items():
        lines.append(f"{kind} {size(count)}: {report.causes[kind]}")
    return lines


def _lines(report: Report, each: bool) -> list[tuple[str, list[Row]]]:
    if each:
        return [(row.name, [row]) for row in report.rows]
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in report.rows:
        groups[row.name.rpartition(".")[2]].append(row)
    return [(f"{name} x {len(rows)}" if len(rows) > 1 else name, rows) for name, rows in groups.items()]


def _range(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _change(rows: list[Row]) -> str:
    before, after = _range([row.rank for row in rows]), _range([row.rank_after for row in rows])
    return before if before == after else f"{before} -> {after}"


def _share(rows: list[Row]) -> str:
    low, mean = min(row.energy for row in rows), sum(row.energy for row in rows) / len(rows)
    return f"{mean:.2%}" if len(rows) == 1 else f"{mean:.2%} (least {low:.2%})"


def _error(rows: list[Row]) -> float:
    norm = sum(row.norm**2 for row in rows)
    return float((sum(row.discarded**2 for row in rows) / norm) ** 0.5) if norm else 0.0


def _bytes(rows: list[Row]) -> str:
    return f"{size(sum(row.size_bytes for row in rows))} -> {size(sum(row.size_bytes_after for row in rows))}"


def _largest(row: Row) -> float:
    first = row.singular_values[0]
    return max(copy[0] for copy in row.singular_values) if isinstance(first, list) else first  # type: ignore[index]
