"""Rules as data: what a reader does with some files, where that is read, and what cures it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_squeeze.formats.peft_config import pattern_value
from lora_squeeze.formats.peft_keys import NESTED
from lora_squeeze.readers.facts import PEFT, Facts, Pair
from lora_squeeze.servers import server_of

# refused: the reader stops. scale: it multiplies updates with other factors than are meant. ignored: it leaves
# something out, or takes it for something else. note: read as meant, but a person should know.
Severity = Literal["refused", "scale", "ignored", "note"]
_SAME_SCALE = 1e-6  # relative: alpha may be stored in float32


@dataclass(frozen=True)
class Asked:
    """What is asked of a reader.

    Args:
        max_rank: the limit that a server is started with; None: not known.
    """

    max_rank: int | None = None


@dataclass(frozen=True)
class Hit:
    """What a rule has found.

    Args:
        modules: names of modules, or keys; empty where the whole adapter is meant.
        fields: filled into the text and the cure.
        factor: of the scale furthest from the one that is meant.
    """

    modules: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict)
    factor: float | None = None


Find = Callable[[Facts, Asked], Hit | None]


@dataclass(frozen=True)
class Rule:
    """One thing that a reader does.

    Args:
        id: name of the rule, unique.
        severity: what it means for the adapter.
        text: for a person; {fields} of the hit are filled in.
        source: where it is read or seen, with file and function.
        find: whether the files are a case of it.
        cure: the command, with {adapter}, {output}, {format}, {rank}, {base} and the hit's fields; or words; "" where
            none is known.
        formats: formats of files that it is about; empty: those that the reader reads.
    """

    id: str
    severity: Severity
    text: str
    source: str
    find: Find
    cure: str = ""
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """A program that reads adapters.

    Args:
        key: for the command line.
        name: for a person.
        version: which version, or commits of single files, the rules are of.
        formats: what it reads; the first is what `convert --to` is asked for.
        rules: what it does, in the order in which it is told.
        source: where the formats are read.
    """

    key: str
    name: str
    version: str
    formats: tuple[str, ...]
    rules: tuple[Rule, ...]
    source: str


# Cures. {output} stands for a new folder or file.
FOLD = "lora-squeeze squeeze {adapter} -o {output} --rank {rank} --alpha fold"
SQUEEZE = "lora-squeeze squeeze {adapter} -o {output} --rank {limit}"
FILL = "lora-squeeze rank-up {adapter} --rank {rank} -o {output}"
UNDORA = "lora-squeeze convert {adapter} -o {output} --to {format} --rank {rank} --base {base}"
CONVERT = "lora-squeeze convert {adapter} -o {output} --to {format}"
SUBTRACT = "lora-squeeze convert {adapter} -o {output} --to peft --initial INITIAL, as it was before the training"
LAYERS = (
    "lora-squeeze convert {adapter} -o {output} --to peft --base {base} --rank {rank} --vocabulary lora makes modules "
    "of embeddings, heads and tokens; norms and new rows have to be merged into the base model"
)
MERGE = "merge it into the base model in PEFT with merge_and_unload(), and serve that model"
AGAIN = "get the file again, or save it again where it was trained"


def always(facts: Facts, asked: Asked) -> Hit | None:
    """Every file of the rule's formats."""
    return Hit()


def setting(name: str, *allowed: Any) -> Find:
    """The configuration sets this field, to something else than the values allowed."""

    def find(facts: Facts, asked: Asked) -> Hit | None:
        value = facts.config.get(name)
        return Hit(fields={"value": value}) if value and value not in allowed else None

    return find


def missing(*names: str) -> Find:
    """The configuration lacks one of these fields."""

    def find(facts: Facts, asked: Asked) -> Hit | None:
        gone = [name for name in names if name not in facts.config]
        return Hit(fields={"names": ", ".join(gone)}) if gone else None

    return find


def some(choose: Callable[[Facts], Iterable[str]]) -> Find:
    """There are such modules or keys."""

    def find(facts: Facts, asked: Asked) -> Hit | None:
        found = tuple(choose(facts))
        return Hit(found) if found else None

    return find


def either(*finds: Find) -> Find:
    """One of these, with the modules of all."""

    def find(facts: Facts, asked: Asked) -> Hit | None:
        hits = [hit for find in finds if (hit := find(facts, asked))]
        if not hits:
            return None
        names = tuple(dict.fromkeys(name for hit in hits for name in hit.modules))
        return Hit(names, {key: value for hit in hits for key, value in hit.fields.items()})

    return find


