"""Rules of SGLang, and of TGI and LoRAX, read in single files of their sources; neither was run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from lora_squeeze.formats.peft_keys import PREFIX
from lora_squeeze.readers.facts import PEFT, Facts
from lora_squeeze.readers.peft import broken, lora_ga, other_kind, unread
from lora_squeeze.readers.rule import (
    AGAIN,
    FILL,
    FOLD,
    MERGE,
    SUBTRACT,
    UNDORA,
    Hit,
    Reader,
    Rule,
    either,
    global_scale,
    initialised,
    layer_of,
    missing,
    other_scales,
    rank_rules,
    setting,
    some,
)

_SGLANG = "SGLang, python/sglang/srt/lora"
_LORAX = "TGI, commit 45d95bd, and LoRAX, commit 03679f3: adapters/lora.py"
VARIANTS = (
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)
_SUBTRACTING = ("pissa", "olora", "corda", "loftq")
_TRAINED = ("module to save", "bias", "lora bias", "trainable tokens", "embedding")
_GLOBAL = "it takes one scale for all modules: {worst} gets {taken}, meant is {meant} (x {factor})"


def unchanged_base(prefix: str, source: str) -> Rule:
    """Readers that apply B @ A to a base whose weights were changed in training."""
    return Rule(
        f"{prefix}-init",
        "ignored",
        "init_lora_weights is {init}, which changed the base weights in training; that is not repeated here",
        source,
        initialised(*_SUBTRACTING),
        SUBTRACT,
        (PEFT,),
    )


def beside(prefix: str, source: str) -> Rule:
    """Readers that look for factors by name and pass over the rest."""
    return Rule(
        f"{prefix}-beside",
        "ignored",
        "tensors beside the factors are passed over: the base model's are used",
        source,
        some(lambda facts: (*facts.extras_of(*_TRAINED), *facts.strange)),
        MERGE,
        (PEFT,),
    )


def plain_global_scale(facts: Facts) -> dict[str, float]:
    """lora_alpha / r, whatever use_rslora says."""
    if not facts.pairs:
        return {}
    scale = facts.config.get("lora_alpha", 8) / facts.config.get("r", 8)
    return {pair.name: scale for pair in facts.pairs}


def _types(facts: Facts) -> dict[str, dict[int, int]]:
    """Last part of a module's name -> layer -> rank."""
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for pair in facts.pairs:
        layer = layer_of(f"{pair.name}.")
        if pair.kind == "linear" and layer is not None:
            found[pair.name.rpartition(".")[2]][layer] = pair.rank
    return found


def _mixed_types(facts: Facts) -> Iterable[str]:
    """Types whose layers have different ranks after they are filled up."""
    return [name for name, ranks in _types(facts).items() if len({_filled(rank) for rank in ranks.values()}) > 1]


