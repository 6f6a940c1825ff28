"""Small kohya and LyCORIS files, and the update that each reader makes of one, written down from its rule."""

import math
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from factor_cases import factors
from torch import Tensor

RANK = 6
Q, V, CONV, POINT = (f"lora_unet_down_blocks_0_{last}" for last in ("attn1_to_q", "attn1_to_v", "conv1", "proj_in"))
# name -> (out, in, *kernel)
SHAPES = {Q: (24, 16), V: (12, 20), CONV: (10, 4, 3, 3), POINT: (16, 24, 1, 1)}
METADATA = {
    "ss_network_module": "networks.lora",
    "ss_network_dim": str(RANK),
    "ss_network_alpha": "3.0",
    "ss_training_comment": "kept",
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
    "modelspec.hash_sha256": "0x" + "0" * 64,
}
HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
SPELLINGS = {  # as ComfyUI looks for them: A, B
    "kohya": (".lora_down.weight", ".lora_up.weight"),
    "diffusers old": ("_lora.down.weight", "_lora.up.weight"),
    "PEFT": (".lora_A.weight", ".lora_B.weight"),
    "diffusers": (".lora.down.weight", ".lora.up.weight"),
    "bare": (".lora_A", ".lora_B"),
    "text encoder": (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "default": (".lora_A.default.weight", ".lora_B.default.weight"),
}


def kohya_tensors(
    ranks: Mapping[str, int] | int = RANK,
    alpha: Mapping[str, float | None] | float | None = 3.0,
    spelling: str = "kohya",
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Factors of every module of SHAPES, and an alpha where it is not None; no two updates are equal."""
    tensors: dict[str, Tensor] = {}
    down, up = SPELLINGS[spelling]
    for i, (name, (out, columns, *kernel)) in enumerate(SHAPES.items()):
        rank = ranks if isinstance(ranks, int) else ranks[name]
        B, A = factors(out, columns * math.prod(kernel), rank, "steps", seed=i)
        tensors[name + down] = (A * (1 + i / 4)).reshape(rank, columns, *kernel).to(dtype)
        tensors[name + up] = B.reshape(out, rank, *(1 for _ in kernel)).to(dtype)
        value = alpha[name] if isinstance(alpha, Mapping) else alpha
        if value is not None:
            tensors[f"{name}.alpha"] = torch.tensor(value, dtype=dtype)
    return tensors


def write_kohya(
    path: Path, tensors: Mapping[str, Tensor] | None = None, metadata: Mapping[str, str] | None = None
) -> Path:
    """A file as the safetensors library writes it."""
    tensors = kohya_tensors() if tensors is None else tensors
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, dict(METADATA if metadata is None else metadata))
    return path


def read_kohya(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, read without the package."""
    with safetensors.safe_open(path, "pt") as file:
        return safetensors.torch.load_file(path), file.metadata() or {}


def comfyui(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """dW as ComfyUI adds it, (out, in * kernel) in float64: alpha / rank of A, 1 without an alpha."""
    down, up = next(pair for pair in SPELLINGS.values() if name + pair[1] in tensors)
    A, B = tensors[name + down].double(), tensors[name + up].double()
    alpha = tensors.get(f"{name}.alpha")
    scale = 1.0 if alpha is None else alpha.item() / A.shape[0]
    return scale * (B.flatten(1) @ A.flatten(1))


def sd_scripts(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """The same as sd-scripts and LyCORIS do it: an alpha of 0 means that of the rank, the shapes are the layer's."""
    A, B = tensors[f"{name}.lora_down.weight"].double(), tensors[f"{name}.lora_up.weight"].double()
    out, columns, *kernel = SHAPES[name]
    rank = A.shape[0]
    assert A.shape == (rank, columns, *kernel) and B.shape == (out, rank, *(1 for _ in kernel))
    alpha = tensors.get(f"{name}.alpha")
    scale = 1.0 if alpha is None or alpha.item() == 0 else alpha.item() / rank
    return scale * torch.einsum("or,r...->o...", B.flatten(1), A).flatten(1)
