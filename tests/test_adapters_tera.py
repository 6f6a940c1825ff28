"""TeRA: the Tucker network against Kronecker products and VeRA, its rank, and what layers share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import pytest
import torch
from adapters_cases import HIDDEN, IN, METHODS, adapted, batch, layers, net
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters import TeraConfig
from lora_squeeze.methods.adapters.tera import TeraDelta, split, tucker_linear, tucker_matrix

TERA = METHODS["tera"]
Network = tuple[Tensor, list[Tensor], list[Tensor]]


def network(widths: Sequence[int], sizes: Sequence[int], dtype: torch.dtype = torch.float64) -> Network:
    """Core, factors and vectors without zeros."""
    generator = torch.Generator().manual_seed(0)
    core = torch.randn(*sizes, generator=generator, dtype=dtype)
    factors = [torch.randn(w, s, generator=generator, dtype=dtype) for w, s in zip(widths, sizes, strict=True)]
    vectors = [torch.randn(s, generator=generator, dtype=dtype) for s in sizes]
    return core, factors, vectors


def by_kron(core: Tensor, factors: list[Tensor], vectors: list[Tensor], rows: int) -> Tensor:
    """K_row diag(kron d_row) G diag(kron d_col) K_col^T."""
    left, right = reduce(torch.kron, factors[:rows]), reduce(torch.kron, factors[rows:])
    d_row, d_col = reduce(torch.kron, vectors[:rows]), reduce(torch.kron, vectors[rows:])
    return left @ torch.diag(d_row) @ core.reshape(len(d_row), len(d_col)) @ torch.diag(d_col) @ right.T


def deltas(model: nn.Module) -> list[TeraDelta]:
    return [layer.deltas["default"] for layer in layers(model).values()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["32", "64"])
@pytest.mark.parametrize(
    ("widths", "sizes", "rows"),
    [
        ((2, 3, 4, 5, 2, 3), (2, 3, 4, 5, 2, 3), 3),
        ((2, 5, 3, 4, 7), (3, 2, 1, 4, 5), 2),
        ((7, 3, 2), (7, 2, 2), 1),
        ((6, 5), (4, 3), 1),
    ],
    ids=["equal", "unequal", "one-row-mode", "two-modes"],
)
def test_forward_matrix_and_kronecker_products_agree(
    widths: tuple[int, ...], sizes: tuple[int, ...], rows: int, dtype: torch.dtype, tolerance: float
) -> None:
    parts = network(widths, sizes, dtype)
    wanted = by_kron(*parts, rows)
    found = tucker_matrix(*parts, rows)
    assert found.shape == (math.prod(widths[:rows]), math.prod(widths[rows:]))
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()
    x = torch.randn(2, 3, found.shape[1], dtype=dtype, generator=torch.Generator().manual_seed(1))
    y = functional.linear(x, wanted)
    assert (tucker_linear(x, *parts, rows) - y).abs().max() <= tolerance * y.abs().max()
    assert tucker_linear(x[:, :0], *parts, rows).shape == (2, 0, found.shape[0])


def test_the_layers_are_this_network_at_their_scale() -> None:
    for delta in deltas(adapted(TERA, trained=True, alpha=3.0).double()):
        core, factors = delta.network()
        wanted = by_kron(core, factors, list(delta.d.split(delta.sizes)), delta.rows)
        wanted = wanted * 3 / math.sqrt(delta.site.in_features)
        assert torch.allclose(delta.weight(), wanted, rtol=1e-10, atol=1e-12)


def test_vera_is_the_special_case_of_two_modes() -> None:
    from peft import VeraConfig, get_peft_model

    config = VeraConfig(r=5, target_modules=["wide"], init_weights=False)
    model: Any = get_peft_model(net(), config).eval()
    found = 0
    for layer in layers(model).values():
        A, B = layer.vera_A["default"][:, :IN], layer.vera_B["default"][:HIDDEN]
        b, d = layer.vera_lambda_b["default"], layer.vera_lambda_d["default"]
        b.data = torch.randn(len(b), generator=torch.Generator().manual_seed(0))
        d.data = torch.randn(len(d), generator=torch.Generator().manual_seed(1))
        parts = B, [torch.eye(HIDDEN), A.T], [b, d]
        x = batch()
        wanted = layer(x) - layer.get_base_layer()(x)
        assert (tucker_linear(x, *parts, 1) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        assert torch.allclose(tucker_matrix(*parts, 1), layer.get_delta_weight("default"), atol=1e-6)
        found += 1
    assert found == 2


@pytest.mark.parametrize(
    ("widths", "sizes"),
    [
        ((4, 4, 4, 4, 4, 4), (4, 4, 4, 4, 4, 4)),
        ((4, 4, 4, 4, 4, 4), (2, 4, 4, 4, 4, 4)),
        ((4, 4, 4, 4, 4, 4), (4, 4, 4, 2, 2, 2)),
        ((3, 4, 2, 3), (3, 4, 5, 5)),
    ],
    ids=["full", "half-rows", "small-columns", "larger-core"],
)
def test_the_rank_is_that_of_the_smaller_side_of_the_core(widths: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    rows = len(widths) // 2
    parts = network(widths, sizes)
    sides = [math.prod(numbers) for numbers in (sizes[:rows], sizes[rows:], widths[:rows], widths[rows:])]
    assert torch.linalg.matrix_rank(tucker_matrix(*parts, rows)) == min(sides)


def test_a_zero_in_a_vector_takes_its_share_of_the_rank() -> None:
    core, factors, vectors = network((4, 4, 4, 4), (4, 4, 4, 4))
    vectors[1][2] = 0
    assert torch.linalg.matrix_rank(tucker_matrix(core, factors, vectors, 2)) == 16 - 16 // 4


@pytest.mark.parametrize("r", [1, 2, 3])
def test_r_bounds_the_core_and_with_it_the_rank(r: int) -> None:
    for layer in layers(adapted(TERA, r=r, init_weights=False).double()).values():
        delta = layer.deltas["default"]
        assert max(delta.sizes) <= r
        bound = min(math.prod(min(mode, r) for mode in split(width, 3)) for width in (IN, HIDDEN))
        assert (delta.rank or min(IN, HIDDEN)) == bound
        assert torch.linalg.matrix_rank(delta.weight(), rtol=1e-10) == bound
        assert delta.d.numel() == sum(min(mode, r) for width in (IN, HIDDEN) for mode in split(width, 3))


def test_it_is_linear_in_each_vector() -> None:
    core, factors, vectors = network((2, 3, 4, 5), (3, 2, 4, 2))
    whole = tucker_matrix(core, factors, vectors, 2)
    generator = torch.Generator().manual_seed(5)
    for n, vector in enumerate(vectors):
        other = torch.randn(vector.shape, generator=generator, dtype=vector.dtype)

        def with_one(d: Tensor, n: int = n) -> Tensor:
            return tucker_matrix(core, factors, [*vectors[:n], d, *vectors[n + 1 :]], 2)

        assert torch.allclose(with_one(-1.5 * vector), -1.5 * whole)
        assert torch.allclose(with_one(vector + other), whole + with_one(other))


def test_at_the_start_one_vector_has_a_gradient_and_after_a_step_all_have() -> None:
    model = adapted(TERA).train()
    target = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(3))

    def gradients() -> list[list[bool]]:
        model.zero_grad()
        functional.mse_loss(model(batch()), target).backward()
        parts = [delta.d.grad.split(delta.sizes) for delta in deltas(model) if delta.d.grad is not None]
        return [[bool(part.abs().min() > 0) for part in vectors] for vectors in parts]

    for found, delta in zip(gradients(), deltas(model), strict=True):
        first, *others = delta.d.split(delta.sizes)
        assert not first.any()
        assert all(torch.equal(vector, torch.ones_like(vector)) for vector in others)
        assert found == [True] + [False] * (len(delta.sizes) - 1)
        assert all(not part.any() for part in delta.d.grad.split(delta.sizes)[1:])  # type: ignore[union-attr]
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(all(found) for found in gradients())


def test_layers_of_a_shape_have_core_and_factors_in_common() -> None:
    model = adapted(TERA)
    model.add_adapter("other", TERA.config(seed=1))
    first, second, third = (layers(model)[f"base_model.model.blocks.{n}"] for n in ("0.wide", "1.wide", "0.tall"))

    def tensors(layer: Any, adapter: str = "default") -> list[Tensor]:
        core, factors = layer.deltas[adapter].network()
        return [core, *factors]

    for one, other in zip(tensors(first), tensors(second), strict=True):
        assert one.data_ptr() == other.data_ptr()
    assert {t.data_ptr() for t in tensors(first)}.isdisjoint(t.data_ptr() for t in tensors(third))
    assert not any(torch.equal(a, b) for a, b in zip(tensors(first), tensors(first, "other"), strict=True))
    assert not list(model.buffers())


def test_with_ones_the_network_has_unit_gain() -> None:
    """In the mean: of one draw the spread is large, since the factors multiply."""
    gains = []
    for seed in range(20):
        with torch.no_grad():
            model = adapted(TERA, nn.Sequential(nn.Linear(64, 27)), target_modules=["0"], seed=seed)
            (delta,) = deltas(model)
            delta.d.fill_(1)
            gains.append(delta.weight().square().sum() / 27)
    assert 0.7 < torch.stack(gains).mean() < 1.4


@pytest.mark.parametrize(
    "width", [384, 576, 768, 1536, 4096, 12, 20, 14, 7, 1], ids=str
)  # fmt: skip
def test_a_width_is_split_as_evenly_as_it_can_be(width: int) -> None:
    def products(count: int) -> list[tuple[int, ...]]:
        if count == 1:
            return [(width,)]
        divisors = [n for n in range(2, width) if width % n == 0]
        if count == 2:
            return [(a, width // a) for a in divisors]
        return [(a, b, width // a // b) for a in divisors for b in divisors if width % (a * b) == 0 and a * b < width]

    found = split(width, 3)
    possible = next(p for p in (products(3), products(2), products(1)) if p)
    assert math.prod(found) == width
    assert list(found) == sorted(found)
    assert sum(found) == min(map(sum, possible))
    assert len(found) == len(possible[0])


def test_more_modes_train_fewer_numbers() -> None:
    counts = []
    for modes in (1, 2, 3):
        (delta,) = deltas(adapted(TERA, nn.Sequential(nn.Linear(64, 48)), target_modules=["0"], modes=modes, r=48))
        counts.append(delta.d.numel())
    assert counts[0] > counts[1] > counts[2]


def test_a_side_that_does_not_split_is_refused() -> None:
    base = nn.Sequential(nn.Linear(12, 31))
    wanted = (
        f"0: a side of 31 that does not split needs a factor of 31 x 31, more than the {12 * 31} numbers of the "
        "weight; bound it with r or leave the layer out of target_modules"
    )
    with pytest.raises(ValueError, match=f"^{wanted}$"):
        adapted(TERA, base, target_modules=["0"])
    assert deltas(adapted(TERA, base, target_modules=["0"], r=12))


def test_in_a_diagonal_core_two_vectors_are_one() -> None:
    """Only their product counts; the random core is what tells them apart."""
    core, factors, (d, e) = network((6, 7), (4, 4))
    for middle, same in ((torch.eye(4, dtype=core.dtype), True), (core, False)):
        swapped = tucker_matrix(middle, factors, [e, d], 1)
        assert torch.allclose(swapped, tucker_matrix(middle, factors, [d, e], 1)) == same


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="modes must be a whole number from 1, got 0"):
        TeraConfig(modes=0)
    with pytest.raises(ValueError, match="r must be a whole number from 1, got 0"):
        TeraConfig(r=0)


def test_rank_is_no_capacity() -> None:
    """A target of full rank is not fitted: as many of its directions as there are numbers, at most."""
    generator = torch.Generator().manual_seed(0)
    widths = (4, 4, 4, 4, 4, 4)
    core, factors, vectors = network(widths, widths)
    tangents = []
    for n, vector in enumerate(vectors):
        for place in range(len(vector)):
            unit = torch.zeros_like(vector).index_fill(0, torch.tensor([place]), 1)
            tangents.append(tucker_matrix(core, factors, [*vectors[:n], unit, *vectors[n + 1 :]], 3).flatten())
    Q = torch.linalg.qr(torch.stack(tangents, 1)).Q
    target = torch.randn(64 * 64, generator=generator, dtype=torch.float64)
    assert torch.linalg.matrix_rank(torch.stack(tangents)) == sum(widths) - len(widths) + 1  # scales move freely
    assert (Q.T @ target).square().sum() < 4 * sum(widths) / 64**2 * target.square().sum()
