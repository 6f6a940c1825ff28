"""Commands and their options. Exit codes: 0 done, 1 refused (one line on standard error), 2 wrong usage."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_squeeze.cli.docs import option_help
from lora_squeeze.cli.train import train
from lora_squeeze.errors import LoraSqueezeError

if TYPE_CHECKING:
    import torch

    from lora_squeeze.adapter import Adapter

app = typer.Typer(
    name="lora-squeeze",
    help="Train a LoRA at any rank, deploy it at the rank you choose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its formatted help takes longer to import than all else together
)


def _option(name: str, module: str = "post_squeeze", function: str = "squeeze") -> Any:
    return typer.Option(help=option_help(module, function)[name], show_default=False)


AdapterArgument = Annotated[str, typer.Argument(help="Folder of a PEFT adapter, or a hub id such as user/adapter.")]
Subfolder = Annotated[str | None, _option("subfolder", module="hub", function="load")]
Revision = Annotated[str | None, _option("revision", module="hub", function="load")]
Json = Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")]
Each = Annotated[bool, typer.Option("--each", help="One line per module instead of one per kind of module.")]


def main() -> None:
    """Run the command line; refused requests become one line on standard error and exit code 1."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()  # here a closed pipe can be answered, at the interpreter's end it cannot
    except LoraSqueezeError as error:
        print(f"lora-squeeze: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    except (BrokenPipeError, KeyboardInterrupt, SystemExit) as stop:
        # Some releases of typer let an interruption through, others make an exit of it.
        if isinstance(stop, KeyboardInterrupt) or isinstance(_cause(stop.__context__), KeyboardInterrupt):
            print("lora-squeeze: interrupted; nothing was written", file=sys.stderr)
            sys.exit(130)
        if not isinstance(stop, BrokenPipeError) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        # The reader of a pipe has seen enough; the command's framework may have turned that into exit code 1.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def _cause(error: BaseException | None) -> BaseException | None:
    return None if error is None else error.__cause__


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from lora_squeeze import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def squeeze(
    adapter: AdapterArgument,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)] = None,
    rank: Annotated[int | None, _option("rank")] = None,
    energy: Annotated[float | None, _option("energy")] = None,
    error: Annotated[float | None, _option("error")] = None,
    size: Annotated[str | None, _option("size")] = None,
    params: Annotated[int | None, _option("params")] = None,
    sv_ratio: Annotated[float | None, _option("sv_ratio")] = None,
    sv_cumulative: Annotated[float | None, _option("sv_cumulative")] = None,
    sv_fro: Annotated[float | None, _option("sv_fro")] = None,
    allocate: Annotated[str | None, _option("allocate")] = None,
    min_rank: Annotated[int, _option("min_rank")] = 0,
    max_rank: Annotated[int | None, _option("max_rank")] = None,
    multiple_of: Annotated[int, _option("multiple_of")] = 1,
    method: Annotated[str, _option("method")] = "gram",
    alpha: Annotated[str, _option("alpha")] = "keep",
    dtype: Annotated[str | None, _option("dtype")] = None,
    device: Annotated[str | None, _option("device")] = None,
    seed: Annotated[int, _option("seed")] = 0,
    subfolder: Subfolder = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is at the output.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute and show the figures, write nothing.")] = False,
    each: Each = False,
    as_json: Json = False,
) -> None:
    """Make an adapter smaller: the best approximation of every update at a lower rank."""
    from lora_squeeze.cli import show

    if output is None and not dry_run:
        raise typer.BadParameter("give an output folder with -o, or --dry-run", param_hint="--output")
    source = _load(adapter, subfolder, revision)
    if output is not None and not dry_run:
        source.format.check_target(output, force=force)
    with show.progress("measuring") as progress:
        result = source.squeeze(
            rank=rank, energy=energy, error=error, size=size, params=params, sv_ratio=sv_ratio,
            sv_cumulative=sv_cumulative, sv_fro=sv_fro, allocate=allocate, min_rank=min_rank, max_rank=max_rank,
            multiple_of=multiple_of, method=method, alpha=alpha, dtype=_dtype(dtype), device=device, seed=seed,
            progress=progress,
        )  # fmt: skip
    _refuse_no_op(source, result, alpha)
    if output is not None and not dry_run:
        with show.progress("writing") as progress:
            result.save(output, force=force, progress=progress)
    report = result.report
    if as_json:
        written = None if dry_run or output is None else str(output)
        print(json.dumps({**report.to_json(), "rank": result.rank, "output": written}))
        return
    console = show.console()
    console.print(show.squeeze_table(report, each))
    for line in (*show.bytes_lines(report, after=True), *report.notes):
        console.print(line, markup=False, highlight=False)
    console.print("dry run: nothing written" if dry_run else f"written to {output}", markup=False, highlight=False)


@app.command()
def inspect(
    adapter: AdapterArgument,
    subfolder: Subfolder = None,
    revision: Revision = None,
    each: Each = False,
    as_json: Json = False,
) -> None:
    """Show ranks, spectra and sizes of an adapter, and the rank that it needs."""
    from lora_squeeze.cli import show
    from lora_squeeze.report import inspect as inspected

    source = _load(adapter, subfolder, revision)
    with show.progress("reading") as progress:
        report = inspected(source, progress)
    if as_json:
        print(json.dumps({**report.to_json(), "rank": source.rank}))
        return
    console = show.console()
    console.print(show.inspect_table(report, each))
    lines = (
        *show.bytes_lines(report, after=False),
        *report.notes,
        f"Rank {report.uniform_rank(0.95)} for all modules keeps 95 % of the energy on average, "
        f"rank {report.uniform_rank(0.99)} keeps 99 %. Energy is not task quality: measure on the task.",
    )
    for line in lines:
        console.print(line, markup=False, highlight=False)


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to write; default lora-squeeze-demo, or lora-squeeze-demo-quick."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and fewer words: under two minutes.")] = False,
    device: Annotated[str | None, typer.Option("--device", help="Where to train; default the best there is.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of data order and initialisation.")] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Train anew even if the folder holds a trained adapter.")
    ] = False,
) -> None:
    """Train a rank-64 LoRA of a small language model, squeeze it to rank 32 ... 1, and measure each."""
    from lora_squeeze.demo import run_demo

    output = output or Path("lora-squeeze-demo-quick" if quick else "lora-squeeze-demo")
    run_demo(output, quick=quick, device=device, seed=seed, force=force)


app.command()(train)


def _load(adapter: str, subfolder: str | None, revision: str | None) -> Adapter:
    from lora_squeeze.hub import load

    return load(adapter, subfolder=subfolder, revision=revision)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    import torch

    short = {"fp32": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp64": "float64"}
    found = getattr(torch, short.get(name, name), None)
    if not isinstance(found, torch.dtype):
        raise LoraSqueezeError(f"dtype {name!r} is not known; choose float32, float16 or bfloat16")
    return found


def _refuse_no_op(source: Adapter, result: Adapter, alpha: str) -> None:
    """A copy under another name is not what anybody who squeezes wants."""

    def facts(adapter: Adapter) -> dict[str, tuple[object, ...]]:
        return {name: (m.rank, m.dtype, m.scale if alpha == "fold" else None) for name, m in adapter.modules.items()}

    if facts(source) == facts(result):
        raise LoraSqueezeError(
            f"nothing to do: the adapter has rank {source.rank} and the request asks for no less; nothing was written"
        )
