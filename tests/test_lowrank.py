"""LowRank: truncation and the algebra of updates, against dense float64 matrices."""

import math
from dataclasses import replace

import pytest
import torch
from factor_cases import ABSOLUTE, EXACT, Reference, factors, quick, update, updates
from hypothesis import given
from hypothesis import strategies as st

from lora_squeeze.decompose import METHODS
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def dense(update: LowRank) -> torch.Tensor:
    return update.scale * (update.B.double() @ update.A.double())


def unchecked(B: torch.Tensor, A: torch.Tensor, scale: float = 1.0) -> LowRank:
    """A LowRank as users make it: here in the tests a type checker would look at the shapes before the class does."""
    update = object.__new__(LowRank)
    for name, value in (("B", B), ("A", A), ("scale", scale)):
        object.__setattr__(update, name, value)
    update.__post_init__()
    return update


def apart(left: LowRank, right: LowRank) -> float:
    """Frobenius distance relative to the first update, by dense matrices."""
    return float((dense(left) - dense(right)).norm() / dense(left).norm())


@pytest.mark.parametrize("method", EXACT)
def test_truncating_twice_equals_truncating_once(method: str) -> None:
    given = update(24, 18, 12, scale=-1.5)
    assert apart(given.truncate(3, method), given.truncate(9, method).truncate(3, method)) < 1e-9


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9])
def test_the_result_does_not_depend_on_how_the_update_is_factored(method: str, condition: float) -> None:
    """(B G, G^-1 A) is the same update."""
    plain, mixed = (LowRank(*factors(24, 18, 12, condition=c)) for c in (1.0, condition))
    room = 1e-15 * condition + 1e-9
    assert apart(plain, mixed) < room
    assert apart(plain.truncate(4, method), mixed.truncate(4, method)) < 10 * room


@quick
@given(updates(), st.integers(0, 40))
def test_a_rank_that_takes_nothing_away_gives_the_update_back(update: LowRank, more: int) -> None:
    """The very factors where there is nothing to do."""
    result = update.truncate(update.rank + more)
    if update.scale > 0:
        assert result.B is update.B and result.A is update.A
    assert result.rank == update.rank
    assert result.dtype == update.dtype and result.device == update.device and result.scale > 0
    if update.dtype == torch.float64 and update.scale:
        reference = Reference.of(update)
        assert (reference.error(result) <= 1e-9 * reference.tail(0) + ABSOLUTE).all()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("method", METHODS)
def test_dtype_and_scale_are_kept_or_chosen(dtype: torch.dtype, method: str) -> None:
    given = update(12, 10, 8, "steps", scale=0.25).to(dtype)
    kept = given.truncate(3, method)
    assert (kept.dtype, kept.B.dtype, kept.A.dtype, kept.scale) == (dtype, dtype, dtype, 0.25)
    chosen = given.truncate(3, method, scale=2.0, dtype=torch.float32)
    assert (chosen.dtype, chosen.scale) == (torch.float32, 2.0)
    assert apart(kept, chosen) < 4 * torch.finfo(dtype).eps + 1e-6
    whole = given.truncate(8, method, scale=2.0, dtype=torch.float32)
    assert (whole.dtype, whole.scale) == (torch.float32, 2.0)


