"""Does an update that depends on the input win where the target has regimes? Queryable LoRA (arXiv 2605.08423).

A network of 6 linear layers (8 inputs, width 64, one output, tanh) is trained on a smooth function for 1500 steps. The
new target adds to it, by the signs of the first two inputs, one of three random networks; training targets have noise
of deviation 0.3. Queryable LoRA has r = 4, 8 atoms of which 2 are used, and blocks of two layers; plain LoRA has r = 5,
as many numbers. Adam for 300 steps of 128 out of 4096 samples, a rate for each arm chosen on two other problems, ten
problems. "error" is the mean squared error on 4096 fresh points without noise; before adaptation it is that of the
pretrained network.

What it may owe its result to, one change at a time: all 8 atoms in use; no sight of earlier blocks (the weight of that
summary is fixed at 0); one fixed core in place of the routing (a single atom: a plain LoRA of r = 4, with fewer
numbers); and, as an instruction to each sample, the number of its regime, or that of another sample. The instructed
arms know more than LoRA does, or are told what is wrong; they are compared with Queryable LoRA alone.

Whether the deviations differ was at first read off the two numbers alone (0.187 against 0.107: "does not hold"); that
they have errors of their own was added after that result.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.claims.arms import Arm, lora, trained_numbers, tuned_rate
from bench.claims.networks import Data, batches, mlp, squared
from bench.claims.outcome import Finding, Outcome, difference, mean_and_error, shown
from bench.claims.problems import fit
from lora_squeeze.methods.adapters.queryable_lora import QueryableConfig, instructed
from lora_squeeze.methods.control import deltas_of

INPUTS, WIDTH, DEPTH, REGIMES, NOISE, SAMPLES = 8, 64, 6, 3, 0.3, 4096
TARGETS = [f"layer{number}" for number in range(DEPTH)]
VALIDATION = (100, 101)
OURS, PLAIN = "Queryable LoRA", "LoRA r=5"


def queryable(name: str, blind: bool = False, **options: Any) -> Arm:
    """With r = 4 and blocks of two layers."""

    def config(seed: int) -> Any:
        return QueryableConfig(r=4, block_layers=2, target_modules=TARGETS, seed=seed, **options)

    return Arm(name, config, _without_earlier_blocks if blind else None, guess=3e-2)


def _without_earlier_blocks(model: Any) -> None:
    weight = next(iter(deltas_of(model).values())).memory.of_depth
    weight.data.zero_()
    weight.requires_grad_(False)


ARMS = (
    lora(5, TARGETS, 3e-2),
    queryable(OURS),
    queryable("all atoms", top_k=8),
    queryable("no earlier blocks", blind=True),
    queryable("one core", atoms=1),
    queryable("told the regime", text_dim=REGIMES),
    queryable("told another's", text_dim=REGIMES),
)


def regime(x: Tensor) -> Tensor:
    """0 where the first input is positive, else 1 or 2 by the sign of the second."""
    return torch.where(x[:, 0] > 0, 0, torch.where(x[:, 1] > 0, 1, 2))


def smooth(x: Tensor, seed: int) -> Tensor:
    """What the network is pretrained on (count, 1)."""
    a, b, c = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(seed)) / INPUTS**0.5
    y: Tensor = torch.sin(2 * x @ a) + (x @ b) * (x @ c)
    return y[:, None]


def data(seed: int, part: int, noise: float) -> Data:
    """Inputs, targets and, one-hot, the regimes."""
    generator = torch.Generator().manual_seed(1000 * seed + part)
    x = torch.randn(SAMPLES, INPUTS, generator=generator)
    drawn = torch.Generator().manual_seed(1000 * seed + 999)
    changes = []
    for _ in range(REGIMES):
        V, w = torch.randn(INPUTS, 4, generator=drawn) / INPUTS**0.5, torch.randn(4, 1, generator=drawn)
        changes.append(torch.tanh(2 * x @ V) @ w)
    one_hot = functional.one_hot(regime(x), REGIMES).float()
    y = smooth(x, seed) + (torch.stack(changes, 1) * one_hot[..., None]).sum(1)
    return x, y + noise * torch.randn(y.shape, generator=generator), one_hot


@cache
def pretrained(seed: int, steps: int) -> nn.Sequential:
    """On the smooth function."""
    model = mlp((INPUTS, *[WIDTH] * (DEPTH - 1), 1), seed, nn.Tanh)
    x = torch.randn(8 * SAMPLES, INPUTS, generator=torch.Generator().manual_seed(seed))
    fit(model, squared, batches((x, smooth(x, seed)), 128, steps, seed), 3e-3, controlled=False)
    return model


def told(arm: Arm, known: Data, seed: int) -> Data:
    """The data with what the arm is told about each sample."""
    x, y, one_hot = known
    if arm.name == "told the regime":
        return known
    if arm.name == "told another's":
        return x, y, one_hot[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    return x, y


def loss(model: Any, batch: Data) -> Tensor:
    """Mean squared error, with the instruction where there is one."""
    if len(batch) == 2:
        return squared(model, batch)
    with instructed(model, batch[2]):
        return squared(model, batch)


def run(quick: bool) -> Outcome:
    """All arms on the same problems."""
    seeds, validation, before, steps = (range(2), VALIDATION[:1], 4, 2) if quick else (range(10), VALIDATION, 1500, 300)
    outcome = Outcome()
    start = [_error(pretrained(seed, before), data(seed, 2, 0.0)[:2]) for seed in seeds]
    mean, error = mean_and_error(start)
    outcome.rows.append({"part": "three regimes", "arm": "pretrained", "error": mean, "± error": error})
    errors: dict[str, list[float]] = {}
    for arm in ARMS:
        numbers, rate, found = _arm(arm, seeds, validation, before, steps)
        errors[arm.name] = found
        mean, error = mean_and_error(found)
        row = {"part": "three regimes", "arm": arm.name, "numbers": numbers, "rate": rate}
        outcome.rows.append({**row, "error": mean, "± error": error, "deviation": statistics.stdev(found)})
    outcome.findings += [_lower(errors), _steadier(errors), *_ablations(errors)]
    return outcome


def _arm(
    arm: Arm, seeds: Sequence[int], validation: Sequence[int], before: int, steps: int
) -> tuple[int, float, list[float]]:
    """Numbers, rate, and the test error of each problem."""
    numbers: list[int] = []

    def test(seed: int, rate: float, part: int) -> float:
        model = arm.on(copy.deepcopy(pretrained(seed, before)), seed)
        numbers.append(trained_numbers(model))
        fit(model, loss, batches(told(arm, data(seed, 1, NOISE), seed), 128, steps, seed), rate)
        return _error(model, told(arm, data(seed, part, 0.0), seed + 1))

    rate = tuned_rate(lambda seed, rate: test(seed, rate, 3), validation, arm.guess)
    return numbers[0], rate, [test(seed, rate, 2) for seed in seeds]


@torch.no_grad()
def _error(model: Any, known: Data) -> float:
    return float(loss(model, known))


def _lower(errors: dict[str, list[float]]) -> Finding:
    scaled = [0.9 * theirs for theirs in errors[PLAIN]]
    mean, error = difference(errors[OURS], scaled)
    ours, theirs = mean_and_error(errors[OURS]), mean_and_error(errors[PLAIN])
    return Finding(
        "the mean test error is at least 10 % below that of LoRA with as many numbers",
        f"{shown(*ours)} against {shown(*theirs)}, ratio of the means {ours[0] / theirs[0]:.2f}; paired difference "
        f"{shown(*difference(errors[OURS], errors[PLAIN]))}",
        None if abs(mean) <= 2 * error else mean < 0,
    )


def _steadier(errors: dict[str, list[float]]) -> Finding:
    ours, theirs = statistics.stdev(errors[OURS]), statistics.stdev(errors[PLAIN])
    farther, error = math.log(ours / theirs), math.sqrt(1 / (len(errors[OURS]) - 1))  # of two deviations' logarithms
    return Finding(
        "its deviation over the problems is not larger",
        f"{ours:.3f} against {theirs:.3f}, each over {len(errors[OURS])} problems: {math.exp(farther):.2f} times, from "
        f"{math.exp(farther - 2 * error):.2f} to {math.exp(farther + 2 * error):.2f} within two errors",
        None if abs(farther) <= 2 * error else farther < 0,
    )


def _ablations(errors: dict[str, list[float]]) -> list[Finding]:
    asked = (
        ("two atoms do better than all eight", OURS, "all atoms"),
        ("the sight of earlier blocks helps", OURS, "no earlier blocks"),
        ("the routing helps over one fixed core", OURS, "one core"),
        ("to be told the regime helps", "told the regime", OURS),
        (
            "to be told that of another sample does not: it is worse than the right one",
            "told the regime",
            "told another's",
        ),
    )
    found = []
    for claim, better, worse in asked:
        mean, error = difference(errors[better], errors[worse])
        figures = f"{shown(*mean_and_error(errors[better]))} against {shown(*mean_and_error(errors[worse]))}"
        holds = None if abs(mean) <= 2 * error else mean < 0
        found.append(Finding(claim, f"{figures}, difference {shown(mean, error)}", holds))
    return found
