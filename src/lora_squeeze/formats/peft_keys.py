"""Keys and shapes of a PEFT weights file: from tensors to modules, without reading data."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_squeeze.adapter import Extra, Module, common_dtype
from lora_squeeze.data_aware import TIED
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.patterns import Patterns
from lora_squeeze.formats.peft_config import pattern_value, scale_of
from lora_squeeze.formats.peft_targets import NESTED as NESTED
from lora_squeeze.formats.peft_targets import TIED_HEADS, Saved, Targets
from lora_squeeze.formats.safetensors_header import check_shown, quoted

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]

# "<path>.lora_A.weight", "<path>.lora_embedding_A"; old files have the adapter's name before ".weight" or at the end.
_FACTOR = re.compile(r"^(?P<path>.+)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(?:\.[^.]+)*)$")
_UNSQUEEZABLE = {
    "lora_magnitude_vector": "DoRA (its magnitude vector rescales base weight and update together)",
    "lora_diag": "KaSA (a diagonal stands between A and B)",
    "lora_E": "AdaLoRA (a diagonal stands between A and B)",
    "lora_mid": "a Tucker convolution",
    "hada_": "LoHa",
    "lokr_": "LoKr",
}
# Parameters of one expert module in the order in which models declare them: PEFT nests their wrappers in that order.
DECLARED = {"gate_up_proj": 0, "gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}
_MAX_NESTED = 64  # wrappers around one module; models have up to three parameters to wrap


@dataclass(frozen=True)
class Layout:
    """How one module stands in the file.

    Args:
        path: the wrapped module as keys spell it, without prefix ("...experts.base_layer" for an inner wrapper).
        a_key, b_key: keys of the factors in the file that was read.
        pattern: regular expression of the whole path that PEFT looks up in rank_pattern; None where another entry of
            the same group stands for it.
    """

    path: str
    a_key: str
    b_key: str
    pattern: str | None = None

    def new_keys(self, kind: str) -> tuple[str, str]:
        """Keys of A and B in a file that PEFT writes today."""
        if kind == "embedding":
            return f"{PREFIX}{self.path}.lora_embedding_A", f"{PREFIX}{self.path}.lora_embedding_B"
        return f"{PREFIX}{self.path}.lora_A.weight", f"{PREFIX}{self.path}.lora_B.weight"


def parse(shapes: Shapes, config: Mapping[str, Any]) -> tuple[dict[str, Module], dict[str, Extra], list[str]]:
    """Modules, carried tensors and notes of a weights file.

    Args:
        shapes: key -> (dtype, shape) of every tensor, in file order.
        config: adapter_config.json.

    Raises:
        LoraSqueezeError: an orphan factor, factors that do not fit, a tensor that changes the meaning of the update.
    """
    check_shown(shapes)
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    rest: list[str] = []
    names: set[str] = set()
    for key in shapes:
        match = _FACTOR.match(key)
        if not match or match["rest"].endswith(".bias"):
            rest.append(key)
            continue
        path, side = _without_prefix(match["path"]), match["what"].replace("lora_", "")
        names.add(match["rest"].removesuffix(".weight").removeprefix("."))
        if len(names) > 1:
            break
        if side in factors[path]:
            raise LoraSqueezeError(f"{quoted(key)} and {quoted(factors[path][side])} are the same factor; keep one")
        factors[path][side] = key
    if len(names) > 1:
        raise LoraSqueezeError(
            f"the file holds several adapters ({', '.join(sorted(quoted(n) for n in names))}); save each by itself"
        )
    if not factors:
        raise LoraSqueezeError(_no_factors(list(shapes)))
    wrappers = defaultdict(list)
    for path in factors:
        wrappers[path.replace(NESTED, "")].append(path)
    if any(len(paths) > _MAX_NESTED for paths in wrappers.values()):
        raise LoraSqueezeError(f"more than {_MAX_NESTED} wrappers around one module; no model has so many parameters")
    config = {**config, **{field: Patterns(config.get(field) or {}) for field in ("rank_pattern", "alpha_pattern")}}
    targets = Targets(config)
    notes: list[str] = []
    modules: dict[str, Module] = {}
    for path, keys in factors.items():
        module = _module(path, keys, shapes, config, targets, wrappers[path.replace(NESTED, "")], notes)
        if module.name in modules:
            raise LoraSqueezeError(f"two modules have the name {quoted(module.name)}")
        modules[module.name] = module
    _check_nesting(modules)
    modules = _tied(modules, config)
    owners = {module.layout.path: module.name for module in modules.values()}
    saved = Saved(config.get("modules_to_save") or [])
    extras = {key: _extra(key, shapes, config, owners, saved) for key in rest}
    floors = {extra.module for extra in extras.values() if extra.module}
    # Tensors of the layer inside a wrapper ("....base_layer.bias") find no place on loading once the wrapper is gone.
    inside = {_without_prefix(key).rpartition(f"{NESTED}.")[0] for key in rest}
    modules = {
        name: replace(m, floor=max(m.floor, int(name in floors or m.layout.path in inside)))
        for name, m in modules.items()
    }
    return modules, extras, notes


def _without_prefix(path: str) -> str:
    return path.removeprefix(PREFIX)


def _no_factors(keys: list[str]) -> str:
    for key in keys:
        for mark, kind in _UNSQUEEZABLE.items():
            if mark in key:
                return f"no plain LoRA factors: {quoted(key)} belongs to {kind}"
    style = "kohya or diffusers" if any("lora_down" in key or ".lora.down" in key for key in keys) else "unknown"
    return (
        f"no LoRA factors among {len(keys)} tensors (the first is {quoted(keys[0])}, style {style}); "
        "expected keys such as '...q_proj.lora_A.weight'"
    )


def _module(
    path: str,
    keys: dict[str, str],
    shapes: Shapes,
    config: Mapping[str, Any],
    targets: Targets,
    siblings: list[str],
    notes: list[str],
) -> Module:
    embedding = "embedding_A" in keys or "embedding_B" in keys
    a_key, b_key = (keys.get(side) for side in (("embedding_A", "embedding_B") if embedding else ("A", "B")))
    if a_key is None or b_key is None or len(keys) != 2:
        present = next(iter(keys.values()))
        raise LoraSqueezeError(
            f"orphan factor {quoted(present)}: its partner for module {quoted(path)} is not in the file; "
            "the file is incomplete: get it again"
        )
    (a_dtype, a), (b_dtype, b) = shapes[a_key], shapes[b_key]
    for key, dtype, shape in ((a_key, a_dtype, a), (b_key, b_dtype, b)):
        if len(shape) < 2 or 0 in shape:
            raise LoraSqueezeError(
                f"{quoted(key)} has shape {list(shape)}: an empty or flat factor means that DeepSpeed ZeRO-3 or FSDP "
                "shards were not gathered before saving; save again from the gathered model"
            )
        if not dtype.is_floating_point:
            raise LoraSqueezeError(f"{quoted(key)} has dtype {dtype}; factors must be floating point")
    layout = Layout(path, a_key, b_key, pattern=re.escape(path))
    dtype = common_dtype(a_dtype, b_dtype)
    wrong = LoraSqueezeError(
        f"factors of {quoted(path)} do not fit: {quoted(a_key)} is {list(a)}, {quoted(b_key)} is {list(b)}"
    )
    if embedding:
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise wrong
        rank = a[0]
        module = Module(path, rank, scale_of(config, path, rank), dtype, b[0], a[1], kind="embedding", layout=layout)
    elif len(a) == len(b) == 2:
        if a[0] != b[1]:
            raise wrong
        parameters = targets.parameters(path)
        if parameters:
            return _experts(layout, dtype, a, b, config, siblings, parameters)
        rank = a[0]
        module = Module(path, rank, scale_of(config, path, rank), dtype, b[0], a[1], layout=layout)
    else:
        module = _conv(layout, dtype, a, b, config, wrong)
    _check_rank(module, config, notes)
    return _attention_output(module, config) if path.endswith(f"{NESTED}.out_proj") else module


def _conv(
    layout: Layout,
    dtype: torch.dtype,
    a: tuple[int, ...],
    b: tuple[int, ...],
    config: Mapping[str, Any],
    wrong: Exception,
) -> Module:
    """A convolution: A (r, in, *kernel), B (out, r / groups, 1, ...); rows of one group of B see their part of A."""
    groups, left = divmod(a[0], b[1])
    if len(a) != len(b) or len(a) > 5 or left or b[0] % groups or set(b[2:]) != {1}:
        raise wrong
    columns = 1
    for size in a[1:]:
        columns *= size
    return Module(
        name=layout.path,
        rank=a[0] // groups,
        scale=scale_of(config, layout.path, a[0]),
        dtype=dtype,
        out_features=b[0] // groups,
        in_features=columns,
        copies=groups,
        kind="conv",
        floor=int(groups > 1),
        step=groups,
        kernel=a[2:],
        layout=layout,
    )


def _experts(
    layout: Layout,
    dtype: torch.dtype,
    a: tuple[int, ...],
    b: tuple[int, ...],
    config: Mapping[str, Any],
    siblings: list[str],
    targets: list[str],
) -> Module:
    """A targeted parameter: A (E * r, in), B (out, r * E). The parameter's name is not in the key.

    Wrappers of several parameters of one module nest, the first declared inside; they share one rank here, so that the
    file never depends on which is which.
    """
    base = layout.path.replace(NESTED, "")
    inner_first = sorted(siblings, key=lambda path: -path.count(NESTED))
    by_order = sorted(targets, key=lambda name: (DECLARED.get(name, 9), name))
    known = len(targets) == len(inner_first) and (len(targets) == 1 or all(name in DECLARED for name in targets))
    mine = [by_order[inner_first.index(layout.path)]] if known else targets
    ranks = {pattern_value(config.get("rank_pattern"), f"{base}.{name}", config.get("r", 8)) for name in mine}
    if len(ranks) > 1:
        raise LoraSqueezeError(
            f"{quoted(base)}: parameters {', '.join(targets)} have different ranks and the file does not say which is "
            "which; train them with one rank"
        )
    rank = int(ranks.pop())
    experts, left = divmod(a[0], rank)
    if left:
        raise LoraSqueezeError(
            f"{quoted(layout.a_key)} has {a[0]} rows, not a multiple of the rank {rank} that {quoted(base)} has in the "
            "configuration; without the right rank the experts cannot be told apart"
        )
    scales = {scale_of(config, f"{base}.{name}", rank) for name in mine}
    if len(scales) > 1:
        raise LoraSqueezeError(
            f"{quoted(base)}: parameters {', '.join(targets)} have different alphas and the file does not say which is "
            "which; train them with one alpha"
        )
    return Module(
        name=f"{base}.{mine[0]}" if known else layout.path,
        rank=rank,
        scale=scales.pop(),
        dtype=dtype,
        out_features=b[0],
        in_features=a[1],
        copies=experts,
        kind="experts",
        group=f"parameters of {base}" if len(inner_first) > 1 else None,
        floor=1,
        layout=replace(layout, pattern=rf"{re.escape(base)}\.(?:{'|'.join(re.escape(name) for name in by_order)})"),
    )


def _check_nesting(modules: Mapping[str, Module]) -> None:
    """Refuse experts whose two parameters differ in scale or rank where the shapes deny the assumed order.

    down_proj maps back what the others map from: its output is their input.
    """
    for outer in modules.values():
        base, _, parameter = outer.name.rpartition(".")
        if outer.kind != "experts" or parameter not in ("down_proj", "w2"):
            continue
        for inner in (m for m in modules.values() if m.group == outer.group and m is not outer and m.group):
            fits = inner.in_features == outer.out_features and inner.out_features % outer.in_features == 0
            if (inner.scale != outer.scale or inner.copies != outer.copies) and not fits:
                raise LoraSqueezeError(
                    f"{quoted(base)}: its parameters have different ranks or alphas, and the shapes do not tell which "
                    "is which; train them with one rank and one alpha"
                )


def _attention_output(module: Module, config: Mapping[str, Any]) -> Module:
    """The output projection inside nn.MultiheadAttention: PEFT gives it the rank and alpha of the attention module."""
    outer = module.name.removesuffix(f"{NESTED}.out_proj")
    return replace(
        module,
        name=f"{outer}.out_proj",
        scale=scale_of(config, outer, module.rank),
        group=f"attention {outer}",
        floor=1,
        layout=replace(module.layout, pattern=None),
    )


def _check_rank(module: Module, config: Mapping[str, Any], notes: list[str]) -> None:
    told = pattern_value(config.get("rank_pattern"), module.name, config.get("r", 8))
    found = module.rank * module.step
    if told != found and not module.name.endswith(f"{NESTED}.out_proj"):
        notes.append(
            f"{module.name}: the configuration says rank {told:g}, the tensors have {found}; the tensors are used"
        )
    if len(config["alpha_pattern"].values_of(module.name)) > 1:
        notes.append(
            f"{module.name}: several alpha patterns match; the first in the file counts, as when PEFT loads it"
        )


def _tied(modules: dict[str, Module], config: Mapping[str, Any]) -> dict[str, Module]:
    """Modules that must keep one rank, because PEFT gives them one when it loads the file."""
    group: dict[str, str] = {}
    attention = {m.group for m in modules.values() if m.group and m.group.startswith("attention ")}
    for name, module in modules.items():
        if f"attention {name}" in attention:
            group[name] = f"attention {name}"
        elif config.get("ensure_weight_tying") and (
            module.kind == "embedding" or name.rpartition(".")[2] in TIED_HEADS
        ):
            group[name] = TIED
    if any(re.search(r"\.experts\.\d+\.", name) for name in modules):
        # PEFT fuses per-expert modules on loading and takes one rank, r, for all of them.
        group = dict.fromkeys(modules, "all: per-expert modules are fused on loading")
    return {name: replace(m, group=group[name], floor=1) if name in group else m for name, m in modules.items()}


def _extra(key: str, shapes: Shapes, config: Mapping[str, Any], owners: Mapping[str, str], saved: Saved) -> Extra:
    dtype, shape = shapes[key]
    for mark, kind in _UNSQUEEZABLE.items():
        if mark in key:
            raise LoraSqueezeError(f"{quoted(key)} belongs to {kind}, which cannot be squeezed as a plain LoRA")
    bare = _without_prefix(key)
    match = _FACTOR.match(key)
    if match:
        owner = owners.get(_without_prefix(match["path"]))
        if match["what"] != "lora_B" or owner is None:
            raise LoraSqueezeError(f"orphan bias {quoted(key)}: there is no LoRA module for it in the file")
        return Extra(key, dtype, shape, "lora bias", "lora_bias is on: B has a bias", module=owner)
    if ".lora_" in key:
        raise LoraSqueezeError(f"{quoted(key)} is no tensor that a plain LoRA has; its meaning is not known here")
    if "trainable_tokens" in bare:
        return Extra(key, dtype, shape, "trainable tokens", "rows of the embedding for trainable_token_indices")
    if saved.holds(bare):
        return Extra(key, dtype, shape, "module to save", saved.cause)
    if bare.endswith(".bias"):
        cause = f"bias is {config.get('bias', 'none')!r:.80}: biases are saved in full"
        return Extra(key, dtype, shape, "bias", cause)
    if bare.endswith(
        (".base_layer.weight", "embed_tokens.weight", "lm_head.weight", "word_embeddings.weight", "wte.weight")
    ):
        return Extra(
            key,
            dtype,
            shape,
            "embedding",
            "PEFT saves the whole embedding when it is a target or the vocabulary was resized (save_embedding_layers)",
        )
    return Extra(key, dtype, shape, "other", "not a tensor of the LoRA itself; carried along unchanged")
