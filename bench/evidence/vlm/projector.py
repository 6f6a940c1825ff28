"""The other trainings: the projector, with tower and language model frozen.

First it learns, without the language model, to turn a cell into the sum of the language model's own embeddings of what
stands there. From that start a few hundred captions are enough for the language model to read pictures.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, mse_loss

from bench.evidence.vlm.canvas import CELLS, COLOURS, Scene, caption, draw, lottery
from bench.evidence.vlm.digits import Handwriting
from bench.evidence.vlm.model import IMAGE_TOKENS, image_token_id, pixels
from bench.evidence.vlm.recipe import Say, Stage, fit
from bench.evidence.vlm.tower import Pool, features

PROMPT = "caption:"
_IGNORED = -100


def train_names(model: Any, tokenizer: Any, writing: Handwriting, stage: Stage, say: Say) -> None:
    """Train the projector in place towards the embeddings of names."""
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    table = model.get_input_embeddings().weight.detach()
    digits = torch.stack([_embedding(table, tokenizer, str(digit)) for digit in range(10)])
    colours = {name: _embedding(table, tokenizer, f" {name}") for name in COLOURS}
    cells = torch.stack([_embedding(table, tokenizer, f" {name}") for name in CELLS])
    scale = table.std()
    pool = Pool(writing, stage)

    def loss(step: int) -> Tensor:
        scenes, pictures = pool.batch(step)
        wanted = cells.repeat(len(scenes), 1, 1)
        for i, scene in enumerate(scenes):
            for mark in scene:
                wanted[i, mark.cell] += digits[mark.digit] + colours[mark.colour]
        with torch.no_grad():
            seen = features(tower, pictures)
        return mse_loss(projector(seen) / scale, wanted / scale)

    fit(projector.parameters(), loss, stage, say)


def _embedding(table: Tensor, tokenizer: Any, text: str) -> Tensor:
    """Mean embedding of a text's tokens."""
    return table[tokenizer(text, add_special_tokens=False)["input_ids"]].mean(0)


def train_captions(model: Any, tokenizer: Any, writing: Handwriting, stage: Stage, say: Say) -> None:
    """Train the projector in place so that the frozen language model writes captions."""
    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True)
    pool = Pool(writing, stage)

    def loss(step: int) -> Tensor:
        scenes, pictures = pool.batch(step)
        logits, labels = _answers(model, tokenizer, scenes, pictures)
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED)

    fit(projector.parameters(), loss, stage, say)
    model.requires_grad_(True)


@torch.no_grad()
def caption_accuracy(model: Any, tokenizer: Any, writing: Handwriting, most: int, seed: int) -> dict[str, float]:
    """Share of right tokens of 128 captions, of all of them and of the digits among them, each after the right ones."""
    scenes = lottery(128, most, seed)
    pictures = pixels(list(draw(scenes, writing, seed)))
    digits = torch.tensor([tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)])
    rights, numbers = [], []
    for start in range(0, len(scenes), 16):
        part = slice(start, start + 16)
        logits, labels = _answers(model, tokenizer, scenes[part], pictures[part])
        counted = labels != _IGNORED
        rights.append((logits.argmax(-1) == labels)[counted])
        numbers.append(torch.isin(labels[counted], digits))
    right, number = torch.cat(rights), torch.cat(numbers)
    return {"caption": right.float().mean().item(), "caption digit": right[number].float().mean().item()}


def _answers(model: Any, tokenizer: Any, scenes: list[Scene], pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels (pictures, tokens) of the captions and their ends."""
    end = tokenizer.eos_token_id
    texts = [[*tokenizer(f" {caption(s)}", add_special_tokens=False)["input_ids"], end] for s in scenes]
    room = max(map(len, texts))
    before = [image_token_id(tokenizer)] * IMAGE_TOKENS + tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + text + [end] * (room - len(text)) for text in texts])
    labels = torch.tensor([text + [_IGNORED] * (room - len(text)) for text in texts])
    with torch.autocast("cpu", torch.bfloat16):  # what pads on the right is read by nothing that counts: no mask
        logits = model(input_ids=ids, pixel_values=pictures, logits_to_keep=room + 1, use_cache=False).logits
    return logits[:, :-1].float(), labels
