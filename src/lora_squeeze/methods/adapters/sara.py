"""SaRA: the entries of W that are next to zero, kept low-rank by a penalty (arXiv 2409.06633, ICLR 2025).

    W'[I] = values,  I the entries with |W| < theta;  loss + nuclear * sum of the singular values of W' on I

The trained numbers are the entries themselves and begin as they are in W, so weight decay acts on them as in the
authors' code. The penalty is of the chosen entries with zeros elsewhere, not of their change; as in the authors' code
one layer, drawn anew in each step, receives its gradient U V^T. At the half of the training the entries that have
grown to theta or above are frozen as they are, and the rest is trained on. `SaraController` does both; without it
this is the training of a fixed set of small entries.

theta is one threshold for all layers, so a layer of small weights is trained as a whole and another not at all;
`fraction` takes the same share of every layer instead, and the layer's own threshold from it (this is an addition of
ours). Penalty and choice concern linear layers of any size; the authors leave out what is smaller than 64 or has 100
entries or fewer, and train biases, norms and convolutions too.

At the half the moments of the entries that are trained on are kept. The authors have two versions of their optimiser,
of which one keeps them; which one made their tables is not known.

As a plain LoRA: only squeezed, the penalty lowers the rank but does not bound it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import register
from lora_squeeze.methods.adapters.lift import largest
from lora_squeeze.methods.adapters.sparse_entries import SparseConfig, SparseDelta, carry_state
from lora_squeeze.methods.control import Controller, controlled_by

THETA = 2e-3


@dataclass
class SaraConfig(SparseConfig):
    """Configuration of SaRA.

    Args:
        theta: entries below it are trained. Default 2e-3, as the authors for Stable Diffusion.
        fraction: share of each layer to train, in place of theta; 0.1 to 0.2 are sensible.
        nuclear: weight of the penalty. Default 5e-4; 0 trains without it.
        r: not used, the method has no rank.
        alpha: there is none, the scale is 1.
    """

    theta: float | None = None
    fraction: float | None = None
    nuclear: float = 5e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            raise ValueError(f"SaRA trains entries of W as they are and has no alpha, got {self.alpha}")
        if self.theta is not None and self.fraction is not None:
            raise ValueError(f"give theta or fraction, not both; got {self.theta} and {self.fraction}")
        if self.theta is not None and self.theta <= 0:
            raise ValueError(f"theta must be above 0, got {self.theta}")
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {self.fraction}")
        if self.nuclear < 0:
            raise ValueError(f"nuclear must be 0 or more, got {self.nuclear}")


def sara_learning_rate(theta: float = THETA) -> float:
    """The authors' rate for a threshold, 1e-3 exp(-350 theta): 5.0e-4 for 2e-3."""
    return 1e-3 * math.exp(-350 * theta)


