"""The one training loop, and the one evaluation, of all methods."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.evidence.data import Example
from bench.evidence.learners.base import Batch, Learner, Scores
from lora_squeeze.adaptive import Adaptive
from lora_squeeze.methods.control import controller_for, parameter_groups
from lora_squeeze.schedule import Schedule
from lora_squeeze.scores import adaptive_calibration_error, expected_calibration_error, maximum_calibration_error
from lora_squeeze.training.squeezer import Squeezer

WARMUP = 0.1  # share of the steps in which the learning rate rises


@dataclass
class Spent:
    """What training has cost so far, over all runs that led to an adapter.

    Args:
        seconds: in the loop.
        parameter_steps: trained parameters, summed over the steps.
        peak_mib: highest resident memory of the process (on a GPU: of its memory), None where it cannot be told.
        losses: training loss of every step.
        history: the squeezes on the way.
    """

    seconds: float = 0.0
    parameter_steps: int = 0
    peak_mib: float | None = None
    losses: list[float] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)


def order(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """The examples of a run, in an order that depends on the seed alone: the same for every method.

    Where there are fewer than `count`, they come again, in a new order each time.

    Raises:
        SystemExit: there are none.
    """
    if not examples:
        raise SystemExit("no example of this task fits into the model's room for prompt and answer")
    found: list[Example] = []
    epoch = 0
    while len(found) < count:
        salt = f"{seed}:{epoch}"
        places = [hashlib.sha256(f"{salt}:{i}:{e.prompt}".encode()).digest() for i, e in enumerate(examples)]
        found += [examples[i] for i in sorted(range(len(examples)), key=places.__getitem__)]
        epoch += 1
    return found[:count]


def train(
    learner: Learner,
    model: Any,
    batches: Sequence[Batch],
    rate: float,
    schedule: Schedule | Adaptive | None = None,
    **options: Any,
) -> Spent:
    """One step per batch: AdamW, warm-up and half a cosine to zero, gradients clipped at norm 1.

    Args:
        learner: gives the loss.
        model: a PEFT model; every parameter that asks for gradients is trained. What its method does around the steps
            is done.
        batches: all of one shape.
        rate: the highest learning rate.
        schedule: squeezes on the way; see `Squeezer`, which gets the options.
    """
    own = schedule is None and hasattr(model, "peft_config")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, rate) if own else trained, lr=rate, weight_decay=0.0, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _curve(len(batches)))
    squeezer = None
    if schedule is not None:
        squeezer = Squeezer(model, optimizer, schedule, scheduler=scheduler, **options)
    controller = controller_for(model, len(batches), optimizer) if own else None
    spent = Spent()
    model.train()
    with measured_memory(learner.device) as peak:
        start = time.perf_counter()
        for batch in batches:
            if controller is not None:
                controller.before_forward()
            loss = learner.loss(model, batch)
            loss.backward()
            if controller is not None:
                controller.before_step()
            trained = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            if controller is not None:
                controller.after_step()
            scheduler.step()
            optimizer.zero_grad()
            spent.losses.append(round(loss.item(), 5))
            spent.parameter_steps += sum(p.numel() for p in trained)
            if squeezer is not None:
                squeezer.step()
        if controller is not None:
            controller.finish()
        if squeezer is not None:
            squeezer.finish()
            spent.history = squeezer.history
        spent.seconds = time.perf_counter() - start
    spent.peak_mib = peak.get("mib")
    return spent


def _curve(steps: int) -> Any:
    rise = max(1, round(steps * WARMUP))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return factor


@contextlib.contextmanager
def measured_memory(device: torch.device) -> Any:
    """Fills a dict with "mib": the peak within the block."""
    found: dict[str, float] = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found["mib"] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak of resident memory back to what is in use now
    except OSError:
        yield found
        return
    yield found
    status = Path("/proc/self/status").read_text()
    found["mib"] = round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


@torch.no_grad()
def evaluate(learner: Learner, model: Any, batches: Sequence[Batch]) -> dict[str, float | int | None]:
    """Loss, accuracies and calibration errors.

    Loss in nats a unit; `accuracy` is the share of examples that are right as a whole, `unit_accuracy` that of tokens
    (or classes). The calibration errors and `brier`, the mean of (confidence - right)^2, are of whole answers, with the
    right answer's tokens before each one.
    """
    was = model.training
    model.eval()
    scores = Scores.join([learner.score(model, batch) for batch in batches])
    model.train(was)
    broken = not scores.confidence.isfinite().all()  # training has diverged: the row says so, and has no confidence
    errors = {
        "ece": expected_calibration_error,
        "mce": maximum_calibration_error,
        "ace": adaptive_calibration_error,
    }
    return {
        "loss": scores.loss.double().mean().item(),
        "accuracy": scores.exact.double().mean().item(),
        "unit_accuracy": scores.right.double().mean().item(),
        **{name: None if broken else error(scores.confidence, scores.exact) for name, error in errors.items()},
        "brier": (scores.confidence.double() - scores.exact.double()).square().mean().item(),
        "units": len(scores.loss),
        "examples": len(scores.exact),
    }
