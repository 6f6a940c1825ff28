"""adapter_config.json: what it means when PEFT reads it, what is refused, and what is written after a squeeze."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.expressions import MAX_LENGTH, Expression
from lora_squeeze.formats.patterns import Patterns
from lora_squeeze.formats.safetensors_header import check_name, check_shown
from lora_squeeze.formats.safetensors_io import read_regular

CONFIG_NAME = "adapter_config.json"
_MAX_CONFIG_BYTES = 10**7  # of JSON, which takes up to twenty times as much memory; 20,000 patterns are 4 MB
_MAX_DEPTH = 50

_CONVERT = "lora-squeeze convert ADAPTER --to peft --rank N"
# Not PEFT's save_as_lora: in 0.21.2 it takes B @ A for the update of these.
_BASE_WAY_OUT = f"{_CONVERT} --base MODEL"
_MERGED_WAY_OUT = "merge it into the base model in PEFT with model.merge_and_unload(), or train a plain LoRA"
_CONVERTED_WAY_OUT = f"{_CONVERT} --initial ADAPTER, with the adapter as it was saved before the training"

# Fields that, when set, make the update something else than scale * B @ A. Field -> (what it is, why, way out).
_REFUSED_FIELDS = {
    "use_dora": (
        "DoRA",
        "its magnitude vector rescales base weight and update together: a change of full rank that depends on the base",
        _BASE_WAY_OUT,
    ),
    "use_qalora": ("QALoRA", "its A acts on pooled inputs, so B @ A is not the update", _CONVERT),
    "use_bdlora": ("BD-LoRA", "its factors are block-diagonal and a truncation would fill the blocks", _CONVERT),
    "kasa_config": ("KaSA", "it puts a diagonal between A and B and changes the base weights", _BASE_WAY_OUT),
    "arrow_config": (
        "Arrow",
        "it routes between several adapters token by token",
        "squeeze each expert adapter by itself",
    ),
    "monteclora_config": ("MonteCLoRA", "it samples its factors around stored means", _CONVERT),
    "velora_config": ("VeLoRA", "it trains its factors with other gradients than a plain LoRA", _CONVERT),
}

# Initialisations that change the base weights: the stored factors are then not the change against the original model.
_MUTATING_INITS = {
    "pissa": "PiSSA subtracts the leading singular directions from the base weights",
    "olora": "OLoRA subtracts an orthonormal factorisation from the base weights",
    "corda": "CorDA subtracts context-oriented directions from the base weights",
    "lora_ga": "LoRA-GA subtracts gradient directions from the base weights",
    "loftq": "LoftQ replaces the base weights by quantised ones fitted together with the adapter",
}
_HARMLESS_INITS = {"gaussian", "eva", "orthogonal", "mica", "true", "false", "none"}

_PATTERNS = ("rank_pattern", "alpha_pattern")

# Fields of PEFT 0.21.2 that choose a variant; another one that is set may change what the factors mean.
_KNOWN_VARIANTS = {
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
    "velora_config",
    "runtime_config",
}


def read_config(folder: Path, *, of_pair: bool = False) -> dict[str, Any]:
    """The configuration in a folder, checked to be one of a plain LoRA.

    Args:
        folder: of the adapter.
        of_pair: allow an initialisation that subtracts the first factors from the base weights (PiSSA and others): such
            an adapter minus its initial one is the whole change.

    Raises:
        LoraSqueezeError: missing, not JSON, not a LoRA, or a kind of LoRA that cannot be squeezed soundly.
    """
    path = folder / CONFIG_NAME
    if not path.exists():
        raise LoraSqueezeError(f"{folder}: no {CONFIG_NAME}; is this the folder of a PEFT adapter?")
    config = read_json(path)
    if not isinstance(config, dict):
        raise LoraSqueezeError(f"{path}: expected an object, found {type(config).__name__}")
    if "fine_tune_type" in config and "peft_type" not in config:
        raise LoraSqueezeError(f"{path}: this is the configuration of an mlx-lm adapter, not of a PEFT one")
    try:
        check_kind({**config, "init_lora_weights": True} if of_pair and subtracts(config) else config)
        check_numbers(config)
        patterns = {field: _patterns(field, config) for field in _PATTERNS if config.get(field)}
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{path}: {error}") from None
    return {**config, **patterns}


def read_json(path: Path) -> Any:
    """The content of a configuration file.

    Raises:
        LoraSqueezeError: missing, no regular file, not JSON, or larger or nested deeper than any configuration is.
    """
    raw = read_regular(path, _MAX_CONFIG_BYTES + 1)
    if len(raw) > _MAX_CONFIG_BYTES:
        raise LoraSqueezeError(
            f"{path}: more than {_MAX_CONFIG_BYTES} bytes, no configuration is so large; restore the file from where "
            "the adapter came"
        )
    try:
        found = json.loads(raw.decode("utf-8"))
        check_depth(found, _MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        raise LoraSqueezeError(
            f"{path}: not valid JSON ({error}); restore the file from where the adapter came"
        ) from None
    return found


def check_depth(value: Any, left: int) -> None:
    """Refuse what could be read, but not be shown or written again: writing takes more of the stack than reading."""
    if not left:
        raise ValueError(f"nested more than {_MAX_DEPTH} deep")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, dict | list):
            check_depth(item, left - 1)


def subtracts(config: Mapping[str, Any]) -> str | None:
    """The initialisation, where it subtracts the first factors from the base weights; LoftQ replaces these instead."""
    init = str(config.get("init_lora_weights", True)).lower()
    return next((kind for kind in _MUTATING_INITS if init.startswith(kind) and kind != "loftq"), None)


def check_kind(config: Mapping[str, Any]) -> None:
    """Refuse a kind of adapter whose update is not scale * B @ A.

    Raises:
        LoraSqueezeError: with the reason and a way out.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LoraSqueezeError(
            f"peft_type is {kind!r:.80}; only LORA adapters are squeezed. For another method with a weight update: "
            f"{_CONVERT}, with --base MODEL where it depends on the base weights"
        )
    for field, (name, reason, way_out) in _REFUSED_FIELDS.items():
        if config.get(field):
            raise LoraSqueezeError(f"{name} ({field}) cannot be squeezed: {reason}. Way out: {way_out}")
    init = str(config.get("init_lora_weights", True)).lower()
    for prefix, reason in _MUTATING_INITS.items():
        if init.startswith(prefix):
            way_out = _MERGED_WAY_OUT if prefix == "loftq" else _CONVERTED_WAY_OUT  # PEFT converts all but LoftQ
            raise LoraSqueezeError(
                f"init_lora_weights is {init!r:.80}: {reason}, so the stored factors are not the whole change. "
                f"Way out: {way_out}"
            )
    if init not in _HARMLESS_INITS:
        raise LoraSqueezeError(
            f"init_lora_weights {init!r:.80} is not known here; if it leaves the base weights as they are, set it to "
            "true"
        )
    for field, value in config.items():
        if field not in _KNOWN_VARIANTS and value and (field.startswith("use_") or field.endswith("_config")):
            raise LoraSqueezeError(
                f"unknown field {field!r:.80} is set and may change what the factors mean; if it does not, remove it"
            )


