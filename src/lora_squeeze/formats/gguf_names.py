"""Names and rows of GGUF: where a module of a transformers model stands in the GGUF file of that model.

The names come from the gguf package. What it does not know is kept here: which architecture a model of transformers
becomes, and for which of them llama.cpp's converter puts the rows of the q and k projections in another order. For a
head of n rows it writes rows 0, n/2, 1, n/2 + 1, ...: rows that transformers rotates together come to lie side by side.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import gguf_lora
from lora_squeeze.formats.gguf_file import read_model_header
from lora_squeeze.formats.peft_config import read_json
from lora_squeeze.formats.safetensors_header import quoted

# Class in transformers -> architecture in GGUF, from llama.cpp's conversion folder of 2026: those where the rows of all
# matrices stay, but for those of q and k in the architectures of PAIRED.
ARCHITECTURES = {
    "ArceeForCausalLM": "arcee",
    "Cohere2ForCausalLM": "cohere2",
    "CohereForCausalLM": "command-r",
    "GPT2LMHeadModel": "gpt2",
    "Gemma2ForCausalLM": "gemma2",
    "Gemma3ForCausalLM": "gemma3",
    "Gemma3ForConditionalGeneration": "gemma3",
    "GemmaForCausalLM": "gemma",
    "GraniteForCausalLM": "granite",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "MixtralForCausalLM": "llama",
    "Olmo2ForCausalLM": "olmo2",
    "OlmoForCausalLM": "olmo",
    "Phi3ForCausalLM": "phi3",
    "PhiForCausalLM": "phi2",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen2MoeForCausalLM": "qwen2moe",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3moe",
    "SmolLM3ForCausalLM": "smollm3",
    "StableLmForCausalLM": "stablelm",
    "Starcoder2ForCausalLM": "starcoder2",
}
PAIRED = frozenset({"arcee", "granite", "llama", "olmo", "smollm3"})
_CONFIG = "config.json"


@dataclass(frozen=True)
class GgufBase:
    """What a conversion has to know of the base model.

    Args:
        name: for a person.
        architecture: in GGUF.
        blocks: number of layers.
        heads, kv_heads: of the attention: queries, and keys and values.
        shapes: tensor -> shape, where the base model's GGUF file is at hand; then names and sizes are checked.
    """

    name: str
    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)

    def tensor_of(self, module: str) -> str | None:
        """The tensor of a module in the GGUF file of the model, without ".weight"; None where it has none."""
        names = _name_map(self.architecture, self.blocks)
        for spelling in _spellings(module):
            if found := names.get_name(spelling):
                return str(found)
        return None

    def rows_of(self, tensor: str, count: int) -> Int[Tensor, " out"] | None:
        """Which row of the transformers weight stands in each row of the tensor; None where all stay in place."""
        if self.architecture not in PAIRED or not tensor.endswith((".attn_q", ".attn_k")):
            return None
        heads = self.heads if tensor.endswith("_q") else self.kv_heads
        if count % (2 * heads):
            raise LoraSqueezeError(
                f"{tensor}: {count} rows are no {heads} heads of an even size; is {self.name} the base model of this "
                "adapter?"
            )
        return torch.arange(count).reshape(heads, 2, -1).transpose(1, 2).flatten()

    def check_shape(self, tensor: str, shape: tuple[int, ...]) -> None:
        """Refuse a tensor that the base model's file does not have, or has at another size."""
        if not self.shapes:
            return
        found = self.shapes.get(f"{tensor}.weight")
        if found is None:
            tied = " (its output layer is the token embedding)" if tensor == "output" else ""
            raise LoraSqueezeError(f"{self.name} has no tensor {tensor}.weight{tied}, so llama.cpp would not load this")
        if found != shape:
            raise LoraSqueezeError(f"{tensor}: the update is {list(shape)}, the weight in {self.name} {list(found)}")


