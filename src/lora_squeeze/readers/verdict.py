"""How a reader will read an adapter: as meant, or not, and why."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import printable, quoted
from lora_squeeze.readers.facts import DIFFUSERS, GGUF, KOHYA, NAMES, PEFT, Facts
from lora_squeeze.readers.images import COMFYUI, DIFFUSERS_READER, SD_SCRIPTS
from lora_squeeze.readers.local import LLAMA_CPP, MLX_LM, OLLAMA
from lora_squeeze.readers.peft import PEFT_READER
from lora_squeeze.readers.read import read_facts
from lora_squeeze.readers.rule import CONVERT, UNDORA, Asked, Hit, Reader, Rule, Severity, always, damaged
from lora_squeeze.readers.servers import SGLANG, TGI
from lora_squeeze.readers.tensorrt import TENSORRT
from lora_squeeze.readers.vllm import VLLM
from lora_squeeze.servers import SERVERS

READERS = (
    PEFT_READER,
    VLLM,
    SGLANG,
    TGI,
    TENSORRT,
    LLAMA_CPP,
    OLLAMA,
    MLX_LM,
    DIFFUSERS_READER,
    COMFYUI,
    SD_SCRIPTS,
)
_ALSO = {"lorax": "tgi", "transformers": "peft", "mlx": "mlx-lm", "kohya": "sd-scripts"}
_IMAGES = (DIFFUSERS, KOHYA)
_DORA_RANK = 16  # what a cure names for a change of full rank


@dataclass(frozen=True)
class Finding:
    """One thing that a reader does with an adapter.

    Args:
        rule: id of the rule.
        severity: "refused", "scale", "ignored" or "note"; only with notes is an adapter read as meant.
        modules: modules or keys that it is about; empty: the whole adapter.
        text: what and why.
        cure: the command that cures it, or words; "" where none is known.
        source: where the rule is read or seen.
        factor: the scale that is taken over the one that is meant, at its worst.
    """

    rule: str
    severity: Severity
    modules: tuple[str, ...]
    text: str
    cure: str
    source: str
    factor: float | None = None

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; a factor without bound is null."""
        factor = self.factor if self.factor is not None and math.isfinite(self.factor) else None
        return {
            "rule": self.rule,
            "severity": self.severity,
            "modules": list(self.modules),
            "text": self.text,
            "cure": self.cure,
            "source": self.source,
            "factor": factor,
        }


@dataclass(frozen=True)
class Verdict:
    """What a reader makes of an adapter.

    Args:
        reader: its key.
        name: its name, for a person.
        version: of the reader, or commits of the files, that the rules are of.
        findings: what was found, in the order of the rules.
    """

    reader: str
    name: str
    version: str
    findings: tuple[Finding, ...]

    @property
    def read_as_meant(self) -> bool:
        """Whether nothing but notes was found."""
        return all(finding.severity == "note" for finding in self.findings)

    @property
    def answer(self) -> str:
        """In a few words: "yes", "no", "in part" or "other scale", the worst of them."""
        found = {finding.severity for finding in self.findings}
        if "refused" in found:
            return "no"
        factors = [
            finding.factor for finding in self.findings if finding.severity == "scale" and finding.factor is not None
        ]
        if factors:
            return f"other scale: x {factors[0]:.4g}"
        return "in part" if "ignored" in found else "yes"

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "reader": self.reader,
            "version": self.version,
            "read_as_meant": self.read_as_meant,
            "findings": [finding.to_json() for finding in self.findings],
        }


def reader_of(key: str) -> Reader:
    """The reader of this key.

    Raises:
        LoraSqueezeError: there is none; the message lists those that there are.
    """
    found = next((reader for reader in READERS if reader.key == _ALSO.get(key, key)), None)
    if found is None:
        raise LoraSqueezeError(f"unknown reader {key!r}: choose one of {', '.join(reader.key for reader in READERS)}")
    return found


