"""Maestro: ordered dropout and a group lasso find each layer's rank while training (arXiv 2308.14929, ICML 2024).

    dW = alpha / r U V^T,   U (out, r), V (in, r), W frozen

The authors factorise the layers themselves and train whole models, which `maestro_layers` does for linear layers. The
form for adapters is ours: U and V are the factors of a LoRA (U = 0 at the start, so dW = 0), and all else is as there:

- each step trains one layer's first b columns, layer and b from a shuffled list of all such pairs, and all other
  layers in full, on the loss itself. (The authors' second pass, which teaches the shortened model the output of the
  full one, needs a training loop of its own and is left out.)
- lasso * HGL, HGL = sum_j ||U[:, j:]|| + ||V[:, j:]||, is added to the loss through the gradients: after they are
  clipped, and once for all micro-batches.
- at `shrinks` points of the training, columns of an importance ||U[:, j:]|| ||V[:, j:]|| below `threshold` are left
  out, for good.

The ranks found stand in the model's configuration, `found_ranks`, and are those of the saved adapter. A layer may end
at 0.

As a plain LoRA: exact at the rank found for each layer, and at every lower `deploy_rank` (see `prefix.set_rank`).

A gradient step drives a column near zero, not to it: what remains is of the size of the last steps. The threshold of
1e-5 asks for a learning rate that falls to about zero, as most schedules do; at a constant rate, no rank may fall
however large the lasso is. Weight decay is not the lasso.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.methods.adapters.engine import FactorDelta, Site, register
from lora_squeeze.methods.control import Controller, controlled_by
from lora_squeeze.methods.ranks.maestro_layers import draw, group_lasso, shrink, used
from lora_squeeze.methods.ranks.parts import add_gradient, lora_pair
from lora_squeeze.methods.ranks.prefix import NestedConfig


@dataclass
class MaestroConfig(NestedConfig):
    """Configuration of Maestro.

    Args:
        r: rank of all layers at the start, the bound of what is found.
        alpha: default r, so that the scale is 1.
        lasso: weight of the group lasso in the loss: more of it, lower ranks. To be swept; the authors' runs have 1e-6
            to 5e-3, their default, for models trained whole.
        threshold: least importance of a column that is kept.
        shrinks: how often ranks are cut in a training, at equal distances, the last time at its end. The authors do it
            after every epoch.
        deploy_rank: columns of each layer that are deployed, at most those found; None: those.
        found_ranks: layer -> rank, written by the training; given, layers begin there.
    """

    lasso: float = 1e-4
    threshold: float = 1e-5
    shrinks: int = 10
    found_ranks: dict[str, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lasso < 0 or self.threshold < 0:
            raise ValueError(f"lasso and threshold must be 0 or more, got {self.lasso} and {self.threshold}")
        if self.shrinks < 1:
            raise ValueError(f"shrinks must be a whole number from 1, got {self.shrinks}")


class MaestroDelta(FactorDelta):
    """One layer; trained: U (out, r) and V (in, r), of which the first `kept` columns count."""

    prefix: int | None

    def __init__(self, site: Site, config: MaestroConfig) -> None:
        super().__init__(site, config)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.U, A = lora_pair(site, config)
        self.V = nn.Parameter(A.data.T.contiguous())
        self._deployed = self._kept = self.rank = config.r
        self.deploy(config.deploy_rank)
        self.kept = min(config.r, (config.found_ranks or {}).get(site.name, config.r))
        self.prefix = None

    @property
    def kept(self) -> int:
        """Columns that are left."""
        return self._kept

    @kept.setter
    def kept(self, rank: int) -> None:
        self._kept = rank
        self.rank = max(1, min(rank, self._deployed))  # as a plain LoRA, no update at all is a pair of zeros

    def deploy(self, rank: int | None) -> None:
        """Deploy the first `rank` columns, None: all that are left."""
        self._deployed = self.config.r if rank is None else rank
        self.kept = self._kept

    def factors(self) -> tuple[Tensor, Tensor]:
        """U (out, rank) with the scale in it, and V^T (rank, in): the columns in use, in eval mode those deployed."""
        rank = used(self, True) if self.training else min(self.kept, self._deployed)
        return self.scale * self.U[:, :rank], self.V[:, :rank].T


class MaestroController(Controller):
    """Shortens a layer in each step, adds the lasso's gradient, and cuts ranks."""

    deltas: dict[str, MaestroDelta]
    began = 0  # step at which the present pass over all pairs of layer and prefix began

    def _before_forward(self) -> None:
        """Choose the layer that is shortened, and its prefix."""
        self.began = draw(self.deltas, self.steps_done, self.began, self.config.seed)

    def _before_step(self) -> None:
        """Add the gradient of the lasso."""
        if not self.config.lasso:
            return
        total = torch.stack([group_lasso(delta) for delta in self.deltas.values()]).sum()
        factors = (p for delta in self.deltas.values() for p in (delta.U, delta.V))
        add_gradient(self.config.lasso * total, factors)

    def _after_step(self) -> None:
        """Cut ranks when it is time."""
        super()._after_step()
        parts = self.config.shrinks
        if self.steps_done * parts // self.total_steps > (self.steps_done - 1) * parts // self.total_steps:
            # Until the first step with a learning rate above zero, U = 0 tells nothing of the columns.
            moved = {name: delta for name, delta in self.deltas.items() if delta.U.any()}
            if shrink(moved, self.config.threshold):
                self.began = self.steps_done
            self.config.found_ranks = {name: delta.kept for name, delta in self.deltas.items()}

    def _finish(self) -> None:
        """All layers in full again, at the ranks found."""
        for delta in self.deltas.values():
            delta.prefix = None

    def state_dict(self) -> dict[str, Any]:
        """The ranks, and where the pass over the pairs stands."""
        ranks = {name: delta.kept for name, delta in self.deltas.items()}
        return {**super().state_dict(), "ranks": ranks, "began": self.began}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the ranks and the pass of a checkpoint."""
        super().load_state_dict(state)
        self.began = int(state["began"])
        for name, rank in state["ranks"].items():
            self.deltas[name].kept = int(rank)
        self.config.found_ranks = {name: delta.kept for name, delta in self.deltas.items()}


register("maestro", MaestroConfig, MaestroDelta)
controlled_by("maestro", MaestroController)
