"""Adapters between the names of transformers and those of GGUF."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.base_model import BaseModel
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import Borrowed, Origin, check_carries_nothing, check_layers, common_scale
from lora_squeeze.formats.gguf_file import Field
from lora_squeeze.formats.gguf_lora import ALPHA_KEY, FILE_TYPE_KEY, GgufFormat, Layout
from lora_squeeze.formats.gguf_names import GgufBase

_FUSED = ("gate_up_proj", ("gate_proj", "up_proj"))  # of experts: one parameter there, two tensors here
_TOKENS_KEY = "adapter.alora.invocation_tokens"


def adopt(adapter: Adapter, base: GgufBase) -> Adapter:
    """The same updates as an adapter of llama.cpp.

    Args:
        adapter: of another format, with the names that its modules have in transformers.
        base: the model that it belongs to, see `gguf_names.open_gguf_base`.

    Returns:
        A lazy Adapter that saves as a GGUF file. Rows of B stand in the order of the base model's file; a fused
        parameter gate_up_proj of experts becomes two tensors with the same A.

    Raises:
        LoraSqueezeError: a module without a tensor in the base model, of another size there, a convolution, a
            carried tensor, or layers that PEFT repeats.
    """
    if isinstance(adapter.format, GgufFormat):
        return adapter
    check_layers(adapter, "llama.cpp")
    check_carries_nothing(adapter, "llama.cpp", "leave them out with extras=False (--without-extras)")
    modules: dict[str, Module] = {}
    origins: dict[str, Origin] = {}
    for name, module in adapter.modules.items():
        for tensor, rows, new in _tensors(module, base):
            if tensor in modules:
                raise LoraSqueezeError(f"{origins[tensor].name} and {name} are both {tensor} in {base.architecture}")
            modules[tensor], origins[tensor] = new, Origin(name, rows)
    return replace(
        adapter,
        modules=modules,
        source=Borrowed(adapter, origins),
        format=GgufFormat(),
        config=_fields(adapter, base),
        default_scale=common_scale(adapter),
        metadata={},
        dropped=(),
        companions=(),
    )


def _tensors(module: Module, base: GgufBase) -> list[tuple[str, Int[Tensor, " out"] | None, Module]]:
    """Tensor, rows of dW in it, and Module there, of one module here."""
    if module.kind == "conv":
        raise LoraSqueezeError(f"{module.name}: llama.cpp has no LoRA of a convolution; leave it out with exclude=")
    parent, _, last = module.name.rpartition(".")
    halves = _FUSED[1] if module.kind == "experts" and last == _FUSED[0] else ()
    names = [f"{parent}.{half}" for half in halves] or [module.name]
    if module.out_features % len(names):
        raise LoraSqueezeError(f"{module.name}: {module.out_features} rows are no gate and up of one size")
    size = module.out_features // len(names)
    found = []
    for i, name in enumerate(names):
        tensor = base.tensor_of(name)
        if tensor is None:
            raise LoraSqueezeError(
                f"{name}: no such module in a model of the architecture {base.architecture} with {base.blocks} layers; "
                f"is {base.name} the base model of this adapter? Or leave it out with exclude= (--exclude)"
            )
        rows = torch.arange(i * size, (i + 1) * size) if halves else base.rows_of(tensor, module.out_features)
        shape = (module.in_features, size) if module.kind == "embedding" else (size, module.in_features)
        base.check_shape(tensor, shape if module.kind != "experts" else (module.copies, *shape))
        layout = Layout(f"{tensor}.weight.lora_a", f"{tensor}.weight.lora_b")
        changed = replace(module, name=tensor, out_features=size, group=None, floor=0, step=1, layout=layout)
        changed = replace(changed, total=None) if halves else changed  # of each half, not known
        found.append((tensor, rows, changed))
    return found


def _fields(adapter: Adapter, base: GgufBase) -> dict[str, Field]:
    fields = {
        "general.architecture": Field.text(base.architecture),
        "general.type": Field.text("adapter"),
        "adapter.type": Field.text("lora"),
        ALPHA_KEY: Field.float32(0.0),  # the one that is right is filled in on writing
        FILE_TYPE_KEY: Field.uint32(0),
    }
    tokens: Any = adapter.config.get("alora_invocation_tokens")
    return {**fields, _TOKENS_KEY: Field.uint32s(tokens)} if tokens else fields


def neutral(adapter: Adapter, base: GgufBase, weights: BaseModel) -> Adapter:
    """An adapter of llama.cpp with the names that its modules have in transformers.

    Args:
        adapter: read from a GGUF file.
        base: the model that it belongs to.
        weights: the same model's safetensors, of which only the names are used.

    Returns:
        A lazy Adapter in the order of rows of transformers.

    Raises:
        LoraSqueezeError: another architecture, a tensor without a module, or a carried tensor.
    """
    architecture = adapter.config["general.architecture"].value if "general.architecture" in adapter.config else None
    if architecture != base.architecture:
        raise LoraSqueezeError(
            f"the adapter is for the architecture {architecture}, {base.name} is {base.architecture}: name its own base"
        )
    check_carries_nothing(adapter, "a conversion from GGUF", "leave them out with extras=False (--without-extras)")
    modules_of: dict[str, str] = {}
    for key in weights.facts:
        name = key.removesuffix(".weight")
        if name != key and (tensor := base.tensor_of(name)):
            modules_of.setdefault(tensor, name)
    modules: dict[str, Module] = {}
    origins: dict[str, Origin] = {}
    for tensor, module in adapter.modules.items():
        found = modules_of.get(tensor)
        if found is None or module.kind == "experts":
            raise LoraSqueezeError(
                f"{tensor}: {'stacked experts' if found else 'no module of ' + weights.name}; which parameter of the "
                "model it belongs to is not known here"
            )
        rows = base.rows_of(tensor, module.out_features)
        modules[found] = replace(module, name=found, layout=None)
        origins[found] = Origin(tensor, None if rows is None else rows.argsort())
    return replace(adapter, modules=modules, source=Borrowed(adapter, origins), config={}, metadata={})
