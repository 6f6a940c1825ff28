"""An adapter of another format as one of PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import Borrowed, Origin, common_scale
from lora_squeeze.formats.peft import PeftFormat
from lora_squeeze.formats.peft_keys import PREFIX, Layout
from lora_squeeze.formats.peft_targets import TIED_HEADS
from lora_squeeze.lowrank import LowRank

_SAVED = ("embedding", "module to save", "bias")
_EXPERT = re.compile(r"\.experts\.\d+\.")
_FUSED = "all: per-expert modules are fused on loading"
_WITHOUT = "leave it out with extras=False (--without-extras)"


def adopt(adapter: Adapter, base_name: str | None = None) -> Adapter:
    """The same updates as a PEFT adapter.

    Args:
        adapter: of another format, with the names that its modules have in the model that PEFT wraps.
        base_name: name or path of the base model, for the configuration; readers that find the base by it need it.

    Returns:
        A lazy Adapter that saves as a PEFT folder. target_modules names every module in full. Modules of single
        experts, which transformers fuses on loading, give all modules one rank.

    Raises:
        LoraSqueezeError: experts, whose parameter a PEFT file does not name; a carried tensor without a place there.
    """
    if isinstance(adapter.format, PeftFormat):  # of another method: read with the names and settings of a LoRA
        return replace(adapter, format=replace(adapter.format, name="peft"))
    modules = _common_rank({name: _module(module) for name, module in adapter.modules.items()})
    extras, keys = {}, {}
    for extra in adapter.extras.values():
        found = _extra(extra, modules)
        extras[found.name], keys[found.name] = found, extra.name
    saved = sorted({key.removeprefix(PREFIX).rpartition(".")[0] for key, e in extras.items() if e.module is None})
    biased = {extra.module: extra for extra in extras.values() if extra.module is not None}
    if biased:
        extras |= _zeros(modules, biased)
        modules = {name: replace(module, floor=1) for name, module in modules.items()}
    return replace(
        adapter,
        modules=modules,
        extras=extras,
        source=_Filled(adapter, {name: Origin(name) for name in modules}, keys, extras),
        format=PeftFormat(),
        config=_config(modules, base_name, saved) | ({"lora_bias": True} if biased else {}),
        default_scale=common_scale(adapter),
        metadata={"format": "pt"},
        dropped=(),
        companions=(),
    )


@dataclass(frozen=True, eq=False)
class _Filled(Borrowed):
    """What another adapter has, with zeros where PEFT wants more: in B up to a common rank, and for biases of B."""

    extras: Mapping[str, Extra] = field(default_factory=dict)

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        found = zip(modules, super().updates(modules), strict=True)
        return [update.rank_up(module.rank) if update.rank < module.rank else update for module, update in found]

    def pieces(self, name: str) -> Iterator[Tensor]:
        if name in self.keys:
            yield from super().pieces(name)
        else:
            yield torch.zeros(self.extras[name].shape, dtype=self.extras[name].dtype)


def _module(module: Module) -> Module:
    if module.kind == "experts":
        raise LoraSqueezeError(
            f"{module.name}: stacked experts, whose place in a PEFT file depends on how the model declares its "
            "parameters; convert the other modules alone with exclude= (--exclude)"
        )
    layout = Layout(module.name, "", "", pattern=re.escape(module.name))
    return replace(module, group=None, floor=0, step=module.copies, layout=layout)


def _common_rank(modules: dict[str, Module]) -> dict[str, Module]:
    """One rank for all if there are modules of single experts: fused they have one, and patterns do not find them."""
    if not any(_EXPERT.search(name) for name in modules):
        return modules
    rank = max(module.rank for module in modules.values())
    return {name: replace(module, rank=rank, group=_FUSED, floor=1) for name, module in modules.items()}


def _extra(extra: Extra, modules: Mapping[str, Module]) -> Extra:
    """A carried tensor as PEFT names it."""
    if extra.module is not None:
        return replace(extra, name=_bias_key(extra.module))
    if extra.kind in _SAVED and "." in extra.name:
        return replace(extra, name=PREFIX + extra.name)
    raise LoraSqueezeError(f"{extra.name}: PEFT has no place for this tensor ({extra.kind}: {extra.cause}); {_WITHOUT}")


def _bias_key(name: str) -> str:
    return f"{PREFIX}{name}.lora_B.bias"


def _zeros(modules: Mapping[str, Module], biased: Mapping[str, Extra]) -> dict[str, Extra]:
    """A bias of zeros for every module that has none: with lora_bias, PEFT looks for one in all of them."""
    sample = next(iter(biased.values()))
    found = {}
    for name, module in modules.items():
        if module.kind == "embedding":
            raise LoraSqueezeError(
                f"{sample.name}: PEFT takes no bias of B ({sample.cause}) beside the update of an embedding, {name}; "
                f"{_WITHOUT}, or the embedding with exclude= (--exclude)"
            )
        if name not in biased:
            key, shape = _bias_key(name), (module.out_features * module.copies,)
            found[key] = replace(sample, name=key, dtype=module.dtype, shape=shape, module=name)
    return found


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
        "target_modules": _targets(modules),
        "task_type": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _targets(modules: Mapping[str, Module]) -> list[str] | str:
    """The modules by name; as one expression where a name of one part would be the end of others' names too.

    A list is what servers take best, and PEFT looks its names up as ends of paths. An output head is the only one.
    """
    if all("." in name or name in TIED_HEADS for name in modules):
        return sorted(modules)
    return "|".join(re.escape(name) for name in sorted(modules))
