"""Maestro (arXiv 2308.14929): is a network that is trained in order better to cut short than one that is cut by SVD?

Handwritten digits, two ways of training, five seeds, 1200 steps of 64 examples:

- whole: a network of 64 to 64 to 64 to 64 to 10 learns them from the start; its hidden layers are decomposed without
  loss (`decompose`), one of them is shortened in each step, and the group lasso is part of the loss: the paper's
  method, without its second, self-distilled pass. The rival is the same network trained plainly.
- adapter: the base of `bench/claims/teacher.py`, pretrained on another task, with Maestro's update of rank 32 (our form
  of it, and the controller of the package). The rival is a plain LoRA of rank 32.

Maestro's hidden layers are then cut to their first k columns, the rival's to the best approximation of rank k by
singular values (`squeeze_` for the LoRA). Lasso weights 0, 1e-4 and 1e-3; the one that is judged has the best accuracy
on validation digits, mean over full rank and a quarter of it. Importances below 1e-3 are left out four times in a
training. Each arm has its own learning rate, by validation loss in full on two other seeds. Accuracy in points, on 172
test digits: one point is less than two of them.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.claims.outcome import Finding, Outcome, Row, difference, mean_and_error, shown
from bench.claims.problems import fit
from bench.claims.teacher import (
    CLASSES,
    LAYERS,
    TUNED,
    WIDTH,
    Arm,
    Problem,
    adapted,
    batches_of,
    cross_entropy,
    digit_data,
    digits,
    lora,
    loss_and_accuracy,
    network,
    verdict,
)
from lora_squeeze.methods.control import deltas_of
from lora_squeeze.methods.ranks.maestro import MaestroConfig, MaestroDelta
from lora_squeeze.methods.ranks.maestro_layers import MaestroLinear, decompose, draw, group_lasso, shrink
from lora_squeeze.methods.ranks.prefix import set_rank
from lora_squeeze.training.inplace import squeeze_

_R = 32  # of the adapters
_LASSOS = (0.0, 1e-4, 1e-3)
_THRESHOLD, _SHRINKS = 1e-3, 4
_SHARES = (1.0, 0.5, 0.25, 0.125, 0.0625)  # of the full rank


@dataclass(frozen=True)
class _Way:
    """A way of training: its full rank, problem, how a model is trained, and how it is cut to a rank."""

    full: int
    problem: Callable[[int], Problem]
    train: Callable[[int, int, float, float | None], nn.Module]  # seed, steps, rate, lasso or None for the rival
    cut: Callable[[nn.Module, int], nn.Module]
    found: Callable[[nn.Module], list[int]]

    def ranks(self) -> list[int]:
        """That are measured, the full one first."""
        return [round(self.full * share) for share in _SHARES]


@dataclass(frozen=True)
class _Curves:
    """Of one arm, for each seed: accuracies in percent, one of each rank, and the ranks found, one of each layer."""

    rate: float
    validation: list[list[float]]
    test: list[list[float]]
    found: list[list[int]]

    def at(self, index: int) -> list[float]:
        """On test digits, for each seed."""
        return [curve[index] for curve in self.test]

    @property
    def worth(self) -> float:
        """What the lasso is chosen by."""
        return statistics.fmean(curve[0] + curve[_SHARES.index(0.25)] for curve in self.validation)


def run(quick: bool) -> Outcome:
    """Measure both ways."""
    steps, seeds, tuned = (8, range(2), TUNED[:1]) if quick else (1200, range(5), TUNED)
    ways = {
        "whole": _Way(WIDTH, _from_the_start, _whole, _cut_whole, _kept),
        "adapter": _Way(_R, lambda seed: digits(seed, min(400, steps)), _adapter, _cut_adapter, _kept),
    }
    outcome = Outcome()
    for name, way in ways.items():
        arms: dict[float | None, _Curves] = {
            lasso: _measured(way, lasso, steps, seeds, tuned) for lasso in (None, *_LASSOS)
        }
        outcome.rows += _rows(name, way, arms)
        outcome.findings += _findings(name, way, arms)
    return outcome


def _measured(way: _Way, lasso: float | None, steps: int, seeds: range, tuned: Sequence[int]) -> _Curves:
    arm = Arm(lambda seed, rate: way.train(seed, steps, rate, lasso), way.problem)
    rate, models = arm.trained(seeds, tuned)
    curves: dict[str, list[list[float]]] = {"validation": [], "test": []}
    for model in models:
        small = [way.cut(model, rank) for rank in way.ranks()]
        for part, values in curves.items():
            values.append([loss_and_accuracy(one, digit_data()[part])[1] for one in small])
    return _Curves(rate, **curves, found=[way.found(model) for model in models])


@cache
def _from_the_start(seed: int) -> Problem:
    return Problem(network([WIDTH, WIDTH, WIDTH, WIDTH, CLASSES], "from the start", seed), digit_data())


def _whole(seed: int, steps: int, rate: float, lasso: float | None) -> nn.Module:
    problem = _from_the_start(seed)
    model, batches = copy.deepcopy(problem.base), batches_of(problem.data["train"], steps, seed)
    if lasso is None:
        fit(model, cross_entropy, batches, rate, controlled=False)
        return model
    plain: dict[str, Any] = {name: model.get_submodule(name) for name in LAYERS}
    layers = {name: decompose(layer) for name, layer in plain.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    began = 0

    def loss(model: nn.Module, batch: tuple[int, tuple[Tensor, Tensor]]) -> Tensor:
        nonlocal began
        step, examples = batch
        if step and step % (steps // _SHRINKS) == 0 and shrink(layers, _THRESHOLD):
            began = step
        began = draw(layers, step, began, seed)
        total = cross_entropy(model, examples)
        return total + lasso * torch.stack([group_lasso(layer) for layer in layers.values()]).sum()

    fit(model, loss, list(enumerate(batches)), rate, controlled=False)
    shrink(layers, _THRESHOLD)
    return model


def _adapter(seed: int, steps: int, rate: float, lasso: float | None) -> nn.Module:
    problem = digits(seed, min(400, steps))
    config: Any = lora(_R)
    if lasso is not None:
        config = MaestroConfig(
            r=_R, alpha=2 * _R, lasso=lasso, threshold=_THRESHOLD, shrinks=_SHRINKS, seed=seed, target_modules=LAYERS
        )
    model = adapted(problem.base, config, seed)
    fit(model, cross_entropy, batches_of(problem.data["train"], steps, seed), rate)
    return model


@torch.no_grad()
def _cut_whole(model: nn.Module, rank: int) -> nn.Module:
    small = copy.deepcopy(model)
    for name in LAYERS:
        layer: Any = small.get_submodule(name)
        if isinstance(layer, MaestroLinear):
            layer.kept = min(layer.kept, rank)
            continue
        U, S, Vh = torch.linalg.svd(layer.weight)
        layer.weight.copy_((U[:, :rank] * S[:rank]) @ Vh[:rank])
    return small


def _cut_adapter(model: nn.Module, rank: int) -> nn.Module:
    small = copy.deepcopy(model)
    if deltas_of(small):
        set_rank(small, rank)
    else:
        squeeze_(small, rank=rank)
    return small


def _kept(model: nn.Module) -> list[int]:
    """Ranks that the lasso has left; of a rival none."""
    modules: list[Any] = [m for m in model.modules() if isinstance(m, MaestroLinear | MaestroDelta)]
    return [module.kept for module in modules]


def _rows(name: str, way: _Way, arms: dict[float | None, _Curves]) -> list[Row]:
    rows: list[Row] = []
    for lasso, of in arms.items():
        rival = "plain + SVD" if name == "whole" else f"LoRA r = {_R} + squeeze"
        arm = rival if lasso is None else f"Maestro, lasso {lasso:g}"
        row: Row = {"part": f"{name}: accuracy in percent, by rank", "arm": arm, "rate": of.rate}
        row |= {str(rank): shown(*mean_and_error(of.at(i)), 1) for i, rank in enumerate(way.ranks())}
        layers = [f"{statistics.fmean(kept):.0f}" for kept in zip(*of.found, strict=True)]
        row["ranks found, mean of seeds"] = " ".join(layers) or None
        rows.append(row)
    return rows


def _findings(name: str, way: _Way, arms: dict[float | None, _Curves]) -> list[Finding]:
    plain = arms[None]
    lasso = max((lasso for lasso in arms if lasso is not None), key=lambda lasso: arms[lasso].worth)
    ours, quarter = arms[lasso], _SHARES.index(0.25)
    gain = difference(ours.at(quarter), plain.at(quarter))
    full = difference(ours.at(0), plain.at(0))
    eighth = difference(ours.at(quarter + 1), plain.at(quarter + 1))
    ranks = way.ranks()
    return [
        Finding(f"{name}: at a quarter of the rank, {ranks[quarter]}, Maestro is at least 2 points above the "
                "truncation by singular values",
                f"lasso {lasso:g}: {shown(*gain, 2)} points; at rank {ranks[quarter + 1]} {shown(*eighth, 2)}",
                verdict(*gain, 2)),
        Finding(f"{name}: in full, Maestro is at most 1 point below plain training",
                f"{shown(*full, 2)} points", verdict(*full, -1)),
    ]  # fmt: skip
