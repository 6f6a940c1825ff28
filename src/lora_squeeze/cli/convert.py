"""`lora-squeeze convert`: from any adapter, or a fine-tuned model, to a plain LoRA in any format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lora_squeeze.cli.docs import option_help
from lora_squeeze.cli.options import Each, Json, Revision, Subfolder, option, parse_dtype


def _own(name: str, *flags: str) -> Any:
    return option(name, *flags, module="conversion", function="convert")


def convert(
    source: Annotated[str, typer.Argument(help=option_help("sources", "open_source")["source"])],
    to: Annotated[str, _own("to", "--to")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder or file to write.", show_default=False)
    ] = None,
    rank: Annotated[int | None, option("rank")] = None,
    energy: Annotated[float | None, option("energy")] = None,
    error: Annotated[float | None, option("error")] = None,
    size: Annotated[str | None, option("size")] = None,
    params: Annotated[int | None, option("params")] = None,
    max_rank: Annotated[int | None, option("max_rank")] = None,
    base: Annotated[str | None, _own("base")] = None,
    initial: Annotated[str | None, option("initial", module="sources", function="open_source")] = None,
    vocabulary: Annotated[str | None, option("vocabulary", module="sources", function="open_source")] = None,
    carry: Annotated[bool, option("carry", "--carry", module="sources", function="open_source")] = False,
    component: Annotated[str | None, _own("component")] = None,
    architecture: Annotated[str | None, _own("architecture")] = None,
    exclude: Annotated[list[str] | None, _own("exclude")] = None,
    without_extras: Annotated[
        bool,
        typer.Option("--without-extras", help="Leave out what is beside the factors: embeddings, heads, biases."),
    ] = False,
    method: Annotated[str, option("method")] = "gram",
    dtype: Annotated[str | None, option("dtype")] = None,
    device: Annotated[str | None, option("device")] = None,
    seed: Annotated[int, option("seed")] = 0,
    subfolder: Subfolder = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute and show the figures, write nothing.")] = False,
    each: Each = False,
    as_json: Json = False,
) -> None:
    """Write an adapter of any kind as a plain LoRA in the format that is asked for, at the rank that you choose."""
    from lora_squeeze.cli import show
    from lora_squeeze.conversion import convert as converted
    from lora_squeeze.sources import open_source

    if output is None and not dry_run:
        raise typer.BadParameter("give an output with -o, or --dry-run", param_hint="--output")
    if vocabulary not in (None, "leave", "lora", "carry"):
        raise typer.BadParameter("choose one of leave, lora, carry", param_hint="--vocabulary")
    adapter = open_source(
        source, base=base, initial=initial, rank=rank or max_rank, carry=carry,
        vocabulary=vocabulary,  # type: ignore[arg-type]  # checked above
        subfolder=subfolder, revision=revision,
    )  # fmt: skip
    with show.progress("measuring") as progress:
        result = converted(
            adapter, to, base=base, component=component, architecture=architecture, exclude=exclude,
            extras=not without_extras, rank=rank, energy=energy, error=error, size=size, params=params,
            max_rank=max_rank, method=method, dtype=parse_dtype(dtype), device=device, seed=seed, progress=progress,
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
