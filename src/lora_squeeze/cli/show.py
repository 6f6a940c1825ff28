"""What a person sees: tables of a report, progress bars, sizes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lora_squeeze.report import by_kind

if TYPE_CHECKING:
    from lora_squeeze.adapter import Progress
    from lora_squeeze.report import Report, Row


ROUGH = 0.01  # share of an update; bfloat16 loses 0.002 to 0.004 where nothing is wrong


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
def progress(label: str, of: str = "bytes") -> Iterator[Progress]:
    """A bar with the time left on standard error, for what takes longer than it takes to read it; silent in a pipe."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    count = DownloadColumn() if of == "bytes" else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), count, TimeRemainingColumn())
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


def inspect_tables(report: Report, each: bool) -> list[Table]:
    """Ranks: as they are, as planned, by energy, effective. Sizes: of the update, beside the base weight, in bytes.

    Two tables, since one would not fit in the 80 columns of a terminal.
    """
    plan, base = bool(report.request), report.base is not None
    headers = ["rank", *(["plan"] if plan else []), "90 %", "95 %", "99 %", "stable", "entropy", "numerical"]
    ranks = Table("module", *headers, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    counted = any(row.base and row.base.intruders is not None for row in report.rows)
    beside = [*(["of the weight", "lost in bf16"] if base else []), *(["intruders"] if counted else [])]
    headers = ["norm", *beside, "scale", "bytes"]
    sizes = Table("module", *headers, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, rows in _lines(report, each):
        ranks.add_row(
            name,
            _range([row.rank for row in rows]),
            *([_range([row.rank_after for row in rows])] if plan else []),
            *(_range([row.rank_for_energy[mark] for row in rows]) for mark in ("0.9", "0.95", "0.99")),
            _short_range([row.stable_rank for row in rows]),
            _short_range([row.entropy_rank for row in rows]),
            _range([row.numerical_rank for row in rows]),
        )
        sizes.add_row(
            name,
            f"{sum(row.norm**2 for row in rows) ** 0.5:.3g}",
            *(_beside_base(rows) if base else []),
            *([_intruders(rows)] if counted else []),
            _range([row.scale for row in rows]),
            size(sum(row.size_bytes for row in rows)),
        )
    return [ranks, sizes]


def recommendation(report: Report) -> list[str]:
    """Which rank, in sentences."""
    lines = []
    if report.request:
        asked = ", ".join(f"{name} {value}" for name, value in report.request.items())
        lines.append(
            f"Plan for {asked}: {size(report.lora_bytes_after)} of factors keep {report.energy:.2%} of the energy, "
            f"{report.mean_energy:.2%} on average, {report.min_energy:.2%} of the module that loses most."
        )
    half, most = report.uniform_rank(0.95), report.uniform_rank(0.99)
    return [
        *lines,
        f"Rank {half} for all modules keeps 95 % of the energy on average, rank {most} keeps 99 %. "
        "Energy is not task quality: measure on the task.",
    ]


def bytes_lines(report: Report, after: bool) -> list[str]:
    """Where the bytes are, and why the ones that are not LoRA are there."""
    lora = size(report.lora_bytes)
    lines = [f"LoRA factors {lora} -> {size(report.lora_bytes_after)}" if after else f"LoRA factors {lora}"]
    for kind, count in report.extra_bytes.items():
        lines.append(f"{kind} {size(count)}: {report.causes[kind]}")
    return [*lines, *_rounding(report.rows)] if after else lines


def _rounding(rows: list[Row]) -> list[str]:
    """What the dtype loses beyond the table's figures, where that is more than the few bits of a sound rounding."""
    lost = {row.name: (row.rounding or 0.0) / row.norm for row in rows if row.norm}
    worst = max(lost, key=lost.__getitem__, default="")
    if not worst or lost[worst] <= ROUGH:
        return []
    norm = sum(row.norm**2 for row in rows)
    error = (sum((row.rounding or 0.0) ** 2 for row in rows) / norm) ** 0.5
    return [
        f"rounding to 16 bits adds an error of {error:.4f}, {lost[worst]:.4f} in {worst}, which the table leaves out: "
        "ask for dtype float32, or for bfloat16 where float16 is too narrow"
    ]


def _lines(report: Report, each: bool) -> list[tuple[str, list[Row]]]:
    """What stands in one line, by name; a name may hold brackets, which are no markup."""
    if each:
        return [(escape(row.name), [row]) for row in report.rows]
    groups = by_kind(report.rows).items()
    return [(escape(name) + (f" x {len(rows)}" if len(rows) > 1 else ""), rows) for name, rows in groups]


def _range(values: list[int] | list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _short_range(values: list[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low}-{high}"


def _beside_base(rows: list[Row]) -> list[str]:
    """Size of the updates beside their weights, and what a merge in bf16 loses; nothing where that was not found."""
    found = [row.base for row in rows if row.base]
    lost = [100 * base.merge_error for base in found if base.merge_error is not None]
    sizes = _short_range([base.relative_norm for base in found]) if found else ""
    return [sizes, f"{_short_range(lost)} %" if lost else ""]


def _intruders(rows: list[Row]) -> str:
    found = [row.base.intruders for row in rows if row.base and row.base.intruders is not None]
    return _range(found) if found else ""


def _change(rows: list[Row]) -> str:
    before, after = _range([row.rank for row in rows]), _range([row.rank_after for row in rows])
    return before if before == after else f"{before} -> {after}"


def _share(rows: list[Row]) -> str:
    kept, low = max(0.0, 1.0 - _error(rows) ** 2), max(0.0, min(row.energy for row in rows))
    return f"{kept:.2%}" if len(rows) == 1 else f"{kept:.2%} (least {low:.2%})"


def _error(rows: list[Row]) -> float:
    norm = sum(row.norm**2 for row in rows)
    return float((sum(row.discarded**2 for row in rows) / norm) ** 0.5) if norm else 0.0


def _bytes(rows: list[Row]) -> str:
    return f"{size(sum(row.size_bytes for row in rows))} -> {size(sum(row.size_bytes_after for row in rows))}"
