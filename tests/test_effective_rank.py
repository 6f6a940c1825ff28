"""Effective ranks against their definitions on dense matrices, and the order in which they stand."""

import math

import pytest
import torch
from factor_cases import SPECTRA, quick, spectrum
from hypothesis import given
from hypothesis import strategies as st

from lora_squeeze.effective_rank import entropy_rank, numerical_rank, stable_rank

values = st.lists(st.floats(0, 1e3), min_size=1, max_size=12).map(lambda found: sorted(found, reverse=True))


def squares(S: list[float]) -> list[float]:
    return [s * s for s in S]


@pytest.mark.parametrize("kind", SPECTRA)
def test_equal_to_the_definitions_on_a_dense_matrix(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    Q = [torch.linalg.qr(torch.randn(9, 6, generator=g, dtype=torch.float64)).Q for _ in range(2)]
    dW = Q[0] * spectrum(kind, 6) @ Q[1].T * 3
    S = torch.linalg.svdvals(dW)[:6]
    energies = S.square().tolist()
    assert stable_rank(energies) == pytest.approx(float(dW.norm() ** 2 / torch.linalg.matrix_norm(dW, 2) ** 2))
    entropy = torch.special.entr(S.square() / S.square().sum()).sum()
    assert entropy_rank(energies) == pytest.approx(float(entropy.exp()))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        expected = torch.linalg.matrix_rank(dW, rtol=torch.finfo(dtype).eps)
        assert numerical_rank(S.tolist(), dtype) == expected


@quick
@given(values)
def test_stable_is_at_most_entropy_is_at_most_the_number_of_directions(S: list[float]) -> None:
    stable, entropy = stable_rank(squares(S)), entropy_rank(squares(S))
    if squares(S)[0] > 0:
        assert 1 <= stable <= entropy * (1 + 1e-12) and entropy <= sum(s > 0 for s in squares(S)) * (1 + 1e-12)
        assert 1 <= numerical_rank(S, torch.float32) <= len(S)
    else:
        assert stable == entropy == 0


@quick
@given(values, st.integers(-30, 30))
def test_a_common_factor_changes_nothing(S: list[float], power: int) -> None:
    if S[0] < 1e-3:
        return
    scaled = [s * 2.0**power for s in S]
    assert stable_rank(squares(scaled)) == pytest.approx(stable_rank(squares(S)))
    assert entropy_rank(squares(scaled)) == pytest.approx(entropy_rank(squares(S)))
    assert numerical_rank(scaled, torch.bfloat16) == numerical_rank(S, torch.bfloat16)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_n_equal_directions_count_n(n: int) -> None:
    assert stable_rank([2.0] * n) == n and entropy_rank([2.0] * n) == pytest.approx(n)
    assert numerical_rank([2.0] * n, torch.bfloat16) == n


@pytest.mark.parametrize("energies", [[0.0, 0.0], [], [0.0]])
def test_a_zero_update_has_rank_zero(energies: list[float]) -> None:
    assert stable_rank(energies) == entropy_rank(energies) == numerical_rank(energies or [0.0], torch.float32) == 0


def test_the_smallest_numbers_do_no_harm() -> None:
    tiny = math.ulp(0.0)
    assert entropy_rank([2.0, tiny]) == 1.0
