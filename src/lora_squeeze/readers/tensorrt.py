"""TensorRT-LLM's rules, read in one file of its source; it was not run."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lora_squeeze.readers.facts import PEFT, Facts
from lora_squeeze.readers.peft import broken, lora_ga, unread
from lora_squeeze.readers.rule import AGAIN, FILL, FOLD, MERGE, Asked, Hit, Reader, Rule, missing, other_scales, some
from lora_squeeze.readers.servers import VARIANTS, unchanged_base

_TRT = "TensorRT-LLM, commit 007e181: tensorrt_llm/lora_manager.py"
_OWN_RANK = "it divides one lora_alpha by each tensor's rank: {worst} gets {taken}, meant is {meant} (x {factor})"
# The modules of its own list, get_default_trtllm_modules_to_hf_modules.
TRT_MODULES = frozenset(
    {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj", "gate_up_proj", "w1", "w2", "w3",
        "gate",
    }
)  # fmt: skip


def own_rank_scale(facts: Facts) -> dict[str, float]:
    """One lora_alpha, divided by each tensor's own rank."""
    alpha, rooted = facts.config.get("lora_alpha", 8), facts.config.get("use_rslora")
    return {pair.name: alpha / (math.sqrt(pair.rank) if rooted else pair.rank) for pair in facts.pairs}


def _mixed(facts: Facts) -> bool:
    return len({pair.rank for pair in facts.pairs}) > 1


def _outside_list(facts: Facts) -> Iterable[str]:
    return [
        pair.name
        for pair in facts.pairs
        if pair.kind != "embedding" and "lm_head" not in pair.name and pair.path.rpartition(".")[2] not in TRT_MODULES
    ]


def _vocabulary(facts: Facts) -> Iterable[str]:
    names = [pair.name for pair in facts.pairs if "lm_head" in pair.name or "embed_tokens" in pair.name]
    return [*names, *facts.extras_of("trainable tokens")]


def _whole(facts: Facts) -> Iterable[str]:
    keys = facts.extras_of("module to save", "embedding")
    return [key for key in keys if "lm_head" in key or "embed_tokens" in key]


def _unknown_keys(facts: Facts) -> Iterable[str]:
    return [key for key in (*facts.extras, *facts.strange) if "lm_head" not in key and "embed_tokens" not in key]


def _above(facts: Facts, asked: Asked) -> Hit | None:
    limit = asked.max_rank
    return Hit(fields={"limit": limit}) if limit is not None and facts.rank > limit else None


TENSORRT = Reader(
    key="tensorrt-llm",
    name="TensorRT-LLM",
    version="commit 007e181",
    formats=(PEFT,),
    source=f"{_TRT}, HfLoraLoader",
    rules=(
        broken("tensorrt"),
        Rule(
            "tensorrt-required",
            "refused",
            "the configuration has no {names}",
            f"{_TRT}, load_from_hf",
            missing("r", "lora_alpha"),
            "add it to adapter_config.json; PEFT takes 8 where it is missing",
        ),
        Rule(
            "tensorrt-rank",
            "refused",
            "rank {rank} is above the max_lora_rank that is asked for, {limit}",
            f"{_TRT}, LoraConfig.max_lora_rank",
            _above,
            "lora-squeeze squeeze {adapter} -o {output} --rank {limit}",
        ),
        Rule(
            "tensorrt-modules",
            "refused",
            "these modules are not in its default list of modules",
            f"{_TRT}, iterate_hf_lora",
            some(_outside_list),
            MERGE,
        ),
        Rule(
            "tensorrt-keys",
            "refused",
            "these keys are not known to it and stop it",
            f"{_TRT}, HF_LORA_PATTERN",
            some(_unknown_keys),
            MERGE,
        ),
        Rule(
            "tensorrt-orphan",
            "refused",
            "the partner of these factors is not in the file",
            f"{_TRT}, load_from_hf",
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "tensorrt-scale",
            "scale",
            _OWN_RANK,
            f"{_TRT}, load_from_hf",
            other_scales(lambda facts: {} if _mixed(facts) else own_rank_scale(facts)),
            FOLD,
        ),
        Rule(
            "tensorrt-mixed",
            "scale",
            _OWN_RANK,
            f"{_TRT}, load_from_hf",
            other_scales(lambda facts: own_rank_scale(facts) if _mixed(facts) else {}),
            FILL,
        ),
        Rule(
            "tensorrt-vocabulary",
            "ignored",
            "updates of embedding and output layer are passed over",
            f"{_TRT}, iterate_hf_lora",
            some(_vocabulary),
            MERGE,
        ),
        unchanged_base("tensorrt", f"{_TRT}, load_from_hf reads no such field"),
        *unread("tensorrt", VARIANTS, f"{_TRT}, load_from_hf reads no such field"),
        lora_ga("tensorrt"),
        Rule(
            "tensorrt-saved",
            "note",
            "whole embeddings and output layers take part only where the engine is built with this adapter",
            f"{_TRT}, load_hf_lora and load_torch_hf_lora",
            some(_whole),
        ),
        Rule(
            "tensorrt-dora",
            "note",
            "DoRA is read, except for experts",
            f"{_TRT}, load_from_hf",
            some(lambda facts: facts.magnitudes),
        ),
    ),
)
