"""One component of a pipeline's adapter, under the names that its modules have in that model alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from lora_squeeze.adapter import Adapter, Extra
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import Borrowed, Origin
from lora_squeeze.formats.diffusers_header import TEXT_MODEL
from lora_squeeze.formats.peft_config import read_json

_FLAT_CLIP = "CLIPTextModel"


def of_component(adapter: Adapter, component: str | None, base: str | os.PathLike[str] | None = None) -> Adapter:
    """The modules of one component without its name in front; all modules of a file of one model.

    Args:
        adapter: of diffusers, or of kohya under the names of diffusers.
        component: default: the only one that there is.
        base: of a text encoder, its folder or that of its pipeline, whose configuration says of which class it is.

    Raises:
        LoraSqueezeError: no such component, several and none chosen, a carried tensor that belongs to none.
    """
    if all(getattr(module.layout, "component", None) == "" for module in adapter.modules.values()):
        if component is not None:
            raise LoraSqueezeError(
                f"the file is of one model and its names begin with no component: leave component={component!r} "
                "(--component) out"
            )
        return adapter
    found = list(dict.fromkeys(name.partition(".")[0] for name in adapter.modules))
    chosen = component or (found[0] if len(found) == 1 else None)
    if chosen not in found:
        raise LoraSqueezeError(
            f"the adapter has modules of {', '.join(found)}, an adapter of the other format those of one model: choose "
            "one with component= (--component)"
        )
    for extra in adapter.extras.values():
        if extra.module is None and extra.name.partition(".")[0] not in found:
            raise LoraSqueezeError(
                f"{extra.name}: of which module this tensor is, its name does not say ({extra.kind}: {extra.cause}); "
                "leave it out with extras=False (--without-extras)"
            )
    prefix = f"{chosen}."
    new = {name: name.removeprefix(prefix) for name in adapter.modules if name.startswith(prefix)}
    known = _class_of(base, chosen)
    flat = any(name.startswith(TEXT_MODEL) for name in new.values()) and _is_flat(adapter, chosen, known)
    if flat:
        new = {old: name.removeprefix(TEXT_MODEL) for old, name in new.items()}
    extras = [_renamed(extra, new, prefix) for extra in adapter.extras.values() if _belongs(extra, new, prefix)]
    note = (
        f"{chosen}: without text_model in front, as the names of a CLIPTextModel are since transformers 5.6; if it is "
        "of another class, give its folder with base= (--base)"
    )
    return replace(
        adapter,
        modules={name: replace(adapter.modules[old], name=name) for old, name in new.items()},
        extras={extra.name: extra for extra, _ in extras},
        source=Borrowed(
            adapter, {name: Origin(old) for old, name in new.items()}, {extra.name: key for extra, key in extras}
        ),
        notes=(*adapter.notes, *([note] if flat and known is None else [])),
    )


def _belongs(extra: Extra, modules: dict[str, str], prefix: str) -> bool:
    return extra.name.startswith(prefix) if extra.module is None else extra.module in modules


def _renamed(extra: Extra, modules: dict[str, str], prefix: str) -> tuple[Extra, str]:
    """The carried tensor under its name in the component, and its key in the file."""
    if extra.module is None:
        return replace(extra, name=extra.name.removeprefix(prefix)), extra.name
    module = modules[extra.module]
    return replace(extra, name=f"{module}.lora_B.bias", module=module), extra.name


def _is_flat(adapter: Adapter, component: str, known: str | None) -> bool:
    """Whether this CLIP is a CLIPTextModel, which has no `text_model` in transformers 5.6 and later.

    The first text encoder of most pipelines is one; that of Stable Diffusion 3 and every second one is a
    CLIPTextModelWithProjection.
    """
    if known is not None:
        return known == _FLAT_CLIP
    fronts = ("transformer.", f"text_encoder_2.{TEXT_MODEL}")
    of_sd3 = all(any(name.startswith(front) for name in adapter.modules) for front in fronts)
    return component == "text_encoder" and not of_sd3 and f"{component}.text_projection" not in adapter.modules


def _class_of(base: str | os.PathLike[str] | None, component: str) -> str | None:
    """The class that a local configuration names, of the component or of the component in its pipeline."""
    for folder in () if base is None else (Path(base).expanduser() / component, Path(base).expanduser()):
        try:
            config = read_json(folder / "config.json")
        except LoraSqueezeError:
            continue
        names = config.get("architectures") if isinstance(config, dict) else None
        if isinstance(names, list) and names:
            return str(names[0])
    return None
