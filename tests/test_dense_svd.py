"""The leading directions of a dense matrix, beside its full decomposition."""

import pytest
import torch
from torch import Tensor

from lora_squeeze.formats.dense_svd import STEPS, leading_factors

SHAPE, RANK = (220, 300), 8


def matrix(spectrum: Tensor, rows: int = SHAPE[0], columns: int = SHAPE[1]) -> Tensor:
    g = torch.Generator().manual_seed(5)
    n = len(spectrum)
    U = torch.linalg.qr(torch.randn(rows, n, generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(columns, n, generator=g, dtype=torch.float64)).Q
    return ((U * spectrum) @ V.mT).float()


def error(M: Tensor, B: Tensor, A: Tensor) -> float:
    return float((B.double() @ A.double() - M.double()).norm())


def best(M: Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(M.double())[rank:].norm())


N = torch.arange(1, SHAPE[0] + 1, dtype=torch.float64)
SPECTRA = {"1/i": 1 / N, "1/sqrt i": N**-0.5, "exponential": torch.exp(-N / 10), "i^-1/4": N**-0.25}


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", list(SPECTRA))
def test_the_error_is_the_least_possible_to_a_thousandth(name: str, turned: bool) -> None:
    assert (STEPS + 1) * (RANK + 10) < 0.75 * SHAPE[0], "else the decomposition is a full one"
    M = matrix(SPECTRA[name])
    M = M.mT if turned else M
    assert error(M, *leading_factors(M, RANK)) <= 1.001 * best(M, RANK)


def test_of_noise_nearly_all_of_the_best_energy_is_kept() -> None:
    """The hardest spectrum: nothing stands out. The error tells little there, so the kept energy is looked at."""
    M = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1))
    B, A = leading_factors(M, RANK)
    kept = float((B.double() @ A.double()).square().sum())
    assert kept >= 0.97 * float(torch.linalg.svdvals(M.double())[:RANK].square().sum())


@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e30])
def test_a_matrix_of_lower_rank_is_found_to_rounding(unit: float) -> None:
    M = matrix(torch.linspace(3, 1, 5, dtype=torch.float64)) * unit
    B, A = leading_factors(M, RANK)
    assert error(M, B, A) <= 1e-6 * float(M.double().norm())


def test_the_factors_are_balanced_and_their_squares_are_the_singular_values() -> None:
    M = matrix(1 / N)
    B, A = (factor.double() for factor in leading_factors(M, RANK))
    S = torch.linalg.svdvals(M.double())[:RANK]
    torch.testing.assert_close(B.mT @ B, torch.diag(S), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(A @ A.mT, torch.diag(S), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns", "rank"), [(5, 40, 8), (40, 5, 8), (60, 60, 12)])
def test_a_small_matrix_is_decomposed_exactly(rows: int, columns: int, rank: int) -> None:
    M = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))
    B, A = leading_factors(M, rank)
    assert B.shape == (rows, min(rank, rows, columns)) and A.shape == (min(rank, rows, columns), columns)
    assert error(M, B, A) == pytest.approx(best(M, rank), rel=1e-5, abs=1e-5)


def test_a_zero_matrix_has_zero_factors() -> None:
    B, A = leading_factors(torch.zeros(200, 300), RANK)
    assert B.shape == (200, RANK) and A.shape == (RANK, 300) and not B.any() and not A.any()


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    M, state = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(1)), torch.get_rng_state()
    one, same, other = (leading_factors(M, RANK, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.get_rng_state())


def test_float64_stays_float64() -> None:
    M = matrix(1 / N).double()
    B, A = leading_factors(M, RANK)
    assert B.dtype == A.dtype == torch.float64
