"""Trained rank pruning of an update: projected to a low rank again and again (arXiv 1812.02402, IJCAI 2020).

    dW = D (out, in), or alpha / r B A;   every `period` steps  dW <- T(dW), the nearest of low rank

T keeps the fewest singular directions with a share `energy` of the squared singular values. The step that follows takes
its gradient there, with nuclear * U V^T added, a sub-gradient of the sum of the singular values; then training goes on
in full width until the next projection. At the end, each layer is cut once more, to the rank of its last projection.
`trp_projection` has the mathematics, for models that are trained whole, which is what the authors do. Two forms for
adapters are ours, with W frozen and dW = 0 at the start:

- "dense": D is trained. The paper's method, on an update that begins at zero: it has as many trained numbers as W.
- "factors": the factors of a LoRA of width r. B becomes U_k U_k^T B and A stays, so that B A = T(dW) and all r
  components go on training; in the paper's terms the width between projections is r.

The nuclear norm's part is added after gradients are clipped, and once for all micro-batches. The optimiser's momentum
is not projected, as in the authors' code. Between two projections, what is evaluated is dW itself, of full width.

As a plain LoRA: exact at the rank found for each layer; squeezed, before the end of a training, or where D itself is of
half precision (PEFT keeps float32 unless told not to), whose rounding has full rank.

Not where memory is short: "dense" with Adam holds three numbers more for each of W. The cost of a projection is one
singular value decomposition of each layer, of the size of W if "dense", of the factors else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.decompose import decompose
from lora_squeeze.methods.adapters.engine import AdapterConfig, Delta, Site, register
from lora_squeeze.methods.control import Controller, controlled_by
from lora_squeeze.methods.ranks.parts import lora_pair
from lora_squeeze.methods.ranks.trp_projection import Prunable, RankPruning, Triple, Weight, add_to_gradient
from lora_squeeze.ranks import shortest_head

_FORMS = ("dense", "factors")
_ROUNDING = 1e-12  # share of the squared singular values that rounding leaves beyond the rank, in float32


@dataclass
class TrpConfig(AdapterConfig):
    """Configuration of trained rank pruning.

    Args:
        form: "dense" or "factors", what is trained.
        r: "dense": the most that a projection keeps, even if the energy falls short; the paper has no such bound, which
            is an r as large as the layers. "factors": the width.
        alpha: of "factors" alone, default r, so that the scale is 1; D has none.
        energy: share that a projection keeps, in (0, 1]: less of it, lower ranks. Default as in the authors' code.
        period: steps from one projection to the next. The authors' code has 1 and 5; 20 costs little, and is said to be
            the paper's.
        nuclear: weight of the sum of the singular values in the loss. Default the authors' for CIFAR-10.
    """

    form: str = "dense"
    energy: float = 0.9
    period: int = 20
    nuclear: float = 3e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in _FORMS:
            raise ValueError(f"form must be one of {', '.join(_FORMS)}, got {self.form!r}")
        if self.form == "dense" and self.alpha is not None:
            raise ValueError(f"a dense update has no alpha, got {self.alpha}; form='factors' has")
        if not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")
        if self.period < 1:
            raise ValueError(f"period must be a whole number from 1, got {self.period}")
        if self.nuclear < 0:
            raise ValueError(f"nuclear must be 0 or more, got {self.nuclear}")


class Factors:
    """scale * B A, as a matrix to be pruned: see `Prunable`."""

    def __init__(self, B: nn.Parameter, A: nn.Parameter, scale: float) -> None:
        self.B, self.A, self.scale = B, A, scale

    def svd(self) -> Triple:
        """In float64, at the cost of the factors."""
        found = decompose(self.B.detach(), self.A.detach(), self.scale, "qr")
        return found.X.to(found.S) @ found.left, found.S, found.right @ found.Y.to(found.S)

    @torch.no_grad()
    def become(self, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        """B loses what is not in the range of U."""
        self.B.copy_(U @ (U.T @ self.B.to(U)))

    @torch.no_grad()
    def push(self, direction_U: Tensor, direction_Vh: Tensor, weight: float) -> None:
        """By the chain rule, without forming U V^T."""
        B, A = self.B.to(direction_U), self.A.to(direction_U)
        add_to_gradient(self.B, weight * self.scale * direction_U @ (direction_Vh @ A.T))
        add_to_gradient(self.A, weight * self.scale * (B.T @ direction_U) @ direction_Vh)


class TrpDelta(Delta):
    """One layer; trained: D (out, in), or B (out, r) and A (r, in)."""

    def __init__(self, site: Site, config: TrpConfig) -> None:
        super().__init__(site, config)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        if config.form == "factors":
            self.B, self.A = lora_pair(site, config)
            return
        D = torch.zeros(site.out_features, site.in_features)
        if not config.init_weights:
            D = torch.rand(D.shape) * 2 - 1
        self.D = nn.Parameter(D / math.sqrt(site.in_features))

    def prunable(self) -> Prunable:
        """What is projected."""
        if self.config.form == "dense":
            return Weight(self.D)
        return Factors(self.B, self.A, self.scale)

    @property
    def rank(self) -> int | None:  # type: ignore[override]
        """Of the present dW, but for rounding; from a decomposition, so not for every step."""
        S = self.prunable().svd()[1]
        rank = max(1, shortest_head(S.double().square().tolist(), _ROUNDING))
        return rank if rank < min(self.site.in_features, self.site.out_features) else None

    @property
    def width(self) -> int | None:
        """The present rank, or r where that is more: a dW that is still zero will come to it. None: as for `rank`."""
        rank = self.rank
        return None if rank is None else max(rank, int(self.config.r))

    def weight(self) -> Tensor:
        """D, or alpha / r B A."""
        return self.D if self.config.form == "dense" else (self.scale * self.B) @ self.A

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """dW x."""
        if self.config.form == "dense":
            return functional.linear(x, self.D)
        return functional.linear(functional.linear(x, self.A), self.scale * self.B)


class TrpController(Controller):
    """Projects every `period` steps and at the end."""

    deltas: dict[str, TrpDelta]

    def __init__(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default"
    ) -> None:  # fmt: skip
        super().__init__(model, total_steps, optimizer, adapter)
        self.pruning = RankPruning(
            {name: delta.prunable() for name, delta in self.deltas.items()},
            energy=self.config.energy, nuclear=self.config.nuclear, most=self.config.r,
        )  # fmt: skip

    def _before_forward(self) -> None:
        """Project when it is time."""
        if self.steps_done % self.config.period == 0:
            self.pruning.project()

    def _before_step(self) -> None:
        """Add the nuclear norm's part where a projection came before."""
        self.pruning.add_gradients()

    def _finish(self) -> None:
        """The last projection."""
        self.pruning.finish()

    def state_dict(self) -> dict[str, Any]:
        """The ranks of the last projection."""
        return {**super().state_dict(), "kept": dict(self.pruning.kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with them."""
        super().load_state_dict(state)
        self.pruning.kept = {str(name): int(rank) for name, rank in state["kept"].items()}


register("trp", TrpConfig, TrpDelta)
controlled_by("trp", TrpController)
