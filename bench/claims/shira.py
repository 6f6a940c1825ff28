"""Are scattered entries worth more than a low rank at equal numbers? SHiRA (arXiv 2406.13175) against LoRA.

Least squares on an update of 64 x 64, r (in + out) = 1024 numbers each, r = 8. In closed form: of a random orthogonal
target, whose singular values are all 1, LoRA leaves 1 - r / n = 0.875, and entries chosen at random leave 1 - 2 r / n =
0.75, as they reach every chosen entry. Of a target of rank 4 LoRA leaves nothing. Both ways round are asked, of PEFT's
SHiRA with this package's masks: structured, by weight (which is noise here, so it tells nothing), by gradient and by
SNIP, the last two from the gradient of this very problem.

Adam for 500 steps, a rate for each arm and target chosen on another target, five targets. "left" is the share of the
target's energy that is not reached. The switching of adapters and the training of real models are elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import ShiraConfig
from torch import nn

from bench.claims.arms import Arm, lora, trained_numbers, tuned_rate
from bench.claims.matrices import (
    LAYER,
    VALIDATION,
    Fitted,
    Problem,
    Problems,
    best_row,
    flat,
    gaussian,
    left,
    model_of,
    with_spectrum,
)
from bench.claims.outcome import Finding, Outcome, mean_and_error, shown
from bench.claims.problems import fit
from lora_squeeze.methods.adapters.shira_masks import (
    calibration_gradients,
    gradient_mask,
    magnitude_mask,
    set_mask,
    snip_mask,
    struct_mask,
)

WIDTH, RANK, LOW = 64, 8, 4
MASKS = ("random", "structured", "weight", "gradient", "SNIP")


def low_rank(seed: int) -> Problem:
    """A target of rank 4 with equal singular values."""
    values = (torch.arange(WIDTH) < LOW).float()
    return Problem(gaussian(seed + 1, WIDTH, WIDTH) / WIDTH**0.5, with_spectrum(seed, values))


def run(quick: bool) -> Outcome:
    """Both targets, all masks."""
    seeds, steps = (range(2), 3) if quick else (range(5), 500)
    outcome = Outcome()
    found: dict[tuple[str, str], list[float]] = {}
    for target, problems in (("orthogonal", flat(WIDTH)), ("rank 4", low_rank)):
        part = f"{target} target"
        row, found["best", target] = best_row(problems, seeds, RANK, part)
        outcome.rows.append(row)
        for name in ("LoRA r=8", *MASKS):
            with torch.sparse.check_sparse_tensor_invariants(enable=False):  # PEFT leaves it open, and torch asks
                fit = _fitted(name, problems, seeds, steps)
            found[name, target] = fit.residuals
            outcome.rows.append(fit.row(part, arm=name if name.startswith("LoRA") else f"SHiRA, {name}"))
    outcome.findings += [_flat(found), _not_flat(found), _gradient(found)]
    return outcome


def _flat(found: dict[tuple[str, str], list[float]]) -> Finding:
    ours, best = found["random", "orthogonal"], found["best", "orthogonal"]
    expected = 1 - 2 * RANK / WIDTH
    mean, error = mean_and_error(ours)
    return Finding(
        "orthogonal target: random entries leave 1 - 2 r / n = 0.75 (within 0.02), less than the best LoRA's 0.875",
        f"{shown(mean, error)} against {mean_and_error(best)[0]:.3f}",
        abs(mean - expected) <= 0.02 and max(ours) < min(best),
    )


def _not_flat(found: dict[tuple[str, str], list[float]]) -> Finding:
    ours, theirs = found["random", "rank 4"], found["LoRA r=8", "rank 4"]
    return Finding(
        "target of rank 4: the trained LoRA leaves less than 0.001, random entries more than 0.7",
        f"{max(theirs):.1e} at most against {min(ours):.3f} at least",
        max(theirs) < 1e-3 and min(ours) > 0.7,
    )


def _gradient(found: dict[tuple[str, str], list[float]]) -> Finding:
    ours, theirs = found["gradient", "orthogonal"], found["random", "orthogonal"]
    return Finding(
        "orthogonal target: entries chosen by gradient leave less than random ones",
        f"{shown(*mean_and_error(ours))} against {shown(*mean_and_error(theirs))}",
        max(ours) < min(theirs),
    )


def _fitted(name: str, problems: Problems, seeds: range, steps: int) -> Fitted:
    def solved(seed: int, rate: float) -> Any:
        problem = problems(seed)
        base = model_of(problem.weight)
        arm = lora(RANK, [LAYER]) if name.startswith("LoRA") else _shira(name, base, problem)
        model = arm.on(base, seed)
        fit(model, left, [problem] * steps, rate)
        return model, float(left(model, problem).detach())

    rate = tuned_rate(lambda seed, rate: float(solved(seed, rate)[1]), [VALIDATION], 1e-2)
    models, residuals = zip(*(solved(seed, rate) for seed in seeds), strict=True)
    return Fitted(rate, list(residuals), models[-1], trained_numbers(models[-1]))


def _shira(name: str, base: nn.Module, problem: Problem) -> Arm:
    def config(seed: int) -> Any:
        plain = ShiraConfig(r=RANK, target_modules=[LAYER], random_seed=seed)
        if name == "random":
            return plain
        if name in ("gradient", "SNIP"):
            gradients = calibration_gradients(base, [problem], [LAYER], left)
            return set_mask(plain, name, gradient_mask(gradients) if name == "gradient" else snip_mask(gradients))
        return set_mask(plain, name, struct_mask() if name == "structured" else magnitude_mask())

    return Arm(name, config)
