"""Make PEFT know a method."""

from __future__ import annotations

import sys
import weakref
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING, register_peft_method
from peft.utils.peft_types import PeftType
from torch import nn

from lora_squeeze.methods.adapters.engine.config import AdapterConfig
from lora_squeeze.methods.adapters.engine.delta import Delta, Shared
from lora_squeeze.methods.adapters.engine.layer import DeltaLayer


class DeltaModel(BaseTuner):
    """The tuner of PEFT that puts the layers in; `register` makes a subclass for each method."""

    target_module_mapping: Any = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    tuner_layer_cls: Any
    shared: Shared  # of the adapter that is being made

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Make an adapter's layers, which share nothing with those of an earlier adapter."""
        self.shared = Shared(model=weakref.ref(model))
        try:
            super().inject_adapter(model, *args, **kwargs)
        finally:
            del self.shared["model"]
            del self.shared

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: Any, target_name: str, parent: nn.Module, current_key: str,
        parameter_name: str | None = None,
    ) -> None:  # fmt: skip
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config, self.shared)
            return
        layer = self.tuner_layer_cls(target, current_key)
        layer._active_adapter = self.active_adapter
        layer.update_layer(adapter_name, peft_config, self.shared)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def register(name: str, config: type[AdapterConfig], delta: type[Delta]) -> None:
    """Make a method known to PEFT: to `get_peft_model`, `PeftModel.from_pretrained` and all that builds on them.

    Args:
        name: in lower case; in capitals it is the `peft_type` in adapter_config.json.
        config: its configuration.
        delta: its update.

    Notes:
        PEFT names its methods in an enumeration, to which the name is added, so that files say what they are. Import
        the method's module before an adapter of it is loaded; `lora_squeeze.methods.adapters` imports them all. A
        method that PEFT has under the same name stays PEFT's, and configuring ours is refused.
    """
    config.method = name
    config.taken = name.upper() in PeftType.__members__
    if config.taken:
        return
    _add_type(name.upper())
    prefix = f"{name}_"
    # PEFT knows a layer that stands for a linear one by "Linear" in the name of its class.
    layer = _made("Linear", DeltaLayer, delta, delta_class=delta, adapter_layer_names=(f"{prefix}delta",))
    model = _made("Model", DeltaModel, delta, prefix=prefix, tuner_layer_cls=layer)
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=prefix)


def _made(kind: str, base: type, delta: type[Delta], **members: Any) -> type:
    """A class of a method as if it were written in the method's module, so that pickle finds it there."""
    made = type(f"{delta.__name__}{kind}", (base,), {"__module__": delta.__module__, **members})
    setattr(sys.modules[delta.__module__], made.__name__, made)
    return made


def _add_type(name: str) -> None:
    member: Any = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType.__members__)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    if not hasattr(PeftType, name):  # from Python 3.12 on names are attributes of the class
        type.__setattr__(PeftType, name, member)
