"""`lora-squeeze calibrate`, and what `--calibrate` means in other commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_squeeze.cli.options import AdapterArgument, Json, Revision, Subfolder, option

if TYPE_CHECKING:
    from lora_squeeze.adapter import Adapter
    from lora_squeeze.calibration_file import Calibration
    from lora_squeeze.moments import Moments
    from lora_squeeze.training.calibration import Subject


def _example(name: str) -> Any:
    return option(name, module="training/calibration", function="Examples")


def _subject(name: str) -> Any:
    return option(name, module="training/calibration", function="Subject")


Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate",
        help="Examples such as the adapter was trained on, or statistics from the calibrate command: ranks and "
        "truncation then follow the loss.",
    ),
]
Base = Annotated[str | None, _subject("base")]


def calibrate(
    adapter: AdapterArgument,
    data: Annotated[str, typer.Argument(help="Examples such as the adapter was trained on: a file or a hub id.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write, ending in .safetensors.", show_default=False)
    ],
    base: Base = None,
    split: Annotated[str, _example("split")] = "train",
    subset: Annotated[str | None, _example("subset")] = None,
    examples: Annotated[int, _example("examples")] = 64,
    batch_size: Annotated[int, _example("batch_size")] = 4,
    max_length: Annotated[int, _example("max_length")] = 1024,
    seed: Annotated[int, _example("seed")] = 0,
    device: Annotated[str | None, _subject("device")] = None,
    dtype: Annotated[str | None, _subject("dtype")] = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: Json = False,
) -> None:
    """Ask examples what the loss feels of an adapter; plan and squeeze take the file with --calibrate."""
    import json

    from lora_squeeze.cli import show
    from lora_squeeze.formats.single_file import check_target
    from lora_squeeze.hub import load, locate
    from lora_squeeze.training.calibration import Examples, Subject

    if output.suffix != ".safetensors":
        raise typer.BadParameter("the name must end in .safetensors, by which --calibrate knows it", param_hint="-o")
    check_target(output, force=force)
    asked = Examples(data, split, subset, examples, batch_size, max_length, seed)
    folder = locate(adapter, subfolder=subfolder, revision=revision)
    with Subject(load(folder), folder, asked, base=base, device=device, dtype=dtype) as subject:
        with show.progress("calibrating", of="batches") as progress:
            found = subject.calibrate(progress)
        unseen = [name for name in subject.adapter.modules if name not in found.moments]
    found.save(output, force=force)
    if as_json:
        told = {"modules": len(found.moments), "unseen": unseen, "loss": found.loss, "examples": found.examples}
        print(json.dumps({**told, "data": found.data, "base": found.base, "output": str(output)}))
        return
    console = show.console()
    lines = [f"{found.examples} examples, loss {found.loss:.4f}, {len(found.moments)} modules"]
    if unseen:
        lines += [f"nothing is known about {len(unseen)} modules, such as {unseen[0]}: they will be cut plainly"]
    for line in [*lines, f"written to {output}"]:
        console.print(line, markup=False, highlight=False)


@dataclass(frozen=True)
class Asked:
    """What `--calibrate` brought.

    Args:
        found: the statistics; None: it was not given.
        subject: the model and the examples, where these were given.
    """

    found: Calibration | None = None
    subject: Subject | None = None

    @property
    def moments(self) -> dict[str, Moments] | None:
        """As `squeeze` takes them."""
        return None if self.found is None else dict(self.found.moments)

    def losses(self, small: Adapter) -> dict[str, float]:
        """Mean loss of the examples before and after, where there is a model to ask."""
        if self.found is None or self.subject is None:
            return {}
        after = self.subject.loss_with(small)
        return {"loss": self.found.loss, "loss_after": after}


def loss_line(losses: dict[str, float], predicted: float | None) -> list[str]:
    """The losses for a person; nothing where they were not measured."""
    if not losses:
        return []
    before, after = losses["loss"], losses["loss_after"]
    told = "" if predicted is None else f", predicted {predicted:+.4f}"
    return [f"loss of the examples {before:.4f} -> {after:.4f} ({after - before:+.4f} measured{told})"]


@contextmanager
def asked_of(
    calibrate: str | None, base: str | None, source: Adapter, folder: Path, device: str | None = None
) -> Iterator[Asked]:
    """Statistics from a file, or from examples, whose model stays loaded inside."""
    from lora_squeeze.errors import LoraSqueezeError

    if calibrate is None:
        if base is not None:
            raise LoraSqueezeError("base is the model for calibrate; give examples, or leave it out")
        yield Asked()
        return
    path = Path(calibrate).expanduser()
    if path.suffix == ".safetensors":
        from lora_squeeze.calibration_file import Calibration

        if base is not None:
            raise LoraSqueezeError(f"{path} holds statistics: no model is needed, leave out base")
        found = Calibration.load(path)
        found.check(source)
        yield Asked(found)
        return
    from lora_squeeze.cli import show
    from lora_squeeze.training.calibration import Examples, Subject

    with Subject(source, folder, Examples(calibrate), base=base, device=device) as subject:
        with show.progress("calibrating", of="batches") as progress:
            found = subject.calibrate(progress)
        yield Asked(found, subject)
