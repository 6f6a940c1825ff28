"""Small checkpoints, as files, and what is extracted from them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter
from lora_squeeze.formats.dense import extract

LAYERS = {
    f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in {"q": (24, 20), "down": (20, 48)}.items()
}
INDEX = "model.safetensors.index.json"
Checkpoint = dict[str, Tensor]
TOKENS, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def integers(*shape: int, seed: int, bound: int = 50) -> Tensor:
    """Whole numbers, which all dtypes hold exactly, and so their sums."""
    return torch.randint(-bound, bound + 1, shape, generator=torch.Generator().manual_seed(seed)).float()


def planted(out: int, inp: int, rank: int = 2, seed: int = 7) -> Tensor:
    """An update of this rank in small whole numbers."""
    return integers(out, rank, seed=seed, bound=1) @ integers(rank, inp, seed=seed + 1, bound=1)


def two_models(dtype: torch.dtype = torch.float32) -> tuple[Checkpoint, Checkpoint]:
    """A tuned model and its base: every layer has an update of rank 2, the norm has none."""
    base = {f"{name}.weight": integers(*shape, seed=i) for i, (name, shape) in enumerate(LAYERS.items())}
    base["model.norm.weight"] = integers(20, seed=99)
    tuned = {name: w + planted(*w.shape, seed=len(name)) if w.ndim == 2 else w for name, w in base.items()}
    return {k: t.to(dtype) for k, t in tuned.items()}, {k: t.to(dtype) for k, t in base.items()}


def write(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 1, config: Mapping[str, Any] | None = None
) -> Path:
    folder.mkdir(parents=True)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    files = {f"model-{i}.safetensors": dict(list(tensors.items())[i::shards]) for i in range(shards)}
    if shards == 1:
        files = {"model.safetensors": tensors}
    for name, part in files.items():
        safetensors.torch.save_file(part, folder / name)
    if shards > 1:
        index = {"weight_map": {key: name for name, part in files.items() for key in part}}
        (folder / INDEX).write_text(json.dumps(index))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def extracted(tmp_path: Path, tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], **options: Any) -> Adapter:
    return extract(write(tmp_path / "tuned", tuned), write(tmp_path / "base", base), **options)


def dense(adapter: Adapter, name: str) -> Tensor:
    update = adapter.update(name)
    return update.scale * (update.B.double() @ update.A.double())


def note_of(adapter: Adapter, words: str) -> str:
    found = [note for note in adapter.notes if words in note]
    assert len(found) == 1, adapter.notes
    return found[0]


def with_tokens(rows_tuned: int = 40, rows_base: int = 40) -> tuple[Checkpoint, Checkpoint, Tensor]:
    """Two models with an embedding, and the update of its rows in the base."""
    tuned, base = two_models()
    W, dW = integers(max(rows_tuned, rows_base), 20, seed=3), planted(max(rows_tuned, rows_base), 20)
    base[TOKENS], tuned[TOKENS] = W[:rows_base], (W + dW)[:rows_tuned]
    dW = dW[:rows_base].clone()
    dW[rows_tuned:] = 0
    return tuned, base, dW
