"""Do principal entries learn from few samples, and forget little? LIFT (arXiv 2506.00772), a teacher and a student.

A network y = W2 relu(W1 x) with matrices of 128 x 128. The old teacher's have rank 8, with singular values from 6 to 3
and random vectors; the pretrained student has the same plus noise of deviation 0.3 / sqrt(128). The new teacher's
singular vectors are the old ones, perturbed by half of their length. The old task has inputs from N(0, 1); the new one
has 192 samples with noise of a tenth of the deviation, and inputs of the same length but of another kind, in two
versions: "shifted", half of their energy a mean that is the same for all, and "subspace", in 32 dimensions. With 128
outputs each, the samples are 24 576 numbers for 32 768 weights.

A first set-up was changed after its results had been seen: its noise in the student was N(0, 1 / 128), so that the
student did not know the old task (an error of 2.8), and its inputs were of the kind "subspace" alone. There LIFT had a
higher error than full tuning on the new task (0.67 against 0.13) and on the old one (6.0 against 2.5; LoRA 3.4). A new
teacher with a random change of rank 8 in its place gave the same verdicts and was left out. The comparison with the
largest entries was added after the results.

With 1024 numbers in each matrix (6.25 %): LIFT (the 1024 largest entries of the best approximation of rank 8, chosen
again every 100 steps), entries by magnitude and at random in the same way, LoRA r=4; full tuning beside them. Adam for
400 steps of 64 samples, a rate for each arm chosen on 2000 fresh samples of another problem; ten problems. Errors are
mean squares over the variance of the teacher's outputs, on 2000 fresh inputs of each task. The noise on entries of a
real model is elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.claims.arms import FULL, Arm, lora, trained_numbers, tuned_rate
from bench.claims.networks import Data, adapted, batches, error
from bench.claims.outcome import Finding, Outcome, difference, mean_and_error, shown
from lora_squeeze.methods.adapters.lift import LiftConfig

WIDTH, RANK, PLANTED, SAMPLES, FRESH, INPUTS = 128, 4, 8, 192, 2000, 32
LAYERS = ["first", "second"]
VALIDATION = 100
VERSIONS = ("shifted", "subspace")


def entries(choice: str, name: str) -> Arm:
    """Chosen entries, by LIFT or by what it is compared with."""

    def config(seed: int) -> Any:
        return LiftConfig(r=RANK, filter_rank=PLANTED, refresh=100, choice=choice, target_modules=LAYERS, seed=seed)

    return Arm(name, config, guess=3e-3)


ARMS = (
    entries("principal", "LIFT"),
    entries("magnitude", "largest entries"),
    entries("random", "random entries"),
    lora(RANK, LAYERS, 3e-3),
    FULL,
)
Errors = dict[tuple[str, str], list[float]]  # arm and task


@dataclass(frozen=True)
class Problem:
    """A pretrained student, samples of the new task, and fresh ones of both."""

    student: nn.Module
    samples: Data
    new: Data
    old: Data


def network(first: Tensor, second: Tensor) -> nn.Sequential:
    """W2 relu(W1 x)."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for name, weight in (("first", first), ("second", second)):
        layer = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        parts[name] = layer
        if name == "first":
            parts["relu"] = nn.ReLU()
    return nn.Sequential(parts)


