"""DyLoRA: one training whose first b components are a LoRA of rank b, for every b (arXiv 2210.07558, EACL 2023).

    dW_b = alpha / b B[:, :b] A[:b],   A (r, in), B (out, r) trained, W frozen

Each step draws one b from 1 to r, the same for all layers, and trains dW_b. What of it is trained, `update` says:

- "frozen": component b alone; those before it take part in the forward pass but have no gradient. What lower ranks have
  learned stays, and the components are ordered. The authors' scripts do this.
- "plain": all components up to b.

After the training, `prefix.set_rank` chooses the rank that is deployed. The scale is that of a LoRA of rank b, so that
a prefix is a LoRA with the same alpha. The start is that of a LoRA, dW = 0 for every b.

Ours: b is drawn once for each step of the optimiser; in the authors' code, for each forward pass. As there, the
optimiser sees whole matrices: components without a gradient still move by its momentum and weight decay, so "frozen" is
exact without both alone.

As a plain LoRA: exact at every rank up to r.

Component b is trained in one of r steps if "frozen", and the higher of the components in few if "plain": at equal
steps, the highest ranks learn less than a LoRA of that rank. Where they matter, train longer, or give them higher odds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from lora_squeeze.methods.adapters.engine import Site, register
from lora_squeeze.methods.control import Controller, controlled_by
from lora_squeeze.methods.ranks.prefix import NestedConfig, NestedDelta

_UPDATES = ("frozen", "plain")


@dataclass
class DyloraConfig(NestedConfig):
    """Configuration of DyLoRA.

    Args:
        r: highest rank. Default 8, as the authors.
        alpha: default 2 r, the authors' 16 at r = 8.
        update: "frozen" or "plain", which components a step trains.
        odds: of each rank from 1 to r to be drawn, in any unit; None: equal ones. A rank of odds 0 is never drawn: if
            "frozen", its component then learns nothing.
    """

    update: str = "frozen"
    odds: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.update not in _UPDATES:
            raise ValueError(f"update must be one of {', '.join(_UPDATES)}, got {self.update!r}")
        if self.odds is None:
            return
        if len(self.odds) != self.r:
            raise ValueError(f"odds must be {self.r} numbers, one for each rank up to r, got {len(self.odds)}")
        if not all(math.isfinite(odd) and odd >= 0 for odd in self.odds) or not any(self.odds):
            raise ValueError(f"odds must be finite, 0 or more and not all 0, got {self.odds}")


class DyloraDelta(NestedDelta):
    """One layer.

    Attributes:
        drawn: rank of the present step; None: all components are trained, as in a LoRA of rank r.
    """

    drawn: int | None

    def __init__(self, site: Site, config: DyloraConfig) -> None:
        super().__init__(site, config)
        self.drawn = None

    def scale_at(self, rank: int) -> float:
        """alpha / b."""
        alpha = 2 * self.config.r if self.config.alpha is None else self.config.alpha
        return float(alpha / rank)

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """What is deployed; while training, what the present step trains."""
        if not self.training:
            return super().forward(x, base_output)
        rank = self.drawn or self.config.r
        B, A = self.B[:, :rank], self.A[:rank]
        if self.drawn and self.config.update == "frozen":
            B = torch.cat([B[:, :-1].detach(), B[:, -1:]], 1)
            A = torch.cat([A[:-1].detach(), A[-1:]])
        return functional.linear(functional.linear(x, A), self.scale_at(rank) * B)


class DyloraController(Controller):
    """Draws the rank of each step."""

    deltas: dict[str, DyloraDelta]

    def _before_forward(self) -> None:
        """Draw one rank for all layers."""
        odds = torch.tensor(self.config.odds or [1.0] * self.config.r, dtype=torch.float64, device="cpu")
        self._set(1 + int(torch.multinomial(odds, 1, generator=self.generator())))

    def _finish(self) -> None:
        """No rank is drawn any more."""
        self._set(None)

    def _set(self, rank: int | None) -> None:
        for delta in self.deltas.values():
            delta.drawn = rank


register("dylora", DyloraConfig, DyloraDelta)
controlled_by("dylora", DyloraController)
