"""What can trained singular values reach, and does a squeeze of them keep the largest? SVFit (arXiv 2409.05926).

The weight is 96 x 96 with singular values 1 / i, and SVFit trains all 96 of them. Two targets for its update: one that
rescales singular values, U diag(e) V^T with e from N(0, 1), and a random full-rank one, N(0, 1) everywhere, of which
only the diagonal between U and V can be reached: 1 / 96 of its energy on average. LoRA of r = 8 is the best there is.
Least squares, Adam for 1000 steps, a rate for each target chosen on another one, five targets. "left" is the share of
the target's energy that is not reached.

Then the squeeze, without training: of an update U diag(s - s0) V^T the best of rank k keeps the k largest |s - s0|, so
the error is known in closed form. The trained update of the last rescaling target is squeezed by all four
decompositions; "off" is the distance of their relative error from that closed form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch

from bench.claims.arms import Arm
from bench.claims.matrices import LAYER, Fitted, Problem, best_row, fitted, gaussian, with_spectrum
from bench.claims.outcome import Finding, Outcome, Row, difference, mean_and_error, shown
from lora_squeeze.decompose import Method
from lora_squeeze.lowrank import LowRank
from lora_squeeze.methods.adapters.svfit import SvfitConfig
from lora_squeeze.methods.control import deltas_of

WIDTH, LORA_RANK = 96, 8
RANKS = (4, 16, 64)


def weight(seed: int) -> torch.Tensor:
    """Singular values 1 / i."""
    return with_spectrum(seed, 1 / torch.arange(1, WIDTH + 1))


def rescaling(seed: int) -> Problem:
    """U diag(e) V^T, with the U and V of the weight."""
    U, _, Vh = torch.linalg.svd(weight(seed))
    return Problem(weight(seed), U * gaussian(3 * seed + 1, WIDTH) @ Vh)


def random(seed: int) -> Problem:
    """N(0, 1) everywhere."""
    return Problem(weight(seed), gaussian(5 * seed + 2, WIDTH, WIDTH))


def run(quick: bool) -> Outcome:
    """Both targets, then the squeeze."""
    seeds, steps = (range(2), 5) if quick else (range(5), 1000)
    outcome = Outcome()
    arm = Arm("SVFit", lambda seed: SvfitConfig(target_modules=[LAYER], seed=seed))
    ours: dict[str, Fitted] = {}
    best: dict[str, list[float]] = {}
    for target, problems in (("rescaling", rescaling), ("random", random)):
        row, best[target] = best_row(problems, seeds, LORA_RANK, "what is reached", target=target)
        ours[target] = fitted(arm, problems, seeds, steps)
        outcome.rows += [row, ours[target].row("what is reached", target=target, arm=arm.name)]
    outcome.findings += _reach(ours["rescaling"].residuals, ours["random"].residuals, best)
    rows = _squeezes(ours["rescaling"].model)
    outcome.rows += rows
    outcome.findings += _closed_form(rows)
    return outcome


def _reach(rescaled: Sequence[float], generic: Sequence[float], best: dict[str, list[float]]) -> list[Finding]:
    mean, error = mean_and_error(generic)
    expected = 1 - 1 / WIDTH
    less, more = difference(best["rescaling"], rescaled), difference(generic, best["random"])
    return [
        Finding(
            "a target that rescales singular values is reached: less than 1e-6 is left",
            f"{max(rescaled):.1e} at most",
            max(rescaled) < 1e-6,
        ),
        Finding(
            f"a random target is not: 1 - 1 / {WIDTH} = {expected:.4f} is left, within 0.005",
            shown(mean, error, 4),
            abs(mean - expected) < 0.005,
        ),
        Finding(
            "the best LoRA r=8 leaves more of the rescaling target than SVFit, and less of the random one",
            f"{shown(*less)} more, {shown(*more)} less",
            less[0] > 2 * less[1] and more[0] > 2 * more[1],
        ),
    ]


def _squeezes(model: Any) -> list[Row]:
    delta = deltas_of(model)[LAYER]
    B, A = (factor.detach().double() for factor in delta.factors())
    update, squares = LowRank(B, A), delta.core().detach().double().square().sort(descending=True).values
    rows: list[Row] = []
    for rank in RANKS:
        exact = math.sqrt(float(squares[rank:].sum() / squares.sum()))
        for method in get_args(Method):
            error = float(update.distance(update.truncate(rank, method)) / update.norm())
            columns = {"rank": rank, "decomposition": method, "relative error": error, "closed form": exact}
            rows.append({"part": "the squeeze", **columns, "off": abs(error - exact)})
    return rows


def _closed_form(rows: list[Row]) -> list[Finding]:
    off = max(row["off"] for row in rows if row["decomposition"] != "rsvd")
    ratio = max(row["relative error"] / row["closed form"] for row in rows if row["decomposition"] == "rsvd")
    return [
        Finding(
            "gram, qr and dense have the relative error of the closed form to 1e-6",
            f"{off:.1e} off at most, at ranks {', '.join(map(str, RANKS))}",
            off < 1e-6,
        ),
        Finding(
            "the randomised decomposition has at most 1.01 times that error",
            f"{ratio:.4f} times at most",
            ratio <= 1.01,
        ),
    ]
