"""Do a parallel and a sequential head together fit what either alone cannot? Hydra (arXiv 2309.06922).

Least squares on an update of 64 x 64 over a W of singular values from 1 down to 0.01, evenly in the logarithm. Three
targets for W + dW: novel, W + P with a random P of rank 2; general, (I + Q) W with a random Q of rank 2; mixed,
(I + Q) W + P, each with |P| = |QW| = |W|. At 512 numbers each: LoRA r=4, the sequential head alone with r=4, and Hydra
with r=2 in each head, all from this package's `hydra`.

W is invertible, so every matrix of rank 4 is within reach of each arm, B_s A_s W as well as B A: all three targets can
be fitted exactly by all arms, and what is asked is how far training comes in 300 steps of Adam. A rate for each arm and
target is chosen on three other problems; ten problems. "left" is the share of |dW|^2 that is not reached, counted as
1e-6 where it is less, since then the target is reached; the figures compare geometric means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench.claims.arms import Arm, tuned_rate
from bench.claims.matrices import LAYER, Problem, Problems, gaussian, left, solve, with_spectrum
from bench.claims.outcome import Finding, Outcome, mean_and_error
from lora_squeeze.methods.adapters.hydra_adapter import HydraConfig

WIDTH, RANK = 64, 2
FLOOR = 1e-6
ARMS = {"LoRA": ("parallel", 2 * RANK), "sequential": ("sequential", 2 * RANK), "Hydra": ("both", RANK)}
Losses = dict[tuple[str, str], list[float]]


def weight(seed: int) -> Tensor:
    """Singular values from 1 to 0.01."""
    return with_spectrum(seed, torch.logspace(0, -2, WIDTH))


def novel(seed: int) -> Tensor:
    """P of rank 2."""
    return _as_long(gaussian(13 * seed + 1, WIDTH, RANK) @ gaussian(13 * seed + 2, RANK, WIDTH), weight(seed))


def general(seed: int) -> Tensor:
    """Q W with a Q of rank 2."""
    Q = gaussian(13 * seed + 3, WIDTH, RANK) @ gaussian(13 * seed + 4, RANK, WIDTH)
    return _as_long(Q @ weight(seed), weight(seed))


def _as_long(change: Tensor, weight: Tensor) -> Tensor:
    scaled: Tensor = change * (weight.norm() / change.norm())
    return scaled


TARGETS: dict[str, Callable[[int], Tensor]] = {
    "novel": novel,
    "general": general,
    "mixed": lambda seed: novel(seed) + general(seed),
}


def run(quick: bool) -> Outcome:
    """All arms on all targets."""
    seeds, validation, steps = (range(2), (100,), 3) if quick else (range(10), (100, 101, 102), 300)
    outcome = Outcome()
    losses: Losses = {}
    for target, change in TARGETS.items():
        for name, (mode, r) in ARMS.items():
            rate, found = _solved(_arm(name, mode, r), _problems(change), seeds, validation, steps)
            losses[name, target] = found
            mean, error = mean_and_error(found)
            columns = {"target": target, "arm": name, "rate": rate, "left": mean, "error": error}
            outcome.rows.append({"part": "512 numbers each", **columns, "geometric mean": _geometric(found)})
    outcome.findings += [_pure(losses, "novel"), _pure(losses, "general"), _mixed(losses)]
    return outcome


def _arm(name: str, mode: str, r: int) -> Arm:
    return Arm(name, lambda seed: HydraConfig(r=r, mode=mode, target_modules=[LAYER], seed=seed), guess=3e-2)


def _solved(
    arm: Arm, problems: Problems, seeds: Sequence[int], validation: Sequence[int], steps: int
) -> tuple[float, list[float]]:
    """The rate of the lowest geometric mean, and what is left with it for each seed."""
    rate = tuned_rate(lambda s, rate: math.log(_loss(arm, problems, s, rate, steps)), validation, arm.guess)
    return rate, [_loss(arm, problems, seed, rate, steps) for seed in seeds]


def _problems(change: Callable[[int], Tensor]) -> Problems:
    return lambda seed: Problem(weight(seed), change(seed))


def _loss(arm: Arm, problems: Problems, seed: int, rate: float, steps: int) -> float:
    model = solve(arm, problems(seed), seed, rate, steps)
    loss = float(left(model, problems(seed)).detach())
    return FLOOR if loss < FLOOR else loss  # not max: what has diverged is no number, and must stay none


def _geometric(values: list[float]) -> float:
    return math.exp(mean_and_error([math.log(value) for value in values])[0])


def _ratio(losses: Losses, target: str, ours: str, theirs: str) -> tuple[float, float, float]:
    """Geometric mean of the ratios of paired problems, and it with two standard errors less and more."""
    logs = [math.log(a / b) for a, b in zip(losses[ours, target], losses[theirs, target], strict=True)]
    mean, error = mean_and_error(logs)
    return math.exp(mean), math.exp(mean - 2 * error), math.exp(mean + 2 * error)


def _figures(losses: Losses, target: str) -> str:
    return ", ".join(f"{name} {_geometric(losses[name, target]):.2e}" for name in ARMS)


def _pure(losses: Losses, target: str) -> Finding:
    better = min(("LoRA", "sequential"), key=lambda name: _geometric(losses[name, target]))
    mean, low, high = _ratio(losses, target, "Hydra", better)
    return Finding(
        f"{target} target: Hydra leaves at most 1.1 times what the better of LoRA and the sequential head leaves",
        f"{_figures(losses, target)}; {mean:.2f} times ({low:.2f} to {high:.2f}) that of {better}",
        True if high <= 1.1 else False if low > 1.1 else None,
    )


def _mixed(losses: Losses) -> Finding:
    ratios = {name: _ratio(losses, "mixed", "Hydra", name) for name in ("LoRA", "sequential")}
    told = "; ".join(f"{m:.2f} times ({low:.2f} to {high:.2f}) {name}" for name, (m, low, high) in ratios.items())
    surely, surely_not = (max(r[k] for r in ratios.values()) for k in (2, 1))
    return Finding(
        "mixed target: Hydra leaves at most half of what either of LoRA and the sequential head leaves",
        f"{_figures(losses, 'mixed')}; {told}",
        True if surely <= 0.5 else False if surely_not > 0.5 else None,
    )
