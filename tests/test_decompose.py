"""The four decompositions against the dense float64 SVD."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from factor_cases import ABSOLUTE, EXACT, SPECTRA, Reference, factors, quick, spectrum, update, updates
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lora_squeeze import decompose as module
from lora_squeeze.decompose import METHODS, decompose, decompose_all
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank

# Largest error of dW_k, relative to |dW|: the projections run in float32 unless the factors are float64.
ROUNDING = {torch.float64: 1e-9}


@quick
@given(updates(), st.sampled_from(EXACT))
def test_exact_methods_find_the_singular_values_of_the_dense_matrix(update: LowRank, method: str) -> None:
    """To 1e-6 each, down to 1e-6 of the largest; below that they may not exceed it."""
    reference = Reference.of(update)
    S = update.singular_values(method) / reference.unit
    n = min(update.rank, *update.shape[-2:])
    expected = reference.S[..., :n] * (update.scale != 0)
    assert S.shape == expected.shape and S.dtype == torch.float64
    assert (S[..., :-1] >= S[..., 1:]).all()
    small = 1e-6 * expected[..., :1]
    off = torch.where(expected > small, (S - expected).abs() - ABSOLUTE, 0) / expected.clamp_min(ABSOLUTE)
    assert off.max() < 1e-6, f"{method}: relative error {off.max():.2e}"
    assert (S <= torch.maximum(expected * (1 + 1e-6), 1.01 * small) + ABSOLUTE).all()


@quick
@given(updates(), st.sampled_from(EXACT), st.integers(1, 24))
def test_exact_methods_reach_the_least_possible_error(update: LowRank, method: str, rank: int) -> None:
    """Eckart-Young: no matrix of rank k is nearer than the root of the sum of the discarded squares."""
    reference = Reference.of(update)
    rank = min(rank, update.rank, *update.shape[-2:])
    dtype = torch.float64 if update.dtype == torch.float64 else torch.float32
    result = update.truncate(rank, method, dtype=dtype)
    scale = update.scale != 0
    least = reference.tail(rank) * scale
    error = reference.error(result) if scale else (result.B.double() @ result.A.double()).norm(dim=(-2, -1))
    room = ROUNDING.get(update.dtype, 2e-6) * reference.tail(0) + ABSOLUTE
    assert result.rank == rank
    assert (error <= least + room).all(), f"{method}: {error} above {least}"
    assert (error >= least * (1 - 1e-6) - room).all()


@quick
@given(updates(), st.sampled_from(METHODS), st.integers(1, 24))
def test_factors_are_balanced(update: LowRank, method: str, rank: int) -> None:
    """B'^T B' = A' A'^T = diag(S) / s', but for the rows of A' that stand for a zero singular value."""
    rank = min(rank, update.rank, *update.shape[-2:])
    found = update.decompose(method, rank=rank)
    dtype = torch.float64 if update.dtype == torch.float64 else torch.float32
    scale = abs(update.scale) or 1.0
    B, A = (t.double() for t in found.factors(rank, scale, dtype))
    unit = Reference.of(update).unit / scale
    expected = torch.diag_embed(found.S[..., :rank] / scale / unit)
    live = torch.diagonal(expected, dim1=-2, dim2=-1) > 1e-6 * expected.amax((-2, -1)).unsqueeze(-1)
    off_B = B.mT @ (B / unit) - expected
    off_A = torch.where(live.unsqueeze(-1) & live.unsqueeze(-2), A @ (A.mT / unit) - expected, 0)
    room = (1e-8 if dtype == torch.float64 else 1e-5) * expected.amax((-2, -1), keepdim=True)
    # In float32 the Gram path loses directions that far below the largest: they are checked by the error above.
    assert (off_B.abs() <= room + 1e-9).all(), f"{method}: {off_B.abs().max():.1e}"
    assert (off_A.abs() <= room + 1e-9).all(), f"{method}: {off_A.abs().max():.1e}"
    assert B.is_contiguous() and A.is_contiguous() and B.isfinite().all() and A.isfinite().all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("kind", "bound"), [("decaying", 1e-4), ("flat", 0.02)])
def test_rsvd_stays_within_its_bounds(kind: str, bound: float, seed: int) -> None:
    """Excess of the error over the optimum at half the rank; all of the energy is accounted for."""
    given, rank = update(160, 120, 64, kind, scale=0.5, seed=seed), 32
    found = given.decompose("rsvd", rank=rank, seed=seed)
    error = Reference.of(given).error(LowRank(*found.factors(rank, 1.0, torch.float64)))
    excess = error / Reference.of(given).tail(rank) - 1
    assert -1e-12 < excess <= bound, f"excess {excess:.2e}"
    assert found.S.shape == (rank,)
    assert float(found.total) == pytest.approx(float(given.dense().square().sum()), rel=1e-12)


def test_rsvd_is_exact_where_the_sketch_spans_everything() -> None:
    given = update(30, 20, 16, "flat")
    assert given.truncate(8, "rsvd").distance(given) == pytest.approx(8**0.5, rel=1e-12)


@contextmanager
def qr_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many items of a batch each call of the QR path has."""
    calls: list[int] = []
    qr = module._qr

    def counted(B: Tensor, A: Tensor) -> Any:
        calls.append(len(B))
        return qr(B, A)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_qr", counted)
        yield calls


