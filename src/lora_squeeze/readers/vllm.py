"""vLLM's rules, read in the source of 0.32.0."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lora_squeeze.formats.peft_config import pattern_value
from lora_squeeze.formats.peft_keys import NESTED
from lora_squeeze.readers.facts import PEFT, Facts, Pair
from lora_squeeze.readers.peft import broken, lora_ga, unread
from lora_squeeze.readers.rule import (
    AGAIN,
    FOLD,
    LAYERS,
    MERGE,
    SUBTRACT,
    UNDORA,
    Asked,
    Hit,
    Reader,
    Rule,
    either,
    global_scale,
    missing,
    other_scales,
    rank_rules,
    setting,
    some,
)

_HELPER = "vLLM 0.32.0: lora/peft_helper.py, PEFTHelper"
_NAMES = "vLLM 0.32.0: lora/utils.py, parse_fine_tuned_lora_name"
_MODULES = "vLLM 0.32.0: lora/lora_model.py, LoRAModel.from_local_checkpoint"
_EXPERTS = "vLLM 0.32.0: lora/model_manager.py, _stack_moe_lora_weights and _validate_moe_lora_format"
HEADS = ("classifier", "score")
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_WHOLE_EMBEDDINGS = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")


def scales(facts: Facts) -> dict[str, float]:
    """The scale of each module: patterns as in PEFT, but ranks as the configuration gives them."""
    return {pair.name: _scale(facts, pair) for pair in facts.pairs}


def _scale(facts: Facts, pair: Pair) -> float:
    config, name = facts.config, pair.path
    if name.endswith(f".experts{NESTED}"):
        name = f"{name.removesuffix(NESTED)}.gate_up_proj"
    elif name.endswith(".experts"):
        name = f"{name}.down_proj"
    rank = pattern_value(config.get("rank_pattern"), name, config.get("r", 8))
    alpha = pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _other_kind(facts: Facts, asked: Asked) -> Hit | None:
    """It does not look at peft_type, but does not know the keys of other methods."""
    kind = facts.config.get("peft_type", "LORA")
    return Hit(fields={"value": kind}) if kind != "LORA" and _unknown_keys(facts) else None


def _saved(facts: Facts, asked: Asked) -> Hit | None:
    names = [name for name in facts.config.get("modules_to_save") or [] if name not in HEADS]
    return Hit(facts.extras_of("module to save"), {"names": ", ".join(map(str, names))}) if names else None


def _heads(facts: Facts) -> Iterable[str]:
    names = facts.config.get("modules_to_save") or []
    return facts.extras_of("module to save") if names and set(names) <= set(HEADS) else ()


def _init(facts: Facts, asked: Asked) -> Hit | None:
    init = facts.config.get("init_lora_weights", True)
    return Hit(fields={"init": init}) if isinstance(init, str) and init.lower() not in _HARMLESS_INITS else None


def _unknown_keys(facts: Facts) -> Iterable[str]:
    """Keys that stop it, but for those of which another rule tells more."""
    told = {*facts.magnitudes, *facts.extras_of("bias", "lora bias", "module to save", "trainable tokens")}
    return [key for key in facts.shapes if key not in told and not key.endswith((*_FACTORS, *_WHOLE_EMBEDDINGS))]


def _other_layers(facts: Facts) -> Iterable[str]:
    inside = {pair.name.removesuffix(".out_proj") for pair in facts.pairs if pair.path.endswith(f"{NESTED}.out_proj")}
    return [pair.name for pair in facts.pairs if pair.kind == "conv" or pair.name.removesuffix(".out_proj") in inside]


def _experts(facts: Facts) -> dict[str, list[str]]:
    """Module of experts -> the paths of its adapted parameters."""
    found: dict[str, list[str]] = {}
    for pair in facts.pairs:
        if pair.kind == "experts":
            found.setdefault(pair.path.replace(NESTED, ""), []).append(pair.path)
    return found


def _half_experts(facts: Facts) -> Iterable[str]:
    return [
        base
        for base, paths in _experts(facts).items()
        if not base.endswith(".experts") or set(paths) != {base, base + NESTED}
    ]


def _whole_experts(facts: Facts) -> Iterable[str]:
    return set(_experts(facts)) - set(_half_experts(facts))


VLLM = Reader(
    key="vllm",
    name="vLLM",
    version="0.32.0",
    formats=(PEFT,),
    source=_MODULES,
    rules=(
        Rule(
            "vllm-kind",
            "refused",
            "peft_type is {value}: only LORA is read",
            _NAMES,
            _other_kind,
            UNDORA,
        ),
        broken("vllm"),
        Rule(
            "vllm-required",
            "refused",
            "the configuration has no {names}",
            f"{_HELPER}.from_dict",
            missing("r", "lora_alpha", "target_modules"),
            "add it to adapter_config.json; PEFT takes 8 where r or lora_alpha is missing",
            (PEFT,),
        ),
        Rule(
            "vllm-dora",
            "refused",
            "DoRA is not supported",
            f"{_HELPER}._validate_features",
            either(setting("use_dora"), some(lambda facts: facts.magnitudes)),
            UNDORA,
        ),
        Rule(
            "vllm-init",
            "refused",
            "init_lora_weights is {init!r}, which changes the base weights",
            f"{_HELPER}._init_is_supported",
            _init,
            SUBTRACT,
        ),
        Rule(
            "vllm-bias",
            "refused",
            "trained biases are not supported",
            f"{_HELPER}.validate_legal",
            either(setting("bias", "none"), some(lambda facts: facts.extras_of("bias"))),
            MERGE,
        ),
        Rule(
            "vllm-lora-bias",
            "refused",
            "lora_bias is not supported",
            f"{_HELPER}._validate_features",
            either(setting("lora_bias"), some(lambda facts: facts.extras_of("lora bias"))),
            MERGE,
        ),
        Rule(
            "vllm-saved",
            "refused",
            "modules_to_save has {names}: only classifier and score are supported",
            f"{_HELPER}._validate_features",
            _saved,
            LAYERS,
        ),
        *(
            Rule(
                f"vllm-{name}",
                "refused",
                f"{field} is set, which is not supported",
                f"{_HELPER}._validate_features",
                setting(field),
                cure,
            )
            for name, field, cure in (
                ("alora", "alora_invocation_tokens", ""),
                ("replication", "layer_replication", ""),
                ("bdlora", "use_bdlora", MERGE),
                ("qalora", "use_qalora", ""),
            )
        ),
        *rank_rules("vllm", "vllm", f"{_HELPER}.validate_legal; config/lora.py, MaxLoRARanks"),
        Rule(
            "vllm-tokens",
            "refused",
            "rows of trained tokens are not known to it and stop it",
            _NAMES,
            some(lambda facts: facts.extras_of("trainable tokens")),
            LAYERS,
        ),
        Rule(
            "vllm-keys",
            "refused",
            "these keys are not known to it and stop it",
            _NAMES,
            some(_unknown_keys),
            f"{FOLD} writes today's keys of plain factors; tensors of another kind have to be merged into the base "
            "model",
        ),
        Rule(
            "vllm-orphan",
            "refused",
            "the partner of these factors is not in the file",
            "vLLM 0.32.0: lora/layers/base_linear.py, set_lora",
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "vllm-layer", "refused", "LoRA on this kind of layer is not supported", _MODULES, some(_other_layers), MERGE
        ),
        Rule(
            "vllm-half-experts",
            "refused",
            "it takes the parameters of these experts for gate_up_proj and down_proj of a module called experts, and "
            "wants both",
            _EXPERTS,
            some(_half_experts),
            MERGE,
        ),
        Rule(
            "vllm-scale",
            "scale",
            "it takes ranks from the configuration: {worst} gets the scale {taken}, meant is {meant} (x {factor})",
            f"{_HELPER}.get_rank_and_scaling",
            other_scales(scales),
            FOLD,
        ),
        Rule(
            "vllm-whole-embedding",
            "ignored",
            "whole embeddings in the file are passed over: the base model's are used",
            "vLLM 0.32.0: lora/utils.py, is_base_embedding_weights",
            some(lambda facts: [key for key in facts.shapes if key.endswith(_WHOLE_EMBEDDINGS)]),
            LAYERS,
        ),
        *unread("vllm", ("arrow_config", "kasa_config", "monteclora_config", "velora_config"), f"{_HELPER}.from_dict"),
        lora_ga("vllm"),
        Rule(
            "vllm-experts",
            "note",
            "experts in one parameter: models without such experts of their own need --enable-mixed-moe-lora-format "
            "and is_3d_lora_weight in the request",
            _EXPERTS,
            some(_whole_experts),
        ),
        Rule(
            "vllm-embedding",
            "note",
            "adapted embeddings are taken by those models only that list them, with a vocabulary of the same size",
            "vLLM 0.32.0: lora/lora_model.py, from_lora_tensors",
            some(lambda facts: facts.of_kind("embedding")),
        ),
        Rule(
            "vllm-head",
            "note",
            "a classification head is taken by models for classification with one such head",
            "vLLM 0.32.0: lora/model_manager.py, _validate_modules_to_save",
            some(_heads),
        ),
        Rule(
            "vllm-older",
            "note",
            "versions that do not read rank_pattern and alpha_pattern take one scale for all modules: {worst} gets "
            "{taken}, meant is {meant} (x {factor})",
            "vLLM, stored file of commit 0214369: lora/peft_helper.py has neither field",
            other_scales(global_scale),
            FOLD,
        ),
    ),
)
