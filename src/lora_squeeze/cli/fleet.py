"""`lora-squeeze fleet`: all adapters of one base model, squeezed for one server and one memory budget."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_squeeze.cli.options import Json, option, parse_dtype
from lora_squeeze.errors import LoraSqueezeError

if TYPE_CHECKING:
    from rich.table import Table

    from lora_squeeze.fleet.passes import Tell
    from lora_squeeze.fleet.report import FleetReport, Row

_WORST = 10  # members shown


def _option(name: str, *flags: str) -> Any:
    return option(name, *flags, module="fleet/run", function="squeeze_fleet")


def fleet(
    adapters: Annotated[
        list[str],
        typer.Argument(help="Folders of adapters, folders that hold such folders, or patterns in quotes."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the squeezed adapters to.")],
    memory: Annotated[str, _option("memory")],
    engine: Annotated[str, _option("engine")] = "vllm",
    slots: Annotated[int | None, _option("slots")] = None,
    host_memory: Annotated[str | None, _option("host_memory", "--host-memory")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="TOML or JSON file with how much the loss of each member counts: name = weight.")
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(help="Keep only members of this base model; several times if it has several names."),
    ] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    slot_dtype: Annotated[str | None, _option("slot_dtype", "--slot-dtype")] = None,
    device: Annotated[str | None, _option("device")] = None,
    skip_unreadable: Annotated[bool, _option("skip_unreadable", "--skip-unreadable")] = False,
    workers: Annotated[int | None, _option("workers")] = None,
    ray: Annotated[str | None, _option("ray")] = None,
    work: Annotated[Path | None, _option("work")] = None,
    force: Annotated[bool, _option("force", "--force")] = False,
    dry_run: Annotated[bool, _option("dry_run", "--dry-run")] = False,
    each: Annotated[bool, typer.Option("--each", help="Show all members instead of those that lose most.")] = False,
    as_json: Json = False,
) -> None:
    """Squeeze all adapters of a base model for one server, at the ranks that lose least in its memory."""
    from lora_squeeze.fleet.run import squeeze_fleet
    from lora_squeeze.fleet.weights import load_weights

    try:
        with _progress() as tell:
            report = squeeze_fleet(
                adapters, output, memory=memory, engine=engine, slots=slots, host_memory=host_memory,
                weights=None if weights is None else load_weights(weights), base=base or (), dtype=parse_dtype(dtype),
                slot_dtype=parse_dtype(slot_dtype), device=device, skip_unreadable=skip_unreadable, dry_run=dry_run,
                force=force, workers=workers, ray=ray, work=work, tell=tell,
            )  # fmt: skip
    except KeyboardInterrupt:  # caught here, since not all releases of typer let it through
        print("lora-squeeze: interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        _print(report, each, dry_run)
    if report.failed:
        reasons = "; ".join(f"{row.name} ({row.reason})" for row in report.failed)
        others = "" if dry_run else "; the others are done"
        raise LoraSqueezeError(f"{len(report.failed)} of {len(report.members)} members failed: {reasons}{others}")


@contextmanager
def _progress() -> Iterator[Tell]:
    """A bar with members done and the time left on standard error; silent in a pipe."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def tell(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bar.add_task(label, total=total, completed=done)
            bar.update(tasks[label], completed=done, total=total)

        yield tell


def _print(report: FleetReport, each: bool, dry_run: bool) -> None:
    from lora_squeeze.cli import show

    console = show.console()
    console.print(_curve(report), _members(report, each))
    hidden = 0 if each else max(0, len(report.members) - _WORST)
    lines = [f"and {hidden} members that lose less: --each shows all"] if hidden else []
    lines += [f"skipped: {name} ({reason})" for name, reason in report.skipped.items()]
    lines += report.notes
    before, after = (sum(size or 0 for size in sizes) for sizes in _sizes(report))
    total = f"{len(report.members)} members, weighted loss {report.loss:.4%} of the energy"
    lines.append(f"{total}; weights files {show.size(before)}" + (f" -> {show.size(after)}" if after else ""))
    if report.options:
        lines.append(f"{report.slots} slots take {show.size(report.bytes)} of {show.size(report.memory)}; start with")
        lines.append(f"    {report.options}")
    else:
        lines.append(f"all adapters together take {show.size(report.bytes)} of {show.size(report.memory)}")
    lines.append("dry run: nothing written" if dry_run else f"written to {report.output}")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _sizes(report: FleetReport) -> tuple[list[int], list[int | None]]:
    return [row.bytes for row in report.members], [row.bytes_after for row in report.members]


def _curve(report: FleetReport) -> Table:
    """The trade-off: one line per rank that the server could have."""
    from rich.markup import escape
    from rich.table import Table

    from lora_squeeze.cli import show

    padded = report.max_rank is not None
    slots = ["slot", "slots that fit"] if padded else []
    table = Table("", "max rank", *slots, "needed", "fits", "loss", "worst member", "its loss")
    for point in report.curve:
        table.add_row(
            "->" if point.chosen else "",
            f"{point.rank}",
            *([show.size(point.slot_bytes or 0), f"{point.slots_fit}"] if padded else []),
            show.size(point.bytes),
            "yes" if point.fits else "no",
            f"{point.loss:.4%}",
            escape(point.worst),
            f"{point.worst_loss:.2%}",
        )
    return table


def _members(report: FleetReport, each: bool) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("member", "rank", "loss", "weight", "bytes", "")
    rows = report.members if each else report.worst(_WORST)
    for row in rows:
        table.add_row(
            escape(row.name),
            _change(row.rank, row.rank_after),
            "" if row.loss is None else f"{row.loss:.2%}",
            f"{row.weight:g}",
            _bytes(row),
            row.state,
        )
    return table


def _change(before: int, after: int | None) -> str:
    return f"{before}" if after in (None, before) else f"{before} -> {after}"


def _bytes(row: Row) -> str:
    from lora_squeeze.cli import show

    before = show.size(row.bytes)
    return before if row.bytes_after is None else f"{before} -> {show.size(row.bytes_after)}"