def check(
    adapter: str | os.PathLike[str],
    reader: str | None = None,
    *,
    max_rank: int | None = None,
    base: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
) -> list[Verdict]:
    """How readers will read an adapter, from its configuration, keys and shapes.

    Args:
        adapter: as for `hub.load`; what that refuses is described too.
        reader: key of one of READERS; default all of them.
        max_rank: rank limit that the server is started with; default the largest that it can be started with.
        base: base model, named in the cures that need one; default the one that the adapter names.
        subfolder: folder inside it.
        revision: branch, tag or commit on the hub.

    Returns:
        One Verdict per reader.

    Raises:
        LoraSqueezeError: an unknown reader, a limit that the server cannot have, or a file that nobody can read.

    Notes:
        No reader is run and no model is loaded: whether module names exist in the base model is not looked at. What the
        rules are read from, and of which version, is in each finding's `source`.

    Example:
        >>> check("my-adapter", "vllm", max_rank=16)[0].read_as_meant  # doctest: +SKIP
        True
    """
    readers: Sequence[Reader] = READERS if reader is None else (reader_of(reader),)
    for one in readers:
        if reader is not None:
            _check_limit(one, max_rank)
    facts = read_facts(adapter, subfolder=subfolder, revision=revision)
    return [verdict(facts, one, Asked(max_rank), adapter=os.fspath(adapter), base=base) for one in readers]


def _check_limit(reader: Reader, max_rank: int | None) -> None:
    if max_rank is None:
        return
    if max_rank < 1:
        raise LoraSqueezeError(f"max_rank must be a whole number from 1, got {max_rank}")
    limits = next((server.limits for server in SERVERS if server.key == reader.key), ())
    if limits and max_rank not in limits:
        raise LoraSqueezeError(
            f"{reader.name} cannot be started with a rank limit of {max_rank}: choose one of "
            f"{', '.join(map(str, limits))}"
        )


def verdict(facts: Facts, reader: Reader, asked: Asked, *, adapter: str, base: str | None = None) -> Verdict:
    """What one reader makes of an adapter that is described.

    Args:
        facts: the description.
        reader: one of READERS.
        asked: of the reader.
        adapter: what cures call the adapter.
        base: what cures call the base model.
    """
    words = {
        "adapter": adapter,
        "output": "OUT",
        "rank": facts.rank,
        "format": reader.formats[0],
        "base": base or facts.config.get("base_model_name_or_path") or "BASE",
    }
    rules = [rule for rule in reader.rules if facts.format in (rule.formats or reader.formats)]
    if facts.damage:  # the other rules take a sound configuration and sound factors for granted
        rules = [rule for rule in rules if rule.find is damaged]
    if facts.format not in reader.formats:
        rules.insert(0, _unread(facts, reader))
    try:
        findings = [_finding(rule, hit, words) for rule in rules if (hit := rule.find(facts, asked))]
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError) as error:
        raise LoraSqueezeError(
            f"{quoted(adapter)}: a field of the configuration holds a value of a kind that it cannot have "
            f"({quoted(error)}); restore the file from where the adapter came"
        ) from None
    return Verdict(reader.key, reader.name, reader.version, tuple(findings))


def _unread(facts: Facts, reader: Reader) -> Rule:
    """The finding that a reader does not read this format at all."""
    wanted = " or ".join(NAMES[name] for name in reader.formats)
    return Rule(
        "format",
        "refused",
        f"{reader.name} reads {wanted}, and this is {NAMES[facts.format]}",
        reader.source,
        always,
        _conversion(facts, reader),
    )


def _conversion(facts: Facts, reader: Reader) -> str:
    """The command that writes the adapter in the reader's format."""
    if (facts.format in _IMAGES) != (reader.formats[0] in _IMAGES) and facts.format != PEFT:
        return ""  # an adapter of an image model for a language model, or the other way round
    if facts.magnitudes:
        return UNDORA
    return f"{CONVERT} --base {{base}}" if reader.formats[0] == GGUF else CONVERT


def _finding(rule: Rule, hit: Hit, words: dict[str, Any]) -> Finding:
    fields = {**words, **hit.fields}
    cure_fields = {**fields, "rank": _DORA_RANK} if rule.cure == UNDORA else fields
    return Finding(
        rule=rule.id,
        severity=rule.severity,
        modules=hit.modules,
        text=printable(rule.text.format_map(fields)),
        cure=printable(rule.cure.format_map(cure_fields)),
        source=rule.source,
        factor=hit.factor,
    )
