"""An adapter of another format as one of PEFT."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import Borrowed, Origin, common_scale
from lora_squeeze.formats.peft import PeftFormat
from lora_squeeze.formats.peft_keys import PREFIX, Layout

_SAVED = ("embedding", "module to save", "bias")


def adopt(adapter: Adapter, base_name: str | None = None) -> Adapter:
    """The same updates as a PEFT adapter.

    Args:
        adapter: of another format, with the names that its modules have in the model that PEFT wraps.
        base_name: name or path of the base model, for the configuration; readers that find the base by it need it.

    Returns:
        A lazy Adapter that saves as a PEFT folder. target_modules names every module in full.

    Raises:
        LoraSqueezeError: experts, whose parameter a PEFT file does not name; a carried tensor without a place there.
    """
    if isinstance(adapter.format, PeftFormat):  # of another method: read with the names and settings of a LoRA
        return replace(adapter, format=replace(adapter.format, name="peft"))
    modules = {name: _module(module) for name, module in adapter.modules.items()}
    extras, keys = {}, {}
    for extra in adapter.extras.values():
        key = PREFIX + extra.name
        if extra.kind not in _SAVED or "." not in extra.name:
            raise LoraSqueezeError(
                f"{extra.name}: PEFT has no place for this tensor ({extra.kind}: {extra.cause}); leave it out with "
                "extras=False (--without-extras)"
            )
        extras[key], keys[key] = replace(extra, name=key), extra.name
    saved = sorted({name.removeprefix(PREFIX).rpartition(".")[0] for name in extras})
    return replace(
        adapter,
        modules=modules,
        extras=extras,
        source=Borrowed(adapter, {name: Origin(name) for name in modules}, keys),
        format=PeftFormat(),
        config=_config(modules, base_name, saved),
        default_scale=common_scale(adapter),
        metadata={"format": "pt"},
        dropped=(),
        companions=(),
    )


def _module(module: Module) -> Module:
    if module.kind == "experts":
        raise LoraSqueezeError(
            f"{module.name}: stacked experts, whose place in a PEFT file depends on how the model declares its "
            "parameters; convert the other modules alone with exclude= (--exclude)"
        )
    layout = Layout(module.name, "", "", pattern=re.escape(module.name))
    return replace(module, group=None, floor=0, step=module.copies, layout=layout)


def _config(modules: dict[str, Module], base_name: str | None, saved: list[str]) -> dict[str, Any]:
    """What PEFT needs; r, alpha and the patterns are filled in on writing."""
    return {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "modules_to_save": saved or None,
        "peft_type": "LORA",
        "target_modules": sorted(modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }
