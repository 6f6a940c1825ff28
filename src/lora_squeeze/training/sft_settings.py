"""What `lora-squeeze train` can be asked for."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.catalogue import rate_factor
from lora_squeeze.ranks import TOGETHER
from lora_squeeze.schedule import LEARNING_RATES, WEIGHTS

SOURCE_RANK = 64
LEARNING_RATE = 2e-4  # of a LoRA
# Options that mean nothing for an adapter that is squeezed at once, and nothing without a teacher.
_OF_NEW = (
    "source_rank", "mode", "alpha", "targets", "squeezes", "stage_steps", "last_steps", "energy", "data_aware",
    "optimizer_state", "learning_rate_policy", "method", "method_options",
)  # fmt: skip
# Options of a squeeze while training, which another method than LoRA has no use for.
_OF_SQUEEZES = (
    "mode", "squeezes", "stage_steps", "last_steps", "energy", "data_aware", "optimizer_state",
    "learning_rate_policy", "allocate", "distill",
)  # fmt: skip
_OF_TEACHER = ("temperature", "generate")
_OF_MODES = {
    "post": (), "cont": ("last_steps",), "in": ("squeezes", "stage_steps", "last_steps"), "adaptive": ("energy",),
}  # fmt: skip


@dataclass(frozen=True)
class TrainSettings:
    """What to train, on what, and how the rank falls.

    Args:
        model: folder or hub id of the base model.
        data: training examples: a .jsonl, .json, .csv, .parquet or .txt file, or a hub id; with columns text, or
            prompt and completion, or messages.
        output: folder for the adapter. Checkpoints stay in a folder of that name with -checkpoints until it is written.
        rank: target rank, the one of the adapter that comes out.
        source_rank: rank at the start; default 64.
        mode: "in" squeezes step by step while training (default), "cont" once shortly before the end, "post" after
            the last step, "adaptive" when the spectrum says that nothing is lost.
        method: train with another method, by its name in `lora-squeeze methods` or in PEFT; what comes out is a plain
            LoRA of the target rank all the same, squeezed after the last step if the method's update has a higher one.
            The source rank is then the method's own r, by default the target rank, or the method's own default where
            that is the full width.
        method_options: further settings of the method, such as bases=512,keep_bases=false.
        adapter: a finished adapter of the model, folder or hub id. It is squeezed to the target rank at once, and the
            training goes on from there.
        distill: with an adapter to continue: learn from that adapter as it was, without labels. Texts are read as they
            are; prompts and conversations are answered by it, and answers in the data are never used.
        temperature: of distillation; default 1.
        generate: most new tokens of an answer in distillation; default 64.
        split: which part of the data, such as train[:1000]; default train.
        subset: name of the configuration, for hub data that has several.
        eval_data: examples that are not trained on, in the same forms; their loss is measured about ten times.
        eval_split: which part of them; default train.
        steps: optimiser steps.
        epochs: instead of steps, passes over the data; default 1.
        batch_size: examples per forward pass; default 8.
        gradient_accumulation: forward passes per optimiser step; default 1.
        learning_rate: highest value, reached after the warm-up, on a cosine curve; default 2e-4, for another method
            times the factor that `lora-squeeze methods METHOD` tells.
        warmup: share of the steps in which the learning rate rises from 0; default 0.05.
        max_length: most tokens of an example, the rest is cut off; default 1024. Batches are padded to their longest.
        alpha: value of lora_alpha at the source rank; default twice the source rank, so that the scale is 2. A squeeze
            keeps the scale.
        targets: names of the layers to train, separated by commas; default all-linear, every linear layer but the
            output head.
        allocate: "uniform" gives all modules one rank, "global" spends the same parameters where they keep the most
            energy. Default uniform, and global for the mode adaptive.
        squeezes: number of squeezes of the mode in; default one per halving of the rank.
        stage_steps: how the ranks of the mode in share the steps: "proportional" to the rank (default), to its square
            root, "sqrt", to its "inverse", or "equal"; at least 5 % each.
        last_steps: steps at the target rank, for the modes in and cont.
        energy: share of the energy that a squeeze of the mode adaptive must keep.
        data_aware: truncate in the metric of the data, collected while training.
        optimizer_state: "transport" carries the moments over a squeeze (default), "reset" begins anew.
        learning_rate_policy: "continue", one curve of the learning rate over all stages (default), "restart", the whole
            curve once per stage, "rank", one curve times sqrt(source rank / rank), or "restart-rank", both.
        dtype: number format of base weights and products, float32 or bfloat16; default bfloat16 where the hardware
            multiplies it faster. The factors are float32.
        gradient_checkpointing: compute activations twice instead of keeping them: less memory, about a fifth slower.
        cpu: train on the processor even if there is an accelerator.
        seed: of the order of the examples and the initial factors.
        save_steps: steps between checkpoints, of which the last two are kept; default a tenth of the training, 0 for
            none.
        resume: go on from the last whole checkpoint, from the beginning if there is none.
        report_to: trackers, separated by commas, such as tensorboard or wandb; default none.
        force: replace what is at the output, and checkpoints of an unfinished training.

    Raises:
        LoraSqueezeError: a value out of range, options that contradict or mean nothing together.
    """

    model: str
    data: str
    output: Path
    rank: int = 8
    source_rank: int | None = None
    mode: str | None = None
    method: str | None = None
    method_options: str | None = None
    adapter: str | None = None
    distill: bool = False
    temperature: float = 1.0
    generate: int = 64
    split: str = "train"
    subset: str | None = None
    eval_data: str | None = None
    eval_split: str = "train"
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 8
    gradient_accumulation: int = 1
    learning_rate: float | None = None
    warmup: float = 0.05
    max_length: int = 1024
    alpha: int | None = None
    targets: str = "all-linear"
    allocate: str | None = None
    squeezes: int | None = None
    stage_steps: str = "proportional"
    last_steps: int | None = None
    energy: float | None = None
    data_aware: bool = False
    optimizer_state: str = "transport"
    learning_rate_policy: str = "continue"
    dtype: str | None = None
    gradient_checkpointing: bool = True
    cpu: bool = False
    seed: int = 0
    save_steps: int | None = None
    resume: bool = False
    report_to: str = "none"
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("rank", "source_rank", "generate", "steps", "batch_size", "gradient_accumulation", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise LoraSqueezeError(f"{name} must be at least 1, got {value}")
        for name in ("epochs", "learning_rate", "temperature"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise LoraSqueezeError(f"{name} must be above 0, got {value}")
        if not 0 <= self.warmup < 1:
            raise LoraSqueezeError(f"warmup is a share of the steps from 0 to below 1, got {self.warmup}")
        if min(self.seed, self.save_steps or 0) < 0:
            raise LoraSqueezeError(f"seed and save_steps must be at least 0, got {self.seed} and {self.save_steps}")
        words = {
            "dtype": ("float32", "bfloat16"), "allocate": TOGETHER, "optimizer_state": ("transport", "reset"),
            "learning_rate_policy": LEARNING_RATES, "stage_steps": tuple(WEIGHTS),
        }  # fmt: skip
        for name, choices in words.items():
            if (word := getattr(self, name)) is not None and word not in choices:
                raise LoraSqueezeError(f"{name} must be one of {', '.join(choices)}, got {word!r}")
        self._check_together()

    def _check_together(self) -> None:
        if self.steps is not None and self.epochs is not None:
            raise LoraSqueezeError(f"give steps or epochs, got {self.steps} steps and {self.epochs} epochs")
        if self.distill and self.adapter is None:
            raise LoraSqueezeError("distill needs a finished adapter as the teacher: name the one to continue")
        if self.distill and self.generate >= self.max_length:
            raise LoraSqueezeError(f"generate {self.generate} leaves no room for a prompt in {self.max_length} tokens")
        if self.adapter is not None and (named := self.changed(_OF_NEW)):
            raise LoraSqueezeError(
                f"{named[0]} means nothing for an adapter that is squeezed at once and continued; leave it out"
            )
        if not self.distill and (named := self.changed(_OF_TEACHER)):
            raise LoraSqueezeError(f"{named[0]} is an option of distillation; add distill, or leave it out")
        if self.method is None and self.method_options is not None:
            raise LoraSqueezeError("method_options are those of a method: name it with method, or leave them out")
        if self.method is not None and (named := self.changed(_OF_SQUEEZES)):
            raise LoraSqueezeError(f"{named[0]} is of training a LoRA; with method {self.method} leave it out")
        for name in self.changed(("squeezes", "stage_steps", "last_steps", "energy")):
            mode, modes = self.mode or "in", [mode for mode, options in _OF_MODES.items() if name in options]
            if mode in _OF_MODES and mode not in modes:
                raise LoraSqueezeError(
                    f"{name} is no option of mode {mode!r}: leave it out, or use mode {' or '.join(map(repr, modes))}"
                )
        if self.adapter is None and self.method is None and self.rank >= self.first_rank:
            raise LoraSqueezeError(
                f"nothing to squeeze: the target rank {self.rank} is not below the source rank {self.first_rank}; "
                "lower rank or raise source_rank"
            )

    def changed(self, names: tuple[str, ...]) -> list[str]:
        """Those of these options that are not at their default."""
        found = (field for field in fields(self) if field.name in names)
        return [field.name for field in found if getattr(self, field.name) != field.default]

    @property
    def first_rank(self) -> int:
        """The source rank, given or by default."""
        if self.source_rank is not None:
            return self.source_rank
        return SOURCE_RANK if self.method is None else self.rank

    @property
    def peak_rate(self) -> float:
        """The learning rate, given or by default."""
        return LEARNING_RATE * rate_factor(self.method) if self.learning_rate is None else self.learning_rate

    @property
    def checkpoints(self) -> Path:
        """The folder beside the output where checkpoints are until the output is written."""
        real = self.output.expanduser().resolve()
        return real.with_name(f"{real.name}-checkpoints")

    def to_json(self) -> dict[str, Any]:
        """All options as plain data."""
        return {**asdict(self), "output": str(self.output), "learning_rate": self.peak_rate}
