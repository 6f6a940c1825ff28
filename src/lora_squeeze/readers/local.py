"""Rules of llama.cpp, and of ollama through it, read in its source, and of mlx-lm, seen by running 0.32.2."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from lora_squeeze.readers.facts import GGUF, MLX, PEFT, Facts
from lora_squeeze.readers.peft import broken
from lora_squeeze.readers.rule import AGAIN, CONVERT, Asked, Hit, Reader, Rule, missing, other_scales, some

_ADAPTER = "llama.cpp, commit 0650ea8: src/llama-adapter.cpp, llama_adapter_lora_init_impl"
_CONVERTER = "llama.cpp, a stored file of convert_lora_to_gguf.py"
_MLX = "mlx-lm 0.32.2, run: tuner/utils.py"


def _field(name: str, wanted: str) -> Rule:
    """A field that has to have one value."""
    key = name.replace(".", "-")

    def find(facts: Facts, asked: Asked) -> Hit | None:
        value = facts.config.get(name)
        return None if value == wanted else Hit(fields={"value": value})

    return Rule(f"llama.cpp-{key}", "refused", f"{name} is {{value}}, not {wanted}", _ADAPTER, find, AGAIN)


def _converter_scales(facts: Facts) -> dict[str, float]:
    """One lora_alpha over each tensor's rank."""
    return {pair.name: facts.config.get("lora_alpha", 8) / pair.rank for pair in facts.pairs}


def _embedding(facts: Facts) -> Iterable[str]:
    return facts.of_kind("embedding")


LLAMA_CPP = Reader(
    key="llama.cpp",
    name="llama.cpp",
    version="commit 0650ea8",
    formats=(GGUF,),
    source=_ADAPTER,
    rules=(
        broken("llama.cpp"),
        _field("general.type", "adapter"),
        _field("adapter.type", "lora"),
        Rule(
            "llama.cpp-suffix",
            "refused",
            "tensors with such names stop it",
            _ADAPTER,
            some(lambda facts: facts.strange),
            "convert the adapter again without them",
        ),
        Rule(
            "llama.cpp-orphan",
            "refused",
            "the partner of these factors is not in the file",
            _ADAPTER,
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "llama.cpp-norm",
            "ignored",
            "trained norms are passed over",
            _ADAPTER,
            some(lambda facts: facts.extras),
            "merge the adapter into the base model before the conversion",
        ),
        Rule(
            "llama.cpp-embedding",
            "note",
            "it aborts on an adapted token_embd where the base model has no output tensor",
            "llama.cpp build 11549, run",
            some(_embedding),
        ),
        Rule(
            "llama.cpp-converter",
            "note",
            "llama.cpp's own converter takes one alpha from the configuration and divides it by each tensor's rank, "
            "without rsLoRA and patterns: {worst} would get {taken}, meant is {meant} (x {factor})",
            _CONVERTER,
            other_scales(_converter_scales),
            formats=(PEFT,),
        ),
    ),
)

# Ollama hands a GGUF adapter to llama.cpp's loader.
OLLAMA = replace(LLAMA_CPP, key="ollama", name="Ollama", version="as llama.cpp")


def _parameters(facts: Facts) -> Mapping[str, Any]:
    found = facts.config.get("lora_parameters")
    return found if isinstance(found, dict) else {}


def _parameters_missing(facts: Facts, asked: Asked) -> Hit | None:
    gone = [name for name in ("rank", "scale", "dropout") if name not in _parameters(facts)]
    return Hit(fields={"names": ", ".join(gone)}) if gone else None


def _is_lora(facts: Facts) -> bool:
    return bool(facts.config.get("fine_tune_type", "lora") == "lora")


def _mlx_rank(facts: Facts) -> Iterable[str]:
    """Modules whose factors do not have the one rank; factors that are transposed as in PEFT are among them."""
    rank = _parameters(facts).get("rank")
    wrong = []
    for pair in facts.pairs:
        a, b = facts.shapes[f"{pair.path}.lora_a"], facts.shapes[f"{pair.path}.lora_b"]
        if rank not in (a[-1], a[-2]) or (len(a) == 2 and (a[1] != rank or b[0] != rank)):
            wrong.append(pair.name)
    return wrong


def _mlx_magnitudes(facts: Facts) -> Iterable[str]:
    return facts.magnitudes if _is_lora(facts) else ()


def _mlx_beside(facts: Facts) -> Iterable[str]:
    return () if facts.config.get("fine_tune_type") == "full" else (*facts.extras, *_mlx_magnitudes(facts))


def _mlx_alpha(facts: Facts, asked: Asked) -> Hit | None:
    parameters = _parameters(facts)
    alpha = parameters.get("alpha")
    return None if alpha is None or alpha == parameters.get("rank") else Hit(fields={"alpha": alpha})


MLX_LM = Reader(
    key="mlx-lm",
    name="mlx-lm",
    version="0.32.2",
    formats=(MLX,),
    source=f"{_MLX}, load_adapters",
    rules=(
        broken("mlx-lm"),
        Rule(
            "mlx-lm-parameters",
            "refused",
            "lora_parameters has no {names}",
            f"{_MLX}, linear_to_lora_layers",
            _parameters_missing,
            "add it to adapter_config.json",
        ),
        Rule(
            "mlx-lm-layers",
            "refused",
            "the configuration has no {names}",
            f"{_MLX}, load_adapters",
            missing("num_layers"),
            "add it to adapter_config.json; -1 stands for all layers",
        ),
        Rule(
            "mlx-lm-rank",
            "refused",
            "the factors do not have the one rank of the configuration, or are transposed as in PEFT",
            f"{_MLX}, load_adapters",
            some(_mlx_rank),
            CONVERT,
        ),
        Rule(
            "mlx-lm-orphan",
            "ignored",
            "the partner of these factors is not in the file: it is left at its start",
            f"{_MLX}, load_adapters",
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "mlx-lm-keys",
            "refused",
            "tensors that are no factors of an adapted layer stop it; versions that do not check names load them",
            f"{_MLX}, load_adapters",
            some(_mlx_beside),
            "train it with fine_tune_type full, or without these tensors",
        ),
        Rule(
            "mlx-lm-alpha",
            "note",
            "lora_parameters has alpha {alpha}, which it does not read; early versions multiplied scale by alpha / "
            "rank",
            f"{_MLX}, linear_to_lora_layers",
            _mlx_alpha,
        ),
    ),
)
