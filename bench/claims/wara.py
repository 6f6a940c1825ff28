"""What does a map shared by wavelet bands reach, and does the order of the features matter? WaRA (arXiv 2506.24092).

With the Haar wavelet the update is kron(M, I_2) with M of rank r: r (in + out) / 2 numbers, rank 2 r. Least squares on
an update of 64 x 64, with four targets: kron(M, I_2) with an M of rank 8 that has equal singular values; the same with
the features shuffled on both sides; an orthogonal one, all singular values 1; one with the i-th singular value 1 / i.
On the first, LoRA of r = 8 has twice the numbers of WaRA of r = 8, and r = 16 the same rank; on the other targets both
have 1024 numbers, WaRA with r = 16.

Adam for 1000 steps, a rate for each arm and target chosen on another target, three targets. "left" is the share of the
target's energy that is not reached. Of a target without structure a Kronecker product with I_2 holds 1 / 4 on average.
"""

from __future__ import annotations

from statistics import fmean

import torch

from bench.claims.arms import Arm, lora
from bench.claims.matrices import LAYER, Fitted, Problem, best_row, decaying, fitted, flat, gaussian, with_spectrum
from bench.claims.outcome import Finding, Outcome, mean_and_error, shown
from lora_squeeze.methods.adapters.wara import WaraConfig

WIDTH, RANK = 64, 8
KRON, SHUFFLED = "kron(M, I_2)", "the same, shuffled"


def kronecker(seed: int) -> Problem:
    """kron(M, I_2) with an M of rank 8, all of its singular values 1."""
    values = (torch.arange(WIDTH // 2) < RANK).float()
    target = torch.kron(with_spectrum(seed, values), torch.eye(2))
    return Problem(gaussian(seed + 1, WIDTH, WIDTH) / WIDTH**0.5, target)


def shuffled(seed: int) -> Problem:
    """The same with rows and columns in another order: of the same spectrum, but neighbours have nothing in common."""
    problem = kronecker(seed)
    rows, columns = (torch.randperm(WIDTH, generator=torch.Generator().manual_seed(2 * seed + k)) for k in (0, 1))
    return Problem(problem.weight, problem.target[rows][:, columns])


def wara(r: int) -> Arm:
    """One map on both bands."""
    return Arm(f"WaRA r={r}", lambda seed: WaraConfig(r=r, target_modules=[LAYER], seed=seed))


def run(quick: bool) -> Outcome:
    """All four targets."""
    seeds, steps = ((0, 1), 3) if quick else ((0, 1, 2), 1000)
    outcome = Outcome()
    few = [wara(8), lora(8, [LAYER]), lora(16, [LAYER])]
    same = [wara(16), lora(8, [LAYER])]
    found: dict[tuple[str, str], Fitted] = {}
    best: dict[str, float] = {}
    for target, problems, arms in (
        (KRON, kronecker, few),
        (SHUFFLED, shuffled, few),
        ("orthogonal", flat(WIDTH), same),
        ("1 / i", decaying(WIDTH), same),
    ):
        row, left = best_row(problems, seeds, RANK, target)
        best[target] = fmean(left)
        outcome.rows.append(row)
        for arm in arms:
            fit = found[arm.name, target] = fitted(arm, problems, seeds, steps)
            outcome.rows.append(fit.row(target, arm=arm.name))
    outcome.findings += [_kronecker(found, best), _order(found), *_generic(found, best)]
    return outcome


def _kronecker(found: dict[tuple[str, str], Fitted], best: dict[str, float]) -> Finding:
    ours, high = found["WaRA r=8", KRON].residuals, found["LoRA r=16", KRON].residuals
    return Finding(
        "target kron(M, I_2): WaRA r=8 leaves less than 0.001, as LoRA r=16 with four times the numbers, while no LoRA "
        "r=8 leaves less than half",
        f"{max(ours):.1e} and {max(high):.1e} at most, the best LoRA r=8 {best[KRON]:.3f}",
        max(ours) < 1e-3 and max(high) < 1e-3 and best[KRON] > 0.499,
    )


def _order(found: dict[tuple[str, str], Fitted]) -> Finding:
    before, after = found["WaRA r=8", KRON].residuals, found["WaRA r=8", SHUFFLED].residuals
    lora_before, lora_after = found["LoRA r=16", KRON].residuals, found["LoRA r=16", SHUFFLED].residuals
    return Finding(
        "the order of the features is what WaRA lives by: shuffled, it leaves more than 0.7 of the same target, and "
        "LoRA r=16 less than 0.001 as before",
        f"WaRA {max(before):.1e} before, {shown(*mean_and_error(after))} after; LoRA {max(lora_before):.1e} before, "
        f"{max(lora_after):.1e} after",
        min(after) > 0.7 and max(lora_after) < 1e-3,
    )


def _generic(found: dict[tuple[str, str], Fitted], best: dict[str, float]) -> list[Finding]:
    flat_ours, steep_ours = (found["WaRA r=16", target].residuals for target in ("orthogonal", "1 / i"))
    steep_theirs = found["LoRA r=8", "1 / i"].residuals
    return [
        Finding(
            "targets without structure: WaRA leaves at least 0.7 at 1024 numbers",
            f"orthogonal {shown(*mean_and_error(flat_ours))}, 1 / i {shown(*mean_and_error(steep_ours))}",
            min(*flat_ours, *steep_ours) >= 0.7,
        ),
        Finding(
            "orthogonal target: WaRA leaves less than the best LoRA of 1024 numbers",
            f"{shown(*mean_and_error(flat_ours))} against {best['orthogonal']:.3f}",
            max(flat_ours) < best["orthogonal"],
        ),
        Finding(
            "spectrum 1 / i: LoRA leaves less than a quarter of what WaRA leaves",
            f"{shown(*mean_and_error(steep_theirs))} against {shown(*mean_and_error(steep_ours))}",
            max(steep_theirs) < 0.25 * min(steep_ours),
        ),
    ]
