"""One weight and a target for its update: least squares, in which every method can be asked alike.

The model is a single linear layer that sees the identity, so its output is the weight and the loss is

    |dW - target|^2 / |target|^2

the share of the target that is not reached. No LoRA of rank r leaves less than the target's singular values beyond r.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.claims.arms import Arm, trained_numbers, tuned_rate
from bench.claims.outcome import Row, mean_and_error
from bench.claims.problems import fit

LAYER = "layer"
VALIDATION = 1000  # the seed of the problem on which rates are chosen


@dataclass(frozen=True)
class Problem:
    """A weight W (out, in) and what its update should be."""

    weight: Tensor
    target: Tensor


Problems = Callable[[int], Problem]  # of a seed


@dataclass(frozen=True)
class Fitted:
    """An arm on one kind of problem.

    Args:
        rate: the chosen one.
        residuals: share of the target that is left, one for each seed.
        model: of the last seed, trained.
        numbers: that it trains.
    """

    rate: float
    residuals: list[float]
    model: Any
    numbers: int

    def row(self, part: str, **columns: Any) -> Row:
        """For the page."""
        mean, error = mean_and_error(self.residuals)
        return {"part": part, **columns, "numbers": self.numbers, "rate": self.rate, "left": mean, "error": error}


def gaussian(seed: int, *shape: int) -> Tensor:
    """N(0, 1)."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def orthogonal(seed: int, width: int) -> Tensor:
    """A random orthogonal matrix: all singular values are 1."""
    Q: Tensor = torch.linalg.qr(gaussian(seed, width, width)).Q
    return Q


def with_spectrum(seed: int, values: Tensor) -> Tensor:
    """A square matrix with random singular vectors."""
    return orthogonal(2 * seed, len(values)) * values @ orthogonal(2 * seed + 1, len(values))


def flat(width: int) -> Problems:
    """All singular values of the target are equal: the worst case of a low rank."""
    return lambda seed: Problem(gaussian(seed + 1, width, width) / width**0.5, with_spectrum(seed, torch.ones(width)))


def decaying(width: int) -> Problems:
    """The i-th singular value of the target is 1 / i."""
    values = 1 / torch.arange(1, width + 1)
    return lambda seed: Problem(gaussian(seed + 1, width, width) / width**0.5, with_spectrum(seed, values))


def beyond_rank(target: Tensor, rank: int) -> float:
    """What the best matrix of a rank leaves of a target (Eckart and Young)."""
    squares = torch.linalg.svdvals(target.double()) ** 2
    return float(squares[rank:].sum() / squares.sum())


def model_of(weight: Tensor) -> nn.Sequential:
    """A linear layer without a bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.clone())
    return nn.Sequential(OrderedDict({LAYER: layer}))


def update_of(model: Any) -> Tensor:
    """dW of a PEFT model of this layer."""
    update: Tensor = model.base_model.model.get_submodule(LAYER).get_delta_weight("default")
    return update.detach()


def left(model: nn.Module, problem: Problem) -> Tensor:
    """The loss: the share of the target that the update has not reached."""
    seen = torch.eye(problem.weight.shape[1])
    goal = (problem.weight + problem.target).T
    share: Tensor = (model(seen) - goal).square().sum() / problem.target.square().sum()
    return share


def solve(arm: Arm, problem: Problem, seed: int, rate: float, steps: int) -> Any:
    """The trained model."""
    model = arm.on(model_of(problem.weight), seed)
    fit(model, left, [problem] * steps, rate)
    return model


def fitted(arm: Arm, problems: Problems, seeds: Sequence[int], steps: int) -> Fitted:
    """An arm at its own rate, chosen on a problem that is not among those of the seeds."""

    def loss(seed: int, rate: float) -> float:
        return float(left(solve(arm, problems(seed), seed, rate, steps), problems(seed)).detach())

    rate = tuned_rate(loss, [VALIDATION], arm.guess)
    models = [solve(arm, problems(seed), seed, rate, steps) for seed in seeds]
    residuals = [float(left(model, problems(seed)).detach()) for model, seed in zip(models, seeds, strict=True)]
    return Fitted(rate, residuals, models[-1], trained_numbers(models[-1]))


def best_row(problems: Problems, seeds: Sequence[int], rank: int, part: str, **columns: Any) -> tuple[Row, list[float]]:
    """What the best update of a rank leaves, as a row, and for each seed."""
    found = [beyond_rank(problems(seed).target, rank) for seed in seeds]
    problem = problems(seeds[0])
    mean, error = mean_and_error(found)
    numbers = rank * sum(problem.weight.shape)
    row = {"part": part, **columns, "arm": f"LoRA r={rank}, the best there is", "numbers": numbers}
    return {**row, "left": mean, "error": error}, found
