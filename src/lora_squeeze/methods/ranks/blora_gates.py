"""The stochastic gates and nested quantisers of Bayesian Bits, which choose bit widths and a rank while training.

A gate is a hard concrete number z in [0, 1] with a trained logit phi:

    z = clip(sigmoid((log u - log(1 - u) + phi) / beta) (zeta - gamma) + gamma, 0, 1),   u uniform in (0, 1)

It is 0 or 1 with a probability above zero, P(z > 0) = q(phi) below, so that what it gates can be left out for good.

A tensor t, clipped to a symmetric range, has quantised versions x_b of b = 2, 4, 8, 16 bits: the multiples of
s_b = 2 range / (2^b - 1) nearest to t. Since s_b is s_2b (2^b + 1), the grid of each lies on that of the next. With the
residuals e_2b = x_2b - x_b and one gate for each,

    t_q = x_2 + z_4 (e_4 + z_8 (e_8 + z_16 e_16))

so gates 1, 1, 0 mean 8 bits. Rounding passes gradients on unchanged. 32 bits are left out: in float32, their step is
below what the numbers themselves resolve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_BETA, _ZETA, _GAMMA = 2 / 3, 1.1, -0.1
_SHIFT = _BETA * math.log(-_GAMMA / _ZETA)
_CLOSED = 0.34  # a gate that is zero with a probability of this or more is closed
WIDTHS = (4, 8, 16)


def sampled(phi: Float[Tensor, "*shape"], u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """z from a uniform u."""
    noise = u.clamp(1e-6, 1 - 1e-6)
    stretched = torch.sigmoid((noise.log() - (-noise).log1p() + phi) / _BETA) * (_ZETA - _GAMMA) + _GAMMA
    return stretched.clamp(0, 1)


def settled(phi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The gate that is deployed, 0 or 1: closed where P(z = 0) is 0.34 or more."""
    return (torch.sigmoid(_SHIFT - phi) < _CLOSED).to(phi.dtype)


def open_probability(phi: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """q(phi) = P(z > 0)."""
    return torch.sigmoid(phi - _SHIFT)


def rounded(t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The nearest whole numbers, with the gradient of t itself."""
    found: Tensor = t + (t.round() - t).detach()
    return found


def on_grid(t: Float[Tensor, "*shape"], bits: int, reach: Float[Tensor, ""]) -> Float[Tensor, "*shape"]:
    """The nearest of the 2^bits - 1 multiples of 2 reach / (2^bits - 1) within +-reach."""
    step = 2 * reach / (2**bits - 1)
    most = 2 ** (bits - 1) - 1
    codes = (t / step).clamp(-most - 0.5, most + 0.5)  # the range: half a step beyond the outermost number
    found: Tensor = step * rounded(codes).clamp(-most, most)
    return found


@dataclass(frozen=True, eq=False)
class Quantizer:
    """The quantiser of one tensor.

    Args:
        log_reach: logarithm of the range, a number.
        bits: logits of the gates of the widths, first the one of 4 bits.
        ranks: logits of the gates of a vector's components from the second on; None: without.
        noise: uniform numbers of the present step, one for each gate; None: the gates that are deployed.
    """

    log_reach: Float[Tensor, ""]
    bits: Float[Tensor, " widths"]
    ranks: Float[Tensor, " components"] | None = None
    noise: Float[Tensor, " gates"] | None = None

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits that the gates lead to."""
        return WIDTHS[: len(self.bits)]

    def values(self) -> tuple[Float[Tensor, " widths"], Float[Tensor, " components"]]:
        """z of each width, and z_2 of each component: 1 without rank gates, else non-increasing and 1 in the first."""
        phi = self.bits if self.ranks is None else torch.cat([self.bits, self.ranks])
        z = settled(phi) if self.noise is None else sampled(phi, self.noise.to(phi))
        kept = rounded(z[len(self.widths) :].cumprod(0))
        return z[: len(self.widths)], torch.cat([kept.new_ones(1), kept])

    def __call__(self, t: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """t_q; for a tensor with rank gates, without the components that they close."""
        exact = t.to(torch.promote_types(t.dtype, torch.float32))
        reach = self.log_reach.to(exact.dtype).exp()
        z, kept = (gates.to(exact.dtype) for gates in self.values())
        previous = found = on_grid(exact, 2, reach)
        for product, width in zip(z.cumprod(0), self.widths, strict=True):
            finer = on_grid(exact, width, reach)
            found = found + product * (finer - previous)
            previous = finer
        return (found if self.ranks is None else kept * found).to(t.dtype)

    def cost(self, prices: Mapping[int, float]) -> Float[Tensor, ""]:
        """The regulariser: sum over widths b of prices[b] P(all gates up to b are open).

        Rank gates count as the width 2, with the mean of theirs.
        """
        reached = self.bits.new_ones(())
        total = self.bits.new_zeros(())
        if self.ranks is not None:
            reached = open_probability(self.ranks).mean()
            total = total + prices[2] * reached
        for q, width in zip(open_probability(self.bits), self.widths, strict=True):
            reached = reached * q
            total = total + prices[width] * reached
        return total

    @torch.no_grad()
    def chosen_bits(self) -> int:
        """Bits of the gates that are deployed."""
        open_ones = int(settled(self.bits).cumprod(0).sum())
        return (2, *self.widths)[open_ones]

    @torch.no_grad()
    def chosen_rank(self) -> int:
        """Components of the gates that are deployed."""
        return 1 if self.ranks is None else 1 + int(settled(self.ranks).cumprod(0).sum())
