"""The layer that PEFT puts in the place of a linear layer: y = W x + b + sum of the active updates."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.quantization_utils import resolve_quantization_backend
from torch import Tensor, nn

from lora_squeeze.methods.adapters.engine.delta import Delta, Shared, Site
from lora_squeeze.methods.control import warn_if_uncontrolled
from lora_squeeze.methods.seeds import usual_defaults


class DeltaLayer(nn.Module, BaseTunerLayer):
    """A linear layer with adapters of one method; `register` makes a subclass for each.

    Attributes:
        delta_class: computes the update.
        adapter_layer_names: the one dictionary of deltas, named after the method.
    """

    delta_class: type[Delta]

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name
        setattr(self, self.adapter_layer_names[0], nn.ModuleDict())
        self._undo: dict[str, tuple[Callable[[Tensor], None] | None, Tensor | None]] = {}
        self._disable_adapters = False
        self.merged_adapters = []
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        shape = features(self.get_base_layer())
        if shape is None:
            raise TypeError(
                f"{name}: {self.delta_class.__name__} adapts nn.Linear and Conv1D, found {type(base_layer).__name__}; "
                "leave it out of target_modules"
            )
        self.in_features, self.out_features = shape

    @property
    def deltas(self) -> nn.ModuleDict:
        """Adapter -> its update."""
        found: nn.ModuleDict = getattr(self, self.adapter_layer_names[0])
        return found

    def update_layer(self, adapter_name: str, config: Any, shared: Shared) -> None:
        """Make an adapter's update, or make it anew; it trains or not as the base layer does."""
        with usual_defaults():
            self.deltas[adapter_name] = self.delta_class(Site(self, shared), config)
        self.train(self.get_base_layer().training)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @property
    def moves_bias(self) -> bool:
        """Whether an update changes the bias too."""
        return any(delta.moves_bias for delta in self.deltas.values())

    def _turned(self) -> bool:
        """Whether the weight stands as (in, out)."""
        return type(self.get_base_layer()).__name__ == "Conv1D"

    def _weight(self) -> Tensor:
        _unpack(self.get_base_layer())
        weight = self.get_base_weight()
        return weight.T if self._turned() else weight

    @torch.no_grad()
    def own_weight(self) -> Tensor:
        """The weight without what is merged into it; a new tensor where something is."""
        weight = self._weight()
        if self.merged_adapters:
            weight = weight.clone()
            for name in reversed(self.merged_adapters):
                self._undo_of(name)(weight)
        return weight

    def own_bias(self) -> Tensor | None:
        """The bias without what is merged into it."""
        before = (self._undo[name][1] for name in self.merged_adapters)
        layer: Any = self.get_base_layer()
        found: Tensor | None = next((bias for bias in before if bias is not None), layer.bias)
        return found

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW of an adapter, in the layout of the base weight."""
        delta: Any = self.deltas[adapter]
        found: Tensor = delta.weight()
        return found.T if self._turned() else found

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's own `convert_to_lora` takes dW from here; it knows no bias."""
        delta: Any = self.deltas[adapter_name]
        return bool(delta.config.static and not delta.moves_bias)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the updates to the base weight.

        Args:
            safe_merge: look for NaN and infinities first; raises ValueError and leaves weight and bias as they were.
            adapter_names: which; default the active ones.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.deltas:
                continue
            delta: Any = self.deltas[name]
            if safe_merge and not self._finite_with(delta):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._undo[name] = self._change(delta.merge_into), self._change_bias(delta)
            self.merged_adapters.append(name)

    def _finite_with(self, delta: Any) -> bool:
        """Whether weight and bias would be numbers with this update in them."""
        layer = self.get_base_layer()
        parts: list[Any] = [(self._weight(), delta.weight()), (getattr(layer, "bias", None), delta.bias())]
        return all((old + new.to(old.dtype)).isfinite().all() for old, new in parts if new is not None)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take the updates out again, the last one first; exactly where the method can."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._change(self._undo_of(name))
            _, bias = self._undo.pop(name)
            if bias is not None:
                base: Any = self.get_base_layer()
                base.bias.copy_(bias)

    def _undo_of(self, name: str) -> Callable[[Tensor], Any]:
        """What takes a merged update out of a weight."""
        delta: Any = self.deltas[name]
        return self._undo[name][0] or (lambda weight: weight.sub_(delta.weight().to(weight.dtype)))

    def _change(self, change: Callable[[Tensor], Any]) -> Any:
        """Let the base weight be changed in place; a quantised one is quantised anew."""
        if self.quantization_backend is None:
            return change(self._weight())
        _unpack(self.get_base_layer())
        weight = self.get_base_weight()
        result = change(weight.T if self._turned() else weight)
        self.set_base_weight(weight)
        return result

    def _change_bias(self, delta: Any) -> Tensor | None:
        """Add the change of the bias; what the bias was before, None where nothing changes."""
        change = delta.bias()
        if change is None:
            return None
        layer: Any = self.get_base_layer()
        before: Tensor = layer.bias.clone()
        layer.bias.add_(change.to(before.dtype))
        return before

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """y = W x + b + sum of the updates of the active adapters."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.deltas]
        if self.disable_adapters or self.merged:
            names = []
        active: list[Any] = [self.deltas[name] for name in names]
        if self.training and torch.is_grad_enabled():
            for name, delta in zip(names, active, strict=True):
                warn_if_uncontrolled(delta.config, name)
        if len(active) == 1 and active[0].replaces and self.quantization_backend is None:
            whole: Tensor = active[0].replaced(x, self.base_layer)
            return whole
        base_output: Tensor = self.base_layer(x, *args, **kwargs)
        result = base_output
        for delta in active:
            seen = delta.dropout(self._cast_input_dtype(x, delta.dtype))
            result = result + delta(seen, base_output).to(result.dtype)
        return result

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].removesuffix('_delta')}.{super().__repr__()}"


def _unpack(layer: Any) -> None:
    """Where bitsandbytes has packed a 4-bit weight for inference on a CPU, which PEFT cannot read, take that back."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        layer.state_dict()  # does it, in place; the next forward pass packs again


def features(layer: nn.Module) -> tuple[int, int] | None:
    """in_features and out_features of a linear layer, quantised or not; None: it is something else."""
    if type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        weight: Any = layer.weight
        return int(weight.shape[0]), int(weight.shape[1])
    if isinstance(layer, nn.Linear) or type(layer).__name__.endswith("Linear"):
        columns, rows = getattr(layer, "in_features", None), getattr(layer, "out_features", None)
        return (columns, rows) if isinstance(columns, int) and isinstance(rows, int) else None
    return None
