"""Truncation in the metric of the data, against dense matrices of inputs and gradients."""

import math
from dataclasses import dataclass

import pytest
import torch
from factor_cases import factors, orthonormal, quick, update
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lora_squeeze import moments as module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank
from lora_squeeze.moments import Moments, predicted_curve, predicted_increase, weighted_truncation

OUT, IN, RANK = 7, 9, 5


def covariance(n: int, seed: int, condition: float = 100.0) -> Tensor:
    """A positive definite matrix in general position."""
    Q = orthonormal(n, n, torch.Generator().manual_seed(seed))
    return Q @ torch.diag(torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)) @ Q.T


def root(matrix: Tensor, power: float = 0.5) -> Tensor:
    """Symmetric power of a positive definite matrix."""
    values, V = torch.linalg.eigh(matrix)
    return V @ torch.diag(values**power) @ V.T


def truncated(matrix: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]


@dataclass(frozen=True)
class Problem:
    """A module with dense covariances of its inputs and of its output gradients."""

    update: LowRank
    C_x: Tensor
    F_y: Tensor

    @classmethod
    def make(cls, seed: int = 0, kind: str = "decaying", scale: float = 0.7, r: int = RANK) -> "Problem":
        given = update(OUT, IN, r, kind, scale=scale, seed=seed)
        return cls(given, 3.0 * covariance(IN, seed + 1), 1e-3 * covariance(OUT, seed + 2))

    @property
    def gram(self) -> tuple[Tensor, Tensor]:
        return self.update.B.mT @ self.update.B, self.update.A @ self.update.A.mT

    @property
    def moments(self) -> Moments:
        A, B = self.update.A, self.update.B
        return Moments(A @ self.C_x @ A.mT, B.mT @ self.F_y @ B, 100.0)

    def metric(self, shrinkage: float = 0.0, two_sided: bool = True) -> tuple[Tensor, Tensor]:
        """The dense weights, shrunk towards the identity by their mean as the update sees it."""
        dW = self.update.dense()
        energy = dW.square().sum()
        C = self.C_x / ((dW @ self.C_x @ dW.T).trace() / energy)
        F = self.F_y / ((dW.T @ self.F_y @ dW).trace() / energy)
        eye_C, eye_F = torch.eye(IN, dtype=C.dtype), torch.eye(OUT, dtype=F.dtype)
        mixed = (1 - shrinkage) * F + shrinkage * eye_F if two_sided else eye_F
        return (1 - shrinkage) * C + shrinkage * eye_C, mixed

    def squeezed(self, P: Tensor, R: Tensor) -> Tensor:
        return self.update.scale * (self.update.B @ P) @ (R @ self.update.A)


@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_result_is_the_dense_solution(rank: int, shrinkage: float, two_sided: bool) -> None:
    """dW_k = F^-1/2 T_k(F^1/2 dW C^1/2) C^-1/2, and the values are the singular values of F^1/2 dW C^1/2."""
    problem = Problem.make()
    C, F = problem.metric(shrinkage, two_sided)
    inner = root(F) @ problem.update.dense() @ root(C)
    expected = root(F, -0.5) @ truncated(inner, rank) @ root(C, -0.5)
    P, R, values = weighted_truncation(problem.moments, *problem.gram, rank, shrinkage=shrinkage, two_sided=two_sided)
    assert P.shape == (RANK, rank) and R.shape == (rank, RANK)
    assert torch.allclose(problem.squeezed(P, R), expected, atol=1e-6 * float(expected.norm()))
    singular = torch.linalg.svdvals(inner)[:RANK] / problem.update.scale
    assert torch.allclose(values, singular, atol=1e-7 * float(singular[0]))


@pytest.mark.parametrize("two_sided", [True, False])
def test_no_other_matrix_of_that_rank_is_nearer_in_the_metric(two_sided: bool) -> None:
    problem = Problem.make(seed=3)
    C, F = problem.metric(two_sided=two_sided)
    dW = problem.update.dense()

    def loss(U: Tensor, V: Tensor) -> float:
        return float((root(F) @ (dW - U @ V) @ root(C)).norm())

    P, R, _ = weighted_truncation(problem.moments, *problem.gram, 2, shrinkage=0.0, two_sided=two_sided)
    U, V = problem.update.scale * problem.update.B @ P, R @ problem.update.A
    least = loss(U, V)
    generator = torch.Generator().manual_seed(0)
    for step in (1e-4, 1e-2, 1.0):
        for _ in range(50):
            dU = torch.randn(U.shape, generator=generator, dtype=U.dtype) * U.abs().mean()
            dV = torch.randn(V.shape, generator=generator, dtype=V.dtype) * V.abs().mean()
            assert loss(U + step * dU, V + step * dV) >= least * (1 - 1e-7)
    plain = problem.update.truncate(2)
    assert least < 0.99 * loss(plain.scale * plain.B, plain.A), "the data must matter in this example"


