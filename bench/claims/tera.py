"""Is the update of 44 numbers of high rank, and is rank capacity? TeRA (arXiv 2509.03234).

Least squares on an update of 384 x 384, a layer of MiniLM-L6, which TeRA's default splits into 6 x 8 x 8 on both sides:
2 (6 + 8 + 8) = 44 trained numbers. The targets are N(0, 1) everywhere, or made by TeRA itself with the same frozen
tensors and vectors of its own, 1 + N(0, 1) / 4: that target says whether training finds what can be represented. LoRA
r=1 has 768 numbers.

Adam for 500 steps, a rate for each arm and target chosen on another target, three targets. "left" is the share of the
target's energy that is not reached. "rank" is that of the trained update in float64 (in float32 the products of frozen
factors are too badly conditioned to tell), "stable rank" the sum of the squared singular values over the largest one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.claims.arms import Arm, lora
from bench.claims.matrices import LAYER, Fitted, Problem, fitted, gaussian, model_of, update_of
from bench.claims.outcome import Finding, Outcome
from lora_squeeze.methods.adapters.tera import TeraConfig, tucker_matrix
from lora_squeeze.methods.control import deltas_of

WIDTH = 384


def tera() -> Arm:
    """The default, the same frozen tensors for all seeds."""
    return Arm("TeRA", lambda seed: TeraConfig(target_modules=[LAYER]))


def random(seed: int) -> Problem:
    """N(0, 1) everywhere."""
    return Problem(gaussian(seed + 1, WIDTH, WIDTH) / WIDTH**0.5, gaussian(9 * seed + 4, WIDTH, WIDTH))


def own(seed: int) -> Problem:
    """A target that TeRA can represent."""
    weight = random(seed).weight
    model = tera().on(model_of(weight), 0)
    delta = deltas_of(model)[LAYER]
    delta.d.data = 1 + gaussian(11 * seed + 5, len(delta.d)) / 4
    return Problem(weight, update_of(model))


def run(quick: bool) -> Outcome:
    """Both targets."""
    seeds, steps = ((0, 1), 2) if quick else ((0, 1, 2), 500)
    outcome = Outcome()
    found: dict[tuple[str, str], Fitted] = {}
    ranks: dict[tuple[str, str], tuple[int, float]] = {}
    for target, problems, arms in (
        ("random", random, (tera(), lora(1, [LAYER]))),
        ("of TeRA", own, (tera(),)),
    ):
        for arm in arms:
            key = arm.name, target
            fit = found[key] = fitted(arm, problems, seeds, steps)
            rank, stable = ranks[key] = _ranks(fit.model)
            columns = {"rank": rank, "stable rank": stable}
            outcome.rows.append({**fit.row("44 numbers", target=target, arm=arm.name), **columns})
    outcome.findings += [_high_rank(ranks, found), _no_capacity(found), _trainable(found["TeRA", "of TeRA"])]
    return outcome


def _high_rank(ranks: dict[tuple[str, str], tuple[int, float]], found: dict[tuple[str, str], Fitted]) -> Finding:
    ours, theirs = ranks["TeRA", "random"], ranks["LoRA r=1", "random"]
    numbers, others = (found[name, "random"].numbers for name in ("TeRA", "LoRA r=1"))
    return Finding(
        "the trained update has a rank above 0.9 of the width, with at most a tenth of the numbers of LoRA r=1",
        f"rank {ours[0]} of {WIDTH} with {numbers} numbers (stable rank {ours[1]:.1f}), LoRA {theirs[0]} with {others}",
        ours[0] > 0.9 * WIDTH and theirs[0] == 1 and numbers <= others / 10,
    )


def _no_capacity(found: dict[tuple[str, str], Fitted]) -> Finding:
    ours, theirs = found["TeRA", "random"].residuals, found["LoRA r=1", "random"].residuals
    return Finding(
        "rank is not capacity: of a random target TeRA leaves more than 0.99, and more than LoRA r=1",
        f"{min(ours):.4f} at least, LoRA r=1 {max(theirs):.4f} at most",
        min(ours) > 0.99 and min(ours) > max(theirs),
    )


def _trainable(fit: Fitted) -> Finding:
    return Finding(
        "a target that TeRA can represent is found by training: less than 0.01 is left",
        ", ".join(f"{value:.2e}" for value in fit.residuals),
        max(fit.residuals) < 0.01,
    )


def _ranks(model: Any) -> tuple[int, float]:
    values = torch.linalg.svdvals(_in_float64(model))
    rank = int((values > values[0] * WIDTH * torch.finfo(torch.float64).eps).sum())
    return rank, float((values / values[0]).square().sum())


@torch.no_grad()
def _in_float64(model: Any) -> Tensor:
    """The update, with all products of factors in float64."""
    delta = deltas_of(model).get(LAYER) if hasattr(model.peft_config["default"], "modes") else None
    if delta is None:
        layer = model.base_model.model.get_submodule(LAYER)
        B, A = (getattr(layer, name)["default"].weight for name in ("lora_B", "lora_A"))
        product: Tensor = B.double() @ A.double()
        return product * float(layer.scaling["default"])
    core, factors = delta.network()
    vectors = delta.d.double().split(delta.sizes)
    update = tucker_matrix(core.double(), [factor.double() for factor in factors], vectors, delta.rows)
    return update * float(delta.scale)
