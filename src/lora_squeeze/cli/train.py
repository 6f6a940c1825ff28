"""`lora-squeeze train`: options on the command line or in a file, progress, and what is told at the end."""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from lora_squeeze.cli.docs import option_help
from lora_squeeze.errors import LoraSqueezeError

if TYPE_CHECKING:
    from lora_squeeze.training.sft import Trained

_HELP = option_help("training/sft_settings", "TrainSettings")
_WRITTEN: dict[type, tuple[type, ...]] = {float: (int, float), Path: (str,)}  # in a file, where not the type itself


def _option(name: str, *flags: str) -> Any:
    return typer.Option(*flags, help=_HELP[name], show_default=False)


def _read_config(ctx: Any, path: Path | None) -> Path | None:
    """Make the options in a file the defaults of the command: what is on the command line wins.

    Args:
        ctx: the command's context, of a class that differs between releases of typer.
        path: the file.
    """
    if path is not None and not ctx.resilient_parsing:
        known = {_name(parameter): str(parameter.name) for parameter in ctx.command.params}
        for name in ("config", "json"):
            del known[name]
        given = _parsed(path)
        unknown = [name for name in given if name not in known]
        if unknown:
            raise LoraSqueezeError(f"{path}: unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
        ctx.default_map = {known[name]: _value(path, name, value, known[name]) for name, value in given.items()}
    return path


def _name(parameter: Any) -> str:
    """What an option is called on the command line, without its dashes."""
    flags = [flag.removeprefix("--") for flag in parameter.opts if flag.startswith("--")]
    return (flags[0] if flags else str(parameter.name)).replace("-", "_")


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:  # both parsers raise kinds of ValueError
        raise LoraSqueezeError(f"{path}: no readable TOML, or JSON in a .json file ({error})") from error
    if not isinstance(found, dict):
        raise LoraSqueezeError(f"{path}: expected options by name, found {type(found).__name__}")
    return {name.replace("-", "_"): value for name, value in found.items()}


def _value(path: Path, name: str, value: Any, parameter: str) -> Any:
    if name == "targets" and isinstance(value, list):
        value = ",".join(map(str, value))
    hint = get_type_hints(train)[parameter]
    wanted = next(iter(get_args(hint)), hint)  # of an optional type the type
    allowed = _WRITTEN.get(wanted, (wanted,))
    # In Python a truth value is a whole number too.
    if not isinstance(value, allowed) or (isinstance(value, bool) and wanted is not bool):
        raise LoraSqueezeError(f"{path}: {name} must be of type {allowed[-1].__name__}, got {value!r}")
    return value


def train(
    model: Annotated[str, typer.Argument(help=_HELP["model"])],
    data: Annotated[str, typer.Argument(help=_HELP["data"])],
    output: Annotated[Path, _option("output", "--output", "-o")],
    rank: Annotated[int | None, _option("rank")] = None,
    source_rank: Annotated[int | None, _option("source_rank")] = None,
    mode: Annotated[str | None, _option("mode")] = None,
    method: Annotated[str | None, _option("method")] = None,
    method_options: Annotated[str | None, _option("method_options")] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML or JSON file with options by these names; flags on the command line win.",
            callback=_read_config,
            is_eager=True,
            show_default=False,
        ),
    ] = None,
    adapter: Annotated[str | None, _option("adapter", "--continue")] = None,
    distill: Annotated[bool | None, _option("distill", "--distill")] = None,
    temperature: Annotated[float | None, _option("temperature")] = None,
    generate: Annotated[int | None, _option("generate")] = None,
    split: Annotated[str | None, _option("split")] = None,
    subset: Annotated[str | None, _option("subset")] = None,
    eval_data: Annotated[str | None, _option("eval_data", "--eval")] = None,
    eval_split: Annotated[str | None, _option("eval_split")] = None,
    steps: Annotated[int | None, _option("steps")] = None,
    epochs: Annotated[float | None, _option("epochs")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    gradient_accumulation: Annotated[int | None, _option("gradient_accumulation")] = None,
    learning_rate: Annotated[float | None, _option("learning_rate")] = None,
    warmup: Annotated[float | None, _option("warmup")] = None,
    max_length: Annotated[int | None, _option("max_length")] = None,
    alpha: Annotated[int | None, _option("alpha")] = None,
    targets: Annotated[str | None, _option("targets")] = None,
    allocate: Annotated[str | None, _option("allocate")] = None,
    squeezes: Annotated[int | None, _option("squeezes")] = None,
    stage_steps: Annotated[str | None, _option("stage_steps")] = None,
    last_steps: Annotated[int | None, _option("last_steps")] = None,
    energy: Annotated[float | None, _option("energy")] = None,
    data_aware: Annotated[bool | None, _option("data_aware", "--data-aware")] = None,
    optimizer_state: Annotated[str | None, _option("optimizer_state")] = None,
    learning_rate_policy: Annotated[str | None, _option("learning_rate_policy")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    gradient_checkpointing: Annotated[bool | None, _option("gradient_checkpointing")] = None,
    cpu: Annotated[bool | None, _option("cpu", "--cpu")] = None,
    seed: Annotated[int | None, _option("seed")] = None,
    save_steps: Annotated[int | None, _option("save_steps")] = None,
    resume: Annotated[bool | None, _option("resume", "--resume")] = None,
    report_to: Annotated[str | None, _option("report_to")] = None,
    force: Annotated[bool | None, _option("force", "--force")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what training.json holds.")] = False,
) -> None:
    """Train a LoRA at a high rank and squeeze it while training: the adapter comes out at the target rank."""
    options = {name: value for name, value in locals().items() if value is not None}
    for name in ("config", "as_json"):
        options.pop(name, None)
    from lora_squeeze.training.sft import train as run
    from lora_squeeze.training.sft_settings import TrainSettings

    settings = TrainSettings(**options)
    try:
        with _progress() as report:
            trained = run(settings, report)
    except KeyboardInterrupt:  # caught here, since not all releases of typer let it through
        begun = settings.checkpoints.is_dir()
        what = f"go on with --resume, from {settings.checkpoints}" if begun else "nothing was written"
        print(f"lora-squeeze: interrupted; {what}", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(trained.to_json()))
        return
    for line in _told(trained):
        print(line)


@contextmanager
def _progress() -> Iterator[Callable[[int, int, Mapping[str, Any]], None]]:
    """Where somebody sees it a bar with the time left, on standard error; in a pipe or a file a line per squeeze and
    at each tenth."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("training", total=None)
        last = 0

        def report(step: int, steps: int, logged: Mapping[str, Any]) -> None:
            nonlocal last
            known = {"loss": "loss", "eval_loss": "evaluation loss", "squeeze/rank": "squeezed to rank"}
            text = ", ".join(f"{word} {logged[key]:.4g}" for key, word in known.items() if key in logged)
            if not text:
                return
            bar.update(task, completed=step, total=steps, description=text)
            if not console.is_terminal and ("squeeze/rank" in logged or step * 10 // steps > last * 10 // steps):
                print(f"step {step} of {steps}: {text}", file=sys.stderr, flush=True)
                last = step

        yield report


def _told(trained: Trained) -> Iterator[str]:
    for entry in trained.squeezes:
        jump = f", loss {entry['loss_before']:.4g} -> {entry['loss_after']:.4g}" if "loss_before" in entry else ""
        yield f"step {entry['step']}: squeezed to rank {entry['rank']}, {entry['energy']:.2%} of the energy kept{jump}"
    for name, values in (("loss", trained.losses), ("evaluation loss", trained.evaluations)):
        if values:
            measured = list(values.values())
            yield f"{name} {measured[0]:.4g} -> {measured[-1]:.4g} in {trained.steps} steps"
    yield f"written to {trained.settings.output}, rank {trained.rank}"