class SaraDelta(SparseDelta):
    """One layer; trained: values, the chosen entries of W'."""

    _start: Tensor
    _start_of: Tensor | None = None

    def choose(self, weight: Tensor) -> Tensor:
        """The places of the small entries in the flat weight, ascending; of equals at the end the first ones."""
        size = weight.abs().flatten()
        if self.config.fraction is None:
            return (size < self.threshold(size)).nonzero().flatten()
        return largest(-size, self._count(size))

    def threshold(self, size: Tensor) -> float:
        """What |W'| must stay below: theta, or the smallest |W| that is not chosen."""
        if self.config.fraction is None:
            return THETA if self.config.theta is None else self.config.theta
        count = self._count(size)
        return math.inf if count == len(size) else float(size.kthvalue(count + 1).values)

    def _count(self, size: Tensor) -> int:
        share: float = self.config.fraction
        return max(1, round(share * len(size)))

    def first_values(self) -> Tensor:
        """The entries of W."""
        return self.start.clone()

    @property
    def start(self) -> Tensor:
        """What the entries are in W; read again where others have been chosen or loaded, since no file has it."""
        if self._start_of is not self.index:
            self._read_start()
        return self._start

    def _read_start(self) -> None:
        weight = self.site.base_weight().detach()
        places = self.index.long().to(weight.device)
        start = weight[places // weight.shape[1], places % weight.shape[1]].float()
        self._start, self._start_of = start.to(self.index.device), self.index

    def change(self) -> Tensor:
        """Of the entries from W."""
        return self.values - self.start.to(self.dtype)

    def penalised(self) -> Tensor:
        """The matrix whose nuclear norm is the penalty: the trained entries, zeros elsewhere."""
        shape = self.site.out_features, self.site.in_features
        zeros = torch.zeros(shape[0] * shape[1], dtype=self.values.dtype, device=self.values.device)
        return zeros.scatter(0, self.index.long(), self.values).view(shape)

    @torch.no_grad()
    def penalise(self, strength: float) -> None:
        """Add the gradient of the penalty, U V^T at the entries, to theirs."""
        matrix = self.penalised()
        U, S, Vh = torch.linalg.svd(matrix.float() if matrix.element_size() < 4 else matrix, full_matrices=False)
        alive = S > S[0] * max(matrix.shape) * torch.finfo(S.dtype).eps
        slope = (U[:, alive] @ Vh[alive]).flatten()[self.index.long()].to(self.values.dtype)
        old = self.values.grad
        self.values.grad = strength * slope if old is None else old + strength * slope

    @torch.no_grad()
    def narrow(self, optimizer: Any) -> None:
        """Freeze the entries at or above the threshold as they are; gradient and moments of the others stay theirs."""
        small = self.values.abs() < self.threshold(self.base().abs().flatten())
        gone = self.changes()[1][: len(small)][~small]
        old, gradient = self.values, self.values.grad
        carry_state(optimizer, old, lambda state: state[small])
        # A new parameter, since autograd may still hold the shape of the old one.
        new = nn.Parameter(old[small].clone(), requires_grad=old.requires_grad)
        new.grad = None if gradient is None else gradient[small]
        self.values = new
        self.kept_index = torch.cat([self.kept_index, self.index[~small]])
        self.kept = torch.cat([self.kept, gone.to(self.kept.dtype)])
        self.index = self.index[small]
        for group in optimizer.param_groups:
            group["params"][:] = [new if p is old else p for p in group["params"]]
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """What the entries are in W is read before a forward pass, in which a quantised W may be packed with loss."""
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "index" in state_dict:
            self._read_start()


class SaraController(Controller):
    """Adds the penalty of a SaRA adapter to the gradients, and narrows its entries at the half of the training.

    The optimiser must keep one number of state per entry, such as torch.optim.AdamW.

    Raises:
        LoraSqueezeError: no optimiser, or no entry below the threshold.

    Notes:
        One SVD of one weight per step. At the half the parameters become shorter, which DDP and FSDP do not follow;
        neither does a gradient scaler's float16: use bfloat16.
    """

    def __init__(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default"
    ) -> None:  # fmt: skip
        super().__init__(model, total_steps, optimizer, adapter)
        if optimizer is None:
            raise LoraSqueezeError("SaRA exchanges parameters while it trains; give the optimizer")
        if not any(len(delta.values) for delta in self.deltas.values()):
            raise LoraSqueezeError("no entry of the adapted weights is below theta; raise theta or give a fraction")
        self.half = total_steps // 2

    def _before_step(self) -> None:
        """At the half, narrow the entries; in each step, the penalty of one layer."""
        if self.steps_done == self.half:
            for delta in self.deltas.values():
                delta.narrow(self.optimizer)
        candidates = [delta for delta in self.deltas.values() if len(delta.values)]
        if candidates and self.config.nuclear:
            number = torch.randint(len(candidates), (), generator=self.generator(), device="cpu")
            candidates[int(number)].penalise(self.config.nuclear)


register("sara", SaraConfig, SaraDelta)
controlled_by("sara", SaraController)
