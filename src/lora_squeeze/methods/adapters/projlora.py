"""Uni-LoRA with a choice of projections: all factors of the network from one vector (arXiv 2506.00799, NeurIPS 2025).

    dW_l = B_l A_l,  all A_l (r, in) and B_l (out, r) together = P theta

theta (length) is all that is trained and stored, once for all layers; P is fixed and comes from the seed:
`unilora_projections` has the paper's and those that the paper compares it with. PEFT's own `UniLoraConfig` is the
paper's method and the one to use for it; this one is for the comparison, with the same vector, order and start.

theta is uniform in +-bound: neither A nor B is zero, so the function is not quite the base model's at the start. With
theta at zero there would be no gradient at all. There is no factor alpha / r. Weight decay on theta shrinks all layers
at once.

The order of the layers is that of the model's modules: it belongs to the format, as does the seed. All adapted layers
must be on one device.

As a plain LoRA: exact at rank r; it then has all the numbers of the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register
from lora_squeeze.methods.adapters.unilora_projections import PROJECTIONS, Projection
from lora_squeeze.methods.seeds import usual_defaults


@dataclass
class ProjLoraConfig(AdapterConfig):
    """Configuration of Uni-LoRA with a choice of projections.

    Args:
        length: d, numbers trained. Default 23040, as the authors for RoBERTa; 524288 for models of 7 billion.
        projection: "onehot" (the paper's), "layerwise", "nonuniform", "nonisometric", "gaussian" or "fastfood".
        bound: theta is uniform in +-bound at the start. Default 0.02.
        r: of the factors. Default 4.
        alpha: default r, so that there is no factor.
    """

    r: int = 4
    length: int = 23040
    projection: str = "onehot"
    bound: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length < 2:
            raise ValueError(f"length must be a whole number from 2, got {self.length}")
        if self.projection not in PROJECTIONS:
            raise ValueError(f"projection must be one of {', '.join(PROJECTIONS)}, got {self.projection!r}")
        if self.bound <= 0:
            raise ValueError(f"bound must be above 0, since nothing moves from zero; got {self.bound}")


@dataclass
class _Layout:
    """What the layers of one adapter have in common: where each stands in theta_D, and P.

    Args:
        sizes: of the layers, in their order.
        projection: made when it is first needed, since all layers must be known.
    """

    sizes: list[int] = field(default_factory=list)
    projection: Projection | None = None

    def __deepcopy__(self, memo: Any) -> _Layout:
        """Copies of a model share it: it does not change any more."""
        return self


class ProjLoraDelta(FactorDelta):
    """One layer; trained: theta (length), which the first layer has and the others read."""

    def __init__(self, site: Site, config: ProjLoraConfig) -> None:
        super().__init__(site, config)
        self.rank = config.r
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.layout: _Layout = self.share("layout", _Layout)
        first: ProjLoraDelta = self.share("first", lambda: self)
        self._first = [first]  # in a list, so that it is no part of this module
        self.number = len(self.layout.sizes)
        self.layout.sizes.append(config.r * (site.in_features + site.out_features))
        if first is self:
            self.theta = nn.Parameter(self._drawn())

    @property
    def vector(self) -> nn.Parameter:
        """Theta. PEFT exchanges parameters when it casts them, so it is looked up each time."""
        return self._first[0].theta

    @property
    def dtype(self) -> torch.dtype:
        """Of theta."""
        return self.vector.dtype

    def _drawn(self) -> Tensor:
        config: ProjLoraConfig = self.config
        if not config.init_weights:
            return torch.randn(config.length)
        return (torch.rand(config.length) * 2 - 1) * config.bound

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) and A (r, in), picked out of P theta."""
        layout, config = self.layout, self.config
        if layout.projection is None:
            with usual_defaults():
                layout.projection = PROJECTIONS[config.projection](layout.sizes, config.length, config.seed)
        numbers = layout.projection.apply(self.vector, sum(layout.sizes[: self.number]), layout.sizes[self.number])
        A, B = numbers.split([config.r * self.site.in_features, config.r * self.site.out_features])
        return self.scale * B.view(-1, config.r), A.view(config.r, -1)


register("projlora", ProjLoraConfig, ProjLoraDelta)
