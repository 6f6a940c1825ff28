"""A live adapter of another method than LoRA becomes a plain LoRA: the same model, optimiser and adapter name.

    dW of each layer = U S V^T -> the best B A of rank k, and from then on a LoRA of scale 1

The layers of the method are taken off the base model and PEFT's LoRA layers put on it. In the optimiser the new factors
take the place of the method's parameters, in the group of the first one; they have no state yet. Learning rate and
schedule go on, which suits methods whose rates are those of a LoRA; others are better squeezed after training.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.data_aware import base_name
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank
from lora_squeeze.training.live import LiveModule, holder_of, live_modules, sync_config
from lora_squeeze.training.optimizer_state import check_optimizer, unwrapped

_KEPT = (  # settings of a method that a LoraConfig has too
    "task_type", "base_model_name_or_path", "revision", "auto_mapping", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class OtherModule:
    """One layer of an adapter of another method; it has of `LiveModule` what the choice of ranks asks for.

    Args:
        name: dotted path in the base model.
        path: name of the layer in the live model.
        layer: PEFT's, or this package's.
        adapter: name of the adapter.
        kind: PEFT's name of the method.
    """

    name: str
    path: str
    layer: Any
    adapter: str
    kind: str

    step = 1
    group: str | None = None

    @property
    def width(self) -> int:
        """Bound of the rank of dW."""
        return self._shape[0]

    @property
    def cost(self) -> int:
        """Numbers in the factors of a LoRA per rank."""
        return self._shape[1] + self._shape[2]

    def rank(self) -> int:
        """Bound of the rank of dW."""
        return self.width

    @torch.no_grad()
    def update(self) -> LowRank:
        """dW as factors, in float32 at least."""
        B, A = self._factors()
        wide = torch.promote_types(B.dtype, torch.float32)
        return LowRank(B.to(wide), A.to(wide), 1.0)

    @torch.no_grad()
    def bias(self) -> Tensor | None:
        """The change of the layer's bias, None where the method makes none."""
        if self._delta is not None:
            found: Tensor | None = self._delta.bias()
            return found
        return self._merged.bias() if self._merged.moves_bias else None

    @property
    def turned(self) -> bool:
        """Whether the weight stands as (in, out)."""
        return type(self.layer.get_base_layer()).__name__ == "Conv1D"

    @property
    def _delta(self) -> Any:
        """The update, where the method is one of this package."""
        deltas: Any = getattr(self.layer, "deltas", None)
        return None if deltas is None else deltas[self.adapter]

    @property
    def _shape(self) -> tuple[int, int, int]:
        """Rank, out and in."""
        if (delta := self._delta) is not None:
            out, columns = self.layer.out_features, self.layer.in_features
            rank = delta.width if hasattr(delta, "width") else delta.rank
            return min(rank or out, out, columns), out, columns
        module = self._merged.module
        return module.rank, module.out_features, module.in_features

    @cached_property
    def _merged(self) -> Any:
        """As when the adapter is converted from a file: a copy of the layer is merged when factors are asked for."""
        from lora_squeeze.formats.peft_methods.table import row_of
        from lora_squeeze.formats.peft_methods.with_base import live_layer

        row, weight = row_of({"peft_type": self.kind}), self.layer.get_base_layer().weight.detach()
        if row.route == "impossible":
            raise LoraSqueezeError(f"{row.name} cannot become a LoRA: {row.why}")
        found = live_layer(self.name, self.layer, weight, row, torch.float32, self.adapter)
        if found.module.kind != "linear":
            raise LoraSqueezeError(
                f"{self.name}: {row.name} on a layer of kind {found.module.kind} cannot become a LoRA in place; save "
                "the adapter and convert the folder: lora-squeeze convert"
            )
        return found

    def _factors(self) -> tuple[Tensor, Tensor]:
        delta = self._delta
        if delta is None or hasattr(delta, "factors"):
            B, A = (self._merged if delta is None else delta).factors()
            if not B.shape[1]:  # no update at all, such as where every gate is closed: as a LoRA, a pair of zeros
                return B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1])
            return B, A
        dW: Tensor = delta.weight()
        eye = torch.eye(min(dW.shape), dtype=dW.dtype, device=dW.device)
        return (dW, eye) if dW.shape[1] == len(eye) else (eye, dW)


