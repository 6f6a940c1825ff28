"""Bayesian-LoRA (arXiv 2406.13046): are most bit operations of the update for nothing?

Two tasks of `bench/claims/teacher.py`: a teacher with updates of rank 4, and handwritten digits. Arms, of 600 steps of
64 examples and three seeds (of the digits: of bases and orders of the batches):

- a plain LoRA of rank 8 in float32, the reference of accuracy and of bit operations (100 %);
- Bayesian-LoRA from rank 8 at four weights lambda of its penalty. Gates and ranges have a rate of 5e-2, five times the
  default, because a gate needs about 7 / rate steps to close and the training is short; each gate costs the same; the
  gates rest in the last fifth of the steps (`settle`). Activations stay in 32 bits.

Each arm has its own learning rate of the factors, chosen by the validation loss on another problem. Evaluated is
with the gates as they are deployed, 0 or 1. Bit operations are those of the update alone, the products with A, E and B
(`blora.found`); the paper counts the whole model. Accuracy on test examples in points: 4096 of the teacher, but only
172 digits, where one point is less than two examples.

A first run had lambda from 1e-4, which closed no gate, to 0.1, where bits had fallen and no rank; 1 has taken the place
of 1e-4 since.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from bench.claims.outcome import Finding, Outcome, Row, difference, mean_and_error, shown
from bench.claims.problems import fit
from bench.claims.teacher import (
    LAYERS,
    TUNED,
    Arm,
    Problem,
    adapted,
    batches_of,
    cross_entropy,
    digits,
    lora,
    loss_and_accuracy,
    taught,
)
from lora_squeeze.methods.ranks.blora import BloraConfig, Found, found

_R, _TRUE_RANK = 8, 4
_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
_GATE_RATE, _SETTLE = 5e-2, 0.2


@dataclass(frozen=True)
class _Measured:
    """Of one arm, for each seed: accuracy in percent, share of the bit operations, what the gates chose."""

    rate: float
    accuracy: list[float]
    share: list[float]
    chosen: list[dict[str, Found]]


def run(quick: bool) -> Outcome:
    """Measure both tasks."""
    steps, seeds = (4, range(2)) if quick else (600, range(3))
    penalties = _PENALTIES[:1] if quick else _PENALTIES
    outcome = Outcome()
    tasks: dict[str, Callable[[int], Problem]] = {
        "teacher": lambda seed: taught(seed, _TRUE_RANK, min(400, steps)),
        "digits": lambda seed: digits(seed, min(400, steps)),
    }
    for task, problem in tasks.items():
        arms = {penalty: _measured(problem, steps, penalty, seeds) for penalty in (None, *penalties)}
        outcome.rows += _rows(task, arms)
        outcome.findings += _findings(task, arms)
    return outcome


def _measured(
    problem: Callable[[int], Problem], steps: int, penalty: float | None, seeds: range
) -> _Measured:  # fmt: skip
    arm = Arm(lambda seed, rate: _train(problem(seed), steps, seed, rate, penalty), problem)
    rate, models = arm.trained(seeds, TUNED[:1])
    scores = [loss_and_accuracy(m, problem(s).data["test"])[1] for s, m in zip(seeds, models, strict=True)]
    chosen = [] if penalty is None else [found(model) for model in models]
    shares = [
        100 * sum(layer.bit_operations for layer in one.values()) / sum(layer.of_lora for layer in one.values())
        for one in chosen
    ]
    return _Measured(rate, scores, shares or [100.0] * len(seeds), chosen)


def _train(problem: Problem, steps: int, seed: int, rate: float, penalty: float | None) -> nn.Module:
    batches = batches_of(problem.data["train"], steps, seed)
    if penalty is None:
        model = adapted(problem.base, lora(_R), seed)
        fit(model, cross_entropy, batches, rate)
        return model
    config: Any = BloraConfig(
        r=_R, alpha=2 * _R, penalty=penalty, settle=_SETTLE, seed=seed, target_modules=LAYERS, gates_lr=_GATE_RATE,
        ranges_lr=_GATE_RATE,
    )  # fmt: skip
    model = adapted(problem.base, config, seed)
    fit(model, cross_entropy, batches, rate)
    return model


def _rows(task: str, arms: dict[float | None, _Measured]) -> list[Row]:
    rows: list[Row] = []
    for penalty, of in arms.items():
        name = f"LoRA r = {_R}" if penalty is None else f"lambda = {penalty:g}"
        row: Row = {"part": f"{task}, lambda sweep", "arm": name, "rate": of.rate}
        row |= {
            "test, %": shown(*mean_and_error(of.accuracy), 2),
            "bit operations, %": shown(*mean_and_error(of.share), 1),
        }
        if of.chosen:
            layers = [layer for one in of.chosen for layer in one.values()]
            row["mean rank"] = statistics.fmean(layer.rank for layer in layers)
            row |= {f"bits of {key}": statistics.fmean(layer.bits[key] for layer in layers) for key in "AEB"}
            row["first seed: rank, bits of A E B"] = "; ".join(_shown(layer) for layer in of.chosen[0].values())
        rows.append(row)
    return rows


def _shown(layer: Found) -> str:
    return f"{layer.rank}, {' '.join(str(layer.bits[key]) for key in 'AEB')}"


def _findings(task: str, arms: dict[float | None, _Measured]) -> list[Finding]:
    plain = arms[None]
    gaps = {p: difference(of.accuracy, plain.accuracy) for p, of in arms.items() if p is not None}
    cut = {p: 100 - statistics.fmean(arms[p].share) for p in gaps}
    as_good = [p for p, (mean, error) in gaps.items() if mean >= -max(1.0, error)]
    both = [p for p in as_good if cut[p] >= 60]
    told = "; ".join(f"lambda {p:g}: {cut[p]:.0f} % fewer, {shown(*gaps[p], 2)} points" for p in gaps)
    chosen = max(both or as_good or list(gaps), key=lambda p: cut[p])
    layers_of = [list(one.values()) for one in arms[chosen].chosen]
    bits = sum(len({tuple(layer.bits.values()) for layer in layers}) > 1 for layers in layers_of)
    ranks = sum(len({layer.rank for layer in layers}) > 1 for layers in layers_of)
    mean = statistics.fmean(layer.rank for layers in layers_of for layer in layers)
    seeds = len(layers_of)
    there = f"{task}: at the lambda with the largest cut of those that are as accurate,"
    return [
        Finding(f"{task}: some lambda takes 60 % of the bit operations off the update at an accuracy within 1 "
                f"point or one standard error of LoRA r = {_R}", told, bool(both)),
        Finding(f"{there} bits differ among the layers in every seed",
                f"lambda {chosen:g}: in {bits} of {seeds} seeds", bits == seeds),
        Finding(f"{there} ranks differ among the layers in every seed",
                f"lambda {chosen:g}: in {ranks} of {seeds} seeds; mean rank {mean:.1f} of {_R}", ranks == seeds),
    ]  # fmt: skip
