"""The adapters that the engines are asked about: one really trained, and what is made of it.

The source is trained as the demonstration trains its own (rank 64, scale 2, every linear layer), once, and kept in the
user's cache under a key of its settings. All others are written from it in seconds.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import lora_squeeze
from lora_squeeze.base_model import open_base
from lora_squeeze.demo.model import find_model, load_model, user_cache
from lora_squeeze.demo.settings import QUICK, Settings
from lora_squeeze.demo.source import SOURCE, is_trained, save_source
from lora_squeeze.demo.task import batches, read_words, split_words, take
from lora_squeeze.demo.train import attach_lora, train

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ALPHAS = {"q_proj": 32, "down_proj": 512}  # beside the source's 128 for the rest
Recipe = Callable[[Mapping[str, Path], Path], None]
_EMBEDDING = "model.embed_tokens.weight"
_ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
_FREE = ("The capital of France is", "Once upon a time there was a")


def prompts() -> list[str]:
    """Eight prompts: six held-out words of the task, two of plain text."""
    _, held = split_words(read_words(), seed=0)
    return [word.prompt for word in held[:6]] + list(_FREE)


def source() -> Path:
    """The folder of the trained adapter; trains it, about a minute on two cores, where it is not there yet."""
    found = find_model()
    settings = Settings(found.origin, seed=0, steps=QUICK.steps)
    key = hashlib.sha256(json.dumps(asdict(settings)).encode()).hexdigest()[:12]
    output = user_cache() / f"engines-adapter-{key}"
    if not is_trained(output, settings, force=False):
        cpu = torch.device("cpu")
        model, tokenizer = load_model(found, cpu)
        words, _ = split_words(read_words(), settings.seed)
        examples = take(words, tokenizer, settings.steps * settings.batch)
        adapted = attach_lora(model, settings)
        train(adapted, list(batches(examples, settings.batch)), settings, cpu, lambda step, loss: None)
        save_source(adapted, settings, output)
    return output / SOURCE


def write_all(trained: Path, folder: Path) -> dict[str, Path]:
    """PEFT folders by name, for all of NAMES."""
    made = {"source": trained}
    for name, write in _RECIPES.items():
        write(made, folder / name)
        made[name] = folder / name
    return made


def _squeezed(of: str, **dials: Any) -> Recipe:
    """Squeeze one of those that are made already; without a dial, copy it."""

    def write(made: Mapping[str, Path], target: Path) -> None:
        adapter = lora_squeeze.load(str(made[of]))
        (adapter.squeeze(**dials) if dials else adapter).save(target)

    return write


def _eighth(made: Mapping[str, Path], target: Path) -> None:
    adapter = lora_squeeze.load(str(made["source"]))
    adapter.squeeze(size=adapter.lora_bytes // 8, allocate="global").save(target)


def _as_rslora(made: Mapping[str, Path], target: Path) -> None:
    """The same function written with scale = alpha / sqrt(r): the source's 128 / 64 is 16 / sqrt(64)."""
    shutil.copytree(made["source"], target)
    before = config(target)
    change(target, use_rslora=True, lora_alpha=round(before["lora_alpha"] / before["r"] ** 0.5))


def _with_patterns(made: Mapping[str, Path], target: Path) -> None:
    """The same function with three scales, as a training run with `alpha_pattern` leaves it."""
    shutil.copytree(made["source"], target)
    usual = config(target)["lora_alpha"]
    tensors = safetensors.torch.load_file(target / WEIGHTS)
    for name, tensor in tensors.items():
        for layer, alpha in _ALPHAS.items():
            if f".{layer}.lora_B." in name:
                tensors[name] = tensor * (usual / alpha)
    safetensors.torch.save_file(tensors, target / WEIGHTS, {"format": "pt"})
    change(target, alpha_pattern=_ALPHAS)


_RECIPES: dict[str, Recipe] = {
    **{f"rank-{rank}": _squeezed("source", rank=rank) for rank in (32, 16, 8, 4)},
    "folded": _squeezed("source", rank=16, alpha="fold"),
    "energy": _squeezed("source", energy=0.9),
    "size": _eighth,
    "rslora": _as_rslora,
    "rslora-8": _squeezed("rslora", rank=8),
    "patterns": _with_patterns,
    "patterns-copy": _squeezed("patterns"),
    "patterns-energy": _squeezed("patterns", energy=0.9),
}
# The source has rank 64 and scale 2; "energy", "size" and "patterns-energy" have a rank of their own in each module.
NAMES = ("source", *_RECIPES)


def without_patterns(adapter: Path, folder: Path) -> Path:
    """The same folder without `rank_pattern` and `alpha_pattern`: what a reader sees that does not know them."""
    shutil.copytree(adapter, folder)
    change(folder, rank_pattern={}, alpha_pattern={})
    return folder


def with_tokens(adapter: Path, base: Path, tokens: list[int], folder: Path) -> Path:
    """The same folder with rows of its own for some tokens, as PEFT saves them for `trainable_token_indices`."""
    shutil.copytree(adapter, folder)
    model = open_base(base)
    rows = torch.cat(list(model.pieces(_EMBEDDING))).reshape(model.facts[_EMBEDDING][1])[tokens].float()
    noise = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)) * rows.std()
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors[_ROWS] = rows + noise
    safetensors.torch.save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    change(folder, trainable_token_indices=tokens)
    return folder


def config(folder: Path) -> dict[str, Any]:
    """adapter_config.json."""
    found: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return found


def change(folder: Path, **settings: Any) -> None:
    """Other values for some fields of adapter_config.json."""
    (folder / CONFIG).write_text(json.dumps(config(folder) | settings, sort_keys=True))