def check_numbers(config: Mapping[str, Any]) -> None:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    if not is_number(rank) or rank < 1 or rank != int(rank):
        raise LoraSqueezeError(f"r must be a whole number from 1, found {rank!r:.80}")
    if not is_number(alpha):
        raise LoraSqueezeError(f"lora_alpha must be a finite number, found {alpha!r:.80}")
    for field in _PATTERNS:
        patterns = config.get(field) or {}
        if not isinstance(patterns, dict):
            raise LoraSqueezeError(f"{field} must be an object of pattern and number, found {type(patterns).__name__}")
        for pattern, value in patterns.items():
            if not is_number(value):
                raise LoraSqueezeError(f"{field}[{pattern!r:.80}] must be a finite number, found {value!r:.80}")
            if field == "rank_pattern" and (value < 1 or value != int(value)):
                raise LoraSqueezeError(f"{field}[{pattern!r:.80}] must be a whole number from 1, found {value!r:.80}")
    for field in ("target_modules", "exclude_modules"):
        _check_rule(field, config.get(field) or [])
    for field in ("target_parameters", "modules_to_save"):
        value = config.get(field) or []
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise LoraSqueezeError(f"{field} must be a list of names, found {value!r:.80}")
    for name in config.get("target_parameters") or []:  # becomes the end of a module's name
        try:
            check_name(name)
            check_shown([name])
        except LoraSqueezeError as error:
            raise LoraSqueezeError(f"target_parameters: {error}") from None


