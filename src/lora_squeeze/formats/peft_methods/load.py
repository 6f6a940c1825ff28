"""Read an adapter of any of PEFT's methods as plain LoRA factors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.adapter import Adapter, Extra, Module, common_dtype
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import peft
from lora_squeeze.formats.borrowed import common_scale
from lora_squeeze.formats.history import read_history
from lora_squeeze.formats.lycoris import Facts
from lora_squeeze.formats.peft_config import read_json
from lora_squeeze.formats.peft_keys import NESTED, PREFIX, Layout, Shapes
from lora_squeeze.formats.peft_methods import identities, variants, with_base
from lora_squeeze.formats.peft_methods.base_weights import Base, weight
from lora_squeeze.formats.peft_methods.parts import Checked, Computed, MethodFormat, Parts, told
from lora_squeeze.formats.peft_methods.table import Row, row_of
from lora_squeeze.formats.peft_targets import Saved
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.formats.safetensors_io import TensorFile

# Of a method's configuration, what a LoraConfig has too, with the same meaning.
_KEPT = (
    "auto_mapping", "base_model_name_or_path", "fan_in_fan_out", "inference_mode", "modules_to_save", "revision",
    "task_type",
)  # fmt: skip


def load(folder: Path, *, base: Base | None = None) -> Adapter:
    """The adapter in a PEFT folder as a plain LoRA, whatever method of PEFT made it.

    Args:
        folder: with adapter_config.json and the weights.
        base: the base model, for methods whose update depends on it: its weights (`lora_squeeze.base_model.open_base`),
            or the model itself on the CPU, which stays as it is. With it, a LoHa, a LoKr or an AdaLoRA of
            convolutions learns their kernels, which the file need not show.

    Returns:
        A lazy Adapter that is written as a plain LoRA of PEFT, at the rank of `TABLE` or, after a squeeze, any other.
        An update of full rank is a matrix and an identity: squeeze it; the report's energy says what is lost.

    Raises:
        LoraSqueezeError: a method without an update of weights, the base model is needed and not given, a damaged file.

    Notes:
        One module at a time is computed, in float64. For a DoRA only the weight concerned is read of the base model;
        for the other methods that need it the whole model is built in memory.

    Example:
        >>> peft_methods.load(Path("my-loha")).squeeze(rank=8).save("my-lora")  # doctest: +SKIP
    """
    try:
        config = _config(folder)
        row = row_of(config)
        _check(row, config, base)
        if row.route == "plain":
            return peft.load(folder)
        file, shapes = _open(folder)
        with told(row.name):
            parts = _read(folder, file, shapes, config, row, base)
    except LoraSqueezeError as error:
        raise error if str(error).startswith(str(folder)) else LoraSqueezeError(f"{folder}: {error}") from None
    companions, strange = peft.beside(folder)
    adapter = Adapter(
        modules=parts.modules,
        extras=parts.extras,
        source=Checked(parts.source, f"{folder}: {row.name}"),
        format=MethodFormat(f"peft-{row.name.lower().replace(' ', '-')}", folder.resolve()),
        config=parts.config,
        metadata=dict(file.metadata),
        history=read_history(file.metadata),
        companions=companions,
        notes=(_note(row), *parts.notes, *strange),
    )
    return replace(adapter, default_scale=common_scale(adapter))


def _note(row: Row) -> str:
    if row.route == "squeezed":
        return f"{row.name}: an update of full rank, read as a matrix and an identity; a squeeze says what it loses"
    return f"{row.name}: read as the plain LoRA that it is, of rank {row.rank}"


def _check(row: Row, config: Mapping[str, Any], base: Base | None) -> None:
    if row.route == "impossible":
        raise LoraSqueezeError(f"{row.name} cannot become a LoRA: {row.why}")
    picked = row.peft_type == "UNILORA" and config.get("save_indices")
    if row.needs_base and base is None and not picked:
        raise LoraSqueezeError(
            f"{row.name} becomes a LoRA with its base model only ({row.why}); give it: --base MODEL, in Python "
            "base=lora_squeeze.base_model.open_base(model)"
        )


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / peft.CONFIG_NAME)
    if not isinstance(config, dict):
        raise LoraSqueezeError(f"{peft.CONFIG_NAME}: expected an object, found {type(config).__name__}")
    return config


def _open(folder: Path) -> tuple[peft.Tensors, Shapes]:
    if (folder / peft.WEIGHTS_NAME).exists():
        opened = TensorFile(folder / peft.WEIGHTS_NAME)
        return opened, {name: (entry.dtype, entry.shape) for name, entry in opened.entries.items()}
    if (folder / peft.PICKLE_NAME).exists():
        pickled = peft.PickleFile(folder / peft.PICKLE_NAME)
        return pickled, pickled.shapes
    raise LoraSqueezeError(f"no {peft.WEIGHTS_NAME} and no {peft.PICKLE_NAME}; the adapter is incomplete")


def _read(
    folder: Path, file: peft.Tensors, shapes: Shapes, config: Mapping[str, Any], row: Row, base: Base | None
) -> Parts:
    if row.field in variants.FIELDS:
        return variants.read(file, shapes, config, base)
    kept = {key: config[key] for key in _KEPT if key in config} | {"peft_type": "LORA"}
    if (bias := config.get("bias") or "none") != "none":
        kept["bias"] = "all" if bias == "all" else "lora_only"
    if base is None or not row.needs_base:
        modules, factors = _known(file, shapes, config, row, base)
        source, biases = Computed(file, factors), dict[str, Extra]()
    else:
        dtype = _dtype([key for key in shapes if _is_own(key, row)], shapes)
        layers = with_base.layers(folder, base, row, config, dtype, _labels(shapes, config))
        moves = any(layer.moves_bias for layer in layers.values())  # then PEFT looks for a bias of every B
        modules = {n: replace(each.module, floor=int(moves)) for n, each in layers.items()}
        moved = {f"{PREFIX}{name}.lora_B.bias": layer for name, layer in layers.items() if moves}
        biases = {key: _bias(key, layer.module) for key, layer in moved.items()}
        source = Computed(
            file,
            {name: layer.factors for name, layer in layers.items()},
            {key: layer.bias for key, layer in moved.items()},
        )
        kept |= {"fan_in_fan_out": any(layer.turned for layer in layers.values()), "lora_bias": moves}
    kept["target_modules"] = sorted(modules)
    modules, extras = _carried(shapes, config, row, modules)
    return Parts(modules, source, {**extras, **biases}, kept)


def _labels(shapes: Shapes, config: Mapping[str, Any]) -> int | None:
    """Of a classifier: how many there are, by the new head that is saved with the adapter."""
    heads = set(config.get("modules_to_save") or ())
    if config.get("task_type") not in ("SEQ_CLS", "TOKEN_CLS"):
        return None
    rows = [
        shape[0]
        for key, (_, shape) in shapes.items()
        if len(shape) == 2 and key.endswith(".weight") and heads & set(key.split("."))
    ]
    return min(rows, default=None)


def _known(
    file: peft.Tensors, shapes: Shapes, config: Mapping[str, Any], row: Row, base: Base | None
) -> tuple[dict[str, Module], dict[str, Callable[[], tuple[Tensor, Tensor]]]]:
    """Modules and their factors, where the file alone tells them."""
    found = identities.find({key: shape for key, (_, shape) in shapes.items()}, config, row)
    modules = {name: _module(name, known, shapes, base) for name, known in found.items()}

    def factors(name: str) -> tuple[Tensor, Tensor]:
        tensors = {role: file.read(key) for role, key in found[name].keys.items()}
        floats = {role: t.double() if t.is_floating_point() else t for role, t in tensors.items()}
        return identities.factors(row, floats, config, name)

    return modules, {name: partial(factors, name) for name in found}


def _module(name: str, found: identities.Found, shapes: Shapes, base: Base | None) -> Module:
    facts = found.facts
    kernel = facts.kernel
    if base is not None:  # of a Conv1d the file may show one in two dimensions
        kernel = _kernel(name, facts, base)
    module = Module(
        name=name,
        rank=facts.rank,
        scale=1.0,
        dtype=_dtype(found.keys.values(), shapes),
        out_features=facts.out_features,
        in_features=facts.in_features,
        kind="conv" if kernel else "linear",
        kernel=kernel,
        layout=Layout(name, "", "", pattern=re.escape(name)),
    )
    return replace(module, source_bytes=8 * (2 * module.parameters + facts.out_features * facts.in_features))


def _dtype(keys: Iterable[str], shapes: Shapes) -> torch.dtype:
    """One that holds the numbers of all these tensors."""
    return reduce(common_dtype, (shapes[key][0] for key in keys if shapes[key][0].is_floating_point))


def _kernel(name: str, facts: Facts, base: Base) -> tuple[int, ...]:
    """The kernel that the base model's layer has."""
    shape = weight(base, name, only_shape=True).shape
    if isinstance(base, nn.Module):
        with_base.check_groups(name, base.get_submodule(name))
    if len(shape) < 3:
        return ()
    if (shape[0], shape[1:].numel()) != (facts.out_features, facts.in_features):
        raise LoraSqueezeError(
            f"{name}: the base weight is {list(shape)}, the update {[facts.out_features, facts.in_features]}; give the "
            "base model that the adapter was trained on"
        )
    return tuple(shape[2:])


