"""Do the smallest weights learn a new task, keep the old one, and leave their threshold? SaRA (arXiv 2409.06633).

A denoiser of points in the plane (noise prediction, 10 inputs, three hidden layers of 128 x 128, 2 outputs) is trained
on a ring of eight Gaussians for 3000 steps and adapted to a grid of nine for 600 steps of 256 points. At 4608 numbers
in the three hidden layers: SaRA with 9.375 % of each layer, its penalty as by default, and LoRA r=6; full tuning of all
numbers beside them. A rate for each arm, chosen on the grid's loss of another pretrained model; four pretrained models.
Losses are of 8192 fresh points; "floor" is the loss of the best denoiser there is, known for mixtures of Gaussians.

Then the re-selection at the half of the training, without the penalty: the share of SaRA's entries whose size is still
below the threshold at the end, with it and without it, each at its own rate. The paper has 2 % with and 15 % without.
The weights of a real model are elsewhere.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.claims.arms import FULL, Arm, lora, trained_numbers, tuned_rate
from bench.claims.networks import Data, adapted, batches, error, mlp, squared
from bench.claims.outcome import Finding, Outcome, Row, difference, mean_and_error, shown
from bench.claims.problems import fit
from lora_squeeze.methods.adapters.sara import SaraConfig
from lora_squeeze.methods.control import deltas_of

WIDTH, RANK, SPREAD = 128, 6, 0.1
SHARE = RANK * 2 / WIDTH
HIDDEN = ["layer1", "layer2", "layer3"]
VALIDATION = 100
RING = torch.tensor([[math.cos(math.tau * k / 8), math.sin(math.tau * k / 8)] for k in range(8)]) * 1.5
GRID = torch.tensor([[float(a), float(b)] for a in (-1, 0, 1) for b in (-1, 0, 1)])
SARA = Arm("SaRA", lambda seed: SaraConfig(fraction=SHARE, target_modules=HIDDEN, seed=seed))
UNPENALISED = Arm("SaRA", lambda seed: SaraConfig(fraction=SHARE, nuclear=0, target_modules=HIDDEN))


def noised(centres: Tensor, count: int, seed: int) -> Data:
    """Inputs (count, 10) and the noise in them (count, 2): x_t = cos x + sin noise, with the angle as the time."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(centres), (count,), generator=generator)
    clean = centres[chosen] + SPREAD * torch.randn(count, 2, generator=generator)
    noise, angle = torch.randn(count, 2, generator=generator), torch.rand(count, 1, generator=generator) * math.pi / 2
    times = [f(k * angle) for k in (1, 2, 4, 8) for f in (torch.sin, torch.cos)]
    return torch.cat([angle.cos() * clean + angle.sin() * noise, *times], 1), noise


def floor(centres: Tensor, data: Data) -> float:
    """The loss of the mean of the noise given what is seen, the best prediction."""
    x, sin, cos = data[0][:, None, :2], data[0][:, None, 2:3], data[0][:, None, 3:4]
    variance = sin**2 + (cos * SPREAD) ** 2
    away = x - cos * centres
    weights = (-away.square().sum(-1, keepdim=True) / (2 * variance)).softmax(1)
    best = (weights * sin / variance * away).sum(1)
    return float((best - data[1]).square().mean())


@cache
def pretrained(seed: int, steps: int) -> nn.Sequential:
    """On the ring."""
    model = mlp((10, *[WIDTH] * 4, 2), seed, nn.SiLU)
    fit(model, squared, _training(RING, steps, 31 * seed), 3e-3, controlled=False)
    return model


def _training(centres: Tensor, steps: int, seed: int) -> list[Data]:
    return batches(noised(centres, 256 * min(steps, 200), seed), 256, steps, seed)


def run(quick: bool) -> Outcome:
    """Both parts."""
    seeds, before, steps = (range(2), 5, 4) if quick else (range(4), 3000, 600)
    outcome = Outcome()
    _adaptation(outcome, seeds, before, steps)
    _reselection(outcome, seeds, before, steps)
    return outcome


def _models(arm: Arm, seeds: Sequence[int], before: int, steps: int, **options: Any) -> tuple[float, list[Any]]:
    """The rate, and a trained model for each seed."""

    def train(seed: int, rate: float) -> Any:
        return adapted(arm, pretrained(seed, before), seed, _training(GRID, steps, 37 * seed + 1), rate, **options)

    fresh = noised(GRID, 8192, 41)
    rate = tuned_rate(lambda seed, rate: error(train(seed, rate), fresh), [VALIDATION], arm.guess)
    return rate, [train(seed, rate) for seed in seeds]