def initialised(*prefixes: str) -> Find:
    """The initialisation is one of these."""

    def find(facts: Facts, asked: Asked) -> Hit | None:
        init = str(facts.config.get("init_lora_weights", True)).lower()
        return Hit(fields={"init": init}) if init.startswith(prefixes) else None

    return find


def damaged(facts: Facts, asked: Asked) -> Hit | None:
    """The factors cannot be paired."""
    return Hit(fields={"damage": facts.damage}) if facts.damage else None


def other_scales(scales: Callable[[Facts], Mapping[str, float]]) -> Find:
    """The reader's scales differ from those that are meant.

    Args:
        scales: module -> the scale that the reader takes; modules that are not in it are not compared.
    """

    def find(facts: Facts, asked: Asked) -> Hit | None:
        taken = scales(facts)
        wrong = [pair for pair in facts.pairs if pair.name in taken and not _same(taken[pair.name], pair.scale)]
        if not wrong:
            return None
        worst = max(wrong, key=lambda pair: _distance(_ratio(taken[pair.name], pair.scale)))
        factor = _ratio(taken[worst.name], worst.scale)
        fields = {"taken": f"{taken[worst.name]:.4g}", "meant": f"{worst.scale:.4g}", "worst": worst.name}
        return Hit(tuple(pair.name for pair in wrong), {**fields, "factor": f"{factor:.4g}"}, factor)

    return find


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME_SCALE)


def _ratio(taken: float, meant: float) -> float:
    return taken / meant if meant else math.inf


def _distance(factor: float) -> float:
    """How far from 1, the same for a factor and its inverse."""
    return abs(math.log(factor)) if 0 < factor < math.inf else math.inf


def global_scale(facts: Facts) -> dict[str, float]:
    """lora_alpha / r for every module, or by the root of r with rsLoRA: no patterns."""
    if not facts.pairs:
        return {}
    r, alpha = facts.config.get("r", 8), facts.config.get("lora_alpha", 8)
    scale = alpha / (math.sqrt(r) if facts.config.get("use_rslora") else r)
    return {pair.name: scale for pair in facts.pairs}


def pattern_name(pair: Pair) -> str:
    """The name that PEFT looks up in its patterns: inside nn.MultiheadAttention, that of the attention module."""
    return pair.name.removesuffix(".out_proj") if pair.path.endswith(f"{NESTED}.out_proj") else pair.name


def declared_rank(facts: Facts, pair: Pair) -> int:
    """The rank that the configuration gives a module."""
    return int(pattern_value(facts.config.get("rank_pattern"), pattern_name(pair), facts.config.get("r", 8)))


def layer_of(name: str) -> int | None:
    """The first number in a module's name: its layer."""
    match = re.search(r"\.(\d+)\.", name)
    return int(match[1]) if match else None


def counted_rank(facts: Facts) -> int:
    """The largest rank of a tensor, or of the configuration: servers look at the one, and copy the other."""
    patterns = facts.config.get("rank_pattern") or {}
    told = [facts.config.get("r", 1), *(patterns.values() if isinstance(patterns, dict) else ())]
    return max([facts.rank, *(int(rank) for rank in told if isinstance(rank, int | float))])


def rank_rules(server: str, prefix: str, source: str) -> tuple[Rule, ...]:
    """Rules of a server's rank limit; values, default and option are those of `servers`.

    Args:
        server: key of the server there.
        prefix: of the rules' names.
        source: where the check is read.
    """
    known = server_of(server)

    def above(facts: Facts, asked: Asked) -> Hit | None:
        top = asked.max_rank if asked.max_rank is not None else known.limits[-1] if known.limits else None
        rank = counted_rank(facts)
        return None if top is None or rank <= top else Hit(fields={"found": rank, "limit": top})

    def needs(facts: Facts, asked: Asked) -> Hit | None:
        rank = counted_rank(facts)
        if asked.max_rank is not None or not known.default < rank <= known.limits[-1]:
            return None
        value = next(limit for limit in known.limits if limit >= rank)
        return Hit(fields={"found": rank, "limit": known.default, "value": value})

    refusal = Rule(
        f"{prefix}-rank",
        "refused",
        "rank {found} is above the largest that it is asked to take, {limit}",
        source,
        above,
        SQUEEZE,
        (PEFT,),
    )
    option = Rule(
        f"{prefix}-rank-option",
        "note",
        f"rank {{found}} is above its default limit of {{limit}}: start it with {known.flag} {{value}}",
        source,
        needs,
        SQUEEZE,
        (PEFT,),
    )
    return (refusal, option) if known.limits else (refusal,)