@pytest.mark.parametrize("kind", ["decaying", "steps", "flat", "duplicates", "zero"])
@pytest.mark.parametrize("rank", [1, 3, 4, 5, 8])
def test_full_shrinkage_is_the_plain_truncation(kind: str, rank: int) -> None:
    """The same dW_k, where that is unique, as balanced factors."""
    problem = Problem.make(kind=kind)
    G, H = problem.gram
    P, R, values = weighted_truncation(problem.moments, G, H, rank, shrinkage=1.0)
    plain, found = problem.update.truncate(rank), problem.squeezed(P, R)
    size = float(problem.update.dense().norm())
    if kind == "decaying":
        assert torch.allclose(found, plain.dense(), atol=1e-9 * size)
    dW = problem.update.dense()
    assert float((dW - found).norm()) == pytest.approx(float((dW - plain.dense()).norm()), abs=1e-9 * size + 1e-14)
    assert torch.allclose(values * problem.update.scale, torch.linalg.svdvals(dW)[:RANK], atol=1e-7 * size)
    if rank < RANK:
        k = int((torch.linalg.svdvals(found) > 1e-9 * size).sum())
        left, right = P.mT @ G @ P, R @ H @ R.mT
        assert torch.allclose(left[:k, :k], right[:k, :k], atol=1e-8 * size)
        assert torch.allclose(left, torch.diag(left.diag()), atol=1e-8 * size)


@pytest.mark.parametrize("shrinkage", [0.0, 0.05, 0.5])
def test_the_result_does_not_depend_on_how_the_update_is_factored(shrinkage: float) -> None:
    """A' = Q A and B' = B Q^-1 with the moments mapped: the same dW_k and the same values."""
    problem = Problem.make(seed=5)
    Q = torch.diag(torch.logspace(0, 3, RANK, dtype=torch.float64)) @ orthonormal(
        RANK, RANK, torch.Generator().manual_seed(1)
    )
    inverse = torch.linalg.inv(Q)
    other = Problem(
        LowRank(problem.update.B @ inverse, Q @ problem.update.A, problem.update.scale), problem.C_x, problem.F_y
    )
    mapped = problem.moments.mapped(inverse, Q)
    P, R, values = weighted_truncation(problem.moments, *problem.gram, 2, shrinkage=shrinkage)
    P2, R2, values2 = weighted_truncation(mapped, *other.gram, 2, shrinkage=shrinkage)
    expected = problem.squeezed(P, R)
    assert torch.allclose(other.squeezed(P2, R2), expected, atol=1e-6 * float(expected.norm()))
    assert torch.allclose(values, values2, atol=1e-6 * float(values[0]))


def test_mapped_moments_are_those_of_the_new_factors() -> None:
    problem = Problem.make()
    P, R, _ = weighted_truncation(problem.moments, *problem.gram, 3)
    small = LowRank(problem.update.B @ P, R @ problem.update.A, problem.update.scale)
    direct, mapped = Problem(small, problem.C_x, problem.F_y).moments, problem.moments.mapped(P, R)
    assert torch.allclose(mapped.C, direct.C, rtol=1e-12) and torch.allclose(mapped.F, direct.F, rtol=1e-12)
    assert mapped.rows == problem.moments.rows
    half = Moments(problem.moments.C.float(), problem.moments.F.float(), 1.0).mapped(P, R)
    assert half.C.dtype == half.F.dtype == torch.float32