@pytest.mark.parametrize("condition", [1e5, 1e8])
def test_gram_hands_ill_conditioned_items_to_qr(monkeypatch: pytest.MonkeyPatch, condition: float) -> None:
    """Squaring a condition number of 1e8 would lose every digit: those items alone are redone."""
    good, bad = factors(30, 20, 8, "steps"), factors(30, 20, 8, "steps", condition=condition)
    B, A = (torch.stack(pair) for pair in zip(good, bad, good, strict=True))
    with qr_calls(monkeypatch) as calls:
        S = decompose(B, A).S
    assert calls == [1]
    assert (S / torch.linalg.svdvals(B @ A)[..., :8] - 1).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gram_needs_no_qr_for_factors_as_training_leaves_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    B, A = (t.to(dtype) for t in factors(64, 48, 16, "steps", condition=100.0))
    with qr_calls(monkeypatch) as calls:
        decompose(B, A)
    assert calls == []


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("side", ["B", "A"])
def test_a_steep_spectrum_in_one_factor_loses_nothing(method: str, side: str) -> None:
    """The other factor is orthonormal: squared, the smallest of these singular values are rounding noise."""
    B, A = factors(40, 30, 16, "flat", condition=1.0)
    S = spectrum("decaying", 16)
    steep = torch.linalg.svd(A, full_matrices=False).U * S @ torch.linalg.svd(A, full_matrices=False).Vh
    pair = (B, steep) if side == "A" else (steep.T, B.T)
    assert (decompose(*pair, method=method).S / S - 1).abs().max() < 1e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("method", EXACT)
def test_factors_that_cancel_each_other_lose_nothing(method: str) -> None:
    """B and A a thousand times larger than their product: projections in float32 would show it."""
    given = LowRank(*(t.float() for t in factors(40, 30, 6, "steps", condition=3e3)))
    reference = Reference.of(given)
    best = reference.U[:, :2] * reference.S[:2] @ reference.Vh[:2]
    B, A = given.decompose(method).factors(2, given.scale, torch.float64)
    error = (B @ A / reference.unit - best).norm() / reference.S[0]
    assert error < 3e-6, f"{method}: {error:.1e}"


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("size", [(40, 30, 6), (40, 30, 1), (64, 48, 24)])
def test_equal_updates_cancel_to_nothing(method: str, size: tuple[int, int, int]) -> None:
    """Whatever order and scale their directions have."""
    B, A = factors(*size, "steps")
    order = torch.randperm(B.shape[1], generator=torch.Generator().manual_seed(3))
    found = LowRank(torch.cat([B, -2 * B[:, order]], 1), torch.cat([A, A[order] / 2]), 1.5).decompose(method)
    assert not found.S.any() and not found.total.any(), found.S.max()
    changed = B.clone()
    changed[0, 0] += 1e-6 * B.abs().max()
    S = LowRank(torch.cat([changed, -B], 1), torch.cat([A, A])).decompose(method).S
    assert int((S > 0).sum()) == 1, S


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", ["B", "A"])
def test_nan_and_infinity_are_refused(method: str, value: float, side: str) -> None:
    B, A = (t.clone() for t in factors(12, 10, 4))
    (B if side == "B" else A)[1, 2] = value
    with pytest.raises(LoraSqueezeError, match=rf"factor {side} holds NaN or infinity.*use an earlier checkpoint"):
        decompose(B, A, method=method)  # type: ignore[arg-type]


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    B, A = factors(12, 10, 4)
    for seed in (-(2**63), 2**64 - 1):
        decompose(B, A, method="rsvd", rank=2, seed=seed)
    for seed in (-(2**63) - 1, 2**64):
        with pytest.raises(LoraSqueezeError, match=f"seed must be a whole number of at most 64 bits, got {seed}"):
            decompose(B, A, method="rsvd", rank=2, seed=seed)


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    B, A = factors(4, 4, 2)
    with pytest.raises(LoraSqueezeError, match=r"unknown method 'svd': choose one of gram, qr, rsvd, dense"):
        decompose_all.__wrapped__([(B, A)], "svd")  # type: ignore[attr-defined]  # past the type checker


