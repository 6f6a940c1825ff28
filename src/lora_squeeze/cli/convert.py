"""`lora-squeeze convert`: from any adapter, or a fine-tuned model, to a plain LoRA in any format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_squeeze.cli import options
from lora_squeeze.cli.docs import option_help


def _own(name: str, *flags: str) -> Any:
    return options.option(name, *flags, module="conversion", function="convert")


def convert(
    source: Annotated[str, typer.Argument(help=option_help("sources", "open_source")["source"])],
    to: Annotated[str, _own("to", "--to")],
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
    base: Annotated[str | None, _own("base")] = None,
    initial: Annotated[str | None, options.option("initial", module="sources", function="open_source")] = None,
    vocabulary: Annotated[str | None, options.option("vocabulary", module="sources", function="open_source")] = None,
    carry: Annotated[bool, options.option("carry", "--carry", module="sources", function="open_source")] = False,
    component: Annotated[str | None, _own("component")] = None,
    architecture: Annotated[str | None, _own("architecture")] = None,
    exclude: Annotated[list[str] | None, _own("exclude")] = None,
    without_extras: Annotated[
        bool,
        typer.Option("--without-extras", help="Leave out what is beside the factors: embeddings, heads, biases."),
    ] = False,
    without_equal: Annotated[
        bool,
        typer.Option("--without-equal", help="Leave out those of them that --base has too, number for number."),
    ] = False,
    method: options.Method = "gram",
    dtype: options.Dtype = None,
    device: options.Device = None,
    seed: options.Seed = 0,
    subfolder: options.Subfolder = None,
    revision: options.Revision = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    each: options.Each = False,
    as_json: options.Json = False,
) -> None:
    """Write an adapter of any kind as a plain LoRA in the format that is asked for, at the rank that you choose."""
    from lora_squeeze.cli import show
    from lora_squeeze.conversion import convert as converted
    from lora_squeeze.sources import open_source

    if output is None and not dry_run:
        raise typer.BadParameter("give an output with -o, or --dry-run", param_hint="--output")
    if vocabulary not in (None, "leave", "lora", "carry"):
        raise typer.BadParameter("choose one of leave, lora, carry", param_hint="--vocabulary")
    if without_extras and without_equal:
        raise typer.BadParameter("--without-extras leaves out these too; choose one", param_hint="--without-equal")
    adapter = open_source(
        source, base=base, initial=initial, rank=rank or max_rank, carry=carry,
        vocabulary=vocabulary,  # type: ignore[arg-type]  # checked above
        subfolder=subfolder, revision=revision,
    )  # fmt: skip
    with show.progress("measuring") as progress:
        result = converted(
            adapter, to, base=base, component=component, architecture=architecture, exclude=exclude,
            extras="changed" if without_equal else not without_extras, rank=rank, energy=energy, error=error,
            size=size, params=params, allocate=allocate, min_rank=min_rank, max_rank=max_rank,
            multiple_of=multiple_of, ranks=options.rank_list(ranks), same_rank_per=same_rank_per, method=method,
            dtype=options.parse_dtype(dtype), device=device, seed=seed, progress=progress,
        )  # fmt: skip
    target = None if dry_run else output
    if target is not None:
        if target.resolve() == Path(source).expanduser().resolve():
            raise typer.BadParameter("the output is the source; choose another", param_hint="--output")
        result.format.check_target(target, force=force)
        with show.progress("writing") as progress:
            result.save(target, force=force, progress=progress)
    report = result.report
    if as_json:
        written = None if target is None else str(target)
        print(json.dumps({**report.to_json(), "rank": result.rank, "format": to, "output": written}))
        return
    console = show.console()
    console.print(show.squeeze_table(report, each))
    where = "dry run: nothing written" if target is None else f"written to {target}"
    for line in [*show.bytes_lines(report, after=True), *report.notes, where]:
        console.print(line, markup=False, highlight=False)
