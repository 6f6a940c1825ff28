"""DiffoRA: a search for the layers that need an update at all (arXiv 2502.08905).

    dW = gamma alpha / r B A,   A (r, in), B (out, r); gamma is 0 or 1, one for each layer

While the search lasts, gamma is sigmoid(a) with a trained logit a, as in differentiable architecture search: a learns
on other data than the factors. Steps take turns, after a warm-up of the factors alone (while B = 0, no gradient reaches
a), and `phase` says whose turn it is:

    for step in range(total_steps):
        controller.before_forward()
        batch = next(gate_batches if controller.phase == "gates" else weight_batches)

In a trainer, which knows no phases, the turns split the stream of batches: that is a split of the data as long as the
search sees no example twice. On the same data, larger gates always win.

When the search is over, the `keep` largest gates of each block of the model are chosen. The factors begin anew there,
and the rest of the training is that of a LoRA on the chosen layers. With `share_unselected`, all other layers of one
kind and shape have one pair of factors in common, trained as one; without, they have none. `lora_config` gives the
result as a configuration of PEFT's own LoRA: to train that elsewhere, end the search with the training, `search=1`.

The gates need a learning rate of their own:

    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))

The authors have published no code. Ours: the sigmoid, one gate for each layer, the schedule, beginning anew, the form
of sharing, all default values; sure are the binary matrix of layers and kinds, its relaxation, and the two levels.

As a plain LoRA: exact at rank r; shared factors are copied into each layer. With distributed data parallel, set
`find_unused_parameters`: the gates rest after the search. The chosen layers are known by name: not where an adapter is
loaded under other names of layers (PEFT's `key_mapping`); convert it to a plain LoRA before.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register
from lora_squeeze.methods.control import Controller, controlled_by, deltas_of
from lora_squeeze.methods.ranks.parts import lora_pair, steps_of

_SCOPES = ("block", "model")


@dataclass
class DifforaConfig(AdapterConfig):
    """Configuration of DiffoRA.

    Args:
        r: rank of every pair, in the search and after it.
        alpha: default r, so that the scale is 1.
        keep: share of the layers that are chosen, of each block (rounded, one at least) or of the whole model.
        scope: "block", chosen among the layers with the same first number in their names; "model", among all.
        search: share of the steps that the search takes.
        warmup: share of the search in which the factors alone are trained; one step at least.
        share_unselected: the layers that are not chosen share factors rather than having none.
        restart: the factors begin anew after the search; else they go on, with the gate in B, and shared
            ones with those of the first layer of the kind.
        gates_lr: learning rate of the gates' logits in `parameter_groups`; the default, with its betas and weight
            decay, is what searches of architectures use.
        chosen: names of the chosen layers, written by the training when the search is over.
    """

    keep: float = 0.5
    scope: str = "block"
    search: float = 0.2
    warmup: float = 0.25
    share_unselected: bool = True
    restart: bool = True
    gates_lr: float = 3e-3
    chosen: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share above 0 and at most 1, got {self.keep}")
        if self.scope not in _SCOPES:
            raise ValueError(f"scope must be one of {', '.join(_SCOPES)}, got {self.scope!r}")
        if not 0 < self.search <= 1:
            raise ValueError(f"search must be a share above 0 and at most 1, got {self.search}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup must be a share from 0 to 1, got {self.warmup}")

    def own_settings(self, lr: float) -> dict[str, dict[str, Any]]:
        """Gates."""
        return {"a": {"lr": self.gates_lr, "betas": (0.5, 0.999), "weight_decay": 1e-3}}


class DifforaDelta(FactorDelta):
    """One layer; trained: B (out, r), A (r, in), and the gate's logit a.

    Attributes:
        chosen: the layer has factors of its own; None: the search is not over.
    """

    chosen: bool | None

    def __init__(self, site: Site, config: DifforaConfig) -> None:
        super().__init__(site, config)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.B, self.A = lora_pair(site, config)
        self.a = nn.Parameter(torch.zeros(1))
        self.chosen = None if config.chosen is None else site.name in config.chosen

    @property
    def idle(self) -> bool:
        """The search has left this layer without an update."""
        return self.chosen is False and not self.config.share_unselected

    @property
    def rank(self) -> int:  # type: ignore[override]
        """r; as a plain LoRA, no update at all is a pair of zeros."""
        return 1 if self.idle else int(self.config.r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) with scale and gate in it, and A (r, in); of rank 0 where there is no update."""
        if self.idle:
            return self.B[:, :0], self.A[:0]
        gate = torch.sigmoid(self.a) if self.chosen is None else 1.0
        return gate * self.scale * self.B, self.A