@pytest.mark.parametrize("method", METHODS)
def test_the_global_generator_is_not_touched_and_results_repeat_bitwise(method: str) -> None:
    given = update(40, 30, 24, "flat")
    before = torch.get_rng_state()
    first = given.truncate(5, method)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    second = given.truncate(5, method)
    assert torch.equal(first.B, second.B) and torch.equal(first.A, second.A)
    other = given.truncate(5, method, seed=1)
    assert torch.equal(first.B, other.B) == (method != "rsvd")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SPECTRA)
def test_many_updates_at_once_equal_one_by_one(method: str, kind: str) -> None:
    """Several shapes, dtypes, batches and ranks mixed, in order; one so ill-conditioned that gram hands it on."""
    shapes = [(20, 14, 6), (9, 14, 6), (20, 14, 6), (20, 14, 5), (3, 2, 7), (20, 14, 6)]
    dtypes = [torch.float64] * 5 + [torch.float32]
    conditions = [3.0, 3.0, 1e10, 3.0, 3.0, 3.0]
    given = [
        tuple(t.to(dtype) for t in factors(*shape, kind, condition=condition, seed=i))
        for i, (shape, dtype, condition) in enumerate(zip(shapes, dtypes, conditions, strict=True))
    ]
    given[1] = tuple(torch.stack([t, 2 * t]) for t in given[1])
    ranks = [3, 3, 3, 2, 2, 4]
    together = decompose_all(given, method, ranks=ranks, seed=3)  # type: ignore[arg-type]
    for pair, all_, rank in zip(given, together, ranks, strict=True):
        alone = decompose(*pair, method=method, rank=rank, seed=3)  # type: ignore[misc]
        assert all_.S.shape == alone.S.shape
        assert (all_.S - alone.S).abs().max() < 1e-9
        assert torch.allclose(all_.total, alone.total, rtol=1e-9)
        products = [B.double() @ A.double() for B, A in (d.factors(1, 1.0, pair[0].dtype) for d in (all_, alone))]
        if kind == "decaying":  # where the leading direction is unique
            assert (products[0] - products[1]).abs().max() < 1e-6


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("method", ["gram", "qr", "rsvd"])
def test_no_out_by_in_matrix_is_formed(method: str) -> None:
    """50,000 x 50,000 at rank 64: dW would have 2.5e9 numbers; no tensor exceeds the factors and the sketch."""
    size, rank = 50_000, 64
    g = torch.Generator().manual_seed(0)
    given = LowRank(torch.randn(size, rank, generator=g), torch.randn(rank, size, generator=g))
    with LargestTensor() as largest:
        given.truncate(16, method)
    assert 0 < largest.numel <= size * (rank + module.OVERSAMPLING), largest.numel


@pytest.mark.parametrize("method", EXACT)
def test_the_decomposition_is_that_of_the_scaled_update(method: str) -> None:
    """U diag(S) Vh equals scale * B @ A also where the scale is negative."""
    B, A = factors(9, 7, 4)
    for scale in (3.0, -0.5):
        found = decompose(B, A, scale, method)
        U, Vh = found.X @ found.left, found.right @ found.Y
        assert (U * found.S @ Vh - scale * (B @ A)).abs().max() < 1e-9
        assert (found.S - abs(scale) * spectrum("decaying", 4)).abs().max() < 1e-9
        assert (found.scaled(2.0).S - 2 * found.S).abs().max() == 0
