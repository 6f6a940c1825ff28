"""A small mlx-lm adapter with every kind of layer, and the dense update of each from the format's definition."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from factor_cases import factors
from torch import Tensor

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
RANK, SCALE, EXPERTS = 6, 2.5, 3
LINEAR = {"model.layers.0.self_attn.q_proj": (24, 16), "model.layers.1.self_attn.q_proj": (24, 16), "lm_head": (40, 16)}
EMBEDDING = {"model.embed_tokens": (40, 16)}  # (vocabulary, dim)
SWITCH = {"model.layers.1.mlp.switch_mlp.up_proj": (20, 16)}
NAMES = (*LINEAR, *EMBEDDING, *SWITCH)


def mlx_config(**changes: Any) -> dict[str, Any]:
    """What mlx-lm writes, as far as it matters here."""
    config = {
        "fine_tune_type": "lora",
        "num_layers": 2,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
        "model": "base",
        "seed": 0,
    }
    return {**config, **changes}


def mlx_tensors(rank: int = RANK, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """lora_a and lora_b of every layer; no two updates are equal."""
    tensors: dict[str, Tensor] = {}
    for i, (name, (out, columns)) in enumerate({**LINEAR, **EMBEDDING}.items()):
        if name in EMBEDDING:
            out, columns = columns, out
        B, A = factors(out, columns, rank, "steps", seed=i)
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = (A.T * (1 + i / 4)).to(dtype), B.T.to(dtype)
    for name, (out, columns) in SWITCH.items():
        pairs = [factors(out, columns, rank, "decaying", seed=50 + e) for e in range(EXPERTS)]
        tensors[f"{name}.lora_a"] = torch.stack([A for _, A in pairs]).to(dtype)
        tensors[f"{name}.lora_b"] = torch.stack([B for B, _ in pairs]).to(dtype)
    return tensors


def write_mlx(
    folder: Path, tensors: Mapping[str, Tensor] | None = None, config: Mapping[str, Any] | None = None
) -> Path:
    """An mlx-lm folder; the header has no metadata, as where MLX writes it."""
    folder.mkdir(parents=True)
    tensors = mlx_tensors() if tensors is None else tensors
    safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(mlx_config() if config is None else config))
    return folder


def read_mlx(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors, read without the package."""
    return json.loads((folder / CONFIG).read_text()), safetensors.torch.load_file(folder / WEIGHTS)


def definition(folder: Path, name: str) -> Tensor:
    """dW as mlx-lm adds it to the layer's weight, in float64: (out, in), (vocabulary, dim), (experts, out, in)."""
    config, tensors = read_mlx(folder)
    scale = config["lora_parameters"]["scale"]
    a, b = (tensors[f"{name}.lora_{side}"].double() for side in "ab")
    if name in SWITCH:
        return scale * torch.einsum("eor,eri->eoi", b, a)
    if name in EMBEDDING:
        return scale * (a @ b)
    return scale * (b.T @ a.T)
