"""Updates between two frozen factors of W itself: what LoLDU, SVFit and LoRA-XS have in common.

    dW = B core A,  B (out, r) and A (r, in) from a decomposition of W, core diagonal or r x r

Only the core is trained and stored. B and A are computed again from the weight when an adapter is loaded, on the CPU
in float64, since directions with close singular values depend on the last bits. The weight must therefore be that of
the training: a fingerprint is stored, and another weight is refused, also the same one rounded to 16 bits. What a merge
in float32 that was taken back leaves behind is let pass.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site
from lora_squeeze.methods.seeds import seeded

_UNIT = 2.0**-30  # of the numbers of a fingerprint
_PROBES = 4
_TOLERANCE = 1e-5  # share of |W|: rounding W to bfloat16 or float16 makes 1e-3 or 2e-4, two sums in float32 1e-7


class DecomposedDelta(FactorDelta):
    """One layer; a method adds the trained numbers and says what the core is.

    Args:
        site, config: as for every delta.
        B, A: the frozen factors.
        stored: they are written to the file.
        checked: they are computed from W again when the adapter is loaded, so W must be the same.
    """

    B: Tensor
    A: Tensor
    fingerprint: Tensor

    def __init__(
        self, site: Site, config: AdapterConfig, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], *,
        stored: bool = False, checked: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(site, config)
        self.rank = B.shape[1]
        self.register_buffer("B", B.float().contiguous(), persistent=stored)
        self.register_buffer("A", A.float().contiguous(), persistent=stored)
        if checked:
            self.register_buffer("fingerprint", fingerprint(site.base_weight()))

    def core(self) -> Tensor:
        """The scale included, (r, r), or (r) for a diagonal."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """B core (out, r), and A (r, in)."""
        core, B = self.core(), self.frozen("B")
        return B * core if core.dim() == 1 else B @ core, self.frozen("A")

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """B (core (A x)): autograd keeps r numbers per token."""
        core, inner = self.core(), functional.linear(x, self.frozen("A"))
        inner = inner * core if core.dim() == 1 else functional.linear(inner, core)
        return functional.linear(inner, self.frozen("B"))

    def _load_from_state_dict(self, *args: Any) -> None:
        """Refuse numbers that were trained over another weight."""
        own = getattr(self, "fingerprint", None)
        before = None if own is None else own.cpu().clone()
        parent: Any = super()
        parent._load_from_state_dict(*args)
        if before is not None and (self.fingerprint.cpu() - before).abs().max() > _TOLERANCE * before[0] + 1:
            raise LoraSqueezeError(
                f"{self.site.name}: the adapter was trained over a weight with other numbers, of which its directions "
                "are made; load the same base model in the same dtype, with nothing merged into it"
            )


def fingerprint(weight: Float[Tensor, "out in"]) -> Int[Tensor, " numbers"]:
    """|W| and the products of W with pairs of fixed random vectors, in units of 2^-30.

    A change E of the weight moves each product by about |E|, whatever it looks like.
    """
    W = weight.detach().to("cpu", torch.float64)
    u, v = (torch.randn(_PROBES, n, dtype=W.dtype, generator=seeded(axis, "probe")) for axis, n in enumerate(W.shape))
    numbers = torch.cat([W.norm()[None], ((u @ W) * v).sum(1)])
    return (numbers / _UNIT).round().long()


def exact_svd(weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, q), S (q), Vh (q, in) in float64, where the largest entry of each column of U is positive.

    Notes:
        With the sign set, whoever computes it gets the same vectors; but for equal singular values, of which only the
        space that they span is determined.
    """
    U, S, Vh = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return U * sign, S, Vh * sign.T
