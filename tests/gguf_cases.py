"""A small GGUF adapter written with the gguf package, and the dense update of each tensor from llama.cpp's rules."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from factor_cases import factors
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

RANK, ALPHA, EXPERTS = 8, 12.0, 3
LINEAR = {"blk.0.attn_q": (24, 32), "blk.0.attn_v": (16, 32), "blk.1.attn_q": (24, 32), "output": (40, 32)}
EMBEDDING = {"token_embd": (40, 32)}  # (vocabulary, dim)
STACKED = {"blk.1.ffn_up_exps": (20, 32)}
NAMES = (*LINEAR, *EMBEDDING, *STACKED)


def gguf_tensors(rank: int = RANK) -> dict[str, Tensor]:
    """lora_a and lora_b of every base tensor, in the order of a file; no two updates are equal."""
    tensors: dict[str, Tensor] = {}
    for i, (name, (out, columns)) in enumerate({**LINEAR, **EMBEDDING}.items()):
        vocabulary = name in EMBEDDING
        B, A = factors(*((columns, out) if vocabulary else (out, columns)), rank, "steps", seed=i)
        tensors[f"{name}.weight.lora_a"] = ((A.T if vocabulary else A) * (1 + i / 4)).float()
        tensors[f"{name}.weight.lora_b"] = B.float()
    for name, (out, columns) in STACKED.items():
        pairs = [factors(out, columns, rank, "decaying", seed=50 + e) for e in range(EXPERTS)]
        tensors[f"{name}.weight.lora_a"] = torch.stack([A for _, A in pairs]).float()
        tensors[f"{name}.weight.lora_b"] = torch.stack([B for B, _ in pairs]).float()
    return tensors


def write_gguf(
    path: Path,
    tensors: Mapping[str, Tensor] | None = None,
    alpha: float | None = ALPHA,
    kinds: Mapping[str, Kind] | Kind = Kind.F32,
    alignment: int | None = None,
    fields: Mapping[str, tuple[Any, gguf.GGUFValueType]] | None = None,
) -> Path:
    """A GGUF file as convert_lora_to_gguf.py writes it; without arguments, one of rank 8 in float32."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    if alpha is not None:
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_file_type(0)
    types = gguf.GGUFValueType
    writer.add_key_value("adapter.alora.invocation_tokens", [7, 8, 9], types.ARRAY, types.UINT32)
    writer.add_array("general.tags", ["one", "", "zwei"])
    writer.add_string("adapter.lora.task_name", "täsk")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for key, (value, kind) in (fields or {}).items():
        writer.add_key_value(key, value, kind)
    for name, tensor in (gguf_tensors() if tensors is None else tensors).items():
        kind = kinds if isinstance(kinds, Kind) else kinds.get(name, Kind.F32)
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Kind]]:
    """Fields, tensors in float32 and their kinds, read by the gguf package."""
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors, kinds = {}, {}
    for tensor in reader.tensors:
        numbers = np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        tensors[tensor.name] = torch.from_numpy(numbers.reshape(tuple(reversed(tensor.shape.tolist()))))
        kinds[tensor.name] = tensor.tensor_type
    return fields, tensors, kinds


def definition(path: Path, name: str) -> Tensor:
    """dW as llama.cpp adds it to the tensor's weight, in float64: (out, in), (vocabulary, dim), (experts, out, in)."""
    fields, tensors, _ = read_gguf(path)
    a, b = (tensors[f"{name}.weight.lora_{side}"].double() for side in "ab")
    alpha = fields.get("adapter.lora.alpha", 0.0)
    scale = alpha / b.shape[-1] if alpha else 1.0
    if name in EMBEDDING:
        return scale * (a @ b.T)
    return scale * (b @ a)
