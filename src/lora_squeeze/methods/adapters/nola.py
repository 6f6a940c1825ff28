"""NOLA: factors that are linear combinations of frozen random matrices (arXiv 2310.02556, ICLR 2024).

    dW = alpha / r B A,  A = A_0 + sum_i a_i A_i,  B = sum_j b_j B_j

A_i (r, in) and B_j (out, r) are uniform in (-1, 1) over sqrt(bases) and come from seeds; only the coefficients a and
b, one number per basis matrix, are trained, and stored with the layer's three seeds: the count depends neither on the
rank nor on the width.

a and b begin at 0. A_0 is uniform in +-1 / sqrt(in) as in the authors' code (their equations leave it out, but with
both factors at zero nothing would ever move), so dW = 0 at the start, b has a gradient from the first step on and a
from the second. In the authors' code A_0 is drawn with the global generator; here it comes from the seed, as the bases
do.

As a plain LoRA: exact at rank r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register
from lora_squeeze.methods.seeds import generator_of

_CHUNK = 64  # basis matrices drawn at a time


@dataclass
class NolaConfig(AdapterConfig):
    """Configuration of NOLA.

    Args:
        bases: k and l, basis matrices of each factor. The authors use 256 to 512 for GPT-2 and 512 for LLaMA-2; more
            than r (in + out) add nothing.
        r: rank; a higher one costs no storage. Default 8, as the authors for GPT-2.
        alpha: default r, so that the scale is 1.
        keep_bases: hold the basis matrices in memory (bases * r * width numbers each) rather than draw them in every
            forward and backward pass, which is slower and needs little.
    """

    bases: int = 256
    keep_bases: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bases < 1:
            raise ValueError(f"bases must be a whole number from 1, got {self.bases}")


class NolaDelta(FactorDelta):
    """One layer; trained: a (bases), b (bases)."""

    def __init__(self, site: Site, config: NolaConfig) -> None:
        super().__init__(site, config)
        self.rank = config.r
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        start = torch.zeros if config.init_weights else torch.randn
        self.a = nn.Parameter(start(config.bases))
        self.b = nn.Parameter(start(config.bases))
        self.register_buffer("seeds", site.seeds(config.seed, "A0", "A", "B"))
        self.draw()

    def draw(self) -> None:
        """A_0 and the basis matrices, from `seeds`."""
        config, inputs = self.config, self.site.in_features
        of_first, *of_bases = self.seeds.tolist()
        self._of_bases = dict(zip("AB", of_bases, strict=True))
        self._freeze("A_0", _uniform((config.r, inputs), generator_of(of_first)) * (1 / math.sqrt(inputs)))
        if config.keep_bases:
            for side, shape in self._shapes().items():
                drawn = _uniform((config.bases, *shape), generator_of(self._of_bases[side]))
                self._freeze(f"{side}_bases", drawn / math.sqrt(config.bases))

    def _freeze(self, name: str, drawn: Tensor) -> None:
        self.register_buffer(name, drawn.to(self.seeds.device), persistent=False)

    def _shapes(self) -> dict[str, tuple[int, int]]:
        return {"A": (self.config.r, self.site.in_features), "B": (self.site.out_features, self.config.r)}

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) with the scale in it, and A (r, in)."""
        mixed: dict[str, Any] = {}
        for side, coefficients in (("A", self.a), ("B", self.b)):
            if self.config.keep_bases:
                mixed[side] = torch.einsum("k,kij->ij", coefficients, self.frozen(f"{side}_bases"))
            else:
                mix: Any = _Mix
                mixed[side] = mix.apply(coefficients, self._of_bases[side], self._shapes()[side])
        return self.scale * mixed["B"], self.frozen("A_0") + mixed["A"]


class _Mix(torch.autograd.Function):
    """sum_i c_i M_i with matrices that are drawn again for each pass and never kept."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, seed: int, shape: tuple[int, int]) -> Tensor:
        ctx.seed, ctx.shape, ctx.like = seed, shape, coefficients
        mixed = torch.zeros(shape, dtype=coefficients.dtype, device=coefficients.device)
        for start, matrices in _chunks(coefficients, seed, shape):
            mixed += torch.einsum("k,kij->ij", coefficients[start : start + len(matrices)], matrices)
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        parts = [torch.einsum("kij,ij->k", m, gradients[0]) for _, m in _chunks(ctx.like, ctx.seed, ctx.shape)]
        return torch.cat(parts), None, None


def _chunks(coefficients: Tensor, seed: int, shape: tuple[int, int]) -> Any:
    """The basis matrices in their order, some at a time, as if they were drawn at once."""
    generator = generator_of(seed)
    count = len(coefficients)
    for start in range(0, count, _CHUNK):
        drawn = _uniform((min(_CHUNK, count - start), *shape), generator) / math.sqrt(count)
        yield start, drawn.to(coefficients.device, coefficients.dtype)


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1


register("nola", NolaConfig, NolaDelta)
