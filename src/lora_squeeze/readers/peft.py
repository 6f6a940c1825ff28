"""PEFT's rules, each of them seen by running PEFT 0.21.2, and what other readers of PEFT folders share."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lora_squeeze.formats.expressions import Expression
from lora_squeeze.formats.peft_keys import NESTED, PREFIX
from lora_squeeze.readers.facts import PEFT, Facts
from lora_squeeze.readers.rule import (
    AGAIN,
    MERGE,
    SUBTRACT,
    UNDORA,
    Asked,
    Hit,
    Reader,
    Rule,
    damaged,
    declared_rank,
    either,
    initialised,
    missing,
    setting,
    some,
)

_RUN = "PEFT 0.21.2, run: PeftModel.from_pretrained"
# Fields of LoraConfig in PEFT 0.21.2.
FIELDS = frozenset(
    {
        "alora_invocation_tokens", "alpha_pattern", "arrow_config", "auto_mapping", "base_model_name_or_path", "bias",
        "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
        "init_lora_weights", "kasa_config", "layer_replication", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
        "modules_to_save", "monteclora_config", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
        "revision", "runtime_config", "target_modules", "target_parameters", "task_type", "trainable_token_indices",
        "use_bdlora", "use_dora", "use_qalora", "use_rslora", "velora_config",
    }
)  # fmt: skip
_INITS = (
    "true",
    "false",
    "none",
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
    "pissa",
    "olora",
    "corda",
    "lora_ga",
    "loftq",
)


def lora_ga(prefix: str) -> Rule:
    """LoRA-GA changes the base weights in training only: who loads its files loads something else than was trained."""
    return Rule(
        f"{prefix}-lora-ga",
        "ignored",
        "LoRA-GA subtracted its first factors from the base weights in training, and nothing repeats that on loading",
        "PEFT 0.21.2: tuners/lora/layer.py, lora_ga_init; run",
        initialised("lora_ga"),
        SUBTRACT,
        (PEFT,),
    )


def broken(prefix: str) -> Rule:
    """Factors that make no adapter at all."""
    return Rule(
        f"{prefix}-damaged",
        "refused",
        "the factors cannot be paired: {damage}",
        "no reader pairs them",
        damaged,
        AGAIN,
    )


def other_kind(prefix: str, source: str) -> Rule:
    """Methods of PEFT other than LoRA."""
    return Rule(
        f"{prefix}-kind",
        "refused",
        "peft_type is {value}: only LORA is read",
        source,
        setting("peft_type", "LORA"),
        UNDORA,
        (PEFT,),
    )


def unread(prefix: str, fields: Iterable[str], source: str) -> tuple[Rule, ...]:
    """One rule for each field of the configuration that changes what is trained and that a reader does not look at."""
    return tuple(
        Rule(
            f"{prefix}-{field}",
            "ignored",
            f"{field} is set and not read: scale * B @ A is applied, to all inputs",
            source,
            setting(field),
            MERGE,
            (PEFT,),
        )
        for field in fields
    )


def _disagreeing(facts: Facts) -> Iterable[str]:
    """Modules of another rank than the configuration gives them; of experts, the shapes do not tell."""
    return [pair.name for pair in facts.pairs if pair.kind != "experts" and pair.rank != declared_rank(facts, pair)]


def _without_prefix(facts: Facts) -> Iterable[str]:
    return [pair.name for pair in facts.pairs if not any(key.startswith(PREFIX + pair.path) for key in facts.shapes)]


def _untargeted(facts: Facts) -> Iterable[str]:
    """Modules that the configuration does not make: their tensors find no place."""
    targets, excluded = facts.config.get("target_modules") or [], facts.config.get("exclude_modules") or []
    if not facts.pairs or targets == "all-linear" or facts.config.get("ensure_weight_tying"):
        return []
    made, left_out = _rule(targets), _rule(excluded)
    return [
        pair.name
        for pair in facts.pairs
        if pair.kind != "experts"  # their parameter is the target, whether its name is known or not
        and not pair.name.startswith(f"{pair.path.replace(NESTED, '')}.")  # so it is here
        and (not made(name := pair.path.removesuffix(f"{NESTED}.out_proj")) or left_out(name))
    ]


def _rule(rule: str | list[str]) -> Callable[[str], bool]:
    """What tells whether a rule of PEFT, an expression or a list of names, takes in a module."""
    if isinstance(rule, str):
        return Expression(rule).matches
    return lambda name: any(name == entry or name.endswith(f".{entry}") for entry in rule)


def _foreign_names(facts: Facts, asked: Asked) -> Hit | None:
    names = [name for name in facts.adapters if name not in ("", "default")]
    return Hit(fields={"names": ", ".join(names)}) if names else None


def _unknown(facts: Facts, asked: Asked) -> Hit | None:
    found = sorted(set(facts.config) - FIELDS)
    return Hit(fields={"names": ", ".join(found)}) if found else None


def _unknown_variant(facts: Facts, asked: Asked) -> Hit | None:
    found = [
        name
        for name, value in facts.config.items()
        if name not in FIELDS and value and (name.startswith("use_") or name.endswith("_config"))
    ]
    return Hit(fields={"names": ", ".join(found)}) if found else None


def _strange_init(facts: Facts, asked: Asked) -> Hit | None:
    init = str(facts.config.get("init_lora_weights", True)).lower()
    return None if init.startswith(_INITS) else Hit(fields={"init": init})


def _magnitudes(facts: Facts, asked: Asked) -> Hit | None:
    return Hit(facts.magnitudes) if bool(facts.magnitudes) != bool(facts.config.get("use_dora")) else None


PEFT_READER = Reader(
    key="peft",
    name="PEFT and transformers",
    version="0.21.2",
    formats=(PEFT,),
    source=_RUN,
    rules=(
        Rule(
            "peft-type",
            "refused",
            "the configuration has no {names}",
            _RUN,
            missing("peft_type"),
            'add "peft_type": "LORA"',
            (PEFT,),
        ),
        broken("peft"),
        Rule(
            "peft-rank",
            "refused",
            "the configuration gives these modules another rank than their tensors have: loading stops with a size "
            "mismatch",
            _RUN,
            some(_disagreeing),
            "lora-squeeze squeeze {adapter} -o {output} --rank {rank} --alpha fold, which reads the tensors",
        ),
        Rule(
            "peft-init",
            "refused",
            "init_lora_weights {init!r} is not known to it",
            _RUN,
            _strange_init,
            "set it to true if it leaves the base weights as they are",
        ),
        Rule(
            "peft-corda",
            "refused",
            "CorDA cannot be loaded again without the statistics that it was initialised with",
            _RUN,
            initialised("corda"),
            SUBTRACT,
        ),
        Rule(
            "peft-orphan",
            "ignored",
            "the partner of these factors is not in the file: it is warned of and left at its start, so that the "
            "module does nothing, or something at random where B alone is there",
            _RUN,
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "peft-names",
            "ignored",
            "the keys hold the name of an adapter ({names}): such keys find no place, and their modules do nothing",
            _RUN,
            _foreign_names,
            "save each adapter by itself with save_pretrained(selected_adapters=[...])",
        ),
        Rule(
            "peft-prefix",
            "ignored",
            f"the keys do not begin with {PREFIX}: they find no place, and the modules do nothing",
            _RUN,
            some(_without_prefix),
            "lora-squeeze squeeze {adapter} -o {output} --rank {rank} --alpha fold, which writes today's keys",
        ),
        Rule(
            "peft-target",
            "ignored",
            "target_modules and exclude_modules do not make these modules: their tensors are dropped without a word",
            _RUN,
            some(_untargeted),
            "add them to target_modules",
        ),
        Rule(
            "peft-magnitude",
            "ignored",
            "use_dora and the magnitude vectors in the file do not go together: these are dropped, or taken from the "
            "base weights",
            _RUN,
            _magnitudes,
            AGAIN,
        ),
        Rule(
            "peft-variant",
            "ignored",
            "{names}: set, and not known to this version, which drops it with a warning",
            _RUN,
            _unknown_variant,
            "read it with the version of PEFT that wrote it",
        ),
        lora_ga("peft"),
        Rule(
            "peft-repeated-init",
            "note",
            "init_lora_weights is {init}: its change of the base weights is repeated on loading, so it has to be "
            "loaded on the very base weights that it was trained from",
            _RUN,
            either(initialised("pissa"), initialised("olora"), initialised("loftq")),
        ),
        Rule(
            "peft-fields",
            "note",
            "{names}: not known to this version, which drops them with a warning; versions from before pull request "
            "2038 (autumn 2024) do not load a file with a field that they do not know",
            f"{_RUN}; peft pull request 2038",
            _unknown,
        ),
    ),
)
