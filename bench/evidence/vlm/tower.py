"""The first training: the tower, with two linear heads that name digit and colour of what stands in each cell."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.evidence.vlm.canvas import CELLS, COLOURS, Scene, draw, lottery
from bench.evidence.vlm.digits import Handwriting
from bench.evidence.vlm.model import pixels
from bench.evidence.vlm.recipe import Say, Stage, fit

_EMPTY_DIGIT, _EMPTY_COLOUR = 10, len(COLOURS)
_POOL = 64  # batches that are drawn at once


class Heads(nn.Module):
    """Names from the features that LLaVA reads, the last layer's before the tower's closing norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.digit = nn.Linear(width, _EMPTY_DIGIT + 1)
        self.colour = nn.Linear(width, _EMPTY_COLOUR + 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of digit and colour by cell."""
        normed = self.norm(features)
        return self.digit(normed), self.colour(normed)


def features(tower: Any, pictures: Tensor) -> Tensor:
    """What LLaVA reads: (pictures, 9, width)."""
    found: Tensor = tower(pixel_values=pictures, output_hidden_states=True).hidden_states[-1]
    return found


def cell_labels(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Digit and colour by picture and cell; an empty cell has one class more than there are names."""
    digits = torch.full((len(scenes), len(CELLS)), _EMPTY_DIGIT)
    colours = torch.full((len(scenes), len(CELLS)), _EMPTY_COLOUR)
    number = {name: i for i, name in enumerate(COLOURS)}
    for i, scene in enumerate(scenes):
        for mark in scene:
            digits[i, mark.cell] = mark.digit
            colours[i, mark.cell] = number[mark.colour]
    return digits, colours


class Pool:
    """Pictures of a training, drawn a stock at a time; every step has new ones.

    Args:
        writing: where the digits are taken from.
        stage: batch, most digits on a picture, and seed.
    """

    def __init__(self, writing: Handwriting, stage: Stage) -> None:
        self._writing, self._stage = writing, stage
        self._number = -1
        self._stock: tuple[list[Scene], Tensor] = ([], torch.empty(0))

    def batch(self, step: int) -> tuple[list[Scene], Tensor]:
        """Scenes and pictures, as the tower wants them, of a step."""
        number, place = divmod(step, _POOL)
        size = self._stage.batch
        if number != self._number:
            seed = 1_000_000 * self._stage.seed + number
            scenes = lottery(size * _POOL, self._stage.most, seed)
            self._number, self._stock = number, (scenes, draw(scenes, self._writing, seed))
        scenes, pictures = self._stock
        part = slice(place * size, (place + 1) * size)
        return scenes[part], pixels(list(pictures[part]))


def train_tower(tower: Any, writing: Handwriting, stage: Stage, say: Say) -> Heads:
    """Train the tower in place.

    Returns:
        The heads, to see how good the tower has become.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed)
        heads = Heads(tower.config.hidden_size)
    pool = Pool(writing, stage)

    def loss(step: int) -> Tensor:
        scenes, pictures = pool.batch(step)
        digits, colours = cell_labels(scenes)
        with torch.autocast("cpu", torch.bfloat16):
            found = heads(features(tower, pictures))
        return cross_entropy(found[0].float().flatten(0, 1), digits.flatten()) + cross_entropy(
            found[1].float().flatten(0, 1), colours.flatten()
        )

    fit([*tower.parameters(), *heads.parameters()], loss, stage, say)
    return heads


@torch.no_grad()
def tower_accuracy(tower: Any, heads: Heads, writing: Handwriting, most: int, seed: int) -> dict[str, float]:
    """Share of cells with a digit in them whose digit and whose colour are named, and of empty cells seen as empty."""
    scenes = lottery(512, most, seed)
    digits, colours = cell_labels(scenes)
    found = heads(features(tower, pixels(list(draw(scenes, writing, seed)))))
    full = digits != _EMPTY_DIGIT
    right = [logits.argmax(-1) == labels for logits, labels in zip(found, (digits, colours), strict=True)]
    return {
        "digit": right[0][full].float().mean().item(),
        "colour": right[1][full].float().mean().item(),
        "empty": right[0][~full].float().mean().item(),
    }
