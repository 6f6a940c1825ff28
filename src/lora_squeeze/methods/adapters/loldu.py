"""LoLDU: the diagonal of an LDU decomposition of W, trained between its frozen factors (arXiv 2410.13618, 2024).

    dW = sigma P L_r diag(z - z0) U_r,  W = P L diag(z0) U,  sigma = alpha / r

P is the permutation of partial pivoting, L (out, q) unit lower and U (q, in) unit upper triangular, q = min(out, in);
L_r and U_r are the first r columns and rows. Trained are the r numbers z - z0, which begin at 0: the function is the
base model's, whatever r and sigma, and no part of W has to be taken out of it. The authors write the same as
sigma P L_r diag(z) U_r beside a residual of W, and offer other first values of z; with a residual that fits them,
which theirs does not always, only z - z0 counts, and all first values are one method. So there is no such choice here.
Their code trains z alone; the paper also speaks of a learned sigma, see `train_scale`.

A truncated LDU is no approximation of W (its residual can have several times the energy of W), and neither L nor U is
orthogonal: r below q chooses by the order of rows and columns. sigma with the default alpha is 1 / width and scales
the updates, so the rate must be far above a LoRA's: a hundred times it, 0.3, was the best of MiniLM, and 0.1 was
worse. A pivot that is zero but for rounding, as those of a rank-deficient or padded weight (below 1.2e-7 times the
longer side, as a share of the largest pivot), has a row of U that hangs on the last bits of W: that row is 0 and its
number does nothing.

As a plain LoRA: exact at rank r, on the weight as it was; the best one of rank k is not that of the k largest
|z - z0|. Not for adapters that are to fit in little memory: L and U take twice that of W.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_squeeze.methods.adapters.decomposed import DecomposedDelta
from lora_squeeze.methods.adapters.engine import AdapterConfig, Site, register

_ROUNDING = torch.finfo(torch.float32).eps  # also for W in 16 bits, whose own rounding is a part of it


@dataclass
class LolduConfig(AdapterConfig):
    """Configuration of LoLDU.

    Args:
        r: entries of the diagonal to train, the first ones. Default None: all, as the authors.
        alpha: default 1, as in the authors' code.
        train_scale: train sigma too, one number per layer.
    """

    r: Any = None
    train_scale: bool = False


class LolduDelta(DecomposedDelta):
    """One layer; trained: change (r), which is z - z0, and with `train_scale` sigma (1)."""

    diagonal_core = True
    z0: Tensor
    sigma: Tensor

    def __init__(self, site: Site, config: LolduConfig) -> None:
        B, D, A = ldu(site.base_weight())
        r = len(D) if config.r is None else min(config.r, len(D))
        super().__init__(site, config, B[:, :r], A[:r])
        self.scale = (1 if config.alpha is None else config.alpha) / (config.r or r)
        self.register_buffer("z0", D[:r].float(), persistent=False)
        self.change = nn.Parameter(torch.zeros(r) if config.init_weights else torch.randn(r))
        if config.train_scale:
            self.sigma = nn.Parameter(torch.full((1,), self.scale))

    def core(self) -> Tensor:
        """sigma z - sigma0 z0."""
        if not self.config.train_scale:
            return self.scale * self.change
        grown = self.sigma - self.sigma.new_tensor(self.scale)
        return self.sigma * self.change + grown * self.frozen("z0")

    def diagonal(self) -> Tensor:
        """z (r)."""
        return self.frozen("z0") + self.change


def ldu(weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor, Tensor]:
    """P L (out, q), the pivots (q) and U (q, in), unit upper triangular, of W = P L diag(pivots) U, in float64.

    Notes:
        On the CPU, O(out in q). Rows of U with a pivot that rounding makes are zero: their part of W is left out.
    """
    P, L, upper = torch.linalg.lu(weight.detach().to("cpu", torch.float64))
    pivots = upper.diagonal()
    alive = pivots.abs() > _ROUNDING * max(weight.shape) * pivots.abs().max()
    U = torch.where(alive[:, None], upper / pivots[:, None], 0.0)
    return L[P.argmax(1)], pivots, U


register("loldu", LolduConfig, LolduDelta)
