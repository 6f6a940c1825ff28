"""The weights: made once, a quarter of an hour on one core, and kept in the user's cache.

    python -m bench.evidence.vlm.build

The folder holds `weights.safetensors` (tower and projector, not the language model) and `vlm.json` (recipe, versions,
seconds and accuracies). Each stage is kept when it is done, so a build that was cut goes on with the next one; a second
build waits for the first. With one recipe, one machine and the same versions the weights are the same bit by bit; other
processors round differently.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.evidence.vlm.digits import Handwriting, digits_source, handwriting
from bench.evidence.vlm.model import parts, tower_config, with_language_model
from bench.evidence.vlm.projector import caption_accuracy, train_captions, train_names
from bench.evidence.vlm.recipe import RECIPE, Recipe, Say, versions
from bench.evidence.vlm.tower import tower_accuracy, train_tower

WEIGHTS, CARD = "weights.safetensors", "vlm.json"
_CHECK_SEED = 7


def built(say: Say, recipe: Recipe = RECIPE) -> Path:
    """The folder of the weights, made if it is missing.

    Args:
        say: called with a line of text now and then while weights are made.
        recipe: what is made.
    """
    from lora_squeeze.demo.model import find_model, user_cache

    language_model = find_model(say).origin
    folder = user_cache() / f"vlm-{recipe.tag(language_model)}"
    if not (folder / CARD).is_file():
        with _alone(folder):
            if not (folder / CARD).is_file():  # another process may have made it meanwhile
                say(f"Making the vision-language model once in {folder}, about a quarter of an hour")
                _make(folder, recipe, language_model, say)
    return folder


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time makes this folder, with one thread: sums of several threads vary."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _make(folder: Path, recipe: Recipe, language_model: str, say: Say) -> None:
    """All stages, in a folder of their own that takes its name when they are done."""
    work = Path(f"{folder}.part")
    work.mkdir(exist_ok=True)
    model, tokenizer = with_language_model(tower_config(**recipe.tower), recipe.seeing.seed)
    writing = handwriting()
    card: dict[str, Any] = {
        "recipe": asdict(recipe), "versions": versions(), "language_model": language_model, "digits": digits_source(),
    }  # fmt: skip
    stages = {
        "seeing": partial(_see, model, writing, recipe, say),
        "naming": partial(_name, model, tokenizer, writing, recipe, say),
        "speaking": partial(_speak, model, tokenizer, writing, recipe, say),
    }
    for name, run in stages.items():
        weights, figures = work / f"{name}.safetensors", work / f"{name}.json"
        if figures.is_file():
            read_weights(model, weights)
        else:
            say(f"{name}: {getattr(recipe, name)}")
            start = time.perf_counter()
            found = run()
            write_weights(model, weights)
            _publish(figures, json.dumps({"seconds": round(time.perf_counter() - start, 1), **found}))
        card[name] = json.loads(figures.read_text())
        say(f"{name}: {card[name]}")
    write_weights(model, work / WEIGHTS)
    (work / CARD).write_text(json.dumps(card, indent=2) + "\n")
    for name in stages:
        (work / f"{name}.safetensors").unlink()
        (work / f"{name}.json").unlink()
    shutil.rmtree(folder, ignore_errors=True)  # without a card it is no finished build
    os.replace(work, folder)


def _see(model: Any, writing: dict[str, Handwriting], recipe: Recipe, say: Say) -> dict[str, Any]:
    tower = model.model.vision_tower
    heads = train_tower(tower, writing["train"], recipe.seeing, say)
    most = recipe.speaking.most
    return {part: tower_accuracy(tower, heads, writing[part], most, _CHECK_SEED) for part in writing}


def _name(model: Any, tokenizer: Any, writing: dict[str, Handwriting], recipe: Recipe, say: Say) -> dict[str, Any]:
    train_names(model, tokenizer, writing["train"], recipe.naming, say)
    return _captions(model, tokenizer, writing, recipe)


def _speak(model: Any, tokenizer: Any, writing: dict[str, Handwriting], recipe: Recipe, say: Say) -> dict[str, Any]:
    train_captions(model, tokenizer, writing["train"], recipe.speaking, say)
    return _captions(model, tokenizer, writing, recipe)


def _captions(model: Any, tokenizer: Any, writing: dict[str, Handwriting], recipe: Recipe) -> dict[str, Any]:
    most = recipe.speaking.most
    return {part: caption_accuracy(model, tokenizer, writing[part], most, _CHECK_SEED) for part in writing}


def write_weights(model: Any, path: Path) -> None:
    """Tower and projector into one file, which is there as a whole or not at all."""
    from safetensors.torch import save_file

    tensors = {
        f"{prefix}.{name}": tensor.contiguous()
        for prefix, module in parts(model).items()
        for name, tensor in module.state_dict().items()
    }
    waiting = path.with_suffix(".waiting")
    save_file(tensors, waiting)
    os.replace(waiting, path)


def read_weights(model: Any, path: Path) -> None:
    """Tower and projector from a file of `write_weights`, into the model."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    for prefix, module in parts(model).items():
        module.load_state_dict(
            {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
        )


def _publish(path: Path, text: str) -> None:
    waiting = path.with_suffix(".waiting")
    waiting.write_text(text)
    os.replace(waiting, path)


if __name__ == "__main__":
    print(built(partial(print, flush=True)))
