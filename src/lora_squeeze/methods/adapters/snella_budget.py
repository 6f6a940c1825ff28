"""The budget of SNELLA: layers compete for entries by how much their factors matter (arXiv 2510.24037).

After each backward pass, for each factor P of a layer and element by element,

    I = |P grad P|,   m <- b1 m + (1 - b1) I,   d <- b2 d + (1 - b2) |I - m|

and a layer's share of the budget is mean(m d) over u plus mean(m d) over v, over the sum of all layers: means, so a
wide layer is not favoured for its size. Training is cut into rounds 0, ..., E of `interval` steps. Round e has V(e)
entries that are not zero, of all layers together:

    V(e) = V_E + (V_0 - V_E) (1 - (e - warmup) / (E - warmup - cooldown))^3

V_0 up to round `warmup`, V_E from round E - `cooldown` on: so at least the last round trains the entries that are
stored. V_0 comes from the `sparsity` of the configuration, and round 0 has that in each layer. The authors count epochs
and allot in the first one already, by equal shares; whether they train at V_E for an epoch is unsure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.snella import SnellaDelta


class SnellaBudget:
    """Lowers the number of entries while an adapter is trained, and moves them to the layers that need them.

    Args:
        model: with SNELLA adapters; those that are trained share one budget.
        sparsity: share of the entries of all updates that are zero in the last round; 0.2 to 0.8 is usual.
        total_steps: optimiser steps of the whole training.
        interval: steps of a round; the authors have one epoch.
        warmup: rounds after the first with the budget of the start.
        cooldown: rounds before the last with the budget of the end.
        done: steps that are finished already, in a run taken up again. The averages begin anew: their memory is short.
        beta: b1, of the mean. Default 0.85, as the authors.
        beta_spread: b2, of the distance from the mean. Default 0.85, as the authors.

    Raises:
        LoraSqueezeError: no SNELLA adapter that is trained, or a schedule that leads nowhere.

    Notes:
        Keeps two numbers for each one of u and v. What it gives a layer is stored with the adapter.

    Example:
        >>> budget = SnellaBudget(model, sparsity=0.8, total_steps=1000, interval=100)  # doctest: +SKIP
        >>> for batch in batches:  # doctest: +SKIP
        ...     model(**batch).loss.backward()
        ...     budget.step()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        sparsity: float,
        total_steps: int,
        interval: int,
        warmup: int = 0,
        cooldown: int = 0,
        done: int = 0,
        beta: float = 0.85,
        beta_spread: float = 0.85,
    ) -> None:
        modules = model.named_modules()
        self.layers = {name: m for name, m in modules if isinstance(m, SnellaDelta) and m.u.requires_grad}
        if not self.layers:
            raise LoraSqueezeError("the model has no SNELLA adapter that is trained; add one with SnellaConfig first")
        self.interval, self.warmup, self.cooldown, self.steps = interval, warmup, cooldown, done
        self.beta, self.beta_spread = beta, beta_spread
        if interval < 1:
            raise LoraSqueezeError(f"interval must be a whole number of steps from 1, got {interval}")
        self.last_round = math.ceil(total_steps / interval) - 1
        entries = sum(delta.entries for delta in self.layers.values())
        self.first = sum(delta.first_kept for delta in self.layers.values())
        self.last = int(entries - sparsity * entries)
        if self.last > self.first or sparsity >= 1:
            raise LoraSqueezeError(
                f"sparsity must rise, from {1 - self.first / entries:g} at the start to below 1, got {sparsity:g}"
            )
        if self.last_round <= warmup + cooldown:
            raise LoraSqueezeError(
                f"{total_steps} steps are {self.last_round + 1} rounds of {interval}, too few for a first and a "
                f"last one, {warmup} of warmup and {cooldown} of cooldown; use a shorter interval"
            )
        factors = [factor for delta in self.layers.values() for factor in (delta.u, delta.v)]
        self._means = [torch.zeros_like(factor, dtype=torch.float32) for factor in factors]
        self._spreads = [torch.zeros_like(mean) for mean in self._means]

    @property
    def sparsity(self) -> dict[str, float]:
        """Share of the entries that are zero, for each layer."""
        return {name: 1 - int(delta.kept) / delta.entries for name, delta in self.layers.items()}

    def step(self) -> None:
        """Take notice of the gradients; where a round ends, allot the entries of the next one.

        Call it after the backward pass and before the optimiser's step and `zero_grad`.
        """
        factors = [factor for delta in self.layers.values() for factor in (delta.u, delta.v)]
        for factor, mean, spread in zip(factors, self._means, self._spreads, strict=True):
            _follow(factor, mean, spread, self.beta, self.beta_spread)
        self.steps += 1
        number, over = divmod(self.steps, self.interval)
        if not over and number <= self.last_round:
            self._allot(number)

    def entries_in(self, number: int) -> int:
        """V(e): how many entries of all updates are not zero in a round."""
        if number <= self.warmup:
            return self.first
        if number > self.last_round - self.cooldown:
            return self.last
        past = (number - self.warmup) / (self.last_round - self.warmup - self.cooldown)
        return int(self.last + (self.first - self.last) * (1 - past) ** 3)

    def shares(self) -> list[float]:
        """Of the budget, for each layer: what it would get if no layer were full."""
        scores = [float((mean * spread).mean()) for mean, spread in zip(self._means, self._spreads, strict=True)]
        return _shares([of_u + of_v for of_u, of_v in zip(scores[::2], scores[1::2], strict=True)])

    def _allot(self, number: int) -> None:
        deltas = self.layers.values()
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
def _follow(factor: Tensor, mean: Tensor, spread: Tensor, beta: float, beta_spread: float) -> None:
    """Move the two averages of a factor by its gradient; what is no number counts as 0."""
    gradient = torch.zeros_like(factor) if factor.grad is None else factor.grad
    importance = (factor * gradient).float().abs().nan_to_num(nan=0.0, posinf=0.0)
    mean.lerp_(importance, 1 - beta)
    spread.lerp_((importance - mean).abs(), 1 - beta_spread)
