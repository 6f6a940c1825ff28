"""TeRA: a Tucker network of frozen random tensors with trained diagonals between them (arXiv 2509.03234, ACL 2026).

    dW = s G x_1 (A_1 diag(d_1)) x_2 ... x_N (A_N diag(d_N)),  reshaped to (out, in),  s = alpha / sqrt(in)

out is the product of the first modes I_n, in that of the others. The core G (R_1, ..., R_N) and the factors A_n
(I_n, R_n) are drawn from the seed, once for all layers of a shape, and not stored; only the vectors d_n (R_n) are
trained, for 4096 x 4096 by default 96 numbers. dW has the rank min(product of the R_n of the rows, of the columns) for
vectors without zeros; one zero in a vector takes its whole share of that rank away. Rank is not capacity: what can be
fitted is bounded by the count.

Only the abstract was at hand: a Tucker network, core and factors random, frozen and shared, diagonals trained for each
layer. All else is our choice: N(0, 1) for G and N(0, 1 / R_n) for A_n, so that dW with all d = 1 has unit gain; three
modes on each side, as equal as they can be; R_n = I_n; one set for each shape. d_1 begins at 0, the other vectors at
1: dW = 0, d_1 has a gradient from the first step on and the others from the second. Rates of 1e-3 to 1e-1, say 1e-2
with a warm-up and without weight decay: dW is a product of N vectors, whose scales move freely between them, so that a
large rate diverges. Clip each vector's values rather than regularise.

VeRA is the special case of one mode on each side, A_1 = I, G its B and A_2 its A^T. G is as large as the largest
adapted weight, in memory alone; a token costs as much as W x.

As a plain LoRA: only squeezed; its spectrum is that of a random matrix, flat, of which a squeeze keeps little. With r
the rank is bounded, but for r^3 that is large too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters.engine import AdapterConfig, Delta, Site, register
from lora_squeeze.methods.seeds import seeded


@dataclass
class TeraConfig(AdapterConfig):
    """Configuration of TeRA.

    Args:
        modes: factors into which out and in are split, each; fewer where a width has not so many. More modes train
            fewer numbers. Default 3.
        r: bound of every R_n; default None: R_n = I_n, the full rank.
        alpha: default 1.
    """

    modes: int = 3
    r: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modes < 1:
            raise ValueError(f"modes must be a whole number from 1, got {self.modes}")


class TeraDelta(Delta):
    """One layer; trained: d, the vectors d_1 ... d_N one after the other."""

    def __init__(self, site: Site, config: TeraConfig) -> None:
        super().__init__(site, config)
        rows, columns = split(site.out_features, config.modes), split(site.in_features, config.modes)
        self.rows, self.widths = len(rows), rows + columns
        self.sizes = tuple(min(width, config.r or width) for width in self.widths)
        self._refuse_large_factors()
        bound = min(math.prod(self.sizes[: self.rows]), math.prod(self.sizes[self.rows :]))
        self.rank = bound if bound < min(site.in_features, site.out_features) else None
        self.scale = (1 if config.alpha is None else config.alpha) / math.sqrt(site.in_features)
        start = torch.ones(sum(self.sizes))
        start[: self.sizes[0]] = 0
        if not config.init_weights:
            start = torch.randn(sum(self.sizes))
        self.d = nn.Parameter(start)

    def _refuse_large_factors(self) -> None:
        numbers = self.site.out_features * self.site.in_features
        for width, size in zip(self.widths, self.sizes, strict=True):
            if width * size > numbers:
                raise ValueError(
                    f"{self.site.name}: a side of {width} that does not split needs a factor of {width} x {size}, more "
                    f"than the {numbers} numbers of the weight; bound it with r or leave the layer out of "
                    "target_modules"
                )

    def network(self) -> tuple[Tensor, list[Tensor]]:
        """The frozen core and factors, which the layers of one shape have in common."""
        factors = [
            self._drawn(f"A_{n}", (width, size), 1 / math.sqrt(size))
            for n, (width, size) in enumerate(zip(self.widths, self.sizes, strict=True), 1)
        ]
        return self._drawn("G", self.sizes, 1.0), factors

    def _drawn(self, name: str, shape: tuple[int, ...], deviation: float) -> Tensor:
        labels = self.rows, self.widths, self.sizes, name
        seed = self.config.seed
        return self.shared_tensor(
            ("tera", seed, *labels), lambda: torch.randn(shape, generator=seeded(seed, *labels)) * deviation
        )

    def weight(self) -> Tensor:
        """dW, formed from the core."""
        core, factors = self.network()
        return self.scale * tucker_matrix(core, factors, self.d.split(self.sizes), self.rows)

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """dW x, mode by mode, without forming dW."""
        core, factors = self.network()
        return self.scale * tucker_linear(x, core, factors, self.d.split(self.sizes), self.rows)


def tucker_matrix(core: Tensor, factors: Sequence[Tensor], vectors: Sequence[Tensor], rows: int) -> Tensor:
    """The matrix (out, in) of a Tucker network with diagonals.

    Args:
        core: (R_1, ..., R_N).
        factors: A_n (I_n, R_n).
        vectors: d_n (R_n).
        rows: modes that make up out, the first ones, the slowest first; the others make up in.
    """
    scaled = [factor * vector for factor, vector in zip(factors, vectors, strict=True)]
    whole = _each_mode(core[None], scaled)
    return whole.reshape(math.prod(whole.shape[1 : rows + 1]), -1)


def tucker_linear(x: Tensor, core: Tensor, factors: Sequence[Tensor], vectors: Sequence[Tensor], rows: int) -> Tensor:
    """The matrix of `tucker_matrix` times each x (*batch, in), in O(in out) a token."""
    scaled = [factor * vector for factor, vector in zip(factors, vectors, strict=True)]
    inner = x.reshape(-1, *(len(factor) for factor in scaled[rows:]))
    inner = _each_mode(inner, [factor.T for factor in scaled[rows:]]).flatten(1)
    inner = functional.linear(inner, core.reshape(-1, inner.shape[1]))
    out = _each_mode(inner.reshape(-1, *core.shape[:rows]), scaled[:rows])
    return out.reshape(*x.shape[:-1], math.prod(out.shape[1:]))


def _each_mode(tensor: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """(batch, J_1, ..., J_m) with mode n multiplied by a matrix (K_n, J_n)."""
    for matrix in matrices:  # the mode in front goes to the end: after all of them the order is the old one
        turned = tensor.movedim(1, -1)
        # Folded by hand: how torch folds depends on what is trained, and with it the last bits.
        tensor = functional.linear(turned.reshape(-1, matrix.shape[1]), matrix).view(*turned.shape[:-1], len(matrix))
    return tensor


@cache
def split(width: int, modes: int) -> tuple[int, ...]:
    """A width as a product of factors above 1 with the smallest sum, ascending; fewer where there are not so many."""
    for count in range(modes, 0, -1):
        found = list(_products(width, count, 2))
        if found:
            return min(found, key=sum)
    return (width,)


def _products(width: int, count: int, least: int) -> Any:
    if count == 1:
        if width >= least:
            yield (width,)
        return
    for factor in range(least, math.isqrt(width) + 1):
        if width % factor == 0:
            yield from ((factor, *rest) for rest in _products(width // factor, count - 1, factor))


register("tera", TeraConfig, TeraDelta)
