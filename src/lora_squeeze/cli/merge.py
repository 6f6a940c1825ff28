"""`lora-squeeze merge`, `subtract` and `rank-up`: adapters added up, taken apart and given room."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_squeeze.cli import options
from lora_squeeze.cli.docs import option_help

if TYPE_CHECKING:
    from lora_squeeze.adapter import Adapter


def _own(name: str, *flags: str) -> Any:
    return options.option(name, *flags, module="combine", function="merge")


ExtrasFrom = Annotated[int | None, _own("extras_from")]


def merge(
    adapters: Annotated[
        list[str], typer.Argument(help="Adapters of any format: folders, files, or hub ids such as user/adapter.")
    ],
    output: options.Output = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="One number per adapter, as in --weights=0.7,0.5,-0.2, or a .toml or .json file with such a list for "
            "every pattern of module names. Default 1 for each.",
        ),
    ] = None,
    rank: options.Rank = None,
    energy: options.Energy = None,
    error: options.Error = None,
    size: options.Size = None,
    params: options.Params = None,
    allocate: options.Allocate = None,
    min_rank: options.MinRank = None,
    max_rank: options.MaxRank = None,
    multiple_of: options.MultipleOf = None,
    ranks: options.Ranks = None,
    same_rank_per: options.SameRankPer = None,
    base: Annotated[str | None, _own("base")] = None,
    method: Annotated[str, _own("method")] = "sum",
    density: Annotated[float | None, _own("density")] = None,
    extras_from: ExtrasFrom = None,
    seed: Annotated[int, _own("seed")] = 0,
    dtype: options.Dtype = None,
    device: options.Device = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    each: options.Each = False,
    as_json: options.Json = False,
) -> None:
    """Add adapters up, each with its weight, to one of the rank that you choose; without a rank, the whole sum."""
    from lora_squeeze.combine_weights import parse_weights

    found = None if weights is None else parse_weights(weights)
    _combine(
        adapters, _load(adapters), found, output, force, dry_run, each, as_json,
        base=base, method=method, density=density, extras_from=extras_from, seed=seed, rank=rank, energy=energy,
        error=error, size=size, params=params, allocate=allocate, min_rank=min_rank, max_rank=max_rank,
        multiple_of=multiple_of, ranks=options.rank_list(ranks), same_rank_per=same_rank_per,
        dtype=options.parse_dtype(dtype), device=device,
    )  # fmt: skip


def subtract(
    minuend: Annotated[str, typer.Argument(help=option_help("combine", "subtract")["minuend"])],
    subtrahend: Annotated[str, typer.Argument(help=option_help("combine", "subtract")["subtrahend"])],
    output: options.Output = None,
    rank: options.Rank = None,
    energy: options.Energy = None,
    error: options.Error = None,
    size: options.Size = None,
    params: options.Params = None,
    allocate: options.Allocate = None,
    min_rank: options.MinRank = None,
    max_rank: options.MaxRank = None,
    multiple_of: options.MultipleOf = None,
    ranks: options.Ranks = None,
    same_rank_per: options.SameRankPer = None,
    extras_from: ExtrasFrom = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    each: options.Each = False,
    as_json: options.Json = False,
) -> None:
    """Subtract one adapter from another: what the first does beyond the second."""
    from lora_squeeze.combine_pair import load_pair

    _combine(
        [minuend, subtrahend], load_pair(minuend, subtrahend), [1.0, -1.0], output, force, dry_run, each, as_json,
        extras_from=extras_from, rank=rank, energy=energy, error=error, size=size, params=params, allocate=allocate,
        min_rank=min_rank, max_rank=max_rank, multiple_of=multiple_of, ranks=options.rank_list(ranks),
        same_rank_per=same_rank_per, dtype=options.parse_dtype(dtype), device=device,
    )  # fmt: skip


def rank_up(
    adapter: options.AdapterArgument,
    rank: Annotated[int, options.option("rank", "--rank", module="combine", function="rank_up")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder or file to write.", show_default=False)],
    seed: Annotated[int, options.option("seed", module="combine", function="rank_up")] = 0,
    subfolder: options.Subfolder = None,
    revision: options.Revision = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write the same adapter at a higher rank: it does the same, and the new directions can learn."""
    from lora_squeeze.cli import show
    from lora_squeeze.combine import rank_up as padded

    source = options.load_adapter(adapter, subfolder, revision)
    source.format.check_target(output, force=force)
    result = padded(source, rank, seed=seed)
    with show.progress("writing") as progress:
        result.save(output, force=force, progress=progress)
    found = {
        "rank_before": source.rank,
        "rank": result.rank,
        "bytes_before": source.lora_bytes,
        "bytes": result.lora_bytes,
        "output": str(output),
    }
    if as_json:
        print(json.dumps(found))
        return
    ranks = sorted({module.rank * module.step for module in source.modules.values()})
    before = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else f"{ranks[0]}"
    line = f"rank {before} -> {rank}, LoRA factors {show.size(source.lora_bytes)} -> {show.size(result.lora_bytes)}"
    for text in (line, f"written to {output}"):
        show.console().print(text, markup=False, highlight=False)


def _load(names: Sequence[str]) -> list[Adapter]:
    return [options.load_adapter(name, None, None) for name in names]


def _combine(
    names: Sequence[str],
    adapters: Sequence[Adapter],
    weights: Any,
    output: Path | None,
    force: bool,
    dry_run: bool,
    each: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Merge, write and tell."""
    from lora_squeeze.cli import show
    from lora_squeeze.combine import merge as merged
    from lora_squeeze.combine import residual

    if output is None and not dry_run:
        raise typer.BadParameter("give an output folder with -o, or --dry-run", param_hint="--output")
    target = None if dry_run else output
    if target is not None:
        for adapter in adapters:
            adapter.format.check_target(target, force=force)
    with show.progress("measuring") as progress:
        result = merged(adapters, weights, progress=progress, **options)
    if target is not None:
        with show.progress("writing") as progress:
            result.save(target, force=force, progress=progress)
    report = result.report
    away = residual(report)
    if as_json:
        written = None if target is None else str(target)
        figures = {"rank": result.rank, "residual": asdict(away), "adapters": list(names), "output": written}
        print(json.dumps({**report.to_json(), **figures}))
        return
    console = show.console()
    console.print(show.squeeze_table(report, each))
    lines = [
        f"residual |sum - written| / |sum| {away.error:.4g}, at most {away.worst:.4g} ({away.module})",
        *show.bytes_lines(report, after=True),
        *report.notes,
        "dry run: nothing written" if target is None else f"written to {target}",
    ]
    for line in lines:
        console.print(line, markup=False, highlight=False)