@cache
def problem(version: str, seed: int) -> Problem:
    """Of a seed; the two versions differ in the inputs of the new task alone."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    values = torch.linspace(6, 3, PLANTED)
    old, new, noise = [], [], []
    for _ in LAYERS:
        U, V, P, Q = (torch.linalg.qr(draw(WIDTH, PLANTED)).Q for _ in range(4))
        old.append(U * values @ V.T)
        new.append((U + P / 2) * values @ (V + Q / 2).T)
        noise.append(draw(WIDTH, WIDTH) * 0.3 / WIDTH**0.5)
    student = network(*(weight + extra for weight, extra in zip(old, noise, strict=True)))
    subspace, mean = torch.linalg.qr(draw(WIDTH, INPUTS)).Q, draw(WIDTH)
    x_old, x_new, x_samples = (draw(count, WIDTH) for count in (FRESH, FRESH, SAMPLES))
    if version == "subspace":
        x_new, x_samples = (x @ subspace @ subspace.T * (WIDTH / INPUTS) ** 0.5 for x in (x_new, x_samples))
    else:
        x_new, x_samples = ((x + mean) / 2**0.5 for x in (x_new, x_samples))
    y_old, (y_new, y_samples) = network(*old)(x_old), map(network(*new), (x_new, x_samples))
    y_samples = y_samples + 0.1 * y_new.std() * draw(SAMPLES, WIDTH)
    return Problem(student, (x_samples, y_samples), (x_new, y_new), (x_old, y_old))


def relative(model: nn.Module, data: Data) -> float:
    """Mean squared error over the variance of the outputs."""
    return error(model, data) / float(functional.mse_loss(data[1], data[1].mean(0).expand_as(data[1])))


def run(quick: bool) -> Outcome:
    """Both versions of the new task."""
    seeds, steps = (range(2), 3) if quick else (range(10), 400)
    outcome = Outcome()
    for version in VERSIONS:
        errors: Errors = {}
        part = f"new inputs: {version}"
        for name, rate, models in _all_models(version, seeds, steps):
            problems = [problem(version, seed) for seed in seeds]
            for task, data in (("new", [p.new for p in problems]), ("old", [p.old for p in problems])):
                errors[name, task] = [relative(model, seen) for model, seen in zip(models, data, strict=True)]
            columns = {"arm": name, "numbers": None if rate is None else trained_numbers(models[0]), "rate": rate}
            for task in ("new", "old"):
                columns[f"{task} task"], columns[f"error, {task}"] = mean_and_error(errors[name, task])
            outcome.rows.append({"part": part, **columns})
        outcome.findings += _findings(version, errors)
    return outcome


def _all_models(version: str, seeds: Sequence[int], steps: int) -> list[tuple[str, float | None, list[Any]]]:
    """Of each arm the name, its rate, and a model for each seed."""
    found: list[tuple[str, float | None, list[Any]]] = [
        ("pretrained", None, [problem(version, s).student for s in seeds])
    ]
    for arm in ARMS:
        train = _trainer(arm, version, steps)
        rate = tuned_rate(lambda s, rate: relative(train(s, rate), problem(version, s).new), [VALIDATION], arm.guess)  # noqa: B023
        found.append((arm.name, rate, [train(seed, rate) for seed in seeds]))
    return found


def _trainer(arm: Arm, version: str, steps: int) -> Callable[[int, float], Any]:
    def train(seed: int, rate: float) -> Any:
        posed = problem(version, seed)
        return adapted(arm, posed.student, seed, batches(posed.samples, 64, steps, 17 * seed), rate)

    return train


def _findings(version: str, errors: Errors) -> list[Finding]:
    plain = f"LoRA r={RANK}"
    return [
        _below(version, "new", "full", errors, "on few samples LIFT's test error is below that of full tuning"),
        _below(version, "old", "full", errors, "LIFT forgets less than full tuning"),
        _below(version, "old", plain, errors, "LIFT forgets less than LoRA at equal numbers"),
        _below(version, "new", "largest entries", errors, "LIFT's test error is below that of the largest entries"),
        _below(version, "new", "random entries", errors, "LIFT's test error is below that of random entries"),
    ]


def _below(version: str, task: str, other: str, errors: Errors, claim: str) -> Finding:
    mean, deviation = difference(errors["LIFT", task], errors[other, task])
    figures = [f"{name} {shown(*mean_and_error(errors[name, task]))}" for name in ("LIFT", other)]
    return Finding(
        f"{version}: {claim}",
        f"{task} task: {', '.join(figures)}, difference {shown(mean, deviation)}",
        None if abs(mean) <= 2 * deviation else mean < 0,
    )