def test_batch_items_are_independent() -> None:
    """Each item is squeezed as if it were alone, the impossible ones too."""
    problems = [Problem.make(seed=i, kind=kind) for i, kind in enumerate(["decaying", "zero", "duplicates", "steps"])]
    C, F, G, H = (
        torch.stack(parts) for parts in zip(*((p.moments.C, p.moments.F, *p.gram) for p in problems), strict=True)
    )
    P, R, values = weighted_truncation(Moments(C, F, 1.0), G, H, 3)
    curve = predicted_curve(Moments(C, F, 1.0), 0.7)
    increase = predicted_increase(Moments(C, F, 1.0), 0.7, P, R)
    for i, problem in enumerate(problems):
        alone_P, alone_R, alone = weighted_truncation(problem.moments, *problem.gram, 3)
        size = float(problem.update.dense().norm()) + 1e-14
        assert torch.allclose(problem.squeezed(P[i], R[i]), problem.squeezed(alone_P, alone_R), atol=1e-9 * size)
        assert torch.allclose(values[i], alone, atol=1e-9 * size)
        assert torch.allclose(curve[i], predicted_curve(problem.moments, 0.7), rtol=1e-9, atol=1e-20)
        assert float(increase[i]) == pytest.approx(
            float(predicted_increase(problem.moments, 0.7, alone_P, alone_R)), rel=1e-6, abs=1e-20
        )


