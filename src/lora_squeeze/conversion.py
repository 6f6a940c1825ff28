"""From any adapter to a plain LoRA in any format: the modules get the names of the other format, and are squeezed."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lora_squeeze.adapter import Adapter
from lora_squeeze.base_model import open_base
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import peft_exclusion
from lora_squeeze.formats.component import of_component
from lora_squeeze.formats.extras import without_equal, without_extras
from lora_squeeze.formats.guarded import Guarded
from lora_squeeze.formats.peft import PeftFormat
from lora_squeeze.ranks import RULES

FORMATS = ("peft", "diffusers", "kohya", "gguf", "mlx")


def convert(
    adapter: Adapter,
    to: str,
    *,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
    architecture: str | None = None,
    exclude: str | Sequence[str] | None = None,
    extras: bool | Literal["changed"] = True,
    **dials: Any,
) -> Adapter:
    """The same updates as a plain LoRA in another format, squeezed by any dial.

    Args:
        adapter: what to convert, from `lora_squeeze.load` or `lora_squeeze.sources.open_source`.
        to: "peft", "diffusers", "kohya", "gguf" or "mlx".
        base: the base model, where names or rows depend on it. To "gguf": its folder, hub id or GGUF file; the file is
            also checked against the adapter. From "gguf": its folder or hub id with safetensors. To "peft": the name
            that the configuration gives; default the one that the adapter has, which one of another method keeps. Of
            the text encoder of a pipeline, a folder also says which class it is.
        component: of a diffusion pipeline, such as "unet", "transformer" or "text_encoder". To "diffusers": where the
            modules belong, if they do not say it. From a pipeline's file to "peft": the one to take, since a PEFT
            adapter is of one model.
        architecture: of kohya's names, such as "sdxl"; default found from the names.
        exclude: a regular expression, or several, of modules to leave out; each must match a whole name.
        extras: False leaves out the tensors beside the factors: trained embeddings, heads and biases. "changed" leaves
            out those that the base model has too, number for number, which are read in it.
        dials: any of `lora_squeeze.squeeze`, such as rank=16 or size="10MB". Without one the rank stays.

    Returns:
        A new lazy Adapter. Its report says the energy kept; without a dial nothing is lost but one rounding of B, where
        a scale has to be rewritten.

    Raises:
        LoraSqueezeError: a module, tensor or setting that the format cannot hold, by name and with the way out; a base
            model or component that is needed and not given.

    Notes:
        Nothing is read until the result is squeezed or saved, but for the header; one batch of modules is in memory.

    Example:
        >>> convert(lora_squeeze.load("style"), "gguf", base="model.gguf").save("style.gguf")  # doctest: +SKIP
    """
    if to not in FORMATS:
        raise LoraSqueezeError(f"unknown format {to!r}: choose one of {', '.join(FORMATS)}")
    before = adapter.format.name
    adapter = _without(_bare(adapter, extras, base), exclude, to)
    adapter = in_format(adapter, to, base, component, architecture)
    if before == to == "peft" and base is not None:
        adapter = replace(adapter, config={**adapter.config, "base_model_name_or_path": str(base)})
    if before == to == "kohya":
        from lora_squeeze.formats import kohya

        adapter = kohya.anew(adapter)
    step = {"step": "convert", "from": before, "to": to}
    adapter = replace(adapter, history=(*adapter.history, step))
    given = {name: value for name, value in dials.items() if value is not None}
    if any(name in given for name in (*RULES, "max_rank", "plan")):
        return adapter.squeeze(**given)
    # Of what is computed: a file whose factors are as large is copied as it is.
    computed = [module for module in adapter.modules.values() if module.source_bytes]
    if sum(m.parameters for m in computed) > sum(m.copies * m.out_features * m.in_features for m in computed):
        raise LoraSqueezeError(
            f"at its full rank, up to {adapter.rank}, this holds more numbers than the weights themselves: say how "
            "small it shall be, such as rank=16 (--rank 16)"
        )
    whole = adapter.squeeze(**given, rank=adapter.rank)
    return replace(whole, history=adapter.history)


def _bare(adapter: Adapter, extras: bool | Literal["changed"], base: str | os.PathLike[str] | None) -> Adapter:
    """The adapter without the tensors beside the factors, or without those of the base model."""
    if extras != "changed":
        return adapter if extras else without_extras(adapter)
    if base is None:
        raise LoraSqueezeError("which tensors are the base model's, only that tells: name it with base= (--base)")
    return without_equal(adapter, open_base(base))


def _without(adapter: Adapter, exclude: str | Sequence[str] | None, to: str) -> Adapter:
    """The adapter without the modules that match."""
    patterns = [exclude] if isinstance(exclude, str) else list(exclude or ())
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise LoraSqueezeError(f"exclude: not a regular expression ({error})") from None
    out = {name for name in adapter.modules if any(pattern.fullmatch(name) for pattern in compiled)}
    idle = [p.pattern for p in compiled if not any(p.fullmatch(name) for name in adapter.modules)]
    if idle:
        raise LoraSqueezeError(
            f"exclude: {idle[0]!r} is the whole name of no module; the first is {next(iter(adapter.modules))}"
        )
    if len(out) == len(adapter.modules):
        raise LoraSqueezeError("exclude leaves no module to convert")
    if out and to == "peft" and isinstance(adapter.format, PeftFormat):
        adapter = peft_exclusion.without(adapter, out)
    elif out:
        adapter = replace(
            adapter,
            modules={name: module for name, module in adapter.modules.items() if name not in out},
            extras={key: extra for key, extra in adapter.extras.items() if extra.module not in out},
            dropped=(*adapter.dropped, *sorted(out)),
        )
    return replace(adapter, notes=(*adapter.notes, f"{len(out)} modules are left out as asked")) if out else adapter


def in_format(
    adapter: Adapter,
    to: str,
    base: str | os.PathLike[str] | None = None,
    component: str | None = None,
    architecture: str | None = None,
) -> Adapter:
    """The adapter as it is, in another format. Arguments and errors as for `convert`."""
    if adapter.format.name == to:
        return adapter
    home = adapter.format.home
    found = _adopted(_neutral(adapter, base, architecture), to, base, component, architecture)
    ours = replace(found.format, home=home)  # type: ignore[type-var]  # all are dataclasses
    if isinstance(adapter.format, Guarded):
        return replace(found, format=Guarded((ours, *adapter.format.formats[1:])))
    return replace(found, format=ours)


def _neutral(adapter: Adapter, base: str | os.PathLike[str] | None, architecture: str | None) -> Adapter:
    """The adapter with the names that its modules have in transformers or diffusers."""
    if adapter.format.name == "gguf":
        return _from_gguf(adapter, base)
    if adapter.format.name == "kohya":
        from lora_squeeze.formats import kohya_names

        return kohya_names.neutral(adapter, architecture)
    return adapter


def _adopted(
    adapter: Adapter,
    to: str,
    base: str | os.PathLike[str] | None,
    component: str | None,
    architecture: str | None,
) -> Adapter:
    """The adapter, whose names are those of the model, in another format."""
    from lora_squeeze.formats import gguf_names, to_gguf, to_mlx, to_peft

    if to == "diffusers":
        from lora_squeeze.formats import to_diffusers

        return to_diffusers.adopt(adapter, component)
    if to == "kohya":
        from lora_squeeze.formats import to_kohya

        return to_kohya.adopt(adapter, architecture)
    if to == "gguf":
        if base is None:
            raise LoraSqueezeError(
                "GGUF has other names and another order of rows, which depend on the base model: name its folder, hub "
                "id or GGUF file with base= (--base)"
            )
        return to_gguf.adopt(adapter, gguf_names.open_gguf_base(base))
    if adapter.format.name in ("diffusers", "kohya"):
        adapter = of_component(adapter, component, base)
    return to_mlx.adopt(adapter) if to == "mlx" else to_peft.adopt(adapter, None if base is None else str(base))


def _from_gguf(adapter: Adapter, base: str | os.PathLike[str] | None) -> Adapter:
    from lora_squeeze.formats import gguf_names, to_gguf

    if base is None or Path(base).expanduser().is_file():
        raise LoraSqueezeError(
            "names of GGUF are those of llama.cpp, and its rows may stand in another order: name the folder or hub id "
            "of the base model in transformers with base= (--base)"
        )
    return to_gguf.neutral(adapter, gguf_names.open_gguf_base(base), open_base(base))
