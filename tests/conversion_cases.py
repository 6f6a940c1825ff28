"""A small model, files of adapters to convert, and what conversions are compared by."""

from pathlib import Path

import safetensors.torch
import torch
from adapter_cases import dense
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lora_squeeze.adapter import Adapter

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IMAGE = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    "lora_unet_mid_block_attentions_0_proj_in": (1280, 1280, 1, 1),
    "lora_te_text_model_encoder_layers_3_self_attn_q_proj": (768, 768),
}


def updates(adapter: Adapter) -> dict[str, Tensor]:
    return {name: dense(adapter, name) for name in adapter.modules}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, dW in expected.items():
        assert float((found[name] - dW).norm() / dW.norm()) < tolerance, name


def base_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False))


def write_image_adapter(path: Path) -> Path:
    """A kohya file of Stable Diffusion 1 with modules of both components, one of them a convolution."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for rank, (name, (out, columns, *kernel)) in zip((4, 2, 4), IMAGE.items(), strict=True):
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, *kernel, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank + 1))
    safetensors.torch.save_file(tensors, path)
    return path
