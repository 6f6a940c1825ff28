"""SoRA: a gate on each component of a LoRA, thresholded in every step until some are 0 (arXiv 2311.11696, EMNLP 2023).

    dW = alpha / r B diag(g) A,   A (r, in), B (out, r), g (r) trained, W frozen

The sum of the |g_i| is penalised by proximal steps. After each step of the optimiser,

    g <- T(g),   T(v) = sign(v) max(|v| - threshold, 0)

so that gates end at exactly 0 and components leave, in each layer as many as it can spare. A gate at 0 still has a
gradient and may come back; what it gates has none as long. `SoraDelta.kept` counts the open ones.

The paper's threshold is eta lambda, with the learning rate eta of the gates (`times_lr`); the authors' code has a
constant, and two more things the paper does not have: after the step it also zeroes what is then below the threshold
(`threshold_mode="official"`), and it adds l1 * mean |g| of all gates to the loss. A list of rising thresholds is the
paper's schedule: one after another, each for an equal part of the training.

In the authors' code, gates have an optimiser of their own, without weight decay; `control.parameter_groups` gives them
`gates_lr` and none:

    optimizer = torch.optim.AdamW(parameter_groups(model, lr=8e-4, weight_decay=0.1))

A and B begin as those of a LoRA, dW = 0. Gates begin at 1, which is ours: the authors draw them from N(0, 1)
(`gate_init="normal"`), and so begin with some that are nearly closed.

As a plain LoRA: exact at the number of open gates of each layer.

The threshold acts in every step, whatever the loss does. Adam moves a gate by up to its learning rate in a step however
small the gradient is, so that thresholds far below the rate close nothing and those of several rates close everything;
a constant threshold wins once the rate has fallen.

Not with gates of half precision, where 1 - 3e-4 is 1: no gate closes. PEFT keeps float32 unless it is told not to; the
controller warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register
from lora_squeeze.methods.control import Controller, controlled_by
from lora_squeeze.methods.ranks.parts import add_gradient, lora_pair

_MODES = ("soft", "official")
_INITS = ("ones", "normal")


@dataclass
class SoraConfig(AdapterConfig):
    """Configuration of SoRA.

    Args:
        r: rank with all gates open. Default 8, as the authors.
        alpha: default 2 r, the authors' 16 at r = 8. The scale stays alpha / r when gates close.
        threshold: what every step takes from each gate, or a list of rising ones. To be swept; the authors' runs have
            3e-4 and, as a list, 0 to 7e-4.
        threshold_mode: "soft", T above; "official", gates below twice the threshold become 0.
        times_lr: the threshold is that many times the gates' present learning rate: lambda of the paper. The
            controller then needs the optimiser.
        l1: weight of mean |g| in the loss. The authors' runs have 1e-3 and 10.
        gate_init: "ones" or "normal".
        gates_lr: learning rate of the gates in `parameter_groups`; default that of A and B.
    """

    threshold: float | list[float] = 3e-4
    threshold_mode: str = "soft"
    times_lr: bool = False
    l1: float = 0.0
    gate_init: str = "ones"
    gates_lr: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = self.thresholds()
        if not stages or not all(low <= high for low, high in pairwise([0.0, *stages])):
            raise ValueError(f"threshold must be 0 or more, or a list of such that never falls, got {self.threshold}")
        if self.threshold_mode not in _MODES:
            raise ValueError(f"threshold_mode must be one of {', '.join(_MODES)}, got {self.threshold_mode!r}")
        if self.gate_init not in _INITS:
            raise ValueError(f"gate_init must be one of {', '.join(_INITS)}, got {self.gate_init!r}")
        if self.l1 < 0:
            raise ValueError(f"l1 must be 0 or more, got {self.l1}")

    def own_settings(self, lr: float) -> dict[str, dict[str, Any]]:
        """Gates have no weight decay."""
        return {"gate": {"lr": lr if self.gates_lr is None else self.gates_lr}}

    def thresholds(self) -> list[float]:
        """Of all stages."""
        return list(self.threshold) if isinstance(self.threshold, list) else [self.threshold]


def shrunk(gates: Float[Tensor, " r"], threshold: float, mode: str = "soft") -> Float[Tensor, " r"]:
    """Gates after a proximal step.

    Args:
        gates: before it.
        threshold: 0 or more.
        mode: "soft", the minimiser of 1/2 |v - g|^2 + threshold |v|; "official", 0 where that is below the threshold.
    """
    found = functional.softshrink(gates, threshold)
    return found if mode == "soft" else torch.where(found.abs() < threshold, 0, found)


class SoraDelta(FactorDelta):
    """One layer; trained: A (r, in), B (out, r), gate (r)."""

    def __init__(self, site: Site, config: SoraConfig) -> None:
        super().__init__(site, config)
        self.scale = (2 * config.r if config.alpha is None else config.alpha) / config.r
        self.B, self.A = lora_pair(site, config)
        gate = torch.ones(config.r)
        if config.gate_init == "normal":
            gate = torch.randn(config.r)
        self.gate = nn.Parameter(gate)

    @property
    def kept(self) -> int:
        """Gates that are open."""
        return int(self.gate.count_nonzero())

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Gates that are open; as a plain LoRA, no update at all is a pair of zeros."""
        return max(self.kept, 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, kept) with gates and scale in it, and A (kept, in), of the open gates."""
        open_ones = self.gate != 0
        return self.B[:, open_ones] * (self.scale * self.gate[open_ones]), self.A[open_ones]

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """B (g A x), through all gates: closed ones have a gradient."""
        return functional.linear(functional.linear(x, self.A) * (self.scale * self.gate), self.B)


class SoraController(Controller):
    """Adds the loss's share of the gates, and thresholds them."""

    deltas: dict[str, SoraDelta]

    def __init__(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default"
    ) -> None:  # fmt: skip
        super().__init__(model, total_steps, optimizer, adapter)
        coarse = {str(d.gate.dtype): torch.finfo(d.gate.dtype).eps for d in self.deltas.values()}
        for dtype, step in coarse.items():
            if step > torch.finfo(torch.float32).eps:
                warnings.warn(
                    f"the gates of adapter {adapter!r} are {dtype}: steps and thresholds below {step / 4:.1g} are "
                    "rounded away at 1, so that no gate may ever close; leave autocast_adapter_dtype=True",
                    stacklevel=3,
                )

    def _before_step(self) -> None:
        """Add the gradient of l1 * mean |g|."""
        if self.config.l1:
            gates = [delta.gate for delta in self.deltas.values()]
            add_gradient(self.config.l1 * torch.cat([*gates]).abs().mean(), gates)

    @torch.no_grad()
    def _after_step(self) -> None:
        """Threshold all gates."""
        stages = self.config.thresholds()
        threshold = stages[min(self.steps_done * len(stages) // self.total_steps, len(stages) - 1)]
        for delta in self.deltas.values():
            taken = threshold * (self._rate(delta.gate) if self.config.times_lr else 1)
            delta.gate.copy_(shrunk(delta.gate, taken, self.config.threshold_mode))
        super()._after_step()

    def _rate(self, gate: nn.Parameter) -> float:
        groups: Sequence[dict[str, Any]] = getattr(self.optimizer, "param_groups", ())
        for group in groups:
            if any(parameter is gate for parameter in group["params"]):
                return float(group["lr"])
        raise LoraSqueezeError(
            "times_lr takes the gates' learning rate from the optimiser; give the one that trains them"
        )


register("sora", SoraConfig, SoraDelta)
controlled_by("sora", SoraController)
