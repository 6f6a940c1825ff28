"""The menagerie: one adapter for every kind of layer and every setting that changes files or scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft_models import Case
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 40
_SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


def invocation() -> Tensor:
    """Token 9 in every row: from there on an activated LoRA takes part."""
    ids = tokens()
    ids[:, 2] = 9
    return ids


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(3))


def llama(**changes: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**(_SIZES | changes)))


def tied_llama() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def classifier() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(LlamaConfig(**_SIZES, num_labels=3))


def biased_llama() -> LlamaForCausalLM:
    return llama(attention_bias=True, mlp_bias=True)


def gpt2() -> GPT2LMHeadModel:
    sizes: dict[str, Any] = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2))


def _eager(model: Any) -> Any:
    """The grouped kernel of the experts has no float64, in which the tests compare."""
    model.set_experts_implementation("eager")
    return model


def qwen_moe() -> Qwen3MoeForCausalLM:
    experts: dict[str, Any] = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, head_dim=4)
    return _eager(Qwen3MoeForCausalLM(Qwen3MoeConfig(**_SIZES, **experts)))


def mixtral() -> MixtralForCausalLM:
    return _eager(MixtralForCausalLM(MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2)))


def gpt_oss() -> GptOssForCausalLM:
    experts: dict[str, Any] = dict(num_local_experts=4, num_experts_per_tok=2, head_dim=4, sliding_window=8)
    return _eager(GptOssForCausalLM(GptOssConfig(**_SIZES, **experts, layer_types=["full_attention"] * 2)))


class Convolutions(nn.Module):
    """Convolutions in one, two and three dimensions, one of them in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 6, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.space = nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:  # (batch, 4, 2, 8, 8)
        line = self.line(x.flatten(2)).flatten(1)
        plane = self.point(self.plane(x[:, :, 0])).flatten(1)
        return torch.cat([line, plane, self.space(x).flatten(1)], 1)


class Grouped(nn.Module):
    """A convolution in two groups beside a linear layer, which take the same rank."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((-2, -1)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x)[0])


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.words(ids))


class Stack(nn.Module):
    """Experts whose weights are one parameter, (experts, out, in), or (experts, in, out) when transposed."""

    def __init__(self, is_transposed: bool) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.kernels = nn.Parameter(torch.randn((3, 8, 10) if is_transposed else (3, 10, 8)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.kernels if self.is_transposed else self.kernels.mT
        return torch.einsum("bi,eio->beo", x, weights).tanh().sum(1)


class Stacked(nn.Module):
    def __init__(self, is_transposed: bool = False) -> None:
        super().__init__()
        self.experts = Stack(is_transposed)
        self.proj = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.experts(x))


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(12, 12)}) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer["q_proj"](x).tanh()
        return x


class Towers(Tower):
    """Two towers with the same names in them: "model.layers.0.q_proj" and "vision.model.layers.0.q_proj"."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = Tower()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.vision(x)


class OddNames(nn.Module):
    """Names in which the characters of regular expressions occur, and one that another ends with."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("proj", "proj+", "pro(j)", "xproj", "p|j"):
            self.add_module(name, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return sum((F.tanh(layer(x)) for layer in self.children()), torch.zeros(()))


_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _llama(
    base: Callable[[], nn.Module] = llama,
    *,
    plain: bool = True,
    prepare: Callable[[PeftModel], None] | None = None,
    **config: Any,
) -> Case:
    return Case(base, {"r": 8, "lora_alpha": 12, "target_modules": _ATTENTION, **config}, tokens, 3, plain, prepare)


def _resized_embedding(model: PeftModel) -> None:
    """An embedding with other rows than the base has, as after resizing: the file is the only place that has them."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in ("model.embed_tokens", "lm_head"):
            weight = model.get_submodule(f"base_model.model.{name}").base_layer.weight
            weight.copy_(torch.randn(weight.shape, generator=generator) / 3)


def _tensor(base: Callable[[], nn.Module], shape: tuple[int, ...], plain: bool = True, **config: Any) -> Case:
    return Case(base, {"r": 4, "lora_alpha": 6, **config}, numbers(*shape), 2, plain)


