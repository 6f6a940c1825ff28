"""An arm of an experiment: a method put on a model, with a rate of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from bench.claims.outcome import best_rate


@dataclass(frozen=True)
class Arm:
    """A method with its settings.

    Args:
        name: for people.
        config: of a seed: the PEFT configuration; None: the whole model is trained.
        change: what is done to the PEFT model before it is trained.
        guess: where the search for its rate begins.
    """

    name: str
    config: Callable[[int], Any] | None
    change: Callable[[Any], Any] | None = None
    guess: float = 1e-2

    def on(self, model: nn.Module, seed: int) -> Any:
        """The model with the method on it; what PEFT draws for its own methods depends on the seed alone."""
        if self.config is None:
            return model.requires_grad_(True)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(model, self.config(seed))
        if self.change is not None:
            self.change(adapted)
        return adapted


def lora(r: int, targets: Sequence[str], guess: float = 1e-2) -> Arm:
    """A plain LoRA with the scale 1."""
    return Arm(f"LoRA r={r}", lambda seed: LoraConfig(r=r, lora_alpha=r, target_modules=list(targets)), guess=guess)


def trained_numbers(model: nn.Module) -> int:
    """How many numbers ask for a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


FULL = Arm("full", None, guess=1e-3)


def tuned_rate(loss: Callable[[int, float], float], seeds: Sequence[int], guess: float) -> float:
    """The rate of the lowest mean loss over seeds that are used for nothing else.

    Args:
        loss: of seed and rate.
        seeds: for the search alone.
        guess: where to begin.
    """
    return best_rate(lambda rate: fmean(loss(seed, rate) for seed in seeds), guess)
