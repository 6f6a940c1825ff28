"""RandLoRA at lower ranks and equal size: what its full rank is worth (arXiv 2502.00987, ICLR 2025, ablations).

    dW = s * sum over groups g of (sum_{j in g} B_j diag(lambda_j)) (sum_{j in g} A_j diag(gamma_j))

B_j (larger side, r) and A_j (r, smaller side), j = 1 ... n = ceil(min(out, in) / r), are random and frozen; lambda
(n, r), which begins at 0, and gamma (n, min(out, in)), which begins at 1 / max(n, min(out, in)), are trained: as many
numbers as RandLoRA's, whatever `together` is. With one basis in a group the rank is full; with all n in one it is r,
the paper's variant "a"; with two it is half. s = alpha / r / sqrt(n), alpha 2 r.

Which formula the paper's variant of half rank has is not known to us: groups of two are our reading. Each basis has an
A_j of its own here, since with one A for all the sums of a group would leave a single gamma. Bases are uniform, divided
by their standard deviation, as the authors' are, and come from the seed; layers of one shape have the same ones.

As a plain LoRA: exact at rank r * number of groups. Not for use beside comparisons: it costs as many frozen numbers as
W has for each side of a group, while PEFT's `RandLoraConfig` has the method itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register
from lora_squeeze.methods.seeds import seeded


@dataclass
class RandLoraRanksConfig(AdapterConfig):
    """Configuration of RandLoRA at lower ranks.

    Args:
        r: rank of one basis; a higher one means FEWER trained numbers. Default 8.
        together: bases in one product. Default None: all, so rank r; 2: half the rank; 1: full rank.
        alpha: the scale is alpha / r / sqrt(n); default 2 r, as the paper for language models.
    """

    together: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.together is not None and self.together < 1:
            raise ValueError(f"together must be a whole number from 1, got {self.together}")


class RandLoraRanksDelta(FactorDelta):
    """One layer; trained: lambda (n, r) and gamma (n, min(out, in))."""

    def __init__(self, site: Site, config: RandLoraRanksConfig) -> None:
        super().__init__(site, config)
        small, self.large = sorted((site.in_features, site.out_features))
        bases = math.ceil(small / config.r)
        self.together = min(config.together or bases, bases)
        rank = config.r * math.ceil(bases / self.together)
        self.rank = rank if rank < small else None
        self.scale = (2 * config.r if config.alpha is None else config.alpha) / config.r / math.sqrt(bases)
        start = torch.zeros if config.init_weights else torch.randn
        self.lambda_ = nn.Parameter(start(bases, config.r))
        self.gamma = nn.Parameter(torch.full((bases, small), 1 / max(bases, small)))

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r * groups) with the scale in it, and A (r * groups, in)."""
        tall = self._grouped(self._basis("B", self.large) * self.lambda_[:, None, :]).transpose(1, 2)
        flat = self._grouped(self._basis("A", self.gamma.shape[1]).transpose(1, 2) * self.gamma[:, None, :])
        large, small = tall.flatten(0, 1).T, flat.flatten(0, 1)
        if self.site.out_features >= self.site.in_features:
            return self.scale * large, small
        return self.scale * small.T, large.T

    def _basis(self, side: str, size: int) -> Tensor:
        """(n, size, r), the same for all layers of the shape."""
        shape = len(self.lambda_), size, self.config.r

        def draw() -> Tensor:
            generator = seeded(self.config.seed, "basis", side, *shape)
            drawn = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu") * 2 - 1
            return drawn * math.sqrt(3) if drawn.numel() == 1 else drawn / drawn.std()  # one has no deviation

        return self.shared_tensor((side, self.config.seed, *shape), draw)

    def _grouped(self, scaled: Tensor) -> Tensor:
        """Sums of the bases that go together, (groups, ...)."""
        return torch.stack([part.sum(0) for part in scaled.split(self.together)])


register("randloraranks", RandLoraRanksConfig, RandLoraRanksDelta)
