"""LIFT: the entries of W that are largest after a low-rank approximation (arXiv 2506.00772, ICML 2025).

    W'[I] = W[I] + values,  I the r (in + out) largest entries of |W_R|

W_R is the best approximation of rank R of the weight as it is now. Every `refresh` steps it is computed again and I
chosen anew: the moments of entries that stay are kept, new entries begin at zero, those that leave keep their trained
value and are trained no longer. The optimiser's step count goes on. That is the work of `LiftController`; without it I
stays what it was at the start. Trained: r (in + out) numbers per layer, or all of W where that is fewer; they begin at
zero, so the function is the base model's. The authors train all linear layers but the output head, without weight
decay, with Adam (betas 0.9 and 0.95, eps 1e-6) at 1e-4 to 2e-4.

The SVD runs in float32 whatever the dtype of W. With `power_iterations` it is a randomised one of width 2 R, which the
authors' code offers too (their scripts use the exact one, and so does the default here). Masks by gradient are SHiRA's:
see `shira_masks`.

As a plain LoRA: only squeezed, the update has full rank. Its spectrum is flat: look at the energy that is kept. Not for
small square layers with a large r: a layer of 384 x 384 has two thirds of its entries trained at r = 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import register
from lora_squeeze.methods.adapters.sparse_entries import SparseConfig, SparseDelta, carry_state
from lora_squeeze.methods.control import Controller, controlled_by

Choice = Literal["principal", "magnitude", "random"]


@dataclass
class LiftConfig(SparseConfig):
    """Configuration of LIFT.

    Args:
        r: the entries trained are as many as the numbers of a LoRA of rank r. Default 128, as the authors'; take 8 to
            16 for models of 20 to 200 million parameters.
        filter_rank: R, of the approximation in which the entries are looked up. Default r; the authors have r / 4 to r.
        refresh: steps of the optimiser between two choices. Default 400; the authors have 10 to 2000.
        choice: "principal" is LIFT. What it is compared with: "magnitude", the largest of W itself, and "random", which
            stays as it was drawn.
        power_iterations: of a randomised SVD, 2 to 4; None: the exact SVD.
        alpha: there is none, the scale is 1.
    """

    r: int = 128
    filter_rank: int | None = None
    refresh: int = 400
    choice: str = "principal"
    power_iterations: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            raise ValueError(f"LIFT trains entries of W as they are and has no alpha, got {self.alpha}")
        for name in ("filter_rank", "refresh"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {given}")
        if self.choice not in get_args(Choice):
            raise ValueError(f"choice must be one of {', '.join(get_args(Choice))}, got {self.choice!r}")


class LiftDelta(SparseDelta):
    """One layer; trained: values, the change of each chosen entry."""

    def choose(self, weight: Tensor) -> Tensor:
        """The places of the chosen entries in the flat weight, ascending."""
        config, generator = self.config, self.site.generator(self.config.seed, "choice")
        count = min(config.r * sum(weight.shape), weight.numel())
        if config.choice == "random":
            return torch.randperm(weight.numel(), generator=generator, device="cpu")[:count].sort().values
        if config.choice == "principal":
            weight = low_rank(weight, config.filter_rank or config.r, config.power_iterations, generator)
        return largest(weight.abs(), count)

    @torch.no_grad()
    def refresh(self, optimizer: Any) -> None:
        """Choose again, of the weight as it is now, and let the optimiser's moments follow."""
        everything = self.weight()
        chosen = self.choose(self.base() + everything.to("cpu", torch.float32))
        index, _ = self.changes()
        new = chosen.to(index)
        everything = everything.flatten()
        leaving = index[~torch.isin(index, new)]
        leaving = leaving[everything[leaving.long()] != 0]
        place = torch.searchsorted(self.index, new).clamp(max=len(self.index) - 1)
        stays = self.index[place] == new
        carry_state(optimizer, self.values, lambda old: torch.where(stays, old[place], 0))
        self.index, self.kept_index = new, leaving
        self.kept = everything[leaving.long()].to(self.kept.dtype)
        self.values.copy_(everything[new.long()])


def low_rank(weight: Tensor, rank: int, power_iterations: int | None, generator: torch.Generator) -> Tensor:
    """The best approximation of a matrix, exact or randomised with a sketch of twice the rank."""
    Q, core = None, weight
    if power_iterations is not None:
        Q = _range(weight, min(2 * rank, *weight.shape), power_iterations, generator)
        core = Q.T @ weight
    U, S, Vh = torch.linalg.svd(core, full_matrices=False)
    found: Tensor = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return found if Q is None else Q @ found


def _range(weight: Tensor, width: int, power_iterations: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns that span the matrix's first left singular vectors, nearly."""
    sketch = torch.randn(weight.shape[1], width, generator=generator, dtype=torch.float32, device="cpu")
    Q: Tensor = torch.linalg.qr(weight @ sketch).Q
    for _ in range(power_iterations):
        Q = torch.linalg.qr(weight @ torch.linalg.qr(weight.T @ Q).Q).Q
    return Q


def largest(score: Tensor, count: int, skip: int = 0) -> Tensor:
    """Places of the largest numbers in the flat score, ascending; of equals the first ones.

    Args:
        score: of any shape.
        count: how many.
        skip: leave out that many that are larger still.
    """
    order = score.flatten().argsort(descending=True, stable=True)
    return order[skip : skip + count].sort().values


class LiftController(Controller):
    """Chooses the entries of a LIFT adapter again, every `refresh` steps of its configuration.

    The optimiser must keep one number of state per entry, such as torch.optim.AdamW(weight_decay=0).

    Raises:
        LoraSqueezeError: no optimiser.

    Notes:
        A choice costs one SVD of every adapted weight. Each process of a distributed run makes the same one.
    """

    def __init__(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default"
    ) -> None:  # fmt: skip
        super().__init__(model, total_steps, optimizer, adapter)
        if optimizer is None:
            raise LoraSqueezeError("LIFT exchanges entries while it trains; give the optimizer")

    def _after_step(self) -> None:
        """Where it is due, choose again."""
        super()._after_step()
        if self.steps_done % self.config.refresh == 0:
            for delta in self.deltas.values():
                delta.refresh(self.optimizer)


register("lift", LiftConfig, LiftDelta)
controlled_by("lift", LiftController)
