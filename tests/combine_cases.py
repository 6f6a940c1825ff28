"""Adapters to be added, and their sum as dense matrices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapter_cases import (
    SHAPES,
    dense,
    plain_config,
    plain_tensors,
    write_folder,
)

import lora_squeeze
from lora_squeeze.adapter import Adapter

RANKS = (8, 3, 5)
NUMBERS = (0.7, -1.5, 0.25)


def made(folder: Path, rank: int, seed: int, dtype: torch.dtype = torch.float32, **config: Any) -> Adapter:
    """A plain adapter with numbers of its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: (torch.randn(tensor.shape, generator=generator) / 4).to(dtype)
        for key, tensor in plain_tensors(rank=rank).items()
    }
    return lora_squeeze.load(write_folder(folder, tensors, plain_config(r=rank, **config)))


def total(adapters: Sequence[Adapter], weights: Sequence[float], name: str) -> torch.Tensor:
    return sum(
        (weight * dense(adapter, name) for adapter, weight in zip(adapters, weights, strict=True)),
        torch.zeros(SHAPES[name], dtype=torch.float64),
    )
