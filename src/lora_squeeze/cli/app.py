"""Commands and their options. Exit codes: 0 done, 1 refused (one line on standard error), 2 wrong usage."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_squeeze.cli import options
from lora_squeeze.cli.calibrate import Base, Calibrate, asked_of, loss_line
from lora_squeeze.cli.calibrate import calibrate as calibrate_command
from lora_squeeze.cli.check import check
from lora_squeeze.cli.convert import convert
from lora_squeeze.cli.fleet import fleet as fleet_command
from lora_squeeze.cli.merge import merge, rank_up, subtract
from lora_squeeze.cli.methods import methods as methods_command
from lora_squeeze.cli.plan import plan as plan_command
from lora_squeeze.cli.search import search as search_command
from lora_squeeze.cli.train import train
from lora_squeeze.errors import LoraSqueezeError

if TYPE_CHECKING:
    from lora_squeeze.adapter import Adapter
    from lora_squeeze.report import Report

app = typer.Typer(
    name="lora-squeeze",
    help="Train a LoRA at any rank, deploy it at the rank you choose.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its formatted help takes longer to import than all else together
)


def main() -> None:
    """Run the command line; refused requests become one line on standard error and exit code 1."""
    if sys.stdout is None:  # closed by whoever started the command
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
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
            print("lora-squeeze: interrupted; an output is there as a whole or not at all", file=sys.stderr)
            sys.exit(130)
        if not isinstance(stop, BrokenPipeError) and not isinstance(stop.__context__, BrokenPipeError):
            raise
        # The reader of a pipe has seen enough; the command's framework may have turned that into exit code 1.
        _silence()
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise
        _silence()
        print(f"lora-squeeze: cannot write ({error.strerror}); standard output may not be whole", file=sys.stderr)
        sys.exit(1)


def _silence() -> None:
    """What standard output still holds goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    adapter: options.AdapterArgument,
    output: options.Output = None,
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
    plan: Annotated[
        Path | None,
        typer.Option(help="File with the rank of every module, from the plan command, in place of a rule."),
    ] = None,
    calibrate: Calibrate = None,
    base: Base = None,
    method: options.Method = "gram",
    alpha: Annotated[str, options.option("alpha")] = "keep",
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
    """Make an adapter smaller: the best approximation of every update at a lower rank."""
    from lora_squeeze.cli import show
    from lora_squeeze.hub import load, locate
    from lora_squeeze.plan import Plan

    if output is None and not dry_run:
        raise typer.BadParameter("give an output folder with -o, or --dry-run", param_hint="--output")
    folder = locate(adapter, subfolder=subfolder, revision=revision)
    source = load(folder)
    if output is not None and not dry_run:
        source.format.check_target(output, force=force)
    planned = None if plan is None else Plan.load(plan)
    with asked_of(calibrate, base, source, folder, device) as asked:
        with show.progress("measuring") as progress:
            result = source.squeeze(
                rank=rank, energy=energy, error=error, size=size, params=params, sv_ratio=sv_ratio,
                sv_cumulative=sv_cumulative, sv_fro=sv_fro, allocate=allocate, min_rank=min_rank, max_rank=max_rank,
                multiple_of=multiple_of, ranks=options.rank_list(ranks), same_rank_per=same_rank_per,
                plan=planned, moments=asked.moments, method=method, alpha=alpha,
                dtype=options.parse_dtype(dtype), device=device, seed=seed, progress=progress,
            )  # fmt: skip
        _refuse_no_op(source, result, alpha)
        if output is not None and not dry_run:
            with show.progress("writing") as progress:
                result.save(output, force=force, progress=progress)
        losses = asked.losses(result)
    report = result.report
    if planned is not None and "loss_increase" in planned.totals and asked.found is None:
        note = "the plan was made with data: without --calibrate its ranks are kept, but cut plainly"
        report = replace(report, notes=[*report.notes, note])
    if planned is not None and (other := planned.note_for(source)):
        report = replace(report, notes=[*report.notes, other])
    if as_json:
        written = None if dry_run or output is None else str(output)
        print(json.dumps({**report.to_json(), **losses, "rank": result.rank, "output": written}))
        return
    console = show.console()
    console.print(show.squeeze_table(report, each))
    lines = [*show.bytes_lines(report, after=True), *loss_line(losses, report.loss_increase), *report.notes]
    for line in lines:
        console.print(line, markup=False, highlight=False)
    console.print("dry run: nothing written" if dry_run else f"written to {output}", markup=False, highlight=False)