def _adaptation(outcome: Outcome, seeds: Sequence[int], before: int, steps: int) -> None:
    tests = {"grid": noised(GRID, 8192, 42), "ring": noised(RING, 8192, 43)}
    floors = {"grid": floor(GRID, tests["grid"]), "ring": floor(RING, tests["ring"])}
    part = "from a ring to a grid"
    losses: dict[tuple[str, str], list[float]] = {}
    runs: list[tuple[str, Arm | None]] = [("pretrained", None)]
    runs += [(arm.name, arm) for arm in (SARA, lora(RANK, HIDDEN), FULL)]
    for name, arm in runs:
        models: list[Any] = [pretrained(seed, before) for seed in seeds]
        row: Row = {"part": part, "arm": name}
        if arm is not None:
            row["numbers"] = trained_numbers(arm.on(copy.deepcopy(models[0]), 0))  # at the start
            row["rate"], models = _models(arm, seeds, before, steps)
        for task, data in tests.items():
            found = losses[name, task] = [error(model, data) for model in models]
            row[f"{task}, new" if task == "grid" else f"{task}, old"], row[f"error, {task}"] = mean_and_error(found)
        outcome.rows.append(row)
    outcome.rows.append({"part": part, "arm": "floor", "grid, new": floors["grid"], "ring, old": floors["ring"]})
    outcome.findings += [_learns(losses, floors["grid"]), _keeps(losses)]


def _learns(losses: dict[tuple[str, str], list[float]], least: float) -> Finding:
    ours, theirs = losses["SaRA", "grid"], losses[f"LoRA r={RANK}", "grid"]
    mean, deviation = mean_and_error([a / b for a, b in zip(ours, theirs, strict=True)])
    above = [mean_and_error(found)[0] - least for found in (ours, theirs)]
    return Finding(
        "new task: SaRA's loss is at most 1.1 times that of LoRA at equal numbers",
        f"{shown(*mean_and_error(ours), 4)} against {shown(*mean_and_error(theirs), 4)}, ratio "
        f"{shown(mean, deviation)}; above the floor of {least:.4f}: {above[0]:.4f} against {above[1]:.4f}",
        None if abs(mean - 1.1) <= 2 * deviation else mean < 1.1,
    )


def _keeps(losses: dict[tuple[str, str], list[float]]) -> Finding:
    mean, deviation = difference(losses["SaRA", "ring"], losses["full", "ring"])
    figures = {name: shown(*mean_and_error(losses[name, "ring"])) for name in ("SaRA", f"LoRA r={RANK}", "full")}
    return Finding(
        "old task: SaRA's loss afterwards is lower than that of full tuning",
        ", ".join(f"{name} {told}" for name, told in figures.items()),
        None if abs(mean) <= 2 * deviation else mean < 0,
    )


def _reselection(outcome: Outcome, seeds: Sequence[int], before: int, steps: int) -> None:
    shares: dict[bool, list[float]] = {}
    for again in (True, False):
        rate, models = _models(UNPENALISED, seeds, before, steps, controlled=again)
        shares[again] = [_below(model) for model in models]
        mean, deviation = mean_and_error(shares[again])
        loss = mean_and_error([error(model, noised(GRID, 8192, 42)) for model in models])[0]
        row = {"rate": rate, "still below": mean, "error": deviation, "loss": loss}
        outcome.rows.append({"part": "entries below the threshold at the end", "chosen again": str(again), **row})
    mean, deviation = difference(shares[True], [share / 2 for share in shares[False]])
    outcome.findings.append(
        Finding(
            "re-selection at the half leaves at most half as many entries below the threshold at the end",
            f"{shown(*mean_and_error(shares[True]))} with, {shown(*mean_and_error(shares[False]))} without",
            None if abs(mean) <= 2 * deviation else mean < 0,
        )
    )


@torch.no_grad()
def _below(model: Any) -> float:
    """Share of the entries chosen at the start."""
    small = count = 0
    for delta in deltas_of(model).values():
        threshold = delta.threshold(delta.base().abs().flatten())
        small += int((delta.values.abs() < threshold).sum())
        count += len(delta.index) + len(delta.kept_index)
    return small / count
