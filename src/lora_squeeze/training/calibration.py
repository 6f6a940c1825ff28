"""Ask examples about an adapter on disk: the statistics for data-aware plans, and the loss before and after a squeeze.

The examples are read, cut into tokens and labelled as `lora-squeeze train` does it, so the loss is the one of the
training: of the completion where there is a prompt, else of the whole text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Progress
from lora_squeeze.calibration_file import Calibration
from lora_squeeze.data_aware import base_name
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import peft
from lora_squeeze.methods.modes import evaluating
from lora_squeeze.runtime import choose_device, choose_precision
from lora_squeeze.training.ask import calibrate
from lora_squeeze.training.dataset import Data, load_data
from lora_squeeze.training.libraries import (
    check_packages,
    checkpointing,
    first_line,
    open_adapter,
    open_model,
    open_tokenizer,
    quiet,
    random_state_put_back,
)
from lora_squeeze.training.live import LiveModule, live_modules

EXAMPLES = 64


@dataclass(frozen=True)
class Examples:
    """What to ask, and how much at once.

    Args:
        data: examples such as the adapter was trained on: a .jsonl, .json, .csv, .parquet or .txt file, or a hub id;
            with columns text, or prompt and completion, or messages.
        split: which part of the data, such as train[:1000]; default train.
        subset: name of the configuration, for hub data that has several.
        examples: how many of them, drawn by the seed; default 64.
        batch_size: examples per pass; default 4.
        max_length: most tokens of an example, the rest is cut off; default 1024.
        seed: of the draw.

    Raises:
        LoraSqueezeError: a number out of range.
    """

    data: str
    split: str = "train"
    subset: str | None = None
    examples: int = EXAMPLES
    batch_size: int = 4
    max_length: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size", "max_length"):
            if getattr(self, name) < 1:
                raise LoraSqueezeError(f"{name} must be at least 1, got {getattr(self, name)}")


class Subject:
    """An adapter in its base model, with examples: what can be asked. A context manager: it holds a loaded model.

    Args:
        adapter: as loaded from `folder`.
        folder: the adapter's folder.
        examples: what to ask.
        base: folder or hub id of the base model; default what the adapter's configuration names.
        device: where to compute; default the best there is.
        dtype: number format of the base weights, "float32" or "bfloat16"; default bfloat16 where the hardware
            multiplies it faster.

    Raises:
        LoraSqueezeError: no base model or no data there, an adapter of another task than language, or one that does not
            fit the model.

    Example:
        >>> with Subject(load(folder), folder, Examples("examples.jsonl")) as subject:  # doctest: +SKIP
        ...     found = subject.calibrate()
        ...     small = adapter.squeeze(rank=8, moments=found.moments)
        ...     print(found.loss, subject.loss_with(small))
    """

    def __init__(
        self,
        adapter: Adapter,
        folder: Path,
        examples: Examples,
        *,
        base: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
    ) -> None:
        check_packages("calibration")
        self.adapter, self.examples = adapter, examples
        self.base = base or _base_of(adapter)
        if dtype not in (None, "float32", "bfloat16"):
            raise LoraSqueezeError(f"dtype must be one of float32, bfloat16, got {dtype!r}")
        with ExitStack() as stack:
            for context in (quiet(), random_state_put_back()):
                stack.enter_context(context)
            data = load_data(examples.data, split=examples.split, subset=examples.subset)
            tokenizer = open_tokenizer(self.base, chat=data.chat)
            where = choose_device(device)
            model = open_model(self.base, where, getattr(torch, dtype or choose_precision(where)))
            self.model = open_adapter(model, str(folder), self.base, trainable=False)
            self.batches, self.count = _batches(self.model, data, tokenizer, examples)
            self._stack = stack.pop_all()

    def __enter__(self) -> Subject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def calibrate(self, progress: Progress | None = None) -> Calibration:
        """The moments of every module and the mean loss; one forward and one backward pass per batch.

        Args:
            progress: called with (batches done, batches in all).
        """
        losses: list[float] = []

        def loss(model: Any, batch: Any) -> Tensor:
            found: Tensor = model(**batch).loss
            losses.append(float(found.detach()))
            if progress:
                progress(len(losses), len(self.batches))
            return found

        found = calibrate(self.model, self.batches, loss=loss)
        mean = sum(losses) / len(losses)
        if not mean < float("inf"):
            raise LoraSqueezeError(
                f"the loss of the examples is {mean}: the adapter or the number format does not work"
            )
        moments = {base_name(path): item for path, item in found.items()}
        digest = self.adapter.source.digest()
        return Calibration(moments, mean, self.count, self.examples.data, self.base, digest)

    def loss_with(self, other: Adapter) -> float:
        """Mean loss of the same examples with another adapter in place of this one: a squeeze of it.

        Args:
            other: has the same modules, or fewer, at ranks no higher.
        """
        with torch.no_grad(), evaluating(self.model), factors_of(self.model, other):
            return sum(float(self.model(**batch).loss) for batch in self.batches) / len(self.batches)


def _base_of(adapter: Adapter) -> str:
    task, named = adapter.config.get("task_type"), adapter.config.get("base_model_name_or_path")
    if task not in (None, "CAUSAL_LM"):
        raise LoraSqueezeError(
            f"the adapter is for {task}; only causal language models are calibrated here. In Python, lora_squeeze."
            "calibrate(model, batches) takes any PEFT model, and its result goes into squeeze(moments=...)"
        )
    if not named:
        raise LoraSqueezeError(f"{peft.CONFIG_NAME} names no base model; give one with base")
    return str(named)


def _batches(model: Any, data: Data, tokenizer: Any, examples: Examples) -> tuple[list[dict[str, Tensor]], int]:
    """The examples drawn, as TRL makes batches of them, and their number."""
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = data.rows.shuffle(seed=examples.seed).select(range(min(examples.examples, len(data.rows))))
    with tempfile.TemporaryDirectory() as folder:  # TRL wants one; nothing is written there
        arguments = SFTConfig(
            **checkpointing(False),
            output_dir=folder,
            max_length=examples.max_length,
            use_cpu=model.device.type == "cpu",
            bf16=False,
            report_to=[],
            disable_tqdm=True,
        )
        try:
            trainer: Any = SFTTrainer(model=model, args=arguments, train_dataset=rows, processing_class=tokenizer)
        except ValueError as error:
            raise LoraSqueezeError(f"TRL refuses these examples: {first_line(error)}") from error
    tokens: Any = trainer.train_dataset
    if not len(tokens):
        raise LoraSqueezeError(f"in no example does anything to learn begin within {examples.max_length} tokens")
    starts = range(0, len(tokens), examples.batch_size)
    chosen = [[tokens[i] for i in range(start, min(start + examples.batch_size, len(tokens)))] for start in starts]
    moved = [_moved(trainer.data_collator(batch), model.device) for batch in chosen]
    return moved, len(tokens)


def _moved(batch: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}


@contextmanager
def factors_of(model: Any, adapter: Adapter) -> Iterator[None]:
    """The live model computes with another adapter's factors inside; afterwards with its own.

    Args:
        model: a PEFT model with one active adapter.
        adapter: has the same modules, or fewer, at ranks no higher.
    """
    modules = live_modules(model, model.active_adapter)
    before = [(module.A.detach().clone(), module.B.detach().clone()) for module in modules]
    try:
        with torch.no_grad():
            for module in modules:
                _put(module, adapter)
        yield
    finally:
        with torch.no_grad():
            for module, (A, B) in zip(modules, before, strict=True):
                module.A.copy_(A)
                module.B.copy_(B)


def _put(module: LiveModule, adapter: Adapter) -> None:
    """The update of this module, filled up with zeros to the rank that the layer has."""
    module.B.zero_()
    if module.name not in adapter.modules:
        return
    update = adapter.update(module.name).with_scale(abs(module.scale), torch.float32)
    missing = module.width - update.rank
    if missing < 0:
        raise LoraSqueezeError(f"{module.name}: rank {update.rank} does not fit in the {module.width} of the model")
    A = torch.nn.functional.pad(update.A, (0, 0, 0, missing))
    B = torch.nn.functional.pad(update.B, (0, missing)) * (-1 if module.scale < 0 else 1)
    module.A.copy_(module.like_A(A))
    module.B.copy_(module.like_B(B))
