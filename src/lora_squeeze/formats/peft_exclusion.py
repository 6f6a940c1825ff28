"""Modules left out of a PEFT adapter: what of the keys and of the configuration has to change with them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import Borrowed, Origin
from lora_squeeze.formats.peft_keys import NESTED, PREFIX
from lora_squeeze.formats.peft_targets import Targets


def without(adapter: Adapter, out: Collection[str]) -> Adapter:
    """The adapter without these modules, such that PEFT loads all that stays.

    PEFT puts a wrapper around every module, so that the keys of what is inside have a `.base_layer`: of a trained bias,
    of a saved embedding, and of the other parameters of the same experts. Without the wrapper they must not.

    Raises:
        LoraSqueezeError: one of two modules that PEFT wraps together, or whose parameters the file does not name.
    """
    modules = {name: module for name, module in adapter.modules.items() if name not in out}
    _check_attention(adapter, out)
    gone = {adapter.modules[name].layout.path for name in out}
    experts = [name for name in out if adapter.modules[name].kind == "experts"]
    keys = {}
    for key, extra in adapter.extras.items():
        if extra.module not in out:
            path = key.removeprefix(PREFIX)
            keys[key.removesuffix(path) + _unwrapped(path, gone)] = key
    return replace(
        adapter,
        modules={
            name: replace(m, layout=replace(m.layout, path=_unwrapped(m.layout.path, gone)))
            for name, m in modules.items()
        },
        extras={new: replace(adapter.extras[key], name=new) for new, key in keys.items()},
        source=Borrowed(adapter, {name: Origin(name) for name in modules}, keys),
        config={**adapter.config, "target_parameters": _parameters(adapter, out)} if experts else adapter.config,
        # PEFT excludes no parameters, and warns of names that exclude nothing.
        dropped=(*adapter.dropped, *sorted(set(out) - set(experts))),
    )


def _check_attention(adapter: Adapter, out: Collection[str]) -> None:
    for name in out:
        group = adapter.modules[name].group or ""
        for other, module in adapter.modules.items():
            if group.startswith("attention ") and module.group == group and other not in out:
                raise LoraSqueezeError(
                    f"exclude: {name} goes and {other} stays, but PEFT adapts both projections of an "
                    "nn.MultiheadAttention or none: exclude both"
                )


def _unwrapped(path: str, gone: Collection[str]) -> str:
    """The path of something without the wrappers that are gone."""
    before, *inside = path.split(NESTED)
    found = before
    for part in inside:
        found += part if before in gone else NESTED + part
        before += NESTED + part
    return found


def _parameters(adapter: Adapter, out: Collection[str]) -> list[str]:
    """target_parameters with the full name of every parameter that stays."""
    targets, named = Targets(adapter.config), set[str]()
    for name, module in adapter.modules.items():
        if module.kind != "experts" or name in out:
            continue
        if name != module.layout.path:
            named.add(name)
            continue
        base = name.replace(NESTED, "")
        if lost := [other for other in out if adapter.modules[other].layout.path.replace(NESTED, "") == base]:
            raise LoraSqueezeError(
                f"exclude: {lost[0]} goes and {name} stays, and the file does not say which parameter of {base} either "
                "is: exclude both"
            )
        named.update(f"{base}.{parameter}" for parameter in targets.parameters(name))
    return sorted(named)