class DifforaController(Controller):
    """Gives each step to the gates or to the factors, and ends the search."""

    deltas: dict[str, DifforaDelta]

    def __init__(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default"
    ) -> None:  # fmt: skip
        super().__init__(model, total_steps, optimizer, adapter)
        self._unshared = {name: (delta.B, delta.A) for name, delta in self.deltas.items()}
        if self.config.chosen is not None:  # by an earlier training
            self._set(self.config.chosen)

    @property
    def phase(self) -> str:
        """What the present step trains: "weights", the factors and all else, or "gates"."""
        waited = self.steps_done - max(1, steps_of(self.config.warmup, self._length))
        gates = self.config.chosen is None and waited >= 0 and waited % 2 == 0
        return "gates" if gates and self.steps_done < self._length else "weights"

    def _before_step(self) -> None:
        """Leave the gradients of one side alone: without a gradient, an optimiser passes a parameter by."""
        gates = {id(delta.a) for delta in self.deltas.values()}
        for parameter in self.model.parameters():
            if (id(parameter) in gates) != (self.phase == "gates"):
                parameter.grad = None

    def _after_step(self) -> None:
        """Choose when the search is over."""
        super()._after_step()
        if self.config.chosen is None and self.steps_done >= self._length:
            self._choose()

    def state_dict(self) -> dict[str, Any]:
        """The chosen layers."""
        return {**super().state_dict(), "chosen": self.config.chosen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the search, or with the chosen layers."""
        super().load_state_dict(state)
        if state["chosen"] is not None:
            self._set(list(state["chosen"]))
        elif self.config.chosen is not None:
            self._search_again()

    @property
    def _length(self) -> int:
        """Steps of the search."""
        return steps_of(self.config.search, self.total_steps)

    @torch.no_grad()
    def _choose(self) -> None:
        gates = {name: float(delta.a) for name, delta in self.deltas.items()}
        for name, delta in self.deltas.items():
            if not self.config.restart:
                delta.B.mul_(torch.sigmoid(delta.a))
                continue
            pair = lora_pair(delta.site, self.config, self.generator(name))
            for factor, value in zip((delta.B, delta.A), pair, strict=True):
                factor.copy_(value)
                if self.optimizer is not None:
                    self.optimizer.state.pop(factor, None)
        self._set(choose(gates, self.config.keep, self.config.scope))

    def _set(self, chosen: list[str]) -> None:
        self.config.chosen = chosen
        for name, delta in self.deltas.items():
            delta.chosen = name in chosen
        if self.config.share_unselected:
            for names in alike(self.deltas).values():
                first = self.deltas[names[0]]
                for name in names[1:]:
                    self.deltas[name].B, self.deltas[name].A = first.B, first.A

    def _search_again(self) -> None:
        """Every layer has a gate and factors of its own, as before the choice; they are yet to be loaded."""
        self.config.chosen = None
        for name, delta in self.deltas.items():
            delta.chosen = None
            delta.B, delta.A = self._unshared[name]


def choose(gates: Mapping[str, float], keep: float, scope: str = "block") -> list[str]:
    """The layers with the largest gates, in the order of the model; of equal ones, the first.

    Args:
        gates: layer -> a number that grows with its gate.
        keep: share of the layers.
        scope: "block" or "model", among which layers.
    """
    groups = defaultdict(list)
    for name in gates:
        groups[kind_and_block(name)[1] if scope == "block" else ""].append(name)
    chosen = set[str]()
    for names in groups.values():
        count = max(1, math.floor(keep * len(names) + 0.5))
        chosen |= set(sorted(names, key=lambda name: -gates[name])[:count])
    return [name for name in gates if name in chosen]


def kind_and_block(name: str) -> tuple[str, str]:
    """ "layers.3.mlp.up_proj" is of the kind "layers.*.mlp.up_proj" and stands in the block "layers.3"."""
    block = re.match(r"(?:.*?\.)??\d+(?=\.|$)", name)
    if block is None:
        return name, ""
    return re.sub(r"\d+$", "*", block[0]) + name[block.end() :], block[0]


def alike(deltas: Mapping[str, DifforaDelta]) -> dict[tuple[Any, ...], list[str]]:
    """The layers that are not chosen, by kind and shape."""
    groups = defaultdict(list)
    for name, delta in deltas.items():
        if delta.chosen is False:
            groups[kind_and_block(name)[0], delta.site.out_features, delta.site.in_features].append(name)
    return dict(groups)


def lora_config(model: nn.Module, adapter: str = "default") -> Any:
    """The result of a search as a configuration of PEFT's own LoRA.

    Args:
        model: a PEFT model whose search is over.
        adapter: its name.

    Returns:
        A LoraConfig, for the chosen layers; with `share_unselected` for all, since PEFT shares none: `factors` has the
        copies.

    Raises:
        LoraSqueezeError: the search is not over.
    """
    from peft import LoraConfig

    config, deltas = _over(model, adapter)
    return LoraConfig(
        r=config.r,
        lora_alpha=config.r if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=[name for name, delta in deltas.items() if not delta.idle],
        modules_to_save=config.modules_to_save,
        bias=config.bias.replace("diffora", "lora"),
        task_type=config.task_type,
    )


def factors(model: nn.Module, adapter: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> B and A of the plain LoRA with `lora_config`: copies, without the scale.

    Raises:
        LoraSqueezeError: the search is not over.
    """
    _, deltas = _over(model, adapter)
    return {
        name: (delta.B.detach().clone(), delta.A.detach().clone()) for name, delta in deltas.items() if not delta.idle
    }


def _over(model: nn.Module, adapter: str) -> tuple[Any, dict[str, DifforaDelta]]:
    deltas = deltas_of(model, adapter)
    if any(delta.chosen is None for delta in deltas.values()):
        raise LoraSqueezeError("the search is not over: no layers are chosen yet; train to its end first")
    model_with_config: Any = model
    return model_with_config.peft_config[adapter], deltas


register("diffora", DifforaConfig, DifforaDelta)
controlled_by("diffora", DifforaController)
