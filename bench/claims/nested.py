"""Curves of accuracy over rank on the teacher problem, for one training that serves all ranks and for its rivals.

Naive truncation takes the first k rows of A and columns of B of a plain LoRA, at its own scale; the SVD squeeze is
`squeeze_`, the best approximation of rank k.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from bench.claims.outcome import Row, mean_and_error, shown
from bench.claims.problems import fit
from bench.claims.teacher import (
    TUNED,
    Arm,
    Problem,
    adapted,
    batches_of,
    cross_entropy,
    lora,
    loss_and_accuracy,
    taught,
)
from lora_squeeze.methods.ranks.prefix import set_rank
from lora_squeeze.scores import aurac
from lora_squeeze.training.inplace import squeeze_

_TRUE_RANK = 8  # of the teacher's update

Versions = Callable[[Any], Iterator[nn.Module]]


@dataclass(frozen=True)
class Curves:
    """Accuracies in percent of one arm, for each seed one of each rank.

    Args:
        name: of the arm.
        rates: learning rate of each rank; the same one where one training serves all.
        values: one list for each seed, on test examples.
        validation: mean AURAC on validation examples.
        seconds: processor time of training, mean over the seeds, of all that the arm trains.
    """

    name: str
    rates: list[float]
    values: list[list[float]]
    validation: float
    seconds: float

    def at(self, index: int) -> list[float]:
        """Of one rank, for each seed."""
        return [curve[index] for curve in self.values]

    def areas(self, ranks: Sequence[int]) -> list[float]:
        """AURAC of each seed."""
        return [aurac(ranks, curve) for curve in self.values]


@dataclass(frozen=True)
class Study:
    """What all arms have in common.

    Args:
        ranks: that are deployed.
        steps: of each training.
        seeds: problems that are measured.
        tuned: problems that learning rates are chosen on.
    """

    ranks: list[int]
    steps: int
    seeds: range
    tuned: tuple[int, ...] = TUNED

    def problem(self, seed: int) -> Problem:
        """Of a seed."""
        return taught(seed, _TRUE_RANK, min(400, self.steps))

    def train(self, config: Callable[[int], Any], seed: int, rate: float) -> nn.Module:
        """One training: a configuration for the seed."""
        problem = self.problem(seed)
        model = adapted(problem.base, config(seed), seed)
        fit(model, cross_entropy, batches_of(problem.data["train"], self.steps, seed), rate)
        return model

    def once(self, config: Callable[[int], Any], tuned_on: Versions, versions: Mapping[str, Versions]) -> list[Curves]:
        """One training for all ranks: its rate by the validation loss of `tuned_on`, a curve for each of `versions`."""
        arm = Arm(lambda seed, rate: self.train(config, seed, rate), self.problem, tuned_on)
        rate = arm.rate(self.tuned)
        start = time.process_time()
        models = [self.train(config, seed, rate) for seed in self.seeds]
        seconds = (time.process_time() - start) / len(self.seeds)
        found = []
        for name, of in versions.items():
            test, validation = (
                [self._curve(model, seed, of, part) for seed, model in zip(self.seeds, models, strict=True)]
                for part in ("test", "validation")
            )
            ranks = self.ranks[: len(test[0])]
            area = statistics.fmean(aurac(ranks, curve) for curve in validation)
            found.append(Curves(name, [rate] * len(ranks), test, area, seconds))
        return found

    def each(self, name: str) -> Curves:
        """A plain LoRA trained at each rank, with a rate of its own."""
        found = [self.once(partial(_lora, rank), plain, {name: plain})[0] for rank in self.ranks]
        values = [[curves.values[i][0] for curves in found] for i in range(len(self.seeds))]
        area = aurac(self.ranks, [curves.validation for curves in found])
        return Curves(
            name, [curves.rates[0] for curves in found], values, area, sum(curves.seconds for curves in found)
        )

    def _curve(self, model: nn.Module, seed: int, versions: Versions, part: str) -> list[float]:
        data = self.problem(seed).data[part]
        return [loss_and_accuracy(version, data)[1] for version in versions(model)]

    def prefixes(self, model: Any) -> Iterator[nn.Module]:
        """The ranks of a nested method."""
        for rank in self.ranks:
            set_rank(model, rank)
            yield model

    def cut(self, model: Any) -> Iterator[nn.Module]:
        """Naive truncations of a plain LoRA."""
        for rank in self.ranks:
            yield cut(model, rank)

    def squeezed(self, model: Any) -> Iterator[nn.Module]:
        """Best approximations of a plain LoRA."""
        for rank in self.ranks:
            small = copy.deepcopy(model)
            squeeze_(small, rank=rank)
            yield small

    def rows(self, arms: Sequence[Curves]) -> list[Row]:
        """Accuracy of each arm at each rank, and the area."""
        rows: list[Row] = []
        for arm in arms:
            row: Row = {"part": "accuracy in percent, by rank", "arm": arm.name}
            row["rate"] = ", ".join(f"{rate:g}" for rate in sorted(set(arm.rates)))
            row |= {str(r): shown(*mean_and_error(arm.at(i)), 1) for i, r in enumerate(self.ranks)}
            row["AURAC"] = shown(*mean_and_error(arm.areas(self.ranks)), 2)
            rows.append(row | {"CPU s of training": round(arm.seconds, 2)})
        return rows


def _lora(rank: int, seed: int) -> Any:
    return lora(rank)


def plain(model: Any) -> Iterator[nn.Module]:
    """The model as it is."""
    yield model


@torch.no_grad()
def cut(model: nn.Module, rank: int) -> nn.Module:
    """A copy of a plain LoRA whose components from `rank` on are zero."""
    small = copy.deepcopy(model)
    for name, parameter in small.named_parameters():
        if "lora_A" in name:
            parameter[rank:] = 0
    return small
