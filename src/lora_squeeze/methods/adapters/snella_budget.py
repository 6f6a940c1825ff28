"""The budget of SNELLA: layers compete for entries by how much their factors matter (arXiv 2510.24037).

After each backward pass, for each factor P of a layer and element by element,

    I = |P grad P|,   m <- 0.85 m + 0.15 I,   d <- 0.85 d + 0.15 |I - m|

and a layer's share of the budget is mean(m d) over u plus mean(m d) over v, over the sum of all layers: means, so a
wide layer is not favoured for its size. Training is cut into rounds 0, ..., E. Round e has V(e)
entries that are not zero, of all layers together:

    V(e) = V_E + (V_0 - V_E) (1 - (e - warmup) / (E - warmup - cooldown))^3

V_0 up to round `warmup`, V_E from round E - `cooldown` on: so at least the last round trains the entries that are
stored. V_0 comes from the `sparsity` of the configuration, and round 0 has that in each layer. The authors count epochs
and allot in the first one already, by equal shares; whether they train at V_E for an epoch is unsure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.snella import SnellaDelta
from lora_squeeze.methods.control import Controller, controlled_by

_BETA = 0.85  # of both averages


class SnellaController(Controller):
    """Lowers the number of entries while an adapter is trained, and moves them to the layers that need them.

    Acts where the configuration has a `final_sparsity`; what it gives a layer is stored with the adapter. A run taken
    up again goes on in its round; the averages begin anew, their memory is short.

    Attributes:
        interval: optimiser steps of a round.
        last_round: its number; the first one is 0.

    Raises:
        LoraSqueezeError: a schedule that leads nowhere.

    Notes:
        Keeps two numbers for each one of u and v.
    """

    deltas: dict[str, SnellaDelta]

    def __init__(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default"
    ) -> None:  # fmt: skip
        super().__init__(model, total_steps, optimizer, adapter)
        if self.config.final_sparsity is None:
            return
        self.interval = math.ceil(total_steps / self.config.rounds)
        self.last_round = math.ceil(total_steps / self.interval) - 1
        entries = sum(delta.entries for delta in self.deltas.values())
        self.first = sum(delta.first_kept for delta in self.deltas.values())
        self.last = int(entries - self.config.final_sparsity * entries)
        if self.last_round <= self.config.warmup + self.config.cooldown:
            raise LoraSqueezeError(
                f"{total_steps} steps are {self.last_round + 1} rounds of {self.interval}, too few for a first and a "
                f"last one, {self.config.warmup} of warmup and {self.config.cooldown} of cooldown; train longer or "
                "change rounds"
            )
        self._means = [torch.zeros_like(factor, dtype=torch.float32) for factor in self._factors()]
        self._spreads = [torch.zeros_like(mean) for mean in self._means]

    @staticmethod
    def acts(config: Any) -> bool:
        """Whether the budget moves."""
        return config.final_sparsity is not None

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of the entries that are zero, for each layer."""
        return {name: 1 - int(delta.kept) / delta.entries for name, delta in self.deltas.items()}

    def _before_step(self) -> None:
        """Take notice of the gradients; where a round ends, allot the entries of the next one."""
        if self.config.final_sparsity is None:
            return
        for factor, mean, spread in zip(self._factors(), self._means, self._spreads, strict=True):
            _follow(factor, mean, spread)
        number, over = divmod(self.steps_done + 1, self.interval)
        if not over and number <= self.last_round:
            self._allot(number)

    def entries_in(self, number: int) -> int:
        """V(e): how many entries of all updates are not zero in a round."""
        warmup, cooldown = self.config.warmup, self.config.cooldown
        if number <= warmup:
            return self.first
        if number > self.last_round - cooldown:
            return self.last
        past = (number - warmup) / (self.last_round - warmup - cooldown)
        return int(self.last + (self.first - self.last) * (1 - past) ** 3)

    def shares(self) -> list[float]:
        """Of the budget, for each layer: what it would get if no layer were full."""
        scores = [float((mean * spread).mean()) for mean, spread in zip(self._means, self._spreads, strict=True)]
        return _shares([of_u + of_v for of_u, of_v in zip(scores[::2], scores[1::2], strict=True)])

    def _factors(self) -> list[nn.Parameter]:
        return [factor for delta in self.deltas.values() for factor in (delta.u, delta.v)]

    def _allot(self, number: int) -> None:
        deltas = self.deltas.values()
        given = allot(self.entries_in(number), self.shares(), [delta.entries for delta in deltas])
        for delta, count in zip(deltas, given, strict=True):
            delta.kept.fill_(count)


def allot(total: int, shares: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """Divide a whole number by shares, where nobody takes more than a size.

    Args:
        total: what there is, at most the sum of the sizes.
        shares: from 0; what full ones leave goes to the others in proportion, and equally where all of those have 0.
        sizes: upper bounds.

    Returns:
        Whole numbers with the sum `total`. A remainder too small for all goes to the largest shares, one each.

    Example:
        >>> allot(10, [0.7, 0.2, 0.1], [5, 9, 9])
        [5, 4, 1]
    """
    given = [0] * len(sizes)
    while left := total - sum(given):
        open_ones = [k for k, size in enumerate(sizes) if given[k] < size]
        wanted = [int(left * share) for share in _shares([shares[k] for k in open_ones])]
        if not any(wanted):
            largest = sorted(open_ones, key=lambda k: -shares[k])[:left]
            wanted = [int(k in largest) for k in open_ones]
        for k, count in zip(open_ones, wanted, strict=True):
            given[k] += min(count, sizes[k] - given[k])
    return given


def _shares(scores: Sequence[float]) -> list[float]:
    """Scores that sum to 1, equal ones where all are 0."""
    total = math.fsum(scores)
    return [score / total if total else 1 / len(scores) for score in scores]


@torch.no_grad()
def _follow(factor: Tensor, mean: Tensor, spread: Tensor) -> None:
    """Move the two averages of a factor by its gradient; what is no number counts as 0."""
    gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
    importance = (factor * gradient).float().abs().nan_to_num(nan=0.0, posinf=0.0)
    mean.lerp_(importance, 1 - _BETA)
    spread.lerp_((importance - mean).abs(), 1 - _BETA)


controlled_by("snella", SnellaController)
