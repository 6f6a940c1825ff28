"""`lora-squeeze search`: the smallest rank that a command of the user accepts."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_squeeze.cli.options import AdapterArgument, Json, Revision, Subfolder, load_adapter, option, rank_list
from lora_squeeze.errors import LoraSqueezeError

if TYPE_CHECKING:
    from lora_squeeze.search import Found, Measured


def search(
    adapter: AdapterArgument,
    metric: Annotated[str, option("command", "--metric", module="search_command", function="CommandMetric")],
    max_drop: Annotated[str, option("max_drop", module="search", function="search")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the smallest that passes to.")],
    ranks: Annotated[str | None, option("ranks", module="search", function="search")] = None,
    over: Annotated[str, option("over", module="search", function="search")] = "rank",
    every: Annotated[bool, option("every", "--all", module="search", function="search")] = False,
    lower_is_better: Annotated[
        bool, option("lower_is_better", "--lower-is-better", module="search", function="search")
    ] = False,
    json_key: Annotated[str | None, option("json_key", module="search_command", function="CommandMetric")] = None,
    timeout: Annotated[float | None, option("timeout", module="search_command", function="CommandMetric")] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            help="Folder for candidates, logs and results; a search goes on from there. Default OUTPUT-search."
        ),
    ] = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output.")] = False,
    as_json: Json = False,
) -> None:
    """Find the smallest rank whose metric, measured by a command of yours, is close enough to the source's."""
    from lora_squeeze.cli import show
    from lora_squeeze.search import search as run
    from lora_squeeze.search_command import CommandMetric

    source = load_adapter(adapter, subfolder, revision)
    source.format.check_target(output, force=force)
    work = work or Path(f"{output}-search")
    command = CommandMetric(metric, work / "logs", json_key, timeout)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the command is ended too
    try:
        found = run(
            source, command, max_drop=max_drop, work=work, ranks=rank_list(ranks), over=over, every=every,
            lower_is_better=lower_is_better, name=command.name, source=getattr(source.format, "home", None),
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )  # fmt: skip
    except KeyboardInterrupt:  # caught here, since not all releases of typer let it through
        print(f"lora-squeeze: interrupted; the same command goes on from {work}", file=sys.stderr)
        raise typer.Exit(130) from None
    if found.adapter is not None:
        with show.progress("writing") as progress:
            found.adapter.save(output, force=force, progress=progress)
    if as_json:
        print(json.dumps({**found.to_json(), "output": None if found.adapter is None else str(output)}))
    else:
        _print(found, output, lower_is_better)
    if found.rank is None:
        largest = found.curve[-1]
        raise LoraSqueezeError(
            f"no candidate passes: the largest, rank {largest.rank}, measures {largest.metric:g}, the bound is "
            f"{found.bound:g}; nothing was written"
        )


def _print(found: Found, output: Path, lower_is_better: bool) -> None:
    from rich.table import Table

    from lora_squeeze.cli import show

    table = Table("rank", "metric", "change", "bytes", "seconds", "")
    for row in (*found.curve, found.source):
        table.add_row(*_cells(row, found))
    console = show.console()
    console.print(table)
    side = "at most" if lower_is_better else "at least"
    lines = [f"a candidate passes with a metric of {side} {found.bound:g}", *found.notes]
    if found.rank is not None:
        lines.append(f"rank {found.rank} is the smallest that passes; written to {output}")
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _cells(row: Measured, found: Found) -> list[str]:
    from lora_squeeze.cli import show

    verdict = "source" if row is found.source else "passes" if row.passes else "does not pass"
    change = row.metric - found.source.metric
    return [
        f"{row.rank}",
        f"{row.metric:g}",
        f"{change:+.3g}",
        show.size(row.size_bytes),
        f"{row.seconds:.1f}",
        f"{verdict}, known from before" if row.reused else verdict,
    ]
