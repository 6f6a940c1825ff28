"""Hydra: a head beside the layer, as in LoRA, and one behind it that reads its output (arXiv 2309.06922, 2023).

    y = f(x) + s B_p A_p x + s B_s A_s f(x),  f(x) = W x + b,  so
    dW = s (B_p A_p + B_s A_s W),  db = s B_s A_s b

A_p (r, in), B_p (out, r), A_s (r_s, out) and B_s (out, r_s) are trained, r (in + out) + 2 r_s out numbers; W and b are
frozen. The A's are drawn as LoRA's, the B's begin at 0. Either head alone is what the paper compares with: "parallel"
is LoRA, "sequential" changes W within its own row space.

The authors adapt the last linear layer of each feed-forward block, for images the projection after the attention too;
r 4 and r_s 8 with scale 1 for RoBERTa-base, 2 and 2 with scales of 0.1 to 4.5 for ViT-B. Their code for images has
biases in the heads; here there are none.

As a plain LoRA: exact at rank r + r_s, with A = [A_p; A_s W] and B = s [B_p, B_s]. The bias moves too, in a LoRA with
lora_bias. Not to be kept beside a W that has changed: the sequential head belongs to the W and b that it was trained
on, so convert it before W is quantised or something else is merged into it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register

_MODES = ("both", "parallel", "sequential")


@dataclass
class HydraConfig(AdapterConfig):
    """Configuration of Hydra.

    Args:
        r: rank of the parallel head. With both heads, r / 2 in each has the numbers of a LoRA of rank r on a square
            layer.
        r_sequential: rank of the sequential head; default r.
        alpha: both heads are multiplied by alpha / r; default r, so that the scale is 1.
        dropout: share of the numbers between A and B of each head that are zeroed while training.
        mode: "both", "parallel" or "sequential": which heads there are.
    """

    r_sequential: int | None = None
    mode: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {self.mode!r}")
        if self.r_sequential is not None and self.r_sequential < 1:
            raise ValueError(f"r_sequential must be a whole number from 1, got {self.r_sequential}")


class HydraDelta(FactorDelta):
    """One layer; trained: A_p (r, in) and B_p (out, r), A_s (r_s, out) and B_s (out, r_s)."""

    def __init__(self, site: Site, config: HydraConfig) -> None:
        super().__init__(site, config)
        self.inside, self.dropout = self.dropout, nn.Identity()
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        heads = {"p": (config.r, site.in_features), "s": (config.r_sequential or config.r, site.out_features)}
        self.heads = {name: heads[name] for name in {"both": "ps", "parallel": "p", "sequential": "s"}[config.mode]}
        self.rank = min(sum(r for r, _ in self.heads.values()), site.in_features, site.out_features)
        self.moves_bias = "s" in self.heads and site.base_bias() is not None
        for name, (r, columns) in self.heads.items():
            A = (torch.rand(r, columns) * 2 - 1) / math.sqrt(columns)
            B = torch.zeros(site.out_features, r)
            if not config.init_weights:
                B = torch.randn(B.shape) / math.sqrt(columns)
            setattr(self, f"A_{name}", nn.Parameter(A))
            setattr(self, f"B_{name}", nn.Parameter(B))

    def head(self, name: str) -> tuple[Tensor, Tensor]:
        """B with the scale in it, and A, of the head "p" or "s"."""
        B: Tensor = self.scale * getattr(self, f"B_{name}")
        A: Tensor = getattr(self, f"A_{name}")
        return B, A

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r + r_s) with the scale in it, and A (r + r_s, in)."""
        heads = {name: self.head(name) for name in self.heads}
        if "s" in heads:
            B, A = heads["s"]
            heads["s"] = B, A @ self.site.base_weight().to(self.dtype)
        Bs, As = zip(*heads.values(), strict=True)
        return torch.cat(Bs, 1), torch.cat(As)

    def bias(self) -> Float[Tensor, " out"] | None:
        """s B_s A_s b, None without a bias or a sequential head."""
        bias = self.site.base_bias()
        if bias is None or "s" not in self.heads:
            return None
        B, A = self.head("s")
        return B @ (A @ bias.to(self.dtype))

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """Both heads: of x, and of what the base layer makes of it."""
        seen = {"p": x, "s": base_output.to(self.dtype)}
        added = []
        for name in self.heads:
            B, A = self.head(name)
            added.append(functional.linear(self.inside(functional.linear(seen[name], A)), B))
        return torch.stack(added).sum(0)

    def merge_into(self, weight: Float[Tensor, "out in"]) -> Callable[[Tensor], None]:
        """Add dW; what takes it out again has the factors from the W of now."""
        B, A = self.factors()
        weight += (B @ A).to(weight.dtype)
        return partial(_take_out, B, A)


def _take_out(B: Tensor, A: Tensor, merged: Tensor) -> None:
    merged -= (B @ A).to(merged.dtype)


register("hydra", HydraConfig, HydraDelta)