def _check_rule(field: str, rule: object) -> None:
    """Refuse what says no modules."""
    # One that excludes thousands of modules, each by its name, is longer than what is matched here.
    if isinstance(rule, str) and (field == "target_modules" or len(rule) <= MAX_LENGTH):
        try:
            Expression(rule)
        except LoraSqueezeError as error:
            raise LoraSqueezeError(f"{field}: {error}") from None
    elif not isinstance(rule, str | list) or not all(isinstance(item, str) for item in rule):
        raise LoraSqueezeError(f"{field} must be an expression or a list of names, found {rule!r:.80}")


def _patterns(field: str, config: Mapping[str, Any]) -> Patterns:
    try:
        return Patterns(config[field])
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{field}: {error}") from None


def is_number(value: object) -> bool:
    """Whether it is a number that can be reckoned with: squares of scales are formed."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e100 < value < 1e100


def pattern_value(patterns: Mapping[str, float | int] | None, key: str, default: float | int) -> float | int:
    """The value of the first pattern that matches the end of a module path, as PEFT looks it up."""
    if not patterns:
        return default
    return (patterns if isinstance(patterns, Patterns) else Patterns(patterns)).value(key, default)


def scale_of(config: Mapping[str, Any], key: str, rank: int) -> float:
    """lora_alpha / r, or lora_alpha / sqrt(r) with rsLoRA, for the module with this path and this actual rank."""
    alpha = pattern_value(config.get("alpha_pattern"), key, config.get("lora_alpha", 8))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def squeezed_config(
    config: Mapping[str, Any], ranks: Mapping[str, int], scale: float, dropped: Sequence[str]
) -> dict[str, Any]:
    """The configuration for new ranks, such that every reader computes alpha / r = scale for every module.

    r is the largest rank, because a server compares only r with its max_lora_rank; lora_alpha / r is the scale of all
    modules, because servers such as SGLang use that one number. Modules of another rank have one entry each in
    rank_pattern and alpha_pattern, anchored and escaped: PEFT sorts the patterns on saving and takes the first that
    matches, so patterns must not overlap.

    Args:
        config: as read.
        ranks: pattern (a regular expression for the whole module path) -> rank.
        scale: s of every module.
        dropped: module paths that have no factors any more; PEFT must not create them, so they are excluded.
    """
    top = max(ranks.values())
    others = {f"^{pattern}": rank for pattern, rank in sorted(ranks.items()) if rank != top}
    new = dict(config)
    new.update(
        r=top,
        lora_alpha=_plain(scale * top),
        use_rslora=False,
        rank_pattern=others,
        alpha_pattern={pattern: _plain(scale * rank) for pattern, rank in others.items()},
    )
    if isinstance(new.get("init_lora_weights"), str):
        # The factors are in the file. Running the initialisation again on loading would cost time or, for
        # "orthogonal" with an odd rank, fail.
        new["init_lora_weights"] = True
        new.update({key: None for key in ("eva_config", "corda_config", "lora_ga_config") if key in new})
        if "loftq_config" in new:
            new["loftq_config"] = {}
    if dropped:
        new["exclude_modules"] = _excluded(config.get("exclude_modules"), dropped)
    return new


def _excluded(before: str | Sequence[str] | None, dropped: Iterable[str]) -> str:
    """One regular expression for PEFT's full match: a list would also exclude equal endings elsewhere in the model."""
    parts = ["|".join(re.escape(name) for name in dropped)]
    if isinstance(before, str):
        parts.insert(0, before)
    elif before:
        parts.insert(0, r"(?:.*\.)?(?:" + "|".join(re.escape(name) for name in before) + ")")
    return "|".join(f"(?:{part})" for part in parts)


def _plain(value: float) -> float | int:
    """The number as an integer where it is one: some readers declare lora_alpha as an integer."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-12 * abs(value) else value