def _filled(rank: int) -> int:
    """The rank that the kernels take on one device: 8, or a multiple of 16."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def _partial_types(facts: Facts) -> Iterable[str]:
    """Types that miss a layer which another type has."""
    types = _types(facts)
    layers = max((layer for ranks in types.values() for layer in ranks), default=-1) + 1
    return [name for name, ranks in types.items() if len(ranks) < layers]


def _unnamed(facts: Facts) -> Iterable[str]:
    """Modules whose two keys are not spelled in the one way that is looked for."""
    return [
        pair.name
        for pair in facts.pairs
        if pair.kind != "linear" or f"{PREFIX}{pair.path}.lora_A.weight" not in facts.shapes
    ]


SGLANG = Reader(
    key="sglang",
    name="SGLang",
    version="commits 002c60a, 0ceb81f",
    formats=(PEFT,),
    source=f"{_SGLANG}/lora_config.py",
    rules=(
        other_kind("sglang", f"{_SGLANG}/lora.py, LoRAAdapter"),
        broken("sglang"),
        Rule(
            "sglang-required",
            "refused",
            "the configuration has no {names}",
            f"{_SGLANG}/lora_config.py, LoRAConfig",
            missing("r", "lora_alpha", "target_modules"),
            "add it to adapter_config.json; PEFT takes 8 where r or lora_alpha is missing",
        ),
        Rule(
            "sglang-dora",
            "refused",
            "DoRA is not supported",
            f"{_SGLANG}/lora_manager.py, validate_new_adapter, as quoted in a description of it",
            either(setting("use_dora"), some(lambda facts: facts.magnitudes)),
            UNDORA,
        ),
        *rank_rules("sglang", "sglang", f"{_SGLANG}/lora_manager.py, validate_new_adapter"),
        Rule(
            "sglang-layer",
            "refused",
            "LoRA on this kind of layer is not supported",
            f"{_SGLANG}/lora.py, get_lora_layer",
            some(lambda facts: facts.of_kind("conv")),
            MERGE,
        ),
        Rule(
            "sglang-orphan",
            "ignored",
            "the partner of these factors is not in the file, and pairs are not checked",
            f"{_SGLANG}/lora.py, initialize_weights",
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "sglang-scale",
            "scale",
            f"{_GLOBAL}; rsLoRA is not looked at, and newer versions look at patterns in a way that was not read",
            f"{_SGLANG}/lora.py, LoRAAdapter.scaling, commit 002c60a; lora_config.py, commit 0ceb81f",
            other_scales(plain_global_scale),
            FOLD,
        ),
        unchanged_base("sglang", f"{_SGLANG}/lora_config.py reads no such field"),
        beside("sglang", f"{_SGLANG}/lora.py, initialize_weights"),
        *unread("sglang", ("lora_bias", *VARIANTS), f"{_SGLANG}/lora_config.py reads no such field"),
        lora_ga("sglang"),
        Rule(
            "sglang-experts",
            "note",
            "experts in one parameter: how it takes them apart was not read",
            _SGLANG,
            some(lambda facts: facts.of_kind("experts")),
        ),
        Rule(
            "sglang-tokens",
            "note",
            "added_tokens.json is beside the adapter: refused if it has tokens above the base model's vocabulary",
            f"{_SGLANG}/lora_config.py, lora_added_tokens_size",
            some(lambda facts: [name for name in facts.companions if name == "added_tokens.json"]),
        ),
    ),
)

TGI = Reader(
    key="tgi",
    name="TGI and LoRAX",
    version="commits 45d95bd, 03679f3",
    formats=(PEFT,),
    source=_LORAX,
    rules=(
        other_kind("tgi", f"{_LORAX}: LoraConfig.load"),
        broken("tgi"),
        Rule(
            "tgi-mixed",
            "refused",
            "the layers of these types have different ranks, and are stacked into one tensor",
            f"{_LORAX}: LoraWeights",
            some(_mixed_types),
            FILL,
        ),
        Rule(
            "tgi-scale",
            "scale",
            _GLOBAL,
            f"{_LORAX}: get_scaling_factor",
            other_scales(global_scale),
            FOLD,
        ),
        Rule(
            "tgi-dora",
            "ignored",
            "DoRA's magnitude vectors are passed over",
            f"{_LORAX}: map_weights_for_model",
            either(setting("use_dora"), some(lambda facts: facts.magnitudes)),
            UNDORA,
        ),
        Rule(
            "tgi-keys",
            "ignored",
            f"only keys of the form {PREFIX}<module>.lora_A.weight are looked for",
            f"{_LORAX}: map_weights_for_model",
            some(_unnamed),
            MERGE,
        ),
        Rule(
            "tgi-partial",
            "ignored",
            "types of modules that are not adapted in every layer are left out altogether",
            f"{_LORAX}: prepare_weights",
            some(_partial_types),
            MERGE,
        ),
        Rule(
            "tgi-orphan",
            "ignored",
            "the partner of these factors is not in the file: the whole type is left out",
            f"{_LORAX}: map_weights_for_model",
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        unchanged_base("tgi", f"{_LORAX}: LoraConfig has no such field"),
        beside("tgi", f"{_LORAX}: map_weights_for_model"),
        *unread("tgi", ("lora_bias", *VARIANTS), f"{_LORAX}: LoraConfig has no such field"),
        lora_ga("tgi"),
        Rule(
            "tgi-filled",
            "note",
            "it fills rank {rank} up to the next that its kernels take, and writes that over r while it loads: types "
            "of modules that come later may be divided by it",
            f"{_LORAX}: prepare_weights; utils/sgmv.py, pad_rank",
            lambda facts, asked: Hit() if facts.rank != _filled(facts.rank) else None,
        ),
    ),
)
