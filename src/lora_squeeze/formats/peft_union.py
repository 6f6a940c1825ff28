"""One PEFT adapter that stands for several: the configuration, and the keys, of the union of their modules.

The keys depend on all of the configuration: wrappers of the parameters of one module nest, tensors inside a wrapper are
renamed, some modules must share a rank. So the file that would be written is described, and read as any other.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lora_squeeze.adapter import Adapter, Extra, Module
from lora_squeeze.combine_join import Joined, Part
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft import factor_shapes
from lora_squeeze.formats.peft_config import squeezed_config
from lora_squeeze.formats.peft_keys import DECLARED, NESTED, PREFIX, Shapes, parse
from lora_squeeze.formats.peft_targets import Saved

_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_MUST_AGREE = {
    "alora_invocation_tokens": "an activated LoRA takes part from these tokens on, others always do",
    "layer_replication": "their modules are those of different models",
    "ensure_weight_tying": "one ties the updates of embedding and head, another does not",
}


def united(adapters: Sequence[Adapter], joined: Joined, scale: float) -> tuple[Joined, dict[str, Any]]:
    """The facts of a sum as a PEFT file has them, and its configuration.

    Args:
        adapters: what is added.
        joined: the facts by module name.
        scale: s of every module.

    Returns:
        The facts with layouts, groups, floors, ranks and keys of one file; adapter_config.json.

    Raises:
        LoraSqueezeError: settings or modules that no one PEFT adapter can have.
    """
    active = [adapters[i] for i in sorted({part.adapter for parts in joined.parts.values() for part in parts})]
    config = _config(active, [adapters[i] for i in joined.carriers], joined)
    modules = _paths(joined.modules)
    _check_saved(modules, config, joined, adapters)
    spelled = {key: _spelled(key, extra, modules) for key, extra in joined.extras.items()}
    extras = {spelled[key]: replace(extra, name=spelled[key]) for key, extra in joined.extras.items()}
    origins = {spelled[key]: parts for key, parts in joined.origins.items()}
    if config.get("lora_bias"):
        _fill_biases(modules, extras, origins)
    ranks = {re.escape(name): module.rank * module.step for name, module in modules.items()}
    config = squeezed_config(config, ranks, scale, ())
    read, read_extras, _ = parse(_shapes(modules, extras), config)
    if read.keys() != modules.keys():
        name = min(read.keys() ^ modules.keys())
        raise LoraSqueezeError(f"{name}: no PEFT adapter can hold this module beside the others; leave one adapter out")
    return replace(joined, modules=_common_ranks(modules, read, scale), extras=read_extras, origins=origins), config


def _config(active: Sequence[Adapter], carriers: Sequence[Adapter], joined: Joined) -> dict[str, Any]:
    """The first adapter's settings, with the targets of all and with what the carried tensors need."""
    configs = [adapter.config for adapter in active]
    for field, reason in _MUST_AGREE.items():
        values = [config.get(field) or None for config in configs]
        if any(value != values[0] for value in values):
            raise LoraSqueezeError(
                f"the adapters differ in {field} ({', '.join(str(value) for value in values)}): {reason}, so that "
                "their sum is no adapter; merge those that agree"
            )
    parameters = [name for config in configs for name in config.get("target_parameters") or []]
    saved = [name for adapter in carriers for name in adapter.config.get("modules_to_save") or []]
    biases = {adapter.config.get("bias") or "none" for adapter in carriers}
    return {
        **configs[0],
        **_targets(active, joined.modules),
        "target_parameters": list(dict.fromkeys(parameters)) or None,
        "modules_to_save": list(dict.fromkeys(saved)) or None,
        "bias": next(kind for kind in ("all", "lora_only", "none") if kind in biases),
        "trainable_token_indices": _tokens([adapter.config for adapter in carriers]),
        "lora_bias": any(extra.kind == "lora bias" for extra in joined.extras.values()),
    }


def _tokens(configs: Sequence[Mapping[str, Any]]) -> Any:
    found = [config["trainable_token_indices"] for config in configs if config.get("trainable_token_indices")]
    if any(indices != found[0] for indices in found):
        raise LoraSqueezeError(
            "the adapters trained the rows of different tokens (trainable_token_indices), which one adapter cannot "
            "hold; take those of one adapter with extras_from=1 (--extras-from 1)"
        )
    return found[0] if found else None


def _targets(active: Sequence[Adapter], modules: Mapping[str, Module]) -> dict[str, Any]:
    """target_modules and what narrows it, so that PEFT makes these modules and no others.

    Settings that all share stay. Plain lists are united: each adapter has all modules that its list matches, so the sum
    has all that the union matches. Else every module is named.
    """
    rules = [{field: adapter.config.get(field) or None for field in _TARGETING} for adapter in active]
    for rule in rules:
        if isinstance(rule["target_modules"], list):
            rule["target_modules"] = sorted(rule["target_modules"])
    complete = not any(adapter.dropped for adapter in active)
    if complete and len({json.dumps(rule, sort_keys=True) for rule in rules}) == 1:
        return {}
    lists = [rule["target_modules"] or [] for rule in rules]
    narrowed = any(rule[field] for rule in rules for field in _TARGETING[1:])
    if complete and not narrowed and all(isinstance(names, list) for names in lists):
        return {"target_modules": sorted({name for names in lists for name in names})}
    paths = [
        module.layout.path
        for module in modules.values()
        if module.kind != "experts" and not module.layout.path.endswith(f"{NESTED}.out_proj")  # its parent is wrapped
    ]
    return {field: None for field in _TARGETING} | {"target_modules": "|".join(map(re.escape, paths)) or []}