@pytest.mark.parametrize("scale", [-2.0, 0.0])
def test_a_scale_that_is_not_positive_becomes_one(scale: float) -> None:
    given = update(12, 10, 8, scale=scale)
    for rank in (3, 8):
        result = given.truncate(rank)
        assert result.scale == 1.0
        assert (dense(result) - dense(given)).norm() <= abs(scale) * Reference.of(given).tail(rank) + 1e-9


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("zero", ["B", "A", "both", "scale"])
def test_a_zero_update_stays_zero_and_can_learn(method: str, zero: str) -> None:
    """B' = 0 and A' != 0, as in a fresh LoRA: then the gradient of B' is not zero."""
    B, A = (t.float() for t in factors(12, 10, 6))
    B, A = (t * (zero not in (side, "both")) for t, side in ((B, "B"), (A, "A")))
    result = LowRank(B, A, 0.0 if zero == "scale" else 2.0).truncate(4, method)
    assert (result.B == 0).all() and result.A.isfinite().all()
    new_B = result.B.requires_grad_()
    (result.scale * new_B @ result.A).sum().backward()
    assert (result.A.norm(dim=1) > 0).all()
    assert new_B.grad is not None and (new_B.grad.norm(dim=0) > 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_directions_without_energy_are_revived(method: str) -> None:
    """A rank-3 update at rank 6: three columns of B' are zero, their rows of A' as long as the others are."""
    B, A = factors(12, 10, 3, "steps")
    given = LowRank(torch.cat([B, B, B], -1), torch.cat([A, A, A], -2), 1.5)
    result = given.truncate(6, method)
    assert apart(given, result) < 1e-9
    lengths = result.A.norm(dim=1)
    assert (result.B[:, 3:] == 0).all() and (result.B[:, :3].norm(dim=0) > 0).all()
    assert torch.allclose(lengths[3:], lengths[:3].median().expand(3), rtol=1e-9)
    rows = result.A / lengths[:, None]
    assert (rows @ rows.T - torch.eye(6)).abs().max() < 1e-6, "the revived rows are directions of their own"


def test_batches_are_truncated_item_by_item() -> None:
    pairs = [factors(9, 11, 5, kind, seed=i) for i, kind in enumerate(["steps", "decaying", "zero", "duplicates"])]
    B, A = (torch.stack(t).reshape(2, 2, *t[0].shape) for t in zip(*pairs, strict=True))
    result = LowRank(B, A).truncate(2)
    assert result.shape == (2, 2, 9, 11) and result.rank == 2
    for i, pair in enumerate(pairs):
        alone = LowRank(*pair).truncate(2)
        item = LowRank(result.B[i // 2, i % 2], result.A[i // 2, i % 2])
        assert (dense(alone) - dense(item)).norm() < 1e-9


@pytest.mark.parametrize("scales", [(0.5, 0.5), (2.0, -3.0), (0.0, 1.0), (1.0, 0.0)])
def test_sums_differences_and_multiples_are_exact(scales: tuple[float, float]) -> None:
    x, y = (update(8, 6, r, scale=s, seed=i) for i, (r, s) in enumerate(zip((3, 4), scales, strict=True)))
    for result, expected in (
        (x + y, dense(x) + dense(y)),
        (x - y, dense(x) - dense(y)),
        (-x, -dense(x)),
        (x * 3.0, 3 * dense(x)),
        (-0.5 * x, -0.5 * dense(x)),
    ):
        assert (dense(result) - expected).abs().max() < 1e-14
    assert (x + y).rank == x.rank + y.rank
    assert ((x + y).truncate(6).distance(x + y)) < 1e-9


def test_a_sum_has_the_wider_dtype() -> None:
    narrow, wide = update(8, 6, 2, "steps").to(torch.bfloat16), update(8, 6, 2, "steps", seed=1)
    assert (narrow + wide).dtype == torch.float64
    assert (dense(narrow + wide) - dense(narrow) - dense(wide)).abs().max() < 1e-14


@quick
@given(updates())
def test_the_norm_is_the_frobenius_norm(update: LowRank) -> None:
    """Also where its square leaves the range of float64."""
    reference = Reference.of(update)
    expected = reference.tail(0) * reference.unit if update.scale else torch.zeros(update.shape[:-2])
    assert torch.allclose(update.norm(), expected.double(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_distance_is_that_of_the_stored_factors(dtype: torch.dtype) -> None:
    """Also between updates of different scales, whose factors a sum in their dtype would round."""
    x = update(20, 16, 6, "steps", scale=0.3).to(dtype)
    y = LowRank(x.B, x.A, 0.7)
    assert float(x.distance(y)) == pytest.approx(0.4 / 0.3 * float(x.norm()), rel=1e-12)
    assert float(x.distance(x)) < 1e-14 * float(x.norm())


@pytest.mark.parametrize("batch", [(), (3,)])
def test_rank_up_keeps_the_update_and_the_new_directions_learn(batch: tuple[int, ...]) -> None:
    B, A = (t.float().expand(*batch, *t.shape) for t in factors(12, 10, 3))
    given = LowRank(B, A, 0.5)
    state = torch.get_rng_state()
    more = given.rank_up(7, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert more.rank == 7 and torch.equal(more.B[..., :3], B) and torch.equal(more.A[..., :3, :], A)
    assert (more.dense() - given.dense()).abs().max() <= 1e-6 * given.dense().abs().max()
    assert more.A[..., 3:, :].abs().max() <= 1 / math.sqrt(10), "Kaiming-uniform as in LoRA: at most 1 / sqrt(in)"
    new_B = more.B.clone().requires_grad_()
    (new_B @ more.A).square().sum().backward()
    assert new_B.grad is not None and (new_B.grad[..., 3:].norm(dim=-2) > 0).all()
    assert torch.equal(more.A, given.rank_up(7, seed=1).A) and not torch.equal(more.A, given.rank_up(7, seed=2).A)
    same = given.rank_up(3)
    assert torch.equal(same.B, B) and torch.equal(same.A, A)
    assert float((more.truncate(3).distance(given)).max()) < 1e-6
    with pytest.raises(LoraSqueezeError, match=r"rank_up to 2: the update already has rank 3; use truncate"):
        given.rank_up(2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_with_scale_moves_the_scale_into_B(dtype: torch.dtype) -> None:
    given = update(8, 6, 3, "steps", scale=-0.3).to(dtype)
    assert apart(given, given.with_scale(2.0)) <= torch.finfo(dtype).eps
    assert given.with_scale(2.0).A is given.A and given.with_scale(-0.3) is given
    assert given.with_scale(2.0).dtype == dtype


@pytest.mark.parametrize("source", [torch.float16, torch.float32], ids=str)
def test_a_small_scale_in_float16_costs_no_digits(source: torch.dtype) -> None:
    """B times 1 / 128 would be below the numbers that float16 has with all digits."""
    g = torch.Generator().manual_seed(3)
    B, A = torch.randn(48, 16, generator=g) * 3e-4, torch.randn(16, 40, generator=g) / 28
    given = LowRank(B.to(source), A.to(source), 1 / 128)
    written = given.with_scale(1.0, torch.float16)
    assert apart(given, written) <= 2 * torch.finfo(torch.float16).eps
    power = given.A.float().abs().max() / written.A.float().abs().max()
    assert float(power.log2()) == pytest.approx(round(float(power.log2())), abs=1e-3)
    for zero in (replace(given, B=given.B * 0), replace(given, scale=0.0)):
        assert torch.equal(zero.with_scale(1.0, torch.float16).A, given.A.half())


def test_dense_is_the_matrix() -> None:
    given = update(8, 6, 3, scale=-0.3)
    assert torch.allclose(given.dense(), dense(given), rtol=1e-14)
    half = given.to(torch.float16)
    assert half.dense().dtype == torch.float32
    assert torch.allclose(half.dense().double(), dense(half), atol=1e-6)
    assert given.to("cpu").shape == given.shape == (8, 6)


@pytest.mark.parametrize(
    ("B", "A", "text"),
    [
        ((4, 2), (3, 5), r"factors do not fit: B is \(4, 2\), A is \(3, 5\)"),
        ((2, 4, 2), (3, 2, 5), r"factors do not fit: B is \(2, 4, 2\), A is \(3, 2, 5\)"),
        ((4, 0), (0, 5), r"a factor is empty: B is \(4, 0\), A is \(0, 5\)"),
        ((0, 2), (2, 5), r"a factor is empty: B is \(0, 2\)"),
        ((2,), (2, 5), r"factors do not fit: B is \(2,\), A is \(2, 5\)"),
    ],
)
def test_factors_that_do_not_fit_are_refused(B: tuple[int, ...], A: tuple[int, ...], text: str) -> None:
    with pytest.raises(LoraSqueezeError, match=text):
        unchecked(torch.ones(B), torch.ones(A))


def test_other_requests_that_make_no_sense_are_refused() -> None:
    B, A = torch.ones(4, 2), torch.ones(2, 3)
    with pytest.raises(LoraSqueezeError, match=r"one float dtype.*B is torch.float32 on cpu, A is torch.float16"):
        unchecked(B, A.half())
    with pytest.raises(LoraSqueezeError, match=r"one float dtype.*B is torch.int64"):
        unchecked(B.long(), A.long())
    with pytest.raises(LoraSqueezeError, match=r"scale must be a finite number, got nan"):
        unchecked(B, A, math.nan)
    with pytest.raises(LoraSqueezeError, match=r"rank must be at least 1, got 0"):
        LowRank(B, A).truncate(0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(LoraSqueezeError, match=rf"scale must be a positive number, got {scale}"):
            LowRank(B, A).truncate(1, scale=scale)
        with pytest.raises(LoraSqueezeError, match=rf"scale must be a positive number, got {scale}"):
            LowRank(B, A).with_scale(scale)
    with pytest.raises(LoraSqueezeError, match=r"different shapes cannot be added: \(4, 3\) and \(4, 1\)"):
        LowRank(B, A) + LowRank(B, A[:, :1])
