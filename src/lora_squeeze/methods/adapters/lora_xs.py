"""LoRA-XS: one small matrix between the frozen factors of a truncated SVD of W (arXiv 2405.17604, ECAI 2025).

    dW = alpha / r U_r R diag(s_r) V_r^T,  W = U diag(s) V^T

R (r, r) is trained, and all that is stored beside a fingerprint of W: the count does not depend on the width. The
singular values stand on the side of the input, as in the authors' code: large singular directions learn faster, small
ones hardly, so that a large r brings little. R is normal with a deviation of 1e-5 at the start, as theirs: the function
is the base model's to about that. Nothing needs it, since R = 0 has a gradient too.

The authors use a randomised SVD in float32; here it is exact, in float64 and with fixed signs, since it is computed
again when an adapter is loaded. Where singular values of W repeat (a weight as it is initialised orthogonally, or
made of equal blocks), their vectors are not determined: store them with `store_factors`. `basis="random"` is the
authors' ablation; that its factors are uniform as those of a LoRA at its start is our reading. The rate must be much
higher than a LoRA's: 1e-3 to 5e-2. Put no weight decay on R.

PEFT's TinyLoRA (arXiv 2602.04118) has the same frozen basis but trains R = sum of u numbers times random fixed
matrices, splits the singular values evenly between both sides and has no alpha. With u = r^2 it spans the same set of
updates, but with other steps, and with r^4 random numbers per layer.

As a plain LoRA: exact at rank r. The best one of rank k comes from an SVD of the r x r matrix R diag(s_r).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_squeeze.methods.adapters.decomposed import DecomposedDelta, exact_svd
from lora_squeeze.methods.adapters.engine import AdapterConfig, Site, register
from lora_squeeze.methods.seeds import generator_of

_START = 1e-5  # standard deviation of R


@dataclass
class LoraXsConfig(AdapterConfig):
    """Configuration of LoRA-XS.

    Args:
        r: of the SVD; r^2 numbers are trained, fewer in a layer that is narrower than r. Default 16. The authors have
            4 to 25 for RoBERTa and up to 64 for models of 7 billion.
        alpha: default r, so that the scale is 1, as the authors for models of 7 billion; for RoBERTa they have 16.
        basis: "svd", or "random", with which the method is compared; of that the layer's seeds are stored.
        store_factors: write U_r and diag(s_r) V_r^T to the file too, r (in + out) numbers per layer: then the base
            model may come in another dtype, and repeated singular values do no harm.
    """

    r: int = 16
    basis: str = "svd"
    store_factors: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis not in ("svd", "random"):
            raise ValueError(f"basis must be svd or random, got {self.basis!r}")


class LoraXsDelta(DecomposedDelta):
    """One layer; trained: R (r, r)."""

    def __init__(self, site: Site, config: LoraXsConfig) -> None:
        svd = config.basis == "svd"
        seeds = site.seeds(config.seed, "B", "A")
        B, A = _svd(site, config) if svd else _random(site, config, seeds)
        super().__init__(site, config, B, A, stored=config.store_factors, checked=svd and not config.store_factors)
        if not svd and not config.store_factors:
            self.register_buffer("seeds", seeds)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        start = torch.randn(B.shape[1], B.shape[1])
        self.R = nn.Parameter(start * _START if config.init_weights else start)

    def draw(self) -> None:
        """B and A of the random basis, from `seeds`."""
        B, A = _random(self.site, self.config, self.seeds)
        self.B, self.A = B.to(self.seeds.device), A.to(self.seeds.device)

    def core(self) -> Tensor:
        """alpha / r R."""
        return self.scale * self.R


def _svd(site: Site, config: LoraXsConfig) -> tuple[Tensor, Tensor]:
    U, S, Vh = exact_svd(site.base_weight())
    return U[:, : config.r], S[: config.r, None] * Vh[: config.r]


def _random(site: Site, config: LoraXsConfig, seeds: Tensor) -> tuple[Tensor, Tensor]:
    r = min(config.r, site.in_features, site.out_features)
    B, A = (
        torch.rand(shape, generator=generator_of(number), dtype=torch.float32, device="cpu") * 2 - 1
        for shape, number in zip(((site.out_features, r), (r, site.in_features)), seeds.tolist(), strict=True)
    )
    return B / math.sqrt(r), A / math.sqrt(site.in_features)


register("loraxs", LoraXsConfig, LoraXsDelta)
