"""How the model is made: recipe as plain data, name of the result in the cache, and the one loop that trains."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from math import cos, pi

import torch
from torch import Tensor, nn

from bench.evidence.vlm import digits

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One training.

    Args:
        steps: of the optimiser.
        batch: pictures a step.
        rate: highest learning rate; it rises over the first twentieth of the steps and falls along a cosine.
        most: most digits on a picture, from 1 up.
        seed: of the pictures and of fresh weights.
    """

    steps: int
    batch: int
    rate: float
    most: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """All that decides about the weights, but for the versions of what computes them.

    Args:
        edition: raised when the code of drawing or training changes what comes out at the same numbers.
        digits: digest of the handwriting.
        tower: sizes of the SigLIP tower.
        seeing: the tower, with heads that name digit and colour of each cell.
        naming: the projector alone, to the language model's own embeddings of those names.
        speaking: the projector, through the frozen language model, on captions.
    """

    edition: int = 1
    digits: str = digits.SHA256
    tower: dict[str, int] = field(
        default_factory=lambda: dict(hidden_size=192, intermediate_size=768, num_hidden_layers=4, num_attention_heads=6)
    )
    seeing: Stage = Stage(steps=2500, batch=64, rate=1e-3, most=9, seed=1)
    naming: Stage = Stage(steps=600, batch=64, rate=1e-3, most=4, seed=2)
    speaking: Stage = Stage(steps=500, batch=8, rate=1e-3, most=4, seed=3)

    def tag(self, language_model: str) -> str:
        """Name of the result: it changes with the recipe, the language model and the libraries that compute."""
        text = json.dumps([asdict(self), language_model, versions()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


RECIPE = Recipe()


def versions() -> dict[str, str]:
    """Of the libraries that compute the weights."""
    return {name: version(name) for name in ("torch", "transformers")}


def fit(parameters: Iterable[nn.Parameter], loss_of: Callable[[int], Tensor], stage: Stage, say: Say) -> None:
    """Train with AdamW.

    Args:
        parameters: what is trained.
        loss_of: the loss of a step, from its number.
        stage: steps and rate.
        say: called with a line of text every fiftieth of the way.
    """
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=stage.rate, weight_decay=0.05, fused=True)
    rise = max(1, stage.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (1 + cos(pi * step / stage.steps)) / 2)
    )
    for step in range(stage.steps):
        loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % max(1, stage.steps // 50) == 0:
            say(f"step {step + 1} of {stage.steps}, loss {loss.item():.3f}")
