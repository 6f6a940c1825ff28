"""How one short vector becomes all LoRA factors of a network: Uni-LoRA's projection and those it is compared with.

All factors of all layers stand in one vector theta_D, layer by layer, A before B, and theta_D = P theta_d, where only
theta_d (d numbers) is trained and P (D, d) is fixed and comes from a seed:

    "onehot"        Uni-LoRA: every number of theta_D is one of theta_d over sqrt(n), n the times that one is used; all
                    are used equally often, over all layers. P^T P = I.
    "layerwise"     the same, but each layer has a share of theta_d of its own (the size in proportion). P^T P = I.
    "nonuniform"    the same, but one half of theta_d serves nine tenths of theta_D (how the paper's own variant spreads
                    them is not known to us). P^T P = I.
    "nonisometric"  as "onehot" without 1 / sqrt(n): P^T P = diag(n).
    "gaussian"      dense, normal with variance 1 / D: P^T P = I in the mean. D d numbers in memory: for small models.
    "fastfood"      blocks H G Q H B of Hadamard matrices H, a permutation Q, normal G and signs B on the diagonal, as
                    good as dense, in O(D log d): P^T P = I in the mean. The usual last factor, which makes the rows
                    differ in length, is left out.

Plain LoRA is P = I: "onehot" with d = D is a permutation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.seeds import seeded, usual_defaults

Sizes = Sequence[int]


class Projection:
    """P: theta_D = P theta_d, in pieces.

    Args:
        sizes: numbers of theta_D that each layer has, in the order of the layers.
        length: d.
        seed: of P.

    Raises:
        LoraSqueezeError: d is larger than D, so some of theta_d would never be used.
    """

    def __init__(self, sizes: Sizes, length: int, seed: int) -> None:
        self.sizes, self.length, self.seed = list(sizes), length, seed
        self.total = sum(self.sizes)
        if length > self.total:
            raise LoraSqueezeError(
                f"length = {length} is more than the {self.total} numbers of all factors; lower it, or raise r"
            )
        self._prepare()

    def apply(self, theta: Tensor, start: int, count: int) -> Tensor:
        """Numbers start ... start + count - 1 of P theta, differentiable."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Draw what is fixed."""


class OneHot(Projection):
    """Every number is one of theta_d, scaled so that P is an isometry."""

    group: Tensor
    scale: Tensor

    def apply(self, theta: Tensor, start: int, count: int) -> Tensor:
        """A gather and a product."""
        if self.group.device != theta.device:
            with torch.inference_mode(False):  # they are kept, for training too
                self.group, self.scale = self.group.to(theta.device), self.scale.to(theta.device)
        group = self.group[start : start + count]
        return theta[group] * self.scale[group].to(theta.dtype)

    def _prepare(self) -> None:
        self.group = self._groups(seeded(self.seed, "projection"))
        self.scale = torch.bincount(self.group, minlength=self.length).double().rsqrt()

    def _groups(self, generator: torch.Generator) -> Tensor:
        return _balanced(self.total, self.length, generator)


class LayerWise(OneHot):
    """Each layer has numbers of its own."""

    def _groups(self, generator: torch.Generator) -> Tensor:
        if self.length < len(self.sizes):
            raise LoraSqueezeError(
                f"length = {self.length} has no number for each of {len(self.sizes)} layers; raise it"
            )
        ends = [round(self.length * sum(self.sizes[: i + 1]) / self.total) for i in range(len(self.sizes))]
        starts = [0, *ends[:-1]]
        if any(start == end for start, end in zip(starts, ends, strict=True)):
            raise LoraSqueezeError(f"length = {self.length} leaves the smallest layer without a number; raise it")
        parts = zip(self.sizes, starts, ends, strict=True)
        return torch.cat([start + _balanced(size, end - start, generator) for size, start, end in parts])


class NonUniform(OneHot):
    """Half of the numbers serve nine tenths of the entries, as far as there are enough for the other half."""

    def _groups(self, generator: torch.Generator) -> Tensor:
        half = self.length // 2
        rare = max(self.total // 10, half)
        often = _balanced(self.total - rare, self.length - half, generator)
        seldom = self.length - half + _balanced(rare, half, generator)
        both = torch.cat([often, seldom])
        return both[torch.randperm(self.total, generator=generator)]


class NonIsometric(OneHot):
    """Without the scale."""

    def _prepare(self) -> None:
        super()._prepare()
        self.scale = torch.ones_like(self.scale)


class Gaussian(Projection):
    """A dense random matrix."""

    matrix: Tensor

    def apply(self, theta: Tensor, start: int, count: int) -> Tensor:
        """Rows of the matrix times theta."""
        with torch.inference_mode(False):  # it is kept, for training too
            self.matrix = self.matrix.to(theta.device)
        return self.matrix[start : start + count].to(theta.dtype) @ theta

    def _prepare(self) -> None:
        generator = seeded(self.seed, "projection")
        self.matrix = torch.randn(self.total, self.length, generator=generator) / math.sqrt(self.total)


class Fastfood(Projection):
    """Structured blocks that are as good as a dense random matrix; one block is drawn at a time and none is kept."""

    def apply(self, theta: Tensor, start: int, count: int) -> Tensor:
        """The blocks that the numbers lie in, cut to them."""
        width = 1 << (self.length - 1).bit_length()
        padded = torch.nn.functional.pad(theta, (0, width - self.length))
        first, last = start // width, -(-(start + count) // width)
        whole = torch.cat([self._block(padded, number) for number in range(first, last)])
        return whole[start - first * width :][:count] / math.sqrt(self.total * width)

    def _block(self, theta: Tensor, number: int) -> Tensor:
        generator = seeded(self.seed, "projection", number)
        width = len(theta)
        with usual_defaults():
            signs = torch.randint(2, (width,), generator=generator)
            order, normal = torch.randperm(width, generator=generator), torch.randn(width, generator=generator)
        signs, order, normal = signs.to(theta) * 2 - 1, order.to(theta.device), normal.to(theta)
        return _hadamard(normal * _hadamard(signs * theta)[order])


def _balanced(count: int, groups: int, generator: torch.Generator) -> Tensor:
    """The group of each entry: sizes differ by one at most, and chance says which groups have the one more."""
    names = torch.randperm(groups, generator=generator)
    return names[torch.arange(count) % groups][torch.randperm(count, generator=generator)]


def _hadamard(x: Tensor) -> Tensor:
    """H x with entries +-1, H in Sylvester's order; the length is a power of two."""
    width = len(x)
    half = 1
    while half < width:
        a, b = x.view(-1, 2, half).unbind(1)
        x = torch.stack([a + b, a - b], dim=1).flatten()
        half *= 2
    return x


PROJECTIONS: dict[str, Callable[[Sizes, int, int], Projection]] = {
    "onehot": OneHot,
    "layerwise": LayerWise,
    "nonuniform": NonUniform,
    "nonisometric": NonIsometric,
    "gaussian": Gaussian,
    "fastfood": Fastfood,
}
