"""What a merge in bfloat16 leaves, against rounding by the definition of the format."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_squeeze import merging
from lora_squeeze.merging import merge, norm_of, row_blocks

COPIES, ROWS, COLUMNS, RANK = 2, 7, 11, 3


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest number of 8 significant bits, ties to even, by exponents alone."""
    _, exponent = np.frexp(x)
    step = 2.0 ** (exponent - 8)
    return np.asarray(np.round(x / step) * step)


def problem(size: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    left = torch.randn(COPIES, ROWS, RANK, generator=g) * size
    left[0, 2] = 0  # a row without update
    right = torch.randn(COPIES, RANK, COLUMNS, generator=g)
    return left, right, torch.randn(COPIES, ROWS, COLUMNS, generator=g).to(dtype)


def pieces(W: Tensor, size: int) -> list[Tensor]:
    return list(W.reshape(-1).split(size))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1.0])
def test_every_figure_is_that_of_the_definition(
    size: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the pieces that the weight comes in."""
    left, right, W = problem(size, dtype)
    dW = (left @ right).double().numpy()
    start = rounded(W.double().numpy())
    result = rounded(start + dW)
    updated = dW != 0
    for block, piece in ((4, 5), (40, 13), (10**6, 10**6)):
        monkeypatch.setattr(merging, "_BLOCK", block)
        found = merge(left, right, pieces(W, piece))
        assert found.base_norm == pytest.approx(float(W.double().norm()))
        assert found.unchanged == pytest.approx((result == start)[updated].mean())
        error = np.linalg.norm(result - start - dW) / np.linalg.norm(dW)
        assert found.merge_error == pytest.approx(error, rel=1e-4)
        assert 0 <= found.merge_error <= 1 + 1e-6


def test_an_update_far_below_a_step_is_lost_and_one_far_above_is_kept() -> None:
    for size, unchanged, error in ((1e-9, 1.0, 1.0), (1e3, 0.0, 0.0)):
        left, right, W = problem(size, torch.bfloat16)
        found = merge(left, right, pieces(W, 10))
        assert found.unchanged == pytest.approx(unchanged, abs=0.02)
        assert found.merge_error == pytest.approx(error, abs=0.01)


def test_half_a_step_is_the_border() -> None:
    """Above 1 the next bfloat16 is 2^-7 away; a tie goes to the even neighbour, which is 1."""
    W, right = torch.ones(1, 1), torch.ones(1, 1, 1)
    for size, unchanged in ((2.0**-8, 1.0), (2.0**-8 * 1.01, 0.0), (-(2.0**-9) * 1.01, 0.0), (-(2.0**-9), 1.0)):
        assert merge(torch.full((1, 1, 1), size), right, [W[0]]).unchanged == unchanged, size


def test_a_zero_update_changes_nothing_and_loses_nothing() -> None:
    left, right, W = problem(0.0, torch.float32)
    found = merge(left, right, pieces(W, 10))
    assert (found.unchanged, found.merge_error) == (0.0, 0.0)


def test_a_weight_with_nan_is_seen() -> None:
    left, right, W = problem(1.0, torch.float32)
    W[1, 0, 0] = math.nan
    assert not math.isfinite(merge(left, right, pieces(W, 10)).base_norm)


@pytest.mark.parametrize("piece", [1, 5, 12, 1000])
def test_blocks_are_whole_rows_in_order(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_BLOCK", 9)
    W = torch.arange(7 * 4.0).view(7, 4)
    blocks = list(row_blocks(pieces(W, piece), 4))
    assert torch.equal(torch.cat(blocks), W)
    assert [len(block) for block in blocks] == [2, 2, 2, 1], "two rows of 4 in 9 numbers"
    assert norm_of(pieces(W, piece)) == pytest.approx(float(W.norm()))