def open_gguf_base(model: str | os.PathLike[str], *, revision: str | None = None) -> GgufBase:
    """Describe a base model by its configuration, or by its GGUF file.

    Args:
        model: folder with config.json, a hub id such as user/model, of which only that file is fetched, or the GGUF
            file that the adapter will be used with. The last is checked against the adapter.
        revision: branch, tag or commit on the hub.

    Raises:
        LoraSqueezeError: no such model, or one whose conversion is not known here.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return _of_file(path)
    if not path.exists():
        from lora_squeeze.hub import HUB_ID, download

        if not HUB_ID.fullmatch(str(model)):
            raise LoraSqueezeError(f"{model}: no such folder or file, and not the form of a hub id (user/name)")
        path = download(str(model), [_CONFIG], revision=revision)
    return _of_config(str(model), path / _CONFIG)


def _of_config(name: str, path: Path) -> GgufBase:
    if not path.is_file():
        raise LoraSqueezeError(f"{path.parent}: no {_CONFIG}; name the folder of the base model, or its GGUF file")
    try:
        config = read_json(path)
        (kind,) = config["architectures"]
        architecture = ARCHITECTURES.get(kind)
        inner: Any = config.get("text_config") or config
        numbers = [_first(inner, *keys) for keys in _NUMBERS]
        blocks, heads, kv_heads = numbers[0], numbers[1], numbers[2] or numbers[1]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, LoraSqueezeError):
            raise
        raise LoraSqueezeError(f"{quoted(path)}: not the configuration of a transformers model") from None
    if architecture is None:
        raise LoraSqueezeError(
            f"{name}: {quoted(kind)}: how llama.cpp lays out this model is not known here; known are "
            f"{', '.join(ARCHITECTURES)}. If its GGUF file has one of the architectures "
            f"{', '.join(sorted(set(ARCHITECTURES.values())))}, name that file as the base"
        )
    if not blocks or not heads:
        raise LoraSqueezeError(f"{quoted(path)}: does not say how many layers and heads the model has")
    return GgufBase(name, architecture, blocks, heads, kv_heads or heads)


_NUMBERS = (("num_hidden_layers", "n_layer"), ("num_attention_heads", "n_head"), ("num_key_value_heads",))


def _first(config: Mapping[str, Any], *keys: str) -> int:
    found = next((config[key] for key in keys if isinstance(config.get(key), int)), 0)
    return int(found)


def _of_file(path: Path) -> GgufBase:
    if not gguf_lora.matches(path):
        raise LoraSqueezeError(f"{quoted(path)}: no GGUF file; name the folder of the base model, or its GGUF file")
    fields, shapes = read_model_header(path)

    def value(key: str) -> Any:
        return fields[key].value if key in fields else None

    architecture = str(value("general.architecture"))
    if value("general.type") == "adapter":
        raise LoraSqueezeError(f"{quoted(path)}: an adapter, not a base model")
    if architecture not in ARCHITECTURES.values():
        raise LoraSqueezeError(
            f"{quoted(path)}: how llama.cpp lays out the architecture {quoted(architecture)} is not known here; known "
            f"are {', '.join(sorted(set(ARCHITECTURES.values())))}"
        )
    blocks, heads = value(f"{architecture}.block_count"), value(f"{architecture}.attention.head_count")
    kv_heads = value(f"{architecture}.attention.head_count_kv") or heads
    if not all(isinstance(number, int) and number > 0 for number in (blocks, heads, kv_heads)):
        raise LoraSqueezeError(f"{quoted(path)}: does not say how many layers and heads the model has")
    return GgufBase(path.name, architecture, blocks, heads, kv_heads, shapes)


def _spellings(module: str) -> Iterator[str]:
    """A module's name, and as the language model alone spells it where it is part of a larger model."""
    yield module
    for prefix in ("model.language_model.", "language_model.model.", "base_model.model."):
        if module.startswith(prefix):
            yield "model." + module.removeprefix(prefix)
    if module.startswith("language_model."):
        yield module.removeprefix("language_model.")


def _name_map(architecture: str, blocks: int) -> Any:
    try:
        import gguf
    except ImportError:
        raise LoraSqueezeError("names of GGUF tensors come from the gguf package: pip install gguf") from None
    kind = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), None)
    if kind is None:
        raise LoraSqueezeError(f"this version of the gguf package does not know {architecture}: pip install -U gguf")
    return gguf.get_tensor_name_map(kind, blocks)
