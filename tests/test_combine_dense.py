"""TIES and DARE on matrices: by their definitions, and as PEFT computes them."""

import math
from pathlib import Path

import pytest
import torch
from adapter_cases import SHAPES, dense, tail
from combine_cases import NUMBERS, made
from peft.utils import merge_utils

from lora_squeeze.adapter import Adapter
from lora_squeeze.combine import merge, residual
from lora_squeeze.combine_dense import METHODS, combine_dense, drop, elected_mean, seed_of, trim


@pytest.fixture
def deltas() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(24, 20, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7])
def test_ties_is_that_of_peft(deltas: list[torch.Tensor], density: float) -> None:
    expected = merge_utils.ties(deltas, torch.ones(3), density)
    torch.testing.assert_close(combine_dense(deltas, "ties", density, [0, 1, 2]), expected)


def test_ties_by_hand() -> None:
    """Two entries of four are kept. Column 1: 3 and 2 outvote nothing; column 2: -4 beats 1; column 4: one alone."""
    one, two = torch.tensor([[3.0, 1.0, 2.0, 0.5]]), torch.tensor([[2.0, -4.0, 0.1, 0.3]])
    assert trim(one, 0.5).tolist() == [[3.0, 0.0, 2.0, 0.0]] and trim(two, 0.5).tolist() == [[2.0, -4.0, 0.0, 0.0]]
    assert combine_dense([one, two], "ties", 0.5, [0, 0]).tolist() == [[2.5, -4.0, 2.0, 0.0]]
    assert elected_mean(torch.tensor([[1.0, 5.0], [-3.0, 1.0], [1.0, 0.0]])).tolist() == [-3.0, 3.0]


def test_dare_keeps_what_it_keeps_divided_by_the_density(deltas: list[torch.Tensor]) -> None:
    for seed in range(3):
        kept = drop(deltas[0], 0.3, seed)
        alive = kept != 0
        torch.testing.assert_close(kept[alive], deltas[0][alive] / 0.3)
        share, spread = float(alive.float().mean()), math.sqrt(0.3 * 0.7 / alive.numel())
        assert abs(share - 0.3) < 5 * spread


def test_dare_leaves_the_expectation(deltas: list[torch.Tensor]) -> None:
    count = 2000
    mean = sum((drop(deltas[0], 0.5, seed) for seed in range(count)), torch.zeros_like(deltas[0])) / count
    # An entry x is 2 x or 0: its mean has the standard deviation |x| / sqrt(count).
    assert ((mean - deltas[0]).abs() <= 6 * deltas[0].abs() / math.sqrt(count)).all()


def test_dare_ties_elects_among_what_was_not_dropped_as_peft_does(deltas: list[torch.Tensor]) -> None:
    dropped = torch.stack([drop(delta, 0.4, seed) for seed, delta in enumerate(deltas)])
    mask = merge_utils.calculate_majority_sign_mask(dropped, method="total")
    expected = merge_utils.disjoint_merge(dropped, mask)
    torch.testing.assert_close(combine_dense(deltas, "dare-ties", 0.4, [0, 1, 2]), expected)
    torch.testing.assert_close(combine_dense(deltas, "dare", 0.4, [0, 1, 2]), dropped.sum(0))


@pytest.fixture
def three(tmp_path: Path) -> list[Adapter]:
    return [made(tmp_path / f"in {i}", rank, i, lora_alpha=4 + 3 * i) for i, rank in enumerate((8, 3, 5))]


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_gets_the_best_of_the_rank_of_the_dense_merge(three: list[Adapter], method: str) -> None:
    small = merge(three, NUMBERS, method=method, density=0.4, seed=5, rank=4)
    lost, norms = [], []
    for name in SHAPES:
        weighted = [(w * dense(adapter, name)).float() for w, adapter in zip(NUMBERS, three, strict=True)]
        whole = combine_dense(weighted, method, 0.4, [seed_of(5, name, i) for i in range(3)]).double()
        found = float((dense(small, name) - whole).norm())
        assert math.isclose(found, tail(whole, 4), rel_tol=1e-4)
        lost.append(found)
        norms.append(float(whole.norm()))
    assert math.isclose(residual(small.report).error, math.hypot(*lost) / math.hypot(*norms), rel_tol=1e-4)


def test_dare_of_density_one_is_the_sum(three: list[Adapter]) -> None:
    for name in SHAPES:
        expected = dense(merge(three, NUMBERS, rank=6), name)
        found = dense(merge(three, NUMBERS, method="dare", density=1.0, rank=6), name)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_seed_decides_and_the_global_generator_does_not(three: list[Adapter]) -> None:
    def found(seed: int) -> torch.Tensor:
        torch.rand(1)
        return dense(merge(three, method="dare", density=0.5, seed=seed, energy=0.9), "layers.0.q_proj")

    assert torch.equal(found(1), found(1)) and not torch.equal(found(1), found(2))
