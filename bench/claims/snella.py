"""Does a kernel of two small factors fit a sparse update better than their product? SNELLA (arXiv 2510.24037).

Least squares on an update of 128 x 128. The target has 5 % entries from N(0, 1) at random places and zeros elsewhere,
or, as a control, is N(0, 1) everywhere. At equal numbers (r (in + out) = 4096, r = 16, and 3 scalars in SNELLA): the
kernel of SNELLA with all entries, which is its start, the same with nine tenths of the entries zero, SNELL's kernel
without the softmax and with nine tenths zero, as it is used, and LoRA, trained and the best there is. One layer has no
other to compete with, so there is no budget that falls.

Adam for 1500 steps, a rate for each arm and target chosen on another target, three targets. "left" is the share of the
target's energy that is not reached; "rank" counts the singular values of the last update that are above the rounding of
float32. The rates end at 0.1, which the kernels choose. SNELL with all entries was an arm of a first run, left 0.12 of
the sparse target, and was taken out for its time.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.claims.arms import Arm, lora
from bench.claims.matrices import LAYER, Fitted, Problem, best_row, fitted, gaussian, update_of
from bench.claims.outcome import Finding, Outcome, mean_and_error, shown
from lora_squeeze.methods.adapters.snella import SnellaConfig

WIDTH, RANK, SHARE = 128, 16, 0.05


def dense(seed: int) -> Problem:
    """N(0, 1) everywhere."""
    return Problem(gaussian(seed + 1, WIDTH, WIDTH) / WIDTH**0.5, gaussian(7 * seed + 2, WIDTH, WIDTH))


def sparse(seed: int) -> Problem:
    """N(0, 1) at one entry of twenty."""
    places = torch.rand(WIDTH, WIDTH, generator=torch.Generator().manual_seed(seed)) < SHARE
    return Problem(dense(seed).weight, dense(seed).target * places)


def kernel(name: str, sparsity: float) -> Arm:
    """SNELLA or SNELL with a share of its entries at zero."""

    def config(seed: int) -> Any:
        return SnellaConfig(r=RANK, kernel=name, sparsity=sparsity, target_modules=[LAYER], seed=seed)

    return Arm(f"{name.upper()}, {100 * sparsity:g} % zeros", config, guess=3e-2)


def run(quick: bool) -> Outcome:
    """The sparse target with all arms, the dense one with SNELLA and LoRA."""
    seeds, steps = ((0, 1), 3) if quick else ((0, 1, 2), 1500)
    outcome = Outcome()
    plain = lora(RANK, [LAYER])
    arms = [plain, kernel("snella", 0.0), kernel("snella", 0.9), kernel("snell", 0.9)]
    found: dict[tuple[str, str], Fitted] = {}
    for target, problems, asked in (("sparse", sparse, arms), ("dense", dense, arms[:2])):
        part = f"{target} target"
        outcome.rows.append(best_row(problems, seeds, RANK, part)[0])
        for arm in asked:
            fit = fitted(arm, problems, seeds, steps)
            found[arm.name, target] = fit
            outcome.rows.append({**fit.row(part, arm=arm.name), "rank": _rank(fit.model)})
    outcome.findings += [
        _at_most(0.8, "sparse", found, arms[1].name),
        _at_most(1.0, "dense", found, arms[1].name),
        _high_rank(found["SNELLA, 0 % zeros", "sparse"]),
    ]
    return outcome


def _at_most(bound: float, target: str, found: dict[tuple[str, str], Fitted], name: str) -> Finding:
    ours, theirs = found[name, target].residuals, found[f"LoRA r={RANK}", target].residuals
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    mean, error = mean_and_error(ratios)
    return Finding(
        f"{target} target: the kernel of SNELLA leaves at most {bound:g} of what LoRA leaves at equal numbers",
        f"{shown(*mean_and_error(ours))} against {shown(*mean_and_error(theirs))}, ratio {shown(mean, error)}",
        None if abs(mean - bound) <= 2 * error else mean < bound,
    )


def _high_rank(fit: Fitted) -> Finding:
    rank = _rank(fit.model)
    return Finding(
        f"the update that SNELLA finds for the sparse target has a rank above 0.9 of the width, not r = {RANK}",
        f"rank {rank} of {WIDTH}",
        rank > 0.9 * WIDTH,
    )


def _rank(model: Any) -> int:
    return int(torch.linalg.matrix_rank(update_of(model), rtol=WIDTH * torch.finfo(torch.float32).eps))
