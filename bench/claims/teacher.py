"""The shared problem of the rank methods: a small network, pretrained on one task, learns another one.

A seed gives a whole problem: base, data, order of the batches. The base has three hidden layers of width 64 and a head
of ten classes, and has learned the labels of a random network. The task is one of two:

- a teacher: the base itself with an update of known rank in each hidden layer, as large as the weight (Frobenius norm).
  Inputs are normal, labels the teacher's likeliest class; 2048 examples to train, so that a plain LoRA gains from rank
  and can overfit.
- digits: handwriting of scikit-learn, 8 x 8 pixels.

All hidden layers are adapted. The teacher has the base's head; for the digits, it is a new random one that stays.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from bench.claims.outcome import best_rate
from bench.claims.problems import fit
from bench.evidence.vlm.digits import handwriting
from lora_squeeze.methods.seeds import seeded

LAYERS = ["fc0", "fc1", "fc2"]
WIDTH, CLASSES = 64, 10
TUNED = (100, 101)  # seeds of the problems that learning rates are chosen on; none of them is measured
_UPDATE = 1.0  # norm of the teacher's update, in norms of the weight
_COUNTS = {"train": 2048, "validation": 1024, "test": 4096}
_BATCH = 64

Batch = tuple[Tensor, Tensor]  # inputs and labels


@dataclass(frozen=True)
class Problem:
    """A base and the data of the task that it is adapted to, by part: "train", "validation", "test"."""

    base: nn.Module
    data: dict[str, Batch]


def linear(columns: int, rows: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer, drawn as PyTorch draws it."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, columns, rows)
    for parameter in layer.parameters():
        drawn = torch.rand(parameter.shape, generator=generator) * 2 - 1
        parameter.data.copy_(drawn / math.sqrt(columns))
    return layer


def network(widths: Sequence[int], *seed: object) -> nn.Sequential:
    """Linear layers fc0, fc1, ... and a head with ReLU between."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    generator = seeded(0, *seed)
    for number, (columns, rows) in enumerate(pairwise(widths)):
        last = number == len(widths) - 2
        layers["head" if last else f"fc{number}"] = linear(columns, rows, generator)
        if not last:
            layers[f"act{number}"] = nn.ReLU()
    return nn.Sequential(layers)


@cache
def pretrained(seed: int, steps: int = 400) -> nn.Sequential:
    """A base: 64 to 64 to 64 to 64 to 10, trained on the labels of a random network."""
    base = network([WIDTH, WIDTH, WIDTH, WIDTH, CLASSES], "base", seed)
    task = network([WIDTH, WIDTH, CLASSES], "first task", seed)
    batches = []
    for step in range(steps):
        x = torch.randn(256, WIDTH, generator=seeded(seed, "first task", step))
        batches.append((x, _labels(task, x, centred=True)))
    fit(base, cross_entropy, batches, 3e-3, controlled=False)
    return base.requires_grad_(False)


@cache
def taught(seed: int, rank: int, steps: int = 400) -> Problem:
    """The labels of a teacher whose update has this rank in every hidden layer."""
    base = pretrained(seed, steps)
    teacher = copy.deepcopy(base)
    generator = seeded(seed, "teacher", rank)
    for name in LAYERS:
        layer: Any = teacher.get_submodule(name)
        weight = layer.weight
        update = torch.randn(WIDTH, rank, generator=generator) @ torch.randn(rank, WIDTH, generator=generator)
        weight.data += _UPDATE * weight.norm() / update.norm() * update
    data = {}
    for part, count in _COUNTS.items():
        x = torch.randn(count, WIDTH, generator=generator)
        data[part] = (x, _labels(teacher, x))
    return Problem(base, data)


@cache
def digits(seed: int, steps: int = 400) -> Problem:
    """Handwritten digits; the pixels have mean 0 and variance 1 over the training part."""
    base: Any = copy.deepcopy(pretrained(seed, steps))
    base.head = linear(WIDTH, CLASSES, seeded(0, "head", seed)).requires_grad_(False)
    return Problem(base, digit_data())


@cache
def digit_data() -> dict[str, Batch]:
    """Handwriting by part."""
    parts = {part: (found.images.flatten(1), found.labels) for part, found in handwriting().items()}
    mean, deviation = parts["train"][0].mean(), parts["train"][0].std()
    return {part: ((x - mean) / deviation, y) for part, (x, y) in parts.items()}


@torch.no_grad()
def _labels(model: nn.Module, x: Tensor, centred: bool = False) -> Tensor:
    logits = model(x)
    likeliest: Tensor = (logits - logits.mean(0) if centred else logits).argmax(-1)
    return likeliest


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    """Mean loss of a batch."""
    x, y = batch
    return functional.cross_entropy(model(x), y)


def batches_of(data: Batch, steps: int, seed: int) -> list[Batch]:
    """One batch for each step, drawn from all examples."""
    x, y = data
    drawn = torch.randint(len(y), (steps, _BATCH), generator=seeded(seed, "batches"))
    return [(x[places], y[places]) for places in drawn]


def adapted(base: nn.Module, config: Any, seed: int) -> nn.Module:
    """A PEFT model on a copy of the base; what PEFT draws depends on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = get_peft_model(copy.deepcopy(base), config)
    return model.eval()


def lora(rank: int, **more: Any) -> LoraConfig:
    """A plain LoRA of all hidden layers, with a scale alpha / r of 2 unless told otherwise."""
    settings: dict[str, Any] = {"r": rank, "lora_alpha": 2 * rank, "target_modules": LAYERS} | more
    return LoraConfig(**settings)


@torch.no_grad()
def loss_and_accuracy(model: nn.Module, data: Batch) -> tuple[float, float]:
    """Mean loss, and the share of right answers in percent."""
    x, y = data
    logits = model(x)
    right = (logits.argmax(-1) == y).double().mean()
    return float(functional.cross_entropy(logits, y)), 100 * float(right)


@dataclass(frozen=True)
class Arm:
    """A way to train, whose learning rate is chosen on the validation data of problems that are not measured.

    Args:
        train: seed and rate -> a trained model.
        problem: seed -> its problem.
        versions: the models of one training that count alike, such as its ranks; default the model as it is.
    """

    train: Callable[[int, float], Any]
    problem: Callable[[int], Problem]
    versions: Callable[[Any], Iterator[nn.Module]] = lambda model: iter([model])

    def rate(self, seeds: Sequence[int]) -> float:
        """The best rate by the mean loss over seeds and versions."""

        def loss_at(rate: float) -> float:
            losses = []
            for seed in seeds:
                model, data = self.train(seed, rate), self.problem(seed).data["validation"]
                losses += [loss_and_accuracy(version, data)[0] for version in self.versions(model)]
            return statistics.fmean(losses)

        return best_rate(loss_at, 1e-2)

    def trained(self, seeds: Sequence[int], tuned: Sequence[int]) -> tuple[float, list[Any]]:
        """The rate, and the models of all seeds."""
        rate = self.rate(tuned)
        return rate, [self.train(seed, rate) for seed in seeds]


def verdict(mean: float, error: float, bound: float) -> bool | None:
    """Whether a mean is above a bound; None where they are less than a standard error apart."""
    if math.isnan(error) or abs(mean - bound) <= error:
        return None
    return mean > bound
