"""Nested updates: the first k components of trained factors are a LoRA of rank k, for every k.

    dW_k = s_k B[:, :k] A[:k]        A (r, in), B (out, r), s_k as the method says

Which k is deployed stands in the configuration, `deploy_rank`, and is chosen after the training:

    set_rank(model, 4)
    model.save_pretrained("my-adapter")     and `lora-squeeze convert` makes a plain LoRA of rank 4 of it

All ranks share the numbers: `set_rank` changes what the layers read, and nothing is computed or lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site
from lora_squeeze.methods.control import own_config
from lora_squeeze.methods.ranks.parts import lora_pair


@dataclass
class NestedConfig(AdapterConfig):
    """What methods with a deployed prefix are configured with.

    Args:
        deploy_rank: k of what is deployed: evaluated, merged, converted. None: the largest that was trained.
    """

    deploy_rank: int | None = None
    least_rank: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.deploy_rank is not None and not self.least_rank <= self.deploy_rank <= self.r:
            raise ValueError(f"deploy_rank must be from {self.least_rank} to r = {self.r}, got {self.deploy_rank}")


class NestedDelta(FactorDelta):
    """One layer; trained: B (out, r), A (r, in).

    Attributes:
        rank: of what is deployed.
    """

    rank: int

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__(site, config)
        self.B, self.A = lora_pair(site, config)
        self.deploy(config.deploy_rank)

    def deploy(self, rank: int | None) -> None:
        """Deploy the first `rank` components."""
        self.rank = self.config.r if rank is None else rank

    def scale_at(self, rank: int) -> float:
        """s_k."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of what is deployed, in training mode too: B (out, rank) with the scale in it, and A (rank, in)."""
        return self.scale_at(self.rank) * self.B[:, : self.rank], self.A[: self.rank]


def set_rank(model: nn.Module, rank: int | None, adapter: str = "default") -> None:
    """Choose the rank that is deployed, in all layers.

    Args:
        model: a PEFT model of a nested method.
        rank: from 1 to r; None: the largest that was trained. Where the method says so, 0 has a meaning of its own.
        adapter: name of the adapter.

    Raises:
        LoraSqueezeError: no such adapter, a method without prefixes, a rank that it does not have, or an adapter that
            is merged: what is merged could then not be taken out any more.

    Example:
        >>> set_rank(model, 4)  # doctest: +SKIP
    """
    configs: Any = getattr(model, "peft_config", None) or {}
    config = configs.get(adapter)
    if not isinstance(config, NestedConfig):
        kind = "there is none" if config is None else f"it is {getattr(config.peft_type, 'value', config.peft_type)}"
        raise LoraSqueezeError(f"adapter {adapter!r} must be of a method with nested ranks, {kind}")
    if rank is not None and not config.least_rank <= rank <= config.r:
        raise LoraSqueezeError(f"rank must be from {config.least_rank} to r = {config.r}, got {rank}")
    layers: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "deltas", None), nn.ModuleDict)]
    layers = [layer for layer in layers if adapter in layer.deltas]
    if any(adapter in layer.merged_adapters for layer in layers):
        raise LoraSqueezeError(f"adapter {adapter!r} is merged; call unmerge_adapter() before another rank is chosen")
    own_config(model, adapter).deploy_rank = rank
    for layer in layers:
        layer.deltas[adapter].deploy(rank)
