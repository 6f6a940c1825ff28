"""Block-LoRA: the factors of a LoRA in n blocks, one down-projection for all of them (arXiv 2501.16720, 2025).

    "shared"        dW = s (sum_i B_i) A,      A (r / n, in), B_i (out, r / n)
    "input_blocks"  dW = s B [A, ..., A],      A (r, in / n), B (out, r)

s = alpha / r. Either way r in / n + r out numbers are trained, and n products become sums: of the B_i, or of the n
parts of x. A is drawn as LoRA's, B begins at 0; with n = 1 both are a LoRA.

We know the paper's abstract and a summary of it. That one A is shared by all blocks is theirs; which of the two forms
is, we do not know. "shared", the default, is what the words fit best. Its B_i all have the same gradient and begin
equal, so they stay equal: it is a LoRA of rank r / n whose B moves n times as fast, and nothing more. "input_blocks"
spends the same numbers on rank r.

As a plain LoRA: exact, at rank r / n ("shared") or r ("input_blocks"; in / n where that is less). Not for saving
numbers as such: a LoRA of rank r / n has what "shared" has in fewer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register

_MODES = ("shared", "input_blocks")


@dataclass
class BlockLoraConfig(AdapterConfig):
    """Configuration of Block-LoRA.

    Args:
        r: rank of the LoRA that is cut into blocks. Default 2; for CLIP such LoRAs are trained with r 2, alpha 1,
            dropout 0.25 on q, k and v.
        alpha: the scale is alpha / r, whatever n is; default r.
        blocks: n. In mode "shared" it divides r, in "input_blocks" each layer's in_features. A square layer has
            (1 + 1 / n) / 2 of a LoRA's numbers.
        mode: "shared" or "input_blocks".
    """

    r: int = 2
    blocks: int = 2
    mode: str = "shared"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {self.mode!r}")
        if self.blocks < 1:
            raise ValueError(f"blocks must be a whole number from 1, got {self.blocks}")
        if self.mode == "shared" and self.r % self.blocks:
            raise ValueError(f"blocks must divide r in mode 'shared', got {self.blocks} and {self.r}")


class BlockLoraDelta(FactorDelta):
    """One layer; trained: A (r / n, in) and B (n, out, r / n), or A (r, in / n) and B (1, out, r)."""

    def __init__(self, site: Site, config: BlockLoraConfig) -> None:
        super().__init__(site, config)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        shared = config.mode == "shared"
        rows, self.parts, arms = (
            (config.r // config.blocks, 1, config.blocks) if shared else (config.r, config.blocks, 1)
        )
        if site.in_features % self.parts:
            raise ValueError(
                f"{site.name}: blocks is {config.blocks}, which does not divide its {site.in_features} inputs; choose "
                "another number or leave the layer out of target_modules"
            )
        columns = site.in_features // self.parts
        self.rank = min(rows, columns)
        drawn = torch.rand(rows, columns) * 2 - 1
        self.A = nn.Parameter(drawn / math.sqrt(site.in_features))
        B = torch.zeros(arms, site.out_features, rows)
        self.B = nn.Parameter(B if config.init_weights else torch.randn(B.shape))

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, rows) with the scale in it, and A (rows, in)."""
        return self.scale * self.B.sum(0), self.A.repeat(1, self.parts)

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """B (A x), the parts of x added first."""
        folded = x.unflatten(-1, (self.parts, -1)).sum(-2) if self.parts > 1 else x
        return functional.linear(functional.linear(folded, self.A), self.scale * self.B.sum(0))


register("blocklora", BlockLoraConfig, BlockLoraDelta)