@app.command()
def inspect(
    adapter: options.AdapterArgument,
    size: options.Size = None,
    params: options.Params = None,
    rank: options.Rank = None,
    allocate: options.Allocate = None,
    min_rank: options.MinRank = None,
    max_rank: options.MaxRank = None,
    multiple_of: options.MultipleOf = None,
    ranks: options.Ranks = None,
    same_rank_per: options.SameRankPer = None,
    base: Annotated[str | None, options.option("model", module="base_model", function="open_base")] = None,
    intruders: Annotated[bool, options.option("intruders", "--intruders", module="report", function="inspect")] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with charts to this file; it works offline.")
    ] = None,
    subfolder: options.Subfolder = None,
    revision: options.Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the page if the file is there.")] = False,
    each: options.Each = False,
    as_json: options.Json = False,
) -> None:
    """Show ranks, spectra and sizes of an adapter, the rank that it needs, and the best ranks for a budget."""
    from lora_squeeze.base_model import open_base
    from lora_squeeze.cli import show
    from lora_squeeze.html_report import check_target, write_page
    from lora_squeeze.report import inspect as inspected

    if html is not None:
        check_target(html, force=force)
    source = options.load_adapter(adapter, subfolder, revision)
    with show.progress("reading") as progress:
        report = inspected(
            source, progress, base=None if base is None else open_base(base), intruders=intruders, size=size,
            params=params, rank=rank, allocate=allocate, min_rank=min_rank, max_rank=max_rank,
            multiple_of=multiple_of, ranks=options.rank_list(ranks), same_rank_per=same_rank_per,
        )  # fmt: skip
    if html is not None:
        write_page(report, html, name=Path(adapter).resolve().name if Path(adapter).exists() else adapter, force=force)
    if as_json:
        print(json.dumps(report.inspection()))
        return
    console = show.console()
    console.print(*show.inspect_tables(report, each))
    told = [*report.notes, *_carried_hints(source, report)]
    lines = [*show.bytes_lines(report, after=False), *told, *show.recommendation(report)]
    for line in [*lines, *([] if html is None else [f"page written to {html}"])]:
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
app.command("plan")(plan_command)
app.command("calibrate")(calibrate_command)
app.command()(convert)
app.command()(check)
app.command()(merge)
app.command()(subtract)
app.command("rank-up")(rank_up)
app.command("search")(search_command)
app.command("fleet")(fleet_command)
app.command("methods")(methods_command)


def _carried_hints(source: Adapter, report: Report) -> list[str]:
    """How to write the adapter without tensors that the base model has too, and with modules for those that changed."""
    if report.base is None or not report.base.carried:
        return []
    call = f"lora-squeeze convert ADAPTER --to {report.format}"
    base = f"--base {shlex.quote(report.base.model)}"
    hints = []
    if equal := sum(tensor.equal for tensor in report.base.carried):
        every = equal == len(source.extras)
        which = (
            "all that it carries is" if every else f"{equal} of the {len(source.extras)} tensors that it carries are"
        )
        options = "--without-extras" if every else f"--without-equal {base}"
        hints.append(f"{which} in the base: {call} {options} -o OUT writes it without")
    changed = [tensor for tensor in report.base.carried if not tensor.equal and not tensor.added_rows]
    if any(len(source.extras[tensor.name].shape) > 1 for tensor in changed):
        options = f"{base} --vocabulary lora --rank {source.rank}"
        hints.append(f"layers that it carries whole can become modules: {call} {options} -o OUT")
    return hints


def _refuse_no_op(source: Adapter, result: Adapter, alpha: str) -> None:
    """A copy under another name is not what anybody who squeezes wants."""

    def facts(adapter: Adapter) -> dict[str, tuple[object, ...]]:
        return {name: (m.rank, m.dtype, m.scale if alpha == "fold" else None) for name, m in adapter.modules.items()}

    if facts(source) == facts(result):
        raise LoraSqueezeError(
            f"nothing to do: the adapter has rank {source.rank} and the request asks for no less; nothing was written"
        )