LAYERS: dict[str, Case] = {
    "linear": _llama(target_modules=[*_ATTENTION, "gate_proj", "up_proj", "down_proj"]),
    "conv1d of gpt2": Case(
        gpt2, dict(r=8, lora_alpha=12, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True), tokens, 3
    ),
    "convolutions": _tensor(Convolutions, (2, 4, 2, 8, 8), target_modules=["line", "plane", "point", "space"]),
    "grouped convolution": _tensor(Grouped, (2, 8, 5, 5), plain=False, target_modules=["conv", "head"]),
    "embedding": Case(Embedded, dict(r=6, lora_alpha=9, target_modules=["words", "head"]), tokens),
    "attention module": _tensor(
        # Not plain: PEFT 0.21.2 adds the update of out_proj twice in forward, so adding it once is not the model.
        Attention,
        (2, 5, 16),
        plain=False,
        target_modules=["attention", "head"],
    ),
    "attention module with biases": _tensor(
        Attention,
        (2, 5, 16),
        plain=False,
        bias="all",
        target_modules=["attention", "head"],
        rank_pattern={"attention": 6},
        alpha_pattern={"attention": 30},
    ),
    "experts": Case(qwen_moe, dict(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=_EXPERTS), tokens),
    "transposed experts": Case(
        gpt_oss, dict(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=_EXPERTS), tokens
    ),
    "experts by bare names": Case(
        # What PEFT writes for adapters of the time when experts were lists of linear layers.
        qwen_moe,
        dict(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]),
        tokens,
    ),
    "experts beside an expression": Case(
        qwen_moe, dict(r=4, lora_alpha=6, target_modules=r".*\.[qk]_proj", target_parameters=["down_proj"]), tokens
    ),
    "router and experts": Case(
        qwen_moe,
        dict(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=["mlp.gate.weight", *_EXPERTS]),
        tokens,
    ),
    "one parameter of experts": Case(
        qwen_moe, dict(r=4, lora_alpha=6, target_modules=[], target_parameters=_EXPERTS[1:]), tokens
    ),
    "handmade experts": _tensor(Stacked, (3, 8), target_modules=["proj"], target_parameters=["experts.kernels"]),
    "handmade transposed experts": _tensor(
        lambda: Stacked(True), (3, 8), target_modules=["proj"], target_parameters=["experts.kernels"]
    ),
    "matrix parameter": _tensor(Stacked, (3, 8), target_modules=[], target_parameters=["proj.weight"]),
    "replicated layers": _llama(layer_replication=[[0, 2], [0, 2]], plain=False),
    "odd names": _tensor(OddNames, (3, 8), target_modules=r".*"),
}

_PATTERNS: dict[str, Any] = dict(
    rank_pattern={r"layers\.0\.self_attn\.q_proj": 5, "v_proj": 6},
    alpha_pattern={r"layers\.0\.self_attn\.q_proj": 20, "k_proj": 3},
)

SETTINGS: dict[str, Case] = {
    "patterns": _llama(**_PATTERNS),
    "rslora": _llama(use_rslora=True),
    "rslora and patterns": _llama(use_rslora=True, **_PATTERNS),
    "lora bias": _llama(biased_llama, lora_bias=True, plain=False, **_PATTERNS),
    "bias all": _llama(biased_llama, bias="all", plain=False),
    "bias lora_only": _llama(biased_llama, bias="lora_only", plain=False),
    "head to save": _llama(classifier, task_type="SEQ_CLS", plain=False),
    "modules to save": _llama(modules_to_save=["embed_tokens", "lm_head", "norm"], plain=False),
    "trained tokens": _llama(trainable_token_indices=[4, 9, 17], plain=False),
    "trained tokens of tied embeddings": _llama(
        tied_llama, trainable_token_indices={"embed_tokens": [5, 6]}, ensure_weight_tying=True, plain=False
    ),
    "embedding and head": _llama(
        target_modules=["embed_tokens", "lm_head", "q_proj"], plain=False, prepare=_resized_embedding
    ),
    "tied embedding and head": _llama(
        tied_llama, target_modules=["embed_tokens", "lm_head", "q_proj"], ensure_weight_tying=True, plain=False
    ),
    "targets as expression": _llama(target_modules=r".*\.layers\.\d+\.(self_attn\.[qv]_proj|mlp\.up_proj)"),
    "all linear": _llama(target_modules="all-linear"),
    "excluded list": _llama(target_modules="all-linear", exclude_modules=["k_proj", "layers.1.mlp.up_proj"]),
    "excluded expression": _llama(exclude_modules=r".*layers\.1\.self_attn\.(k|v)_proj|nothing"),
    "some layers": _llama(layers_to_transform=[1]),
    "some layers by pattern": _llama(layers_to_transform=[0], layers_pattern="layers"),
    "activated": Case(
        llama,
        dict(r=8, lora_alpha=12, target_modules=_ATTENTION, task_type="CAUSAL_LM", alora_invocation_tokens=[9]),
        invocation, 3, plain=False,
    ),
    "mica": _llama(init_lora_weights="mica"),
    "gaussian": _llama(init_lora_weights="gaussian"),
    "orthogonal": _llama(init_lora_weights="orthogonal"),
    "eva": _llama(init_lora_weights="eva"),
    "negative alpha": _llama(lora_alpha=-4),
    "towers": _tensor(
        Towers, (3, 12), target_modules=["q_proj"],
        rank_pattern={r"^model\.layers\.0\.q_proj": 7, r"vision\.model\.layers\.1\.q_proj": 5},
        alpha_pattern={r"^model\.layers\.0\.q_proj": 3},
    ),
}  # fmt: skip

CASES = LAYERS | SETTINGS
