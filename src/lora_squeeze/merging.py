"""What bfloat16 leaves of an update that is merged into its base weight.

With R(x) the rounding of x to the nearest bfloat16 (8 bits, ties to even), W the base weight and dW the update:

============  =======================================================================================================
figure        definition
============  =======================================================================================================
unchanged     share of the entries with dW_ij != 0 for which R(R(W) + dW)_ij = R(W)_ij: the updates that vanish
merge_error   |R(R(W) + dW) - (R(W) + dW)|_F / |dW|_F: 0 keeps the update, 1 leaves nothing of it
============  =======================================================================================================

All entries count. The sum is formed in float32 and rounded once, as a careful merge does it. The neighbours of w in
bfloat16 are 2^-8 |w| to 2^-7 |w| away and what is below half of that vanishes: an update of 2^-9 of its weight or less
is lost. merge_error cannot exceed 1, since R(W) itself is among the numbers to round to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_BLOCK = 2**20  # numbers of W and of dW in memory at a time


@dataclass(frozen=True)
class Merge:
    """A weight and its merge with an update.

    Args:
        base_norm: Frobenius norm of W; NaN or infinity where W holds them.
        unchanged, merge_error: see the module; 0 for a zero update.
    """

    base_norm: float
    unchanged: float
    merge_error: float


def merge(
    left: Float[Tensor, "copies rows r"],
    right: Float[Tensor, "copies r columns"],
    pieces: Iterable[Tensor],
) -> Merge:
    """Measure the merge of dW = left @ right, copy by copy, into a weight that is read in pieces.

    Args:
        left, right: factors in float32, the scale in one of them, oriented as the weight is stored.
        pieces: the numbers of W in order, as flat tensors; copies * rows * columns in all.

    Notes:
        Exact, 2 copies rows columns r operations. W and dW are formed a block of rows at a time.
    """
    base_norm = norm = error = 0.0
    touched = unchanged = start = 0
    for W in row_blocks(pieces, right.shape[-1]):
        dW = _rows(left, right, start, start + len(W))
        start += len(W)
        rounded = W.to(torch.bfloat16).float()
        merged = (rounded + dW).to(torch.bfloat16).float()
        moves = dW != 0
        touched += int(moves.sum())
        unchanged += int((moves & (merged == rounded)).sum())
        base_norm = math.hypot(base_norm, _norm(W))
        norm = math.hypot(norm, _norm(dW))
        error = math.hypot(error, _norm((merged - rounded) - dW))
    return Merge(base_norm, unchanged / touched if touched else 0.0, error / norm if norm else 0.0)


def norm_of(pieces: Iterable[Tensor]) -> float:
    """Frobenius norm of a weight that is read in pieces."""
    return math.hypot(*map(_norm, pieces))


def row_blocks(pieces: Iterable[Tensor], columns: int) -> Iterator[Tensor]:
    """Flat pieces as matrices of whole rows, about a million numbers each; equally many rows in all but the last."""
    size = max(1, _BLOCK // columns) * columns
    rest: Tensor | None = None
    for piece in pieces:
        rest = piece if rest is None else torch.cat([rest, piece])
        whole = len(rest) - len(rest) % size
        if whole:
            yield from (block.view(-1, columns) for block in rest[:whole].split(size))
            rest = rest[whole:]
    if rest is not None and len(rest):
        yield rest.view(-1, columns)


def _rows(left: Tensor, right: Tensor, start: int, stop: int) -> Tensor:
    """Rows of left @ right, counted through all copies."""
    parts = []
    while start < stop:
        copy, row = divmod(start, left.shape[-2])
        end = min(left.shape[-2], row + stop - start)
        parts.append(left[copy, row:end] @ right[copy])
        start += end - row
    return torch.cat(parts)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
