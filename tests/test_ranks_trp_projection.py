"""Trained rank pruning's mathematics: projections, the nuclear norm, and weights as matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.ranks.trp_layers import as_matrix, as_weight, factorised
from lora_squeeze.methods.ranks.trp_projection import RankPruning, Weight

SCHEMES = ("channel", "spatial")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pruned(W: Tensor, **settings: Any) -> tuple[Tensor, RankPruning]:
    parameter = nn.Parameter(W.clone())
    pruning = RankPruning({"W": Weight(parameter)}, **settings)
    pruning.project()
    return parameter.data, pruning


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_a_projection_keeps_the_fewest_directions_with_the_energy(energy: float) -> None:
    W = random(7, 9)
    T, pruning = pruned(W, energy=energy)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    k = pruning.kept["W"]
    torch.testing.assert_close(T, U[:, :k] * S[:k] @ Vh[:k])
    assert S[:k].square().sum() >= energy * S.square().sum() * (1 - 1e-9)
    assert k == 1 or S[: k - 1].square().sum() < energy * S.square().sum()


def test_a_second_projection_changes_nothing_at_the_same_rank_and_never_adds() -> None:
    W = random(7, 9)
    once, pruning = pruned(W, energy=0.8)
    weight = nn.Parameter(once.clone())
    again = RankPruning({"W": Weight(weight)}, energy=0.8)
    again.kept = dict(pruning.kept)
    again.finish()
    torch.testing.assert_close(weight.data, once)
    ranks = [pruning.kept["W"]]
    for _ in range(5):
        again.project()
        ranks.append(again.kept["W"])
    assert ranks == sorted(ranks, reverse=True)


def test_the_direction_is_a_sub_gradient_of_the_sum_of_singular_values() -> None:
    W = random(6, 8, seed=1)
    T, _ = pruned(W, energy=0.7)
    parameter = nn.Parameter(T.clone())
    pruning = RankPruning({"W": Weight(parameter)}, energy=1.0, nuclear=1.0)
    pruning.project()
    pruning.add_gradients()
    G = parameter.grad
    assert torch.linalg.matrix_norm(G, 2) <= 1 + 1e-12
    torch.testing.assert_close((G * T).sum(), torch.linalg.svdvals(T).sum())
    for seed in range(200):
        for size in (1e-3, 1.0):
            change = size * random(6, 8, seed=seed)
            least = torch.linalg.svdvals(T).sum() + (G * change).sum()
            assert torch.linalg.svdvals(T + change).sum() >= least - 1e-9


def test_the_direction_is_added_once_to_the_gradient_that_is_there() -> None:
    for before in (None, random(6, 8, seed=3)):
        parameter = nn.Parameter(random(6, 8))
        pruning = RankPruning({"W": Weight(parameter)}, energy=0.5, nuclear=0.2)
        parameter.grad = None if before is None else before.clone()
        pruning.project()
        U, _, Vh = torch.linalg.svd(parameter.detach(), full_matrices=False)
        k = pruning.kept["W"]
        pruning.add_gradients()
        pruning.add_gradients()
        torch.testing.assert_close(parameter.grad, 0.2 * U[:, :k] @ Vh[:k] + (0 if before is None else before))


def test_a_bound_holds_even_if_the_energy_falls_short() -> None:
    assert pruned(random(7, 9), energy=0.99, most=2)[1].kept == {"W": 2}
    assert pruned(random(7, 9), energy=0.01, most=2)[1].kept == {"W": 1}


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_what_cannot_be_decomposed_stays_as_it_is(value: float) -> None:
    W = torch.full((3, 4), value)
    T, pruning = pruned(W, energy=0.9, nuclear=1.0)
    pruning.add_gradients()
    pruning.finish()
    assert torch.equal(T.nan_to_num(7), W.nan_to_num(7))
    assert pruning.kept == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_kernel_goes_to_a_matrix_and_back(scheme: str) -> None:
    kernel = random(4, 3, 2, 5)
    matrix = as_matrix(kernel, scheme)
    assert matrix.shape == {"channel": (4, 3 * 2 * 5), "spatial": (3 * 2, 4 * 5)}[scheme]
    for n in range(4):
        for c in range(3):
            for i in range(2):
                for j in range(5):
                    place = (n, (c * 2 + i) * 5 + j) if scheme == "channel" else (c * 2 + i, n * 5 + j)
                    assert matrix[place] == kernel[n, c, i, j]
    assert torch.equal(as_weight(matrix, kernel.shape, scheme), kernel)
    assert torch.equal(
        as_weight(as_matrix(kernel[..., 0, 0], scheme), kernel[..., 0, 0].shape, scheme), kernel[..., 0, 0]
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_linear_layer_of_low_rank_becomes_two(rank: int, bias: bool) -> None:
    layer = nn.Linear(9, 7, bias=bias)
    pruning = RankPruning({"W": Weight(layer.weight)}, energy=1.0, most=rank)
    pruning.finish()
    small = factorised(layer, pruning.kept["W"])
    x = torch.randn(5, 9)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) == rank * (9 + 7) + 7 * bias


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "settings",
    [{}, {"stride": 2, "padding": 1}, {"stride": (1, 3), "padding": (0, 2), "dilation": (2, 1)}, {"bias": False}],
    ids=["plain", "stride", "axes", "no-bias"],
)
def test_a_convolution_of_low_rank_becomes_two(scheme: str, settings: dict[str, Any]) -> None:
    layer = nn.Conv2d(3, 6, (3, 2), **settings)
    pruning = RankPruning({"W": Weight(layer.weight, scheme)}, energy=1.0, most=4)
    pruning.project()
    small = factorised(layer, 4, scheme)
    x = torch.randn(2, 3, 11, 12)
    torch.testing.assert_close(small(x), layer(x), rtol=1e-5, atol=1e-5)
    rows, columns = as_matrix(layer.weight, scheme).shape
    assert sum(p.numel() for name, p in small.named_parameters() if "bias" not in name) == 4 * (rows + columns)


def test_factorising_leaves_the_global_generator_alone() -> None:
    layer = nn.Conv2d(3, 6, 3)
    state = torch.get_rng_state()
    factorised(layer, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"groups": 3},
            "a convolution of 3 groups with padding .0, 0. of zeros cannot be factorised; it must have one",
        ),
        ({"padding": "same"}, "a convolution of 1 groups with padding 'same' of zeros cannot be factorised"),
        ({"padding": 1, "padding_mode": "reflect"}, "with padding .1, 1. of reflect cannot be factorised"),
    ],
    ids=["groups", "same", "reflect"],
)
def test_other_convolutions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraSqueezeError, match=message):
        factorised(nn.Conv2d(3, 6, 3, **settings), 2)


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(LoraSqueezeError, match="scheme must be one of channel, spatial, got 'network'"):
        Weight(nn.Parameter(random(2, 3)), "network")
