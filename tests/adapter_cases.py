"""Small PEFT folders written with the safetensors library, and dense references for what is done with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from factor_cases import factors
from torch import Tensor

from lora_squeeze.adapter import Adapter

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# name -> (out, in); two of one shape, one wide, one tall
SHAPES = {
    "layers.0.q_proj": (24, 20),
    "layers.0.v_proj": (8, 20),
    "layers.1.q_proj": (24, 20),
    "layers.1.down_proj": (20, 48),
}
RANK, ALPHA = 8, 12


def plain_config(**changes: Any) -> dict[str, Any]:
    """What PEFT writes, as far as it matters here."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return {**config, **changes}


def plain_tensors(
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    rank: int = RANK,
    dtype: torch.dtype = torch.float32,
    kind: str = "steps",
) -> dict[str, Tensor]:
    """A and B of every module under today's keys; no two modules are equal or equally large."""
    tensors = {}
    for i, (name, shape) in enumerate(shapes.items()):
        B, A = factors(*shape, rank, kind, seed=i)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = (A * (1 + i / 4)).to(dtype)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = B.to(dtype)
    return tensors


def write_folder(
    folder: Path,
    tensors: Mapping[str, Tensor] | None = None,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """A PEFT folder; without arguments, a plain adapter of four modules and rank 8."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = plain_tensors() if tensors is None else tensors
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, folder / WEIGHTS, {"format": "pt", **(metadata or {})})
    (folder / CONFIG).write_text(json.dumps(plain_config() if config is None else config))
    return folder


def dense(adapter: Adapter, name: str) -> Tensor:
    """dW of one module in float64."""
    update = adapter.update(name)
    return update.scale * (update.B.double() @ update.A.double())


def read_dense(folder: Path, name: str) -> Tensor:
    """dW of one module in float64, read with the safetensors library and alpha / r of the configuration alone."""
    config = json.loads((folder / CONFIG).read_text())
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    A, B = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
    return config["lora_alpha"] / config["r"] * (B @ A)


def tail(dense: Tensor, rank: int) -> float:
    """The least error that a matrix of this rank can have."""
    return float(torch.linalg.svdvals(dense)[rank:].norm())