@quick
@given(
    st.sampled_from(["decaying", "steps", "duplicates", "zero"]),
    st.sampled_from(["full", "one row", "zero", "stale"]),
    st.sampled_from(["full", "one row", "zero", "stale"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([0.0, 0.05, 1.0]),
    st.booleans(),
    st.integers(1, 6),
    st.integers(0, 50),
)
def test_poor_statistics_never_break_the_result(
    kind: str, C: str, F: str, dtype: torch.dtype, shrinkage: float, two_sided: bool, rank: int, seed: int
) -> None:
    """Whatever was seen, the result is finite and at most of the energy of a bounded multiple of the update."""
    problem = Problem.make(seed=seed, kind=kind)
    generator = torch.Generator().manual_seed(seed)

    def poor(matrix: Tensor, how: str) -> Tensor:
        if how == "one row":
            row = torch.randn(RANK, 1, generator=generator, dtype=torch.float64)
            return row @ row.T
        if how == "stale":  # of other factors
            return covariance(RANK, seed)
        return matrix if how == "full" else torch.zeros_like(matrix)

    moments = Moments(poor(problem.moments.C, C).to(dtype), poor(problem.moments.F, F).to(dtype), 1.0)
    P, R, values = weighted_truncation(moments, *problem.gram, rank, shrinkage=shrinkage, two_sided=two_sided)
    assert P.isfinite().all() and R.isfinite().all() and values.isfinite().all()
    assert (values[:-1] >= values[1:]).all() and (values >= 0).all()
    increase, curve = predicted_increase(moments, 0.7, P, R), predicted_curve(moments, 0.7)
    assert increase.isfinite() and increase >= 0 and curve.isfinite().all() and curve[-1] == 0
    if rank < RANK and kind != "duplicates":
        assert (R.norm(dim=-1) > 0).all(), "a row of A' that is zero with its column of B' could never learn"
    if rank >= RANK:
        assert torch.equal(P @ R, torch.eye(RANK, dtype=torch.float64)), "nothing to take away"


def test_without_statistics_the_result_is_the_plain_truncation() -> None:
    """B was zero while the data went by: the metric is the plain one, on each side by itself."""
    problem = Problem.make()
    nothing = torch.zeros(RANK, RANK, dtype=torch.float64)
    P, R, _ = weighted_truncation(Moments(nothing, nothing, 0.0), *problem.gram, 2)
    assert torch.allclose(problem.squeezed(P, R), problem.update.truncate(2).dense(), atol=1e-9)
    inputs_only = Moments(problem.moments.C, nothing, 0.0)
    P, R, _ = weighted_truncation(inputs_only, *problem.gram, 2)
    P2, R2, _ = weighted_truncation(problem.moments, *problem.gram, 2, two_sided=False)
    assert torch.allclose(P @ R, P2 @ R2, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_row_of_data_takes_its_direction_first_and_the_plain_metric_the_others(dtype: torch.dtype) -> None:
    """The output on that row is kept, and what is left of the rank goes where the rest of dW is largest."""
    problem = Problem.make(kind="flat")
    x = torch.randn(IN, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = problem.update.A @ x
    moments = Moments((h @ h.T).to(dtype), problem.moments.F.to(dtype), 1.0)
    P, R, _ = weighted_truncation(moments, *problem.gram, 3, shrinkage=0.0, two_sided=False)
    dW, kept = problem.update.dense(), problem.squeezed(P, R)
    assert torch.allclose(kept @ x, dW @ x, atol=1e-5 * float((dW @ x).norm()))
    direction = problem.update.A.mT @ torch.linalg.solve(problem.gram[1], h)
    across = dW - (dW @ direction) @ direction.T / direction.square().sum()
    assert float((dW - kept).norm()) <= float((across - truncated(across, 2)).norm()) * (1 + 1e-5)


def test_more_shrinkage_is_nearer_to_the_update_in_the_plain_metric() -> None:
    problem = Problem.make(seed=2)
    errors = []
    for shrinkage in (0.0, 0.01, 0.1, 0.5, 1.0):
        P, R, _ = weighted_truncation(problem.moments, *problem.gram, 2, shrinkage=shrinkage)
        errors.append(float((problem.update.dense() - problem.squeezed(P, R)).norm()))
    assert errors == sorted(errors, reverse=True)


def test_the_curve_is_the_increase_at_every_rank() -> None:
    problem = Problem.make()
    curve = predicted_curve(problem.moments, problem.update.scale)
    assert curve.shape == (RANK + 1,) and curve.dtype == torch.float64 and curve[-1] == 0
    assert (curve[:-1] >= curve[1:]).all()
    for rank in range(1, RANK + 1):
        P, R, _ = weighted_truncation(problem.moments, *problem.gram, rank, shrinkage=0.0)
        increase = float(predicted_increase(problem.moments, problem.update.scale, P, R))
        dense = root(problem.F_y) @ (problem.update.dense() - problem.squeezed(P, R)) @ root(problem.C_x)
        assert increase == pytest.approx(0.5 * float(dense.square().sum()), rel=1e-6, abs=1e-18)
        assert increase == pytest.approx(float(curve[rank]), rel=1e-5, abs=1e-7 * float(curve[0]))
    nothing = torch.zeros(RANK, 1, dtype=torch.float64)
    assert float(curve[0]) == pytest.approx(
        float(predicted_increase(problem.moments, problem.update.scale, nothing, nothing.T))
    )


def test_the_prediction_is_the_increase_of_a_quadratic_loss() -> None:
    """Independent inputs and gradients, B A at the minimum: there the estimate is the mean over pairs of both."""
    problem = Problem.make()
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(30, IN, generator=generator, dtype=torch.float64)
    gs = torch.randn(20, OUT, generator=generator, dtype=torch.float64)
    A, B = problem.update.A, problem.update.B
    moments = Moments((xs @ A.T).T @ (xs @ A.T) / len(xs), (gs @ B).T @ (gs @ B) / len(gs), 30.0)
    P, R, _ = weighted_truncation(moments, *problem.gram, 2)
    change = problem.update.dense() - problem.squeezed(P, R)
    losses = 0.5 * (gs @ change @ xs.T).square()
    assert float(predicted_increase(moments, problem.update.scale, P, R)) == pytest.approx(float(losses.mean()))


def test_float32_moments_are_good_enough() -> None:
    problem = Problem.make()
    rough = Moments(problem.moments.C.float(), problem.moments.F.float(), 1.0)
    P, R, values = weighted_truncation(rough, *problem.gram, 2)
    P2, R2, values2 = weighted_truncation(problem.moments, *problem.gram, 2)
    assert P.dtype == R.dtype == values.dtype == torch.float64
    assert torch.allclose(problem.squeezed(P, R), problem.squeezed(P2, R2), atol=1e-4)
    assert torch.allclose(values, values2, atol=1e-4 * float(values[0]))


@pytest.mark.parametrize("seed", range(5))
def test_rounding_of_the_moments_does_no_harm(seed: int) -> None:
    """Float32 sums of few rows in nearly parallel coordinates have negative eigenvalues once the factor is divided out.

    What they say about the strong directions still counts: the loss in the metric is near the least one.
    """
    problem = Problem.make(seed=seed)
    mix = torch.ones(RANK, RANK, dtype=torch.float64) + 1e-3 * covariance(RANK, seed, 10.0)
    near = LowRank(problem.update.B @ torch.linalg.inv(mix), mix @ problem.update.A, problem.update.scale)
    xs = torch.randn(2, IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rough = Problem(near, xs.T @ xs, problem.F_y)
    moments = Moments(rough.moments.C.float(), rough.moments.F, 1.0)
    P, R, values = weighted_truncation(moments, *rough.gram, 2, shrinkage=0.0, two_sided=False)
    assert P.isfinite().all() and R.isfinite().all() and values.isfinite().all()
    dW = near.dense()
    assert float(((dW - rough.squeezed(P, R)) @ xs.T).norm()) < 1e-2 * float((dW @ xs.T).norm())


def test_rounding_never_makes_a_predicted_increase_negative() -> None:
    C = torch.diag(torch.tensor([1.0, -1e-9], dtype=torch.float64))
    moments = Moments(C, torch.eye(2, dtype=torch.float64), 1.0)
    kept = torch.eye(2, 1, dtype=torch.float64)
    assert float(predicted_increase(moments, 1.0, kept, kept.T)) == 0.0
    assert (predicted_curve(moments, 1.0) >= 0).all()


@pytest.mark.parametrize("power", [-12, 12])
def test_units_do_not_matter(power: int) -> None:
    """Gradients of a mean over many rows are tiny; factors may be too."""
    problem = Problem.make()
    B, A = problem.update.B * 10.0**power, problem.update.A * 10.0**power
    moments = Moments(problem.moments.C * 10.0 ** (2 * power - 6), problem.moments.F * 10.0 ** (2 * power - 9), 1.0)
    P, R, _ = weighted_truncation(moments, B.T @ B, A @ A.T, 2)
    P2, R2, _ = weighted_truncation(problem.moments, *problem.gram, 2)
    assert torch.allclose(P @ R, P2 @ R2, atol=1e-6 * float((P2 @ R2).norm()))


def test_requests_that_make_no_sense_are_refused() -> None:
    problem = Problem.make()
    G, H = problem.gram
    eye = torch.eye(3, dtype=torch.float64)
    with pytest.raises(LoraSqueezeError, match="rank must be at least 1, got 0"):
        weighted_truncation(problem.moments, G, H, 0)
    for shrinkage in (-0.1, 1.1, math.nan):
        with pytest.raises(LoraSqueezeError, match=f"shrinkage must be from 0 to 1, got {shrinkage}"):
            weighted_truncation(problem.moments, G, H, 2, shrinkage=shrinkage)
    with pytest.raises(LoraSqueezeError, match=r"a Gram matrix holds NaN or infinity.*use an earlier checkpoint"):
        weighted_truncation(problem.moments, G * math.nan, H, 2)
    with pytest.raises(LoraSqueezeError, match=r"moments hold NaN or infinity: the loss diverged.*collect them again"):
        Moments(eye, eye * math.inf, 1.0)
    with pytest.raises(LoraSqueezeError, match="moments hold NaN or infinity"):
        Moments(eye, eye, 1.0, eye * math.nan)


def test_moments_of_another_rank_are_refused() -> None:
    """As users call it: here in the tests a type checker would look at the shapes first."""
    problem, eye = Problem.make(), torch.eye(3, dtype=torch.float64)
    text = (
        r"moments of shape \(3, 3\) do not fit factors with Gram matrices \(5, 5\) and \(5, 5\): the rank has changed"
    )
    with pytest.raises(LoraSqueezeError, match=text):
        module._check(Moments(eye, eye, 1.0), *problem.gram, 2, 0.0)
    for C, F, slope in [
        (eye, eye[:2, :2], None), (eye[:2], eye[:2], None), (eye[0], eye[0], None), (eye, eye, eye[:2, :2])
    ]:  # fmt: skip
        broken = object.__new__(Moments)
        for name, value in (("C", C), ("F", F), ("rows", 1.0), ("slope", slope)):
            object.__setattr__(broken, name, value)
        with pytest.raises(LoraSqueezeError, match=r"moments do not fit: C is .*expected \(\.\.\., r, r\) for all"):
            broken.__post_init__()


def test_a_rank_above_the_dimensions_of_the_module_is_no_problem() -> None:
    """r = 12 with a 7 x 9 update: the Gram matrices are singular, and so are the moments."""
    problem = Problem(LowRank(*factors(OUT, IN, 12)), covariance(IN, 1), covariance(OUT, 2))
    C, F = problem.metric()
    inner = root(F) @ problem.update.dense() @ root(C)
    expected = root(F, -0.5) @ truncated(inner, 3) @ root(C, -0.5)
    P, R, _ = weighted_truncation(problem.moments, *problem.gram, 3, shrinkage=0.0)
    assert torch.allclose(problem.squeezed(P, R), expected, atol=1e-6 * float(expected.norm()))
    P, R, values = weighted_truncation(problem.moments, *problem.gram, 10)
    assert torch.allclose(problem.squeezed(P, R), problem.update.dense(), atol=1e-9)
    assert (values[7:] < 1e-9 * values[0]).all()