def _paths(modules: Mapping[str, Module]) -> dict[str, Module]:
    """Modules with the paths that their wrappers have in one model: of parameters of one module, the first declared is
    inside.
    """
    bases: dict[str, list[Module]] = defaultdict(list)
    for module in modules.values():
        if module.kind == "experts":
            bases[module.layout.path.replace(NESTED, "")].append(module)
    placed = dict(modules)
    for base, members in bases.items():
        parameters = {module.name.removeprefix(f"{base}."): module for module in members}
        if len(members) > 1 and not all(name in DECLARED for name in parameters):
            if {module.layout.path for module in members} == {base + NESTED * i for i in range(len(members))}:
                continue  # all adapters have them all, under equal keys
            raise LoraSqueezeError(
                f"{base}: the adapters have different parameters of it ({', '.join(sorted(parameters))}), and in which "
                "order PEFT nests these is not known; merge adapters that have the same ones"
            )
        order = sorted(parameters, key=lambda name: DECLARED.get(name, 9))
        for depth, name in enumerate(reversed(order)):
            module = parameters[name]
            placed[module.name] = replace(module, layout=replace(module.layout, path=base + NESTED * depth))
    return placed


def _check_saved(
    modules: Mapping[str, Module], config: Mapping[str, Any], joined: Joined, adapters: Sequence[Adapter]
) -> None:
    """Refuse a module that one adapter updates and another trains in full: PEFT leaves its update out."""
    for saved in config["modules_to_save"] or []:
        named = Saved([saved])
        for name, module in modules.items():
            if named.holds(module.layout.path) and not all(name in adapters[i].modules for i in joined.carriers):
                raise LoraSqueezeError(
                    f"{name}: one adapter has an update of it, another was trained with the whole of it in "
                    f"modules_to_save ({saved}): one adapter cannot hold both; take the carried tensors of the first "
                    "with extras_from (--extras-from)"
                )


def _spelled(key: str, extra: Extra, modules: Mapping[str, Module]) -> str:
    """The key of a carried tensor among these modules: of a wrapped layer, it stands inside the wrappers."""
    if extra.module is not None:
        return f"{PREFIX}{modules[extra.module].layout.path}.lora_B.bias"
    parent, _, leaf = key.removeprefix(PREFIX).rpartition(".")
    depth = sum(module.layout.path.replace(NESTED, "") == parent for module in modules.values())
    outer, _, last = parent.rpartition(".")
    if f"{outer}{NESTED}.{last}" in {module.layout.path for module in modules.values()}:
        return f"{PREFIX}{outer}{NESTED}.{last}{NESTED}.{leaf}"  # the output projection inside an attention module
    return f"{PREFIX}{parent}{NESTED * depth}.{leaf}" if depth else key


def _fill_biases(modules: Mapping[str, Module], extras: dict[str, Extra], origins: dict[str, list[Part]]) -> None:
    """With lora_bias, PEFT looks for a bias in every module: one of zeros where no adapter has one."""
    biased = {extra.module for extra in extras.values()}
    sample = next(extra for extra in extras.values() if extra.kind == "lora bias")
    for name, module in modules.items():
        if name in biased:
            continue
        if module.kind in ("embedding", "experts"):
            raise LoraSqueezeError(
                f"{name}: PEFT has no lora_bias for this kind of layer ({module.kind}), which another adapter was "
                "trained with; merge adapters of one setting"
            )
        key = f"{PREFIX}{module.layout.path}.lora_B.bias"
        shape = (module.out_features * module.copies,)
        extras[key] = replace(sample, name=key, dtype=module.dtype, shape=shape, module=name)
        origins[key] = []


def _shapes(modules: Mapping[str, Module], extras: Mapping[str, Extra]) -> Shapes:
    """What the header of the file says."""
    factors = {
        key: (module.dtype, shape)
        for module in modules.values()
        for key, shape in zip(module.layout.new_keys(module.kind), factor_shapes(module), strict=True)
    }
    return factors | {key: (extra.dtype, extra.shape) for key, extra in extras.items()}


def _common_ranks(modules: Mapping[str, Module], read: Mapping[str, Module], scale: float) -> dict[str, Module]:
    """What reading found, with the scale that all have; modules of a group are filled up to one rank."""
    group: dict[str, int] = {}
    for module in read.values():
        if module.group is not None:
            group[module.group] = max(module.rank, group.get(module.group, 0))
    return {
        name: replace(
            read[name],
            rank=read[name].rank if read[name].group is None else group[str(read[name].group)],
            scale=scale,
            source_bytes=module.source_bytes,
        )
        for name, module in modules.items()
    }
