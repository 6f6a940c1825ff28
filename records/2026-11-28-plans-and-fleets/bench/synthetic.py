"""Synthetic adapters, written as PEFT folders: the module shapes of real models, a spectrum like a trained adapter's.

How the factors of a module are made, with generator seed, rank r, B (out, r) and A (r, in):

    A = U + N/10    U uniform in +-1/sqrt(in), as Kaiming-initialised LoRA starts; N normal with U's deviation: training
                    moves A a little
    B = N d R / 100 N standard normal (out, r), d_j = 10^(-2 j / (r - 1)) for j = 0 ... r - 1, R a random rotation:
                    singular values fall by two decades, and every column of B takes part in every direction

The rotation keeps the columns of B from being orthogonal, which would make the problem easier than it is.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.formats.safetensors_io import TensorFileWriter

Shape = tuple[int, int]  # out, in


@dataclass(frozen=True)
class Model:
    """The linear layers of a model.

    Args:
        name: what the tables call it.
        modules: module path -> (out, in).
    """

    name: str
    modules: dict[str, Shape]

    def parameters(self, rank: int) -> int:
        """Numbers in the factors of an adapter of this rank."""
        return rank * sum(sum(shape) for shape in self.modules.values())

    def shapes(self) -> Counter[Shape]:
        """How many modules there are of each shape."""
        return Counter(self.modules.values())


def llama_8b(layers: int = 32) -> Model:
    """Llama-3-8B: 7 linear layers in each of 32 blocks; more blocks make a larger file of the same kind."""
    block = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    name = "Llama-3-8B" if layers == 32 else f"Llama-3-8B with {layers} blocks"
    return Model(name, {f"model.layers.{i}.{k}": s for i in range(layers) for k, s in block.items()})


def flux() -> Model:
    """A diffusion transformer of the size of FLUX.1: 19 double and 38 single blocks, all linear layers."""
    d, h = 3072, 12288
    attention = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out")
    double: dict[str, Shape] = {f"attn.{name}": (d, d) for name in attention}
    for stream in ("ff", "ff_context"):
        double |= {f"{stream}.net.0.proj": (h, d), f"{stream}.net.2": (d, h)}
    double |= {"norm1.linear": (6 * d, d), "norm1_context.linear": (6 * d, d)}
    single: dict[str, Shape] = {f"attn.{name}": (d, d) for name in ("to_q", "to_k", "to_v")}
    single |= {"proj_mlp": (h, d), "proj_out": (d, d + h), "norm.linear": (3 * d, d)}
    modules = {f"transformer_blocks.{i}.{k}": s for i in range(19) for k, s in double.items()}
    modules |= {f"single_transformer_blocks.{i}.{k}": s for i in range(38) for k, s in single.items()}
    return Model("Flux-like", modules)


def factors(shape: Shape, rank: int, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """B (out, rank) and A (rank, in) of one module, see the top of this file."""
    out_features, in_features = shape
    bound = in_features**-0.5
    A = (2 * torch.rand(rank, in_features, generator=generator) - 1) * bound
    A += torch.randn(rank, in_features, generator=generator) * (bound / 3**0.5 / 10)
    decay = 10 ** (-2 * torch.arange(rank) / max(1, rank - 1))
    rotation = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    B = torch.randn(out_features, rank, generator=generator) @ (decay[:, None] * rotation) / 100
    return B.to(dtype), A.to(dtype)


def write_adapter(folder: Path, model: Model, rank: int, dtype: torch.dtype, seed: int = 0) -> Path:
    """Write a PEFT folder module by module: memory is one module, whatever the size of the file."""
    folder.mkdir(parents=True)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".", 2)[2] for name in model.modules}),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    entries = {
        f"base_model.model.{name}.lora_{letter}.weight": (dtype, size)
        for name, (out_features, in_features) in model.modules.items()
        for letter, size in (("A", (rank, in_features)), ("B", (out_features, rank)))
    }
    generator = torch.Generator().manual_seed(seed)
    with TensorFileWriter(folder / "adapter_model.safetensors", entries) as file:
        for name, shape in model.modules.items():
            B, A = factors(shape, rank, dtype, generator)
            file.write(f"base_model.model.{name}.lora_A.weight", A)
            file.write(f"base_model.model.{name}.lora_B.weight", B)
    return folder


def read_modules(names: Iterator[str]) -> list[str]:
    """Module paths, as written above, in the names of a file's tensors."""
    return [name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight")]
