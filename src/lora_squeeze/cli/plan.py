"""`lora-squeeze plan`: the ranks that a squeeze would choose, in a file that can be read and edited."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_squeeze.cli import options
from lora_squeeze.cli.calibrate import Base, Calibrate, asked_of, loss_line

if TYPE_CHECKING:
    from rich.table import Table

    from lora_squeeze.plan import Plan


def plan(
    adapter: options.AdapterArgument,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write: TOML, or JSON if it ends with .json.", show_default=False),
    ] = None,
    rank: options.Rank = None,
    energy: options.Energy = None,
    error: options.Error = None,
    size: options.Size = None,
    params: options.Params = None,
    sv_ratio: options.SvRatio = None,
    sv_cumulative: options.SvCumulative = None,
    sv_fro: options.SvFro = None,
    allocate: options.Allocate = None,
    min_rank: options.MinRank = 0,
    max_rank: options.MaxRank = None,
    multiple_of: options.MultipleOf = 1,
    ranks: options.Ranks = None,
    same_rank_per: options.SameRankPer = "module",
    dtype: options.Dtype = None,
    calibrate: Calibrate = None,
    base: Base = None,
    subfolder: options.Subfolder = None,
    revision: options.Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    each: options.Each = False,
    as_json: options.Json = False,
) -> None:
    """Write the ranks that a squeeze would choose to a file, for `squeeze --plan`; without -o, show them."""
    from lora_squeeze.cli import show
    from lora_squeeze.hub import load, locate
    from lora_squeeze.plan import make_plan
    from lora_squeeze.plan_file import check_target, to_json

    if output is not None:
        check_target(output, force=force)
    folder = locate(adapter, subfolder=subfolder, revision=revision)
    source = load(folder)
    with asked_of(calibrate, base, source, folder) as asked:
        with show.progress("measuring") as progress:
            made = make_plan(
                source, name=adapter, moments=asked.moments, progress=progress, rank=rank, energy=energy, error=error,
                size=size, params=params, sv_ratio=sv_ratio, sv_cumulative=sv_cumulative, sv_fro=sv_fro,
                allocate=allocate, min_rank=min_rank, max_rank=max_rank, multiple_of=multiple_of,
                ranks=options.rank_list(ranks), same_rank_per=same_rank_per, dtype=options.parse_dtype(dtype),
            )  # fmt: skip
        losses = asked.losses(source.squeeze(plan=made, moments=asked.moments))
    made = replace(made, totals={**made.totals, **losses})
    if output is not None:
        made.save(output, force=force)
    if as_json:
        print(to_json(made), end="")
        return
    console = show.console()
    console.print(_table(made, each))
    totals = made.totals
    lines = [
        f"{totals['parameters']:,} parameters, at most {show.size(totals['file_bytes'])}, "
        f"energy kept {totals['energy']:.2%}, error {totals['error']:.4f}"
    ]
    lines += loss_line(losses, totals.get("loss_increase"))
    lines += ["nothing written: give -o plan.toml"] if output is None else [f"written to {output}"]
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _table(made: Plan, each: bool) -> Table:
    """Ranks, largest error and reasons: one line per kind of module, or per module."""
    from rich.markup import escape
    from rich.table import Table

    from lora_squeeze.dials import type_of

    rows: dict[str, list[str]] = {}
    for name in made.modules:
        rows.setdefault(name if each else type_of(name), []).append(name)
    table = Table("module", "rank", "error", "reason")
    for kind, names in rows.items():
        found = [made.modules[name] for name in names]
        ranks = sorted({row.rank for row in found})
        reasons = Counter(row.reason for row in found)
        table.add_row(
            escape(f"{kind} x {len(names)}" if len(names) > 1 else kind),
            f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}",
            f"{max(row.error or 0.0 for row in found):.4f}",
            escape(
                "; ".join(f"{reason} ({count})" if len(reasons) > 1 else reason for reason, count in reasons.items())
            ),
        )
    return table
