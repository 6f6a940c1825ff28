"""The whole demonstration: train, squeeze through the public calls, reload, measure, show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import lora_squeeze
from lora_squeeze.demo.evaluate import Score, evaluate
from lora_squeeze.demo.model import find_model, load_model
from lora_squeeze.demo.plot import draw
from lora_squeeze.demo.result import DemoResult, Row
from lora_squeeze.demo.settings import FULL, QUICK, Settings
from lora_squeeze.demo.source import SOURCE, WEIGHTS, check_output, is_trained, save_source
from lora_squeeze.demo.task import Batch, batches, read_words, split_words, take
from lora_squeeze.demo.train import attach_lora, train
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.runtime import choose_device, choose_precision, quiet_libraries

RANKS = (32, 16, 8, 4, 2, 1)
_MEASURED_AT_ONCE = 50


def run_demo(
    output: Path,
    *,
    quick: bool = False,
    device: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    held_out: int | None = None,
    ranks: Sequence[int] = RANKS,
    force: bool = False,
    console: Any = None,
) -> DemoResult:
    """Train a LoRA of SmolLM2-135M at rank 64, squeeze it to each rank, and measure every one of them.

    Args:
        output: folder for the adapters, results.json and results.png. A source adapter that was trained there with the
            same settings is used again.
        quick: fewer steps and fewer held-out words.
        device: a name for torch, such as "cpu" or "cuda:1"; default the best there is.
        seed: of the split, the order of the words and the initial factors. The same seed on the same machine gives the
            same figures; the global generator is left as it was found.
        steps: optimiser steps; default by `quick`.
        held_out: number of words to measure; default by `quick`.
        ranks: the ranks to squeeze to.
        force: train anew, and write into a folder that holds something else.
        console: a rich console for tables and progress; default standard output.

    Returns:
        The figures; they are printed and written as well.

    Raises:
        LoraSqueezeError: an argument is out of range, the folder holds something else, there is no model or no
            dictionary, a package or the device is missing.

    Notes:
        Under six minutes on two processor cores with float32 products, less where the hardware has bfloat16.
    """
    from rich.console import Console

    output, console = Path(output), console or Console()
    say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
    budget = QUICK if quick else FULL
    seconds: dict[str, float] = {}
    steps = budget.steps if steps is None else steps
    count = budget.held_out if held_out is None else held_out
    _check_request(steps, count, ranks)
    check_output(output, force)
    here = choose_device(device)
    precision = choose_precision(here)
    with _timed(seconds, "load"):
        training, held = split_words(read_words(), seed)
        found = find_model(say)
        settings = Settings(found.origin, seed, steps, precision=precision)
        reused = is_trained(output, settings, force)
        model, tokenizer = load_model(found, here)
    say(f"{found.origin}; {here}, {precision}, {settings.steps} steps of {settings.batch} words: {training[0].example}")
    with quiet_libraries(), _bars(console) as bar:
        if reused:
            say(f"The trained adapter in {output / SOURCE} is used again.")
        else:
            with _timed(seconds, "train"):
                examples = take(training, tokenizer, settings.steps * settings.batch)
                model = _train_source(model, list(batches(examples, settings.batch)), settings, here, output, bar)
        with _timed(seconds, "squeeze"):
            adapters = [_Measured("source", settings.rank, 1.0, output / SOURCE), *_squeeze(output, ranks)]
        with _timed(seconds, "measure"):
            words = list(batches(take(held, tokenizer, count), min(count, _MEASURED_AT_ONCE)))
            rows = _measure(model, adapters, words, here, precision, bar)
    result = DemoResult(rows[0], rows[1], tuple(rows[2:]), settings, count, reused, seconds, output)
    result.write_json()
    draw(result, result.picture_path)
    console.print(result.table())
    for line in result.closing_lines():
        say(line)
    return result


@dataclass(frozen=True)
class _Measured:
    name: str
    rank: int
    energy: float | None
    folder: Path | None


def _check_request(steps: int, held_out: int, ranks: Sequence[int]) -> None:
    """Refuse at once what would fail after minutes of training."""
    missing = [name for name in ("transformers", "peft", "matplotlib") if find_spec(name) is None]
    if missing:
        raise LoraSqueezeError(f"the demo needs {' and '.join(missing)}: pip install 'lora-squeeze[demo]'")
    if steps < 1 or held_out < 1:
        raise LoraSqueezeError(f"the demo needs at least one step and one word, got {steps} and {held_out}")
    if not ranks or min(ranks) < 1 or max(ranks) > Settings.rank:
        raise LoraSqueezeError(f"ranks of the demo lie between 1 and {Settings.rank}, got {list(ranks)}")


def _train_source(
    model: Any, data: Sequence[Batch], settings: Settings, device: torch.device, output: Path, bar: Any
) -> Any:
    """Train, save, and give back the base model without the adapter."""
    peft_model = attach_lora(model, settings)
    advance = bar("training", len(data))
    train(peft_model, data, settings, device, lambda _, loss: advance(f"training, loss {loss:.2f}"))
    save_source(peft_model, settings, output)
    return peft_model.unload()


def _squeeze(output: Path, ranks: Sequence[int]) -> Iterator[_Measured]:
    """Squeeze the source to each rank; these are the calls a user makes."""
    source = lora_squeeze.load(str(output / SOURCE))
    for rank in ranks:
        folder = output / f"rank-{rank}"
        small = source.squeeze(rank=rank)
        small.save(folder, force=True)
        yield _Measured(f"rank {rank}", rank, small.report.mean_energy, folder)


def _measure(
    model: Any,
    adapters: Sequence[_Measured],
    words: Sequence[Batch],
    device: torch.device,
    precision: str,
    bar: Any,
) -> list[Row]:
    """The base model and each adapter, read back from its folder by PEFT."""
    from peft import PeftModel

    advance = bar("measuring", len(words) * (1 + len(adapters)))
    rows = []
    for item in (_Measured("base", 0, None, None), *adapters):

        def score(scored: Any, label: str = item.name) -> Score:
            return evaluate(scored, words, device, precision, lambda: advance(f"measuring, {label}"))

        if item.folder is None:
            rows.append(Row(item.name, item.rank, 0, item.energy, score(model), None))
            continue
        with torch.random.fork_rng():  # PEFT draws initial factors before it reads the file
            peft_model = PeftModel.from_pretrained(model, item.folder)
        size_bytes = (item.folder / WEIGHTS).stat().st_size
        rows.append(Row(item.name, item.rank, size_bytes, item.energy, score(peft_model), item.folder))
        model = peft_model.unload()
    return rows


@contextmanager
def _timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


@contextmanager
def _bars(console: Any) -> Iterator[Callable[[str, int], Callable[[str], None]]]:
    """Progress with the time left; the value makes a bar, and what that gives moves it on by one.

    Where nobody sees a bar (a pipe, a log file) a line is printed at each quarter instead.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:

        def bar(label: str, total: int) -> Callable[[str], None]:
            task, start, done = progress.add_task(label, total=total), time.perf_counter(), 0

            def advance(text: str) -> None:
                nonlocal done
                done += 1
                progress.update(task, advance=1, description=f"{text:24}")
                if progress.disable and 4 * done // total > 4 * (done - 1) // total:
                    console.print(
                        f"{text}: {done} of {total} after {time.perf_counter() - start:.0f} s", highlight=False
                    )

            return advance

        yield bar
