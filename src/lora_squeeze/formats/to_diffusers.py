"""An adapter of another format as one of diffusers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_squeeze.adapter import Adapter, Extra, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import Borrowed, Origin
from lora_squeeze.formats.diffusers import DiffusersFormat
from lora_squeeze.formats.diffusers_keys import COMPONENTS, Layout, component_of, module_name, today_path, with_floors
from lora_squeeze.formats.safetensors_header import quoted

_CLASSES = {  # of models in diffusers
    "unet": re.compile(r"^UNet\w*Model$"),
    "transformer": re.compile(r"Transformer(2D|3D)?Model$"),
}


def adopt(adapter: Adapter, component: str | None = None) -> Adapter:
    """The same updates as a diffusers adapter.

    Args:
        adapter: of another format; names as in a model of diffusers or transformers, with a pipeline's component in
            front or not.
        component: the component that all modules belong to, such as "unet", "transformer" or "text_encoder"; for names
            without one. Default: that in the names, or what the configuration says of the model's class.

    Returns:
        A lazy Adapter that saves as one safetensors file. Scales are multiplied into B.

    Raises:
        LoraSqueezeError: an embedding, experts, a carried tensor that has no place, or no way to tell the component.
    """
    if isinstance(adapter.format, DiffusersFormat):
        return adapter
    places = _places(adapter, component)
    modules = {}
    for name, (part, path) in places.items():
        module = _module(adapter.modules[name], part, path)
        if module.name in modules:
            raise LoraSqueezeError(f"two modules get the name {quoted(module.name)}")
        modules[module.name] = module
    names = {old: new for old, new in zip(places, modules, strict=True)}
    extras = {key: _extra(extra, names, modules) for key, extra in adapter.extras.items()}
    biased = {extra.module for extra in extras.values()}
    modules = {name: replace(m, floor=max(m.floor, int(name in biased))) for name, m in modules.items()}
    return replace(
        adapter,
        modules=with_floors(modules),
        extras={extra.name: extra for extra in extras.values()},
        source=Borrowed(
            adapter, {new: Origin(old) for old, new in names.items()}, {e.name: key for key, e in extras.items()}
        ),
        format=DiffusersFormat(),
        config={},
        default_scale=1.0,
        metadata={"format": "pt"},
        companions=(),
    )


def _places(adapter: Adapter, component: str | None) -> dict[str, tuple[str, str]]:
    """Module -> component and path there."""
    inside = {name: found for name in adapter.modules if (found := component_of(name)) is not None}
    if component is not None:
        if component not in COMPONENTS:
            raise LoraSqueezeError(f"unknown component {quoted(component)}: choose one of {', '.join(COMPONENTS)}")
        if other := next((name for name, found in inside.items() if found != component), None):
            raise LoraSqueezeError(
                f"{other}: this module is of the component {inside[other]}, asked for was {component}; leave component "
                "(--component) out, or exclude the modules of other components"
            )
    elif len(inside) < len(adapter.modules):
        name = next(name for name in adapter.modules if name not in inside)
        component = _component_of_model(adapter.config)
        if component is None or inside:
            raise LoraSqueezeError(
                f"{name}: the name does not say which component of a pipeline the module belongs to, and diffusers "
                "needs it; name it with component= (--component), such as unet, transformer or text_encoder"
            )
    return {
        name: (inside[name], name.removeprefix(f"{inside[name]}.")) if name in inside else (str(component), name)
        for name in adapter.modules
    }


def _component_of_model(config: Mapping[str, Any]) -> str | None:
    """The component that a model of this class is in every pipeline, by what PEFT notes of the model."""
    noted = config.get("auto_mapping")
    if not isinstance(noted, dict):
        return None
    name, library = str(noted.get("base_model_class")), str(noted.get("parent_library"))
    if library.split(".")[0] == "diffusers":
        return next((component for component, pattern in _CLASSES.items() if pattern.search(name)), None)
    return "text_encoder" if name == "CLIPTextModel" else None


def _module(module: Module, component: str, path: str) -> Module:
    if module.kind not in ("linear", "conv"):
        raise LoraSqueezeError(
            f"{module.name}: {module.kind} has no place in a file of diffusers, which holds linear layers and "
            "convolutions; convert the other modules alone with exclude= (--exclude)"
        )
    path = today_path(component, path)
    return replace(
        module,
        name=module_name(component, path),
        group=None,
        floor=int(module.copies > 1),
        step=module.copies,
        layout=Layout(component, path),
    )


def _extra(extra: Extra, names: Mapping[str, str], modules: Mapping[str, Module]) -> Extra:
    if extra.module is None:
        raise LoraSqueezeError(
            f"{extra.name}: diffusers has no place for this tensor ({extra.kind}: {extra.cause}); leave it out with "
            "extras=False (--without-extras)"
        )
    layout: Layout = modules[names[extra.module]].layout
    return replace(extra, name=layout.key("lora_B.bias"), module=names[extra.module], factor=1.0)
