"""Pictures: canvases of 48 x 48 pixels on which handwritten digits stand in the cells of a 3 x 3 grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from bench.evidence.vlm.digits import Handwriting

GRID, CELL = 3, 16
SIDE = GRID * CELL
CELLS = ("top left", "top", "top right", "left", "middle", "right", "bottom left", "bottom", "bottom right")
COLOURS = {
    "red": (215, 45, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (225, 200, 30),
    "orange": (240, 130, 20),
    "purple": (140, 60, 170),
}
GROUNDS = {"light": (238, 236, 230), "dark": (28, 30, 36)}
_SIZES = (14, 15, 16)  # pixels of a digit
_SHIFT = 2  # pixels that a digit may stand off the middle of its cell
_TINT = 20  # how far each channel of a colour may be off
_NOISE = 4.0  # standard deviation of every pixel


class Mark(NamedTuple):
    """A digit on a canvas.

    Args:
        cell: its place, an index into CELLS.
        digit: 0 to 9.
        colour: its name, in COLOURS.
    """

    cell: int
    digit: int
    colour: str


Scene = tuple[Mark, ...]


def draw(scenes: Sequence[Scene], writing: Handwriting, seed: int) -> Tensor:
    """One picture for each scene; who wrote a digit, its size, shift and exact tint, and the ground are drawn by lot.

    Args:
        scenes: what stands where; at most one mark in each cell.
        writing: where the digits are taken from.
        seed: of the lots; the global generator is not touched.

    Returns:
        Unsigned bytes of shape (scenes, 3, 48, 48).
    """
    lots = torch.Generator().manual_seed(seed)
    grounds = torch.tensor(list(GROUNDS.values()), dtype=torch.float32)
    chosen = grounds[torch.randint(len(grounds), (len(scenes),), generator=lots)]
    side = SIDE + 2 * _SHIFT
    canvas = chosen[:, None, None, :].expand(-1, side, side, -1).contiguous()  # channels last, with a border
    glyphs = _glyphs(writing.images)
    for cell in range(GRID * GRID):  # cell by cell, since neighbours may overlap
        marks = [(i, mark) for i, scene in enumerate(scenes) for mark in scene if mark.cell == cell]
        if marks:
            _put(canvas, cell, marks, writing.labels, glyphs, lots)
    inner = canvas[:, _SHIFT:-_SHIFT, _SHIFT:-_SHIFT]
    noisy = inner + _NOISE * torch.randn(inner.shape, generator=lots)
    return noisy.round().clamp(0, 255).to(torch.uint8).permute(0, 3, 1, 2).contiguous()


def _glyphs(images: Tensor) -> Tensor:
    """Ink at every size, in the middle of a cell: (sizes, images, 16, 16)."""
    found = []
    for size in _SIZES:
        left = (CELL - size) // 2
        right = CELL - size - left
        scaled = interpolate(images[:, None], size=(size, size), mode="bilinear")[:, 0]
        found.append(pad(scaled, (left, right, left, right)))
    return torch.stack(found)


def _put(
    canvas: Tensor, cell: int, marks: list[tuple[int, Mark]], labels: Tensor, glyphs: Tensor, lots: torch.Generator
) -> None:
    """Paint the marks of one cell, on as many canvases."""
    count = len(marks)
    digits = torch.tensor([mark.digit for _, mark in marks])
    first = torch.searchsorted(labels, digits)
    past = torch.searchsorted(labels, digits, right=True)
    writer = first + (torch.rand(count, generator=lots) * (past - first)).long()
    size = torch.randint(len(_SIZES), (count,), generator=lots)
    ink = glyphs[size, writer].unsqueeze(-1)  # (count, 16, 16, 1)
    tint = torch.randint(-_TINT, _TINT + 1, (count, 3), generator=lots)
    colour = (torch.tensor([COLOURS[mark.colour] for _, mark in marks]) + tint)[:, None, None, :].float()
    shift = torch.randint(-_SHIFT, _SHIFT + 1, (count, 2), generator=lots) + _SHIFT
    row, column = divmod(cell, GRID)
    along = torch.arange(CELL)
    where = (
        torch.tensor([i for i, _ in marks])[:, None, None],
        (row * CELL + shift[:, :1] + along)[:, :, None],
        (column * CELL + shift[:, 1:] + along)[:, None, :],
    )
    canvas[where] = canvas[where] * (1 - ink) + colour * ink


def caption(scene: Scene) -> str:
    """What stands on a canvas, in reading order: "red 3 top left, blue 7 middle"."""
    return ", ".join(f"{mark.colour} {mark.digit} {CELLS[mark.cell]}" for mark in sorted(scene))


def lottery(count: int, most: int, seed: int) -> list[Scene]:
    """Scenes with 1 to `most` marks, all of it by lot."""
    lots = torch.Generator().manual_seed(seed)
    names = list(COLOURS)
    numbers = torch.randint(1, most + 1, (count,), generator=lots).tolist()
    cells = torch.rand(count, len(CELLS), generator=lots).argsort(1).tolist()
    digits = torch.randint(10, (count, len(CELLS)), generator=lots).tolist()
    colours = torch.randint(len(names), (count, len(CELLS)), generator=lots).tolist()
    return [
        tuple(Mark(cells[i][k], digits[i][k], names[colours[i][k]]) for k in range(numbers[i])) for i in range(count)
    ]
