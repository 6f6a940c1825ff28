"""Tensors beside the factors left out of an adapter: all of them, or those that the base model has too."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from lora_squeeze.adapter import Adapter
from lora_squeeze.base_figures import Weights, by_reason, compare_carried
from lora_squeeze.formats.peft import PeftFormat
from lora_squeeze.formats.peft_keys import PREFIX
from lora_squeeze.formats.peft_targets import Saved

# Setting of PEFT that a kind of tensor belongs to, and its value without any.
_SETTINGS: dict[str, tuple[str, Any]] = {
    "bias": ("bias", "none"),
    "lora bias": ("lora_bias", False),
    "trainable tokens": ("trainable_token_indices", None),
    "module to save": ("modules_to_save", None),
}


def without_extras(adapter: Adapter) -> Adapter:
    """The adapter without any tensor beside the factors."""
    if not adapter.extras:
        return adapter
    note = f"{len(adapter.extras)} tensors beside the factors are left out as asked ({next(iter(adapter.extras))})"
    return without(adapter, adapter.extras.keys(), note)


def without_equal(adapter: Adapter, base: Weights) -> Adapter:
    """The adapter without the tensors beside the factors that the base model has too, number for number.

    The base's are rounded to the dtype in the adapter first. What a name in PEFT's modules_to_save stands for goes as a
    whole or not at all, so that PEFT finds all that it asks for. What cannot be compared stays, and a note says so.

    Args:
        adapter: of which to leave them out.
        base: the base model's weights, of which those concerned are read once, piece by piece.
    """
    if not adapter.extras:
        return adapter
    carried, unmatched = compare_carried(adapter, base)
    equal = at_once(adapter, [tensor.name for tensor in carried if tensor.equal])
    size, stay = sum(adapter.extras[name].size_bytes for name in equal), len(adapter.extras) - len(equal)
    told = (
        f"{len(equal)} tensors beside the factors are left out, since {base.name} has them "
        f"({equal[0]}; {size:,} bytes); {stay} stay"
        if equal
        else f"none of the {stay} tensors beside the factors is left out: {base.name} has none of them"
    )
    return without(adapter, equal, told, *(f"not compared with the base, {line}" for line in by_reason(unmatched)))


def at_once(adapter: Adapter, names: Collection[str]) -> list[str]:
    """Those of the carried tensors that can leave: with all that one setting of PEFT stands for."""
    leaving = {*names}
    tokens = {name for name, extra in adapter.extras.items() if extra.kind == "trainable tokens"}
    for held in (tokens, *(_held(adapter, name) for name in _saved(adapter))):
        if not held <= leaving:
            leaving -= held
    return [name for name in adapter.extras if name in leaving]


def without(adapter: Adapter, names: Collection[str], *notes: str) -> Adapter:
    """The adapter without these carried tensors, and without the settings of PEFT that ask for them."""
    kept = {name: extra for name, extra in adapter.extras.items() if name not in names}
    settings: dict[str, Any] = {}
    if names and isinstance(adapter.format, PeftFormat):
        kinds = {extra.kind for extra in kept.values()}
        settings = {setting: bare for kind, (setting, bare) in _SETTINGS.items() if kind not in kinds}
        if "module to save" in kinds:
            settings["modules_to_save"] = [name for name in _saved(adapter) if not _held(adapter, name) & {*names}]
    return replace(adapter, extras=kept, config={**adapter.config, **settings}, notes=(*adapter.notes, *notes))


def _saved(adapter: Adapter) -> list[str]:
    """The names in PEFT's modules_to_save."""
    return list(adapter.config.get("modules_to_save") or ()) if isinstance(adapter.format, PeftFormat) else []


def _held(adapter: Adapter, name: str) -> set[str]:
    """The tensors that a name in modules_to_save stands for."""
    saved = Saved([name])
    kinds = {key: extra.kind for key, extra in adapter.extras.items()}
    return {key for key, kind in kinds.items() if kind == "module to save" and saved.holds(key.removeprefix(PREFIX))}
