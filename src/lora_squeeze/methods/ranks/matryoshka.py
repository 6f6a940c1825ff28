"""MatryoshkaLoRA: nested LoRAs of several ranks, summed and trained together in every step (arXiv 2605.07850, 2026).

    training   dW   = sum over k in S of s_k B[:, :k] A[:k] = B diag(p) A,   p_j = sum of s_k over k in S with k >= j
    deployed   dW_k = s_k B[:, :k] A[:k]

A (r, in) and B (out, r) are trained; p is fixed, the same in all layers and costs one multiplication for each component
and token. There is one forward pass and one loss, that of the sum: every rank has a gradient in each step. S = {r} is a
LoRA of scale s_r; a single k drawn anew for each step would be DyLoRA.

The start is that of a LoRA, dW = 0 in training and at every rank. After the training, `prefix.set_rank` chooses the
rank that is deployed; one that is not in S is a prefix too, with the s_k of its own k.

The sum that was trained is another update than each of the prefixes. `set_rank(model, 0)` deploys it, for instance to
be squeezed. p_1 may be as many times the scale of a LoRA as S has ranks: the learning rate has to be found anew.

As a plain LoRA: exact at every rank up to r, with alpha = k s_k; the sum at the largest rank of S.

The loss sees the sum alone: nothing asks a prefix for the right size. Where the size of the output counts, as in a
regression, take DyLoRA. In the paper, on language tasks, the gain over DyLoRA is at the higher ranks.
`lora_squeeze.scores.aurac` measures a curve over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from lora_squeeze.methods.adapters.engine import Site, register
from lora_squeeze.methods.ranks.prefix import NestedConfig, NestedDelta

_SCALES: dict[str, Callable[[int], float]] = {
    "none": lambda rank: 1.0,
    "rank": lambda rank: 1 / rank,
    "sqrt": lambda rank: 1 / math.sqrt(rank),
}


@dataclass
class MatryoshkaConfig(NestedConfig):
    """Configuration of MatryoshkaLoRA.

    Args:
        r: highest rank. Default 32; the authors have 32 and 256.
        ranks: S, the ranks that are trained; None: 1, 2, 4 and so on below r, and r. Components above the largest of
            them are never trained.
        scaling: s_k: "none" 1, "rank" 1 / k, "sqrt" 1 / sqrt(k). Default as in the authors' scripts.
        normalise: divide the sum that is trained by the number of ranks in S: its mean, which asks for another learning
            rate. What is deployed stays as it is, but for the sum.
        deploy_rank: as for all nested methods; 0: the sum that was trained. None: the largest of `ranks`.
        alpha: there is none, `scaling` has its place.
    """

    r: int = 32
    ranks: list[int] | None = None
    scaling: str = "sqrt"
    normalise: bool = False
    least_rank: ClassVar[int] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            raise ValueError(f"MatryoshkaLoRA has scaling in the place of alpha, got alpha = {self.alpha}")
        if self.scaling not in _SCALES:
            raise ValueError(f"scaling must be one of {', '.join(_SCALES)}, got {self.scaling!r}")
        if self.ranks is None:
            return
        if not self.ranks or not all(1 <= rank <= self.r for rank in self.ranks):
            raise ValueError(f"ranks must be whole numbers from 1 to r = {self.r}, got {self.ranks}")
        if len(set(self.ranks)) < len(self.ranks):
            raise ValueError(f"ranks must be different from each other, got {self.ranks}")

    def trained_ranks(self) -> list[int]:
        """S, in rising order."""
        powers = [2**i for i in range(self.r.bit_length()) if 2**i < self.r]
        return sorted(self.ranks or [*powers, self.r])


def component_scales(ranks: Sequence[int], scaling: str, r: int) -> Float[Tensor, " r"]:
    """p of every component, float64: non-increasing, 0 above the largest rank.

    Args:
        ranks: S.
        scaling: as in the configuration.
        r: components.
    """
    return torch.tensor(
        [math.fsum(_SCALES[scaling](rank) for rank in ranks if rank > j) for j in range(r)], dtype=torch.float64
    )


class MatryoshkaDelta(NestedDelta):
    """One layer; p (r) is frozen and not stored."""

    def __init__(self, site: Site, config: MatryoshkaConfig) -> None:
        super().__init__(site, config)
        ranks = config.trained_ranks()
        p = component_scales(ranks, config.scaling, config.r) / (len(ranks) if config.normalise else 1)
        self.register_buffer("p", p.float(), persistent=False)

    def deploy(self, rank: int | None) -> None:
        """Deploy a prefix, or for 0 the sum."""
        self.summed = rank == 0
        self.rank = rank or max(self.config.trained_ranks())

    def scale_at(self, rank: int) -> float:
        """s_k."""
        return _SCALES[self.config.scaling](rank)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of what is deployed, in training mode too."""
        if not self.summed:
            return super().factors()
        return self.B[:, : self.rank] * self.frozen("p")[: self.rank], self.A[: self.rank]

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """What is deployed; while training, the sum."""
        if not self.training:
            return super().forward(x, base_output)
        return functional.linear(functional.linear(x, self.A) * self.frozen("p"), self.B)


register("matryoshka", MatryoshkaConfig, MatryoshkaDelta)