STATISTICS = "statistics of the data are those of LoRA layers; squeeze this adapter without them"
AnyModule = LiveModule | OtherModule


def is_other(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter is of another method than LoRA."""
    configs = holder_of(model).peft_config
    return adapter in configs and _kind(configs[adapter]) != "LORA"


def other_modules(model: nn.Module, adapter: str) -> list[OtherModule]:
    """The layers of an adapter of another method, in the model's order.

    Raises:
        LoraSqueezeError: no PEFT model, several adapters, merged weights, or an update that is no change of a weight.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    holder = holder_of(model)
    kind = _kind(holder.peft_config[adapter])
    if not isinstance(holder, PeftModel):
        raise LoraSqueezeError(
            f"{type(holder).__name__} has a {kind} adapter that cannot become a LoRA in place; make the model with "
            "peft.get_peft_model"
        )
    if len(holder.peft_config) > 1:
        raise LoraSqueezeError(
            f"{adapter!r} is of {kind} and cannot become a LoRA beside other adapters; call delete_adapter on them"
        )
    if not getattr(holder.peft_config[adapter], "static", True):
        raise LoraSqueezeError(
            f"{adapter!r} is of {kind}, whose update depends on the input; fix it first, see its module"
        )
    found = []
    for path, layer in holder.named_modules():
        if isinstance(layer, BaseTunerLayer) and _has(layer, adapter):
            if layer.merged:
                raise LoraSqueezeError(
                    f"{base_name(path)}: adapters are merged into the base weights; call unmerge_adapter() first"
                )
            found.append(OtherModule(base_name(path), path, layer, adapter, kind))
    if not found:
        raise LoraSqueezeError(f"adapter {adapter!r} has no layer in the model that could become a LoRA")
    return found


def modules_of(model: nn.Module, adapter: str) -> list[LiveModule] | list[OtherModule]:
    """The layers of an adapter, of LoRA or of another method.

    Raises:
        LoraSqueezeError: as `live_modules` and `other_modules`.
    """
    return other_modules(model, adapter) if is_other(model, adapter) else live_modules(model, adapter)


def become_lora(
    model: nn.Module,
    modules: Sequence[OtherModule],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    optimizer: Any = None,
) -> None:
    """Put LoRA layers in the place of an adapter's own, and their factors into the optimiser.

    Args:
        model: the model, wrapped or not.
        modules: all layers of the adapter.
        factors: name of the layer -> B (out, k) and A (k, in), with dW = B A.
        optimizer: takes the factors in the place of the method's parameters.

    Raises:
        LoraSqueezeError: an optimiser that cannot exchange parameters, targets that mean other layers to a LoRA.
            Nothing has changed then.
    """
    holder, adapter = holder_of(model), modules[0].adapter
    biases = {module.name: module.bias() for module in modules}
    before = {id(p) for p in holder.parameters() if p.requires_grad}
    old = learned(model, modules)
    if optimizer is not None:
        check_optimizer(unwrapped(optimizer), old, "reset")
    dtype, trained = (old[0].dtype, True) if old else (torch.float32, False)
    config = _lora_config(holder.peft_config[adapter], modules, factors, biases)
    _put_layers(holder, adapter, modules, config)
    for parameter in holder.parameters():
        parameter.requires_grad_(id(parameter) in before)
    live = live_modules(model, adapter)
    for module in live:
        B, A = (factor.to(module.B.device, dtype).contiguous() for factor in factors[module.name])
        module.put(nn.Parameter(A, requires_grad=trained), nn.Parameter(B, requires_grad=trained))
        own, bias = module.layer.lora_B[adapter], biases[module.name]
        if own.bias is not None:
            change = torch.zeros_like(own.bias) if bias is None else bias
            own.bias = nn.Parameter(change.to(module.B.device, dtype), requires_grad=trained)
    sync_config(model, adapter, live)
    if optimizer is not None:
        new = [p for m in live for p in m.layer.parameters() if p.requires_grad and id(p) not in before]
        _exchange(unwrapped(optimizer), old, new)


def _put_layers(holder: Any, adapter: str, modules: Sequence[OtherModule], config: Any) -> None:
    """The base model's layers in the place of the method's, and PEFT's LoRA layers on them."""
    from peft.tuners.lora import LoraModel

    before = holder.base_model
    inner = before.model
    places = [(holder.get_submodule(m.path.rpartition(".")[0]), m.path.rpartition(".")[2], m.layer) for m in modules]
    for owner, last, layer in places:
        setattr(owner, last, layer.base_layer)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT tells of a configuration that is left over in the model
            holder.base_model = LoraModel(inner, {adapter: config}, adapter)
        if {m.path for m in live_modules(holder, adapter)} != {m.path for m in modules}:
            raise LoraSqueezeError(
                f"PEFT puts a LoRA on other layers than a {modules[0].kind} with these target_modules; name the layers "
                "in full"
            )
    except BaseException:
        holder.base_model, inner.peft_config = before, before.peft_config
        for owner, last, layer in places:
            setattr(owner, last, layer)
        raise
    holder.peft_type = config.peft_type


def _lora_config(
    config: Any,
    modules: Sequence[OtherModule],
    factors: Mapping[str, tuple[Tensor, Tensor]],
    biases: Mapping[str, Tensor | None],
) -> Any:
    """Of a LoRA with the method's targets, at the largest rank and scale 1."""
    from peft import LoraConfig

    kept = {name: getattr(config, name) for name in _KEPT if getattr(config, name, None) is not None}
    if "target_modules" not in kept:
        kept["target_modules"] = [module.name for module in modules]
    told = str(getattr(config, "bias", "none"))
    rank = max(B.shape[1] for B, _ in factors.values())
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=float(getattr(config, "dropout", 0.0) or 0.0),
        bias=told if told in ("none", "all") else "lora_only",  # type: ignore[arg-type]
        lora_bias=any(bias is not None for bias in biases.values()),
        fan_in_fan_out=all(module.turned for module in modules),
        inference_mode=config.inference_mode,
        **kept,
    )


