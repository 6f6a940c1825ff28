"""The difference of one tensor in two checkpoints: measured piece by piece, or formed matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_squeeze.base_figures import Weights
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.merging import row_blocks

_SINGLE = torch.finfo(torch.float32).eps
_COMPARABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Difference:
    """A tensor in two checkpoints, over the rows that both have.

    Args:
        norm: Frobenius norm of the difference.
        base_norm: of the base's tensor.
        changed: numbers that differ.
        numbers: numbers compared.
        rounded: one tensor is the other, rounded to its dtype.
        step: largest relative distance of two neighbours in the coarser dtype.
        added_rows: rows of the tuned model after the base's last one; below 0, rows that it has not.
    """

    norm: float
    base_norm: float
    changed: int
    numbers: int
    rounded: bool
    step: float
    added_rows: int

    @property
    def same(self) -> bool:
        """Whether the tensors are one but for rounding to a dtype that one of them had at some time."""
        return self.rounded or self.norm <= _SINGLE * self.base_norm

    @property
    def faint(self) -> bool:
        """Whether the difference is as small as single steps of the dtype: most of it may be rounding."""
        return self.norm <= self.step * self.base_norm


def compare(tuned: Weights, tuned_key: str, base: Weights, base_key: str) -> Difference:
    """Measure the difference; the tensors have the same shape but perhaps for the number of rows.

    Raises:
        LoraSqueezeError: NaN or infinity in one of them.
    """
    (my_dtype, mine), (their_dtype, theirs) = tuned.facts[tuned_key], base.facts[base_key]
    norm = base_norm = 0.0
    changed = numbers = 0
    to_mine = to_theirs = True
    for one, other in _blocks(tuned, tuned_key, base, base_key):
        unequal = one != other
        changed += int(unequal.sum())
        numbers += one.numel()
        to_mine = to_mine and torch.equal(one, other.to(my_dtype).to(one.dtype))
        to_theirs = to_theirs and torch.equal(one.to(their_dtype).to(other.dtype), other)
        norm = math.hypot(norm, _norm(_minus(one, other)))
        base_norm = math.hypot(base_norm, _norm(other))
    if not math.isfinite(norm):
        raise LoraSqueezeError(f"{quoted(tuned_key)}: NaN or infinity in {tuned.name} or in {base.name}")
    floats = [torch.finfo(dtype).eps for dtype in (my_dtype, their_dtype) if dtype.is_floating_point]
    added = mine[0] - theirs[0] if mine else 0
    return Difference(norm, base_norm, changed, numbers, to_mine or to_theirs, max(floats, default=0.0), added)


def matrices(tuned: Weights, tuned_key: str, base: Weights, base_key: str, copies: int = 1) -> Iterator[Tensor]:
    """The difference as matrices of the base's shape, copy by copy; rows that only the base has do not change.

    Yields:
        `copies` matrices in float32, or in float64 where one of the tensors has it.
    """
    shape = base.facts[base_key][1]
    columns = math.prod(shape[1:]) if copies == 1 else shape[-1]
    rows = math.prod(shape) // (columns * copies)
    dtype = torch.promote_types(torch.float32, torch.promote_types(tuned.facts[tuned_key][0], base.facts[base_key][0]))
    matrix, filled = torch.zeros(rows, columns, dtype=dtype), 0
    for one, other in _blocks(tuned, tuned_key, base, base_key, columns):
        block = _minus(one, other)
        while len(block):
            part, block = block.split([n := min(len(block), rows - filled), len(block) - n])
            matrix[filled : filled + n] = part
            filled += n
            if filled == rows and copies > 1:
                yield matrix
                matrix, filled = torch.zeros(rows, columns, dtype=dtype), 0
    if copies == 1:
        yield matrix


def _blocks(
    tuned: Weights, tuned_key: str, base: Weights, base_key: str, columns: int | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors as blocks of the rows that both have."""
    columns = columns or max(1, math.prod(base.facts[base_key][1][1:]))
    pair = (row_blocks(tuned.pieces(tuned_key), columns), row_blocks(base.pieces(base_key), columns))
    for one, other in zip(*pair, strict=False):
        n = min(len(one), len(other))
        yield _plain(one[:n]), _plain(other[:n])


def _plain(tensor: Tensor) -> Tensor:
    """Common floats as they are; torch cannot compare all kinds of float8 and of unsigned integers."""
    return tensor if tensor.dtype in _COMPARABLE else tensor.double()


def _minus(one: Tensor, other: Tensor) -> Tensor:
    inner = torch.promote_types(torch.float32, torch.promote_types(one.dtype, other.dtype))
    return one.to(inner) - other.to(inner)


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float64))