def _bias(key: str, module: Module) -> Extra:
    shape = (module.out_features,)
    return Extra(key, module.dtype, shape, "lora bias", "the method changes the layer's bias too", module=module.name)


def _is_own(key: str, row: Row) -> bool:
    """Whether a tensor is one of the method's."""
    return any(part.startswith(row.prefixes) for part in key.split("."))


def _carried(
    shapes: Shapes, config: Mapping[str, Any], row: Row, modules: Mapping[str, Module]
) -> tuple[dict[str, Module], dict[str, Extra]]:
    """The tensors beside the method's, and the modules, those with such a tensor inside kept at rank 1 at least."""
    keys = [key for key in shapes if not _is_own(key, row)]
    saved = Saved(config.get("modules_to_save") or [])
    extras = {key: _extra(key, shapes, config, saved) for key in keys}
    inside = {key.removeprefix(PREFIX).rpartition(f"{NESTED}.")[0] for key in keys}
    kept = {name: replace(m, floor=max(m.floor, int(name in inside))) for name, m in modules.items()}
    return kept, extras


def _extra(key: str, shapes: Shapes, config: Mapping[str, Any], saved: Saved) -> Extra:
    dtype, shape = shapes[key]
    bare = key.removeprefix(PREFIX)
    if "trainable_tokens" in bare:
        return Extra(key, dtype, shape, "trainable tokens", "rows of the embedding for trainable_token_indices")
    if saved.holds(bare):
        return Extra(key, dtype, shape, "module to save", saved.cause)
    if bare.endswith(".bias"):
        return Extra(key, dtype, shape, "bias", f"bias is {quoted(str(config.get('bias')))}: biases are saved in full")
    if bare.endswith(".weight"):
        return Extra(key, dtype, shape, "embedding", "a whole weight beside the method's (save_embedding_layers)")
    return Extra(key, dtype, shape, "other", "not a tensor of the method itself; carried along unchanged")