def _exchange(optimizer: torch.optim.Optimizer, old: Sequence[nn.Parameter], new: Sequence[nn.Parameter]) -> None:
    """New parameters in the place of the first old one; the others leave their groups, which stay even when empty."""
    gone = {id(parameter) for parameter in old}
    groups = [group for group in optimizer.param_groups if any(id(p) in gone for p in group["params"])]
    for group in groups:
        first = next(place for place, p in enumerate(group["params"]) if id(p) in gone)
        added = list(new) if group is groups[0] else []
        group["params"][first:] = [*added, *(p for p in group["params"][first:] if id(p) not in gone)]
    for parameter in old:
        optimizer.state.pop(parameter, None)


def learned(model: nn.Module, modules: Sequence[OtherModule]) -> list[nn.Parameter]:
    """What the method trains: of its layers, but not the base layers', and what its layers share in their tuner."""
    inner: Any = holder_of(model).base_model
    stays = {id(p) for m in modules for p in m.layer.base_layer.parameters()}
    own = [p for m in modules for p in m.layer.parameters()]
    shared = [p for name, child in inner.named_children() if name != "model" for p in child.parameters()]
    found = {id(p): p for p in (*own, *shared) if p.requires_grad and id(p) not in stays}
    return list(found.values())


def _has(layer: Any, adapter: str) -> bool:
    """Whether a layer has this adapter; where numbers are common to all layers, only one of them has parameters."""
    return any(adapter in getattr(layer, name, ()) for name in layer.adapter_layer_names)


def _kind(config: Any) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))
