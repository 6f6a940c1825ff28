"""SVFit: the singular values of W, trained between its frozen singular vectors (arXiv 2409.05926, 2024).

    dW = U_r diag(s - s0) V_r^T,  W = U diag(s0) V^T

U_r (out, r) and V_r (in, r) hold the top singular vectors; the r numbers s - s0 are trained and begin at 0, so the
function is the base model's and weight decay draws towards W, not towards a weight without its singular values. s may
become negative. The singular values of the merged weight at full r are the |s|, and the spectral norm of dW is the
largest |s - s0|.

There is no code of the authors, and of the paper's body nothing was at hand. That r is the full width by default is an
inference from its count, a sixteenth of a LoRA of rank 8; it also speaks of the top values with 99 % of the
information, which is `energy` here, measured in squares: that reading is ours. `relative`, `nonnegative` and
`store_factors` are additions of ours. The rate must be higher than a LoRA's, as there are few numbers: try 1e-3 to
1e-1.

Singular values that are zero but for rounding, as where rows of W are, have no vectors of their own: they are not
trained, and r is the rank of W at most. Equal ones (of an orthogonal W) have some, but which is a matter of the last
bits: such an adapter is refused where they come out otherwise. Store them with `store_factors`.

As a plain LoRA: exact at rank r, which is large; the best LoRA of rank k has the k largest |s - s0|. Not with a small
r: only the r directions u_i v_i^T can change, and a change of full rank in no special direction has 1 / width of its
energy in them. Not for adapters that are to fit in little memory: U and V take twice that of W. SVFT
(arXiv 2405.19597), which adds a sparse matrix between U and V^T, is another method.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.methods.adapters.decomposed import DecomposedDelta, exact_svd
from lora_squeeze.methods.adapters.engine import AdapterConfig, Site, register
from lora_squeeze.methods.adapters.sparse_entries import make_room

_ROUNDING = torch.finfo(torch.float32).eps  # also for W in 16 bits, whose own rounding is a part of it


@dataclass
class SvfitConfig(AdapterConfig):
    """Configuration of SVFit.

    Args:
        r: singular values to train, the largest. Default None: all but zeros, as in the paper.
        energy: in place of r, the share of the sum of squares that they have; each layer gets the r that it needs.
        relative: train s = s0 (1 + z) by z, so that a step moves large singular values by more.
        nonnegative: keep s from falling below 0; what would be has no gradient.
        store_factors: write U_r, V_r and s0 to the file too, r (in + out + 1) numbers per layer: then the base model
            may come in another dtype, and repeated singular values do no harm.
        alpha: there is none, the scale is 1.
    """

    r: Any = None
    energy: float | None = None
    relative: bool = False
    nonnegative: bool = False
    store_factors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha is not None:
            raise ValueError(f"SVFit trains the singular values themselves and has no alpha, got {self.alpha}")
        if self.r is not None and self.energy is not None:
            raise ValueError(f"give r or energy, not both; got {self.r} and {self.energy}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ValueError(f"energy must be in (0, 1], got {self.energy}")


class SvfitDelta(DecomposedDelta):
    """One layer; trained: z (r), the change of the singular values, or their relative change."""

    diagonal_core = True
    s0: Tensor

    def __init__(self, site: Site, config: SvfitConfig) -> None:
        U, S, Vh = exact_svd(site.base_weight())
        alive = _ROUNDING * math.sqrt(max(len(U), Vh.shape[1])) * S[0] < S
        r = max(1, int(alive.sum()))
        if config.energy is not None:
            share = (S**2).cumsum(0)
            r = min(r, int((share < config.energy * share[-1]).sum()) + 1)
        r = r if config.r is None else min(r, config.r)
        stored = config.store_factors
        super().__init__(site, config, U[:, :r] * alive[:r], Vh[:r], stored=stored, checked=not stored)
        self.register_buffer("s0", S[:r].float(), persistent=stored)
        self.z = nn.Parameter(torch.zeros(r) if config.init_weights else torch.randn(r))

    def core(self) -> Tensor:
        """s - s0."""
        s0 = self.frozen("s0")
        change = s0 * self.z if self.config.relative else self.z
        return torch.where(change < -s0, -s0, change) if self.config.nonnegative else change

    def singular_values(self) -> Tensor:
        """s (r), in the order of s0."""
        return self.frozen("s0") + self.core()

    def _before_loading(self, state_dict: Any, prefix: str) -> None:
        """Stored factors are taken in their rank; a file that has numbers for zeros of W loses these."""
        super()._before_loading(state_dict, prefix)
        z = state_dict.get(prefix + "z")
        if z is None or len(z) == self.rank:
            return
        if self.config.store_factors:
            make_room(self, state_dict, prefix, ("B", "A", "s0", "z"))
            self.rank = len(z)
        elif prefix + "fingerprint_of_factors" not in state_dict and len(z) > self.rank:
            warnings.warn(
                f"{self.site.name}: {len(z) - self.rank} of {len(z)} numbers are of singular values that are 0 in W "
                "and have no directions of their own; they are left out",
                stacklevel=2,
            )
            state_dict[prefix + "z"] = z[: self.rank]


register("svfit", SvfitConfig, SvfitDelta)
