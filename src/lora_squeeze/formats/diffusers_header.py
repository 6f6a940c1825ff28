"""What the header of a diffusers file says of scales: `lora_adapter_metadata`, one LoraConfig for each component.

diffusers 0.34 and later hand these fields to PEFT as they are and look at no tensor for rank or alpha; earlier versions
do not read them. docs/formats-diffusers.md has the rules.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.kohya import DIFFUSERS_KEY
from lora_squeeze.formats.patterns import Patterns
from lora_squeeze.formats.peft_config import check_depth, check_kind, check_numbers, squeezed_config
from lora_squeeze.formats.safetensors_header import quoted

TEXT_MODEL = "text_model."  # in front of CLIP's paths in files, and in models of transformers before 5
_WRITE_AGAIN = "write the file again with diffusers, or remove the entry if all scales are 1"
_DEFAULT = 8  # r and lora_alpha of a LoraConfig that does not say them
_OPTIONAL = r"(?:text_model\.)?"
_MAX_CHARACTERS, _MAX_DEPTH = 10**7, 50
_LONGEST = 1000  # of an error, which may quote a value of any length
_ALWAYS = ("rank_pattern", "alpha_pattern", "init_lora_weights")
_UNUSED = ("exclude_modules", "layers_to_transform", "layers_pattern", "peft_version")  # target_modules says it all


@dataclass(frozen=True)
class Settings:
    """The LoraConfig of one component.

    Args:
        config: fields as read.
        ranks, alphas: its patterns.
    """

    config: Mapping[str, Any]
    ranks: Patterns
    alphas: Patterns

    def of_module(self, paths: Sequence[str]) -> dict[str, Any]:
        """r, lora_alpha and use_rslora of one module; `paths`: what it is called in several versions of its model."""
        rank, alpha = self.config.get("r", _DEFAULT), self.config.get("lora_alpha", _DEFAULT)
        for path in reversed(paths):
            rank, alpha = self.ranks.value(path, rank), self.alphas.value(path, alpha)
        return {"r": rank, "lora_alpha": alpha, "use_rslora": self.config.get("use_rslora", False)}


def read_settings(metadata: Mapping[str, str]) -> dict[str, Settings] | None:
    """Component -> its settings; "" for a file of one model without components. None where the header has none.

    Raises:
        LoraSqueezeError: not JSON, of another form, or a kind of LoRA that cannot be squeezed soundly.
    """
    fields = _fields(metadata)
    if fields is None:
        return None
    found = {}
    for component, config in fields.items():
        try:
            found[component] = _settings(config)
        except LoraSqueezeError as error:
            where = f" of {quoted(component)}" if component else ""
            raise LoraSqueezeError(f"{DIFFUSERS_KEY}{where}: {str(error)[:_LONGEST]}") from None
    return found


def _fields(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]] | None:
    """Component -> fields, in the order of the file."""
    text = metadata.get(DIFFUSERS_KEY)
    if not text:
        return None
    if len(text) > _MAX_CHARACTERS:
        raise LoraSqueezeError(
            f"{DIFFUSERS_KEY} has {len(text)} characters, more than the settings of any adapter; {_WRITE_AGAIN}"
        )
    try:
        entries = json.loads(text)
        check_depth(entries, _MAX_DEPTH)
    except (ValueError, RecursionError) as error:
        raise LoraSqueezeError(f"{DIFFUSERS_KEY} is not valid JSON ({quoted(error)}); {_WRITE_AGAIN}") from None
    if entries is None:
        return None
    if not isinstance(entries, dict):
        raise LoraSqueezeError(f"{DIFFUSERS_KEY} must be an object, found {type(entries).__name__}; {_WRITE_AGAIN}")
    fields: dict[str, dict[str, Any]] = {}
    for key, value in entries.items():
        component, _, field = key.rpartition(".")
        fields.setdefault(component, {})[field] = value
    if "" in fields and len(fields) > 1:
        other = next(component for component in fields if component)
        raise LoraSqueezeError(
            f"{DIFFUSERS_KEY} has fields with and without a component ({quoted(next(iter(fields[''])))}, "
            f"{quoted(other)}); {_WRITE_AGAIN}"
        )
    return fields


def _settings(config: dict[str, Any]) -> Settings:
    check_kind({"peft_type": "LORA", **config})
    check_numbers(config)
    if config.get("target_parameters"):
        raise LoraSqueezeError("target_parameters is set; diffusers does not load such an adapter")
    return Settings(config, _patterns("rank_pattern", config), _patterns("alpha_pattern", config))


def _patterns(field: str, config: Mapping[str, Any]) -> Patterns:
    try:
        return Patterns(config.get(field) or {})
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{field}: {error}") from None


def write_settings(
    metadata: Mapping[str, str], ranks: Mapping[str, Mapping[str, int]], biased: Iterable[str], *, longest: bool = False
) -> str:
    """The entry for a file in which every scale is 1: alpha is the rank in every module.

    Args:
        metadata: strings of the source; its fields that have nothing to do with rank and scale are kept.
        ranks: component -> path -> rank as PEFT counts it.
        biased: components with biases of B.
        longest: list every module, as no choice of lower ranks needs more; for the bound of bytes.
    """
    before = _fields(metadata) or {}
    entries: dict[str, Any] = {}
    for component, each in ranks.items():
        patterns = {_pattern(path): rank for path, rank in each.items()}
        # The addition makes all ranks but one differ from the largest.
        listed = patterns | {"-": max(patterns.values()) + 1} if longest else patterns
        config = squeezed_config(before.get(component, {}), listed, 1.0, ())
        config["target_modules"] = "|".join(patterns)
        if component in biased:
            config["lora_bias"] = True
        prefix = f"{component}." if component else ""
        entries |= {prefix + field: value for field, value in config.items() if _is_said(field, value)}
    return json.dumps(entries, sort_keys=True)


def _is_said(field: str, value: Any) -> bool:
    """Whether a field is written: a version of PEFT that does not know one refuses the file, diffusers before 0.40 asks
    for rank_pattern in any case.
    """
    return field in _ALWAYS or (field not in _UNUSED and value not in (None, False, {}, []))


def _pattern(path: str) -> str:
    """The expression for exactly this module, in every version of its model."""
    if path.startswith(TEXT_MODEL):
        return _OPTIONAL + re.escape(path.removeprefix(TEXT_MODEL))
    return re.escape(path)
