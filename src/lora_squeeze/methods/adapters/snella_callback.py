"""The budget of SNELLA in a transformers or TRL trainer."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.snella_budget import SnellaBudget


class SnellaCallback(TrainerCallback):
    """Makes a `SnellaBudget` for a trainer's model and steps, and calls it before each step of the optimiser.

    Args:
        sparsity: share of the entries of all updates that are zero in the end.
        interval: optimiser steps of a round; default as many rounds as epochs. Give a shorter one where epochs are
            few.
        options: warmup, cooldown, beta and beta_spread of `SnellaBudget`.

    Attributes:
        budget: the `SnellaBudget`, from the beginning of training on.

    Raises:
        LoraSqueezeError: when training begins, see `SnellaBudget`; or no interval for a data set without a length.

    Notes:
        Gradients are seen as they are clipped. A run taken up from a checkpoint goes on with the round that it was in.

    Example:
        >>> trainer = Trainer(..., callbacks=[SnellaCallback(0.8, interval=100)])  # doctest: +SKIP
    """

    budget: SnellaBudget

    def __init__(self, sparsity: float, *, interval: int | None = None, **options: Any) -> None:
        self.sparsity, self.interval, self.options = sparsity, interval, options

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Make the budget, now that the number of steps is known."""
        if self.interval is None and state.num_train_epochs > state.max_steps:
            raise LoraSqueezeError(
                "a data set without a length has no epochs to be the rounds; give SnellaCallback interval="
            )
        epoch = math.ceil(state.max_steps / state.num_train_epochs)
        self.budget = SnellaBudget(
            model, sparsity=self.sparsity, total_steps=state.max_steps, interval=self.interval or epoch,
            done=state.global_step, **self.options,
        )  # fmt: skip

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the budget see the gradients."""
        self.budget.step()
