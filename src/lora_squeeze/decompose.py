"""Singular value decomposition of a low-rank update, four ways, three of them without the `out x in` matrix.

An update is s * B @ A with B (out, r) and A (r, in). Everything a truncation needs sits in r x r matrices:

=======  =====================================================================  ======================================
method   what is computed                                                       when
=======  =====================================================================  ======================================
gram     B^T B = L L^T, one symmetric eigenproblem of L^T (A A^T) L             default; falls back to qr where
                                                                                squaring loses digits
qr       B = Q_B R_B, A^T = Q_A R_A, SVD of R_B R_A^T                           ill-conditioned or rank-deficient
rsvd     randomised range finder, oversampling 10, 2 power iterations           reference: the paper's first variant
dense    SVD of the product B @ A                                               reference: small matrices only
=======  =====================================================================  ======================================

Sources: LoRA-Squeeze (arXiv 2602.10993), algorithms 1 (rsvd) and 2 (qr); Halko, Martinsson, Tropp 2011 (rsvd). The
paper materialises B @ A for algorithm 1; here the same products are applied factor by factor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError

Method = Literal["gram", "qr", "rsvd", "dense"]
METHODS: tuple[str, ...] = get_args(Method)

OVERSAMPLING = 10  # p of the paper's RSVD
POWER_ITERATIONS = 2  # q of the paper's RSVD

# The Gram path squares: an eigenvalue below eps * (sum of |b_i|^2 |a_i|^2) is rounding noise. A relative error of 1e-7
# in sigma needs lambda above 1e-9 of that sum, and column-scaled factors whose inverse stays below 2e4.
_EIGENVALUE_FLOOR = 1e-9
_INVERSE_CEILING = 2e4
# Float32 projections lose eps32 * sqrt(sum |b_i|^2 |a_i|^2): harmless unless the factors cancel each other.
_CANCELLATION_CEILING = 100.0
_PINV_FLOOR = 1e-6
# Of factors that cancel each other, rounding leaves singular values up to 3 eps * sqrt(sum |b_i|^2 |a_i|^2).
_NOISE = 16 * torch.finfo(torch.float64).eps
_CHUNK_ELEMENTS = 2**18  # 2 MiB of float64: converted pieces of a long factor stay in the cache


@dataclass(frozen=True)
class Decomposition:
    """The singular value decomposition s * B @ A = U diag(S) Vh, with U = X @ left and Vh = right @ Y kept as products.

    Forming U and Vh costs two tall-skinny products per rank kept, so they are formed for the kept rank only, by
    `factors`. Leading dimensions (`*batch`) are independent updates of one shape.

    Args:
        X: (*batch, out, p), B itself or an orthonormal basis of its columns.
        left: (*batch, p, n) float64.
        S: (*batch, n) float64, singular values in descending order.
        right: (*batch, n, q) float64.
        Y: (*batch, q, in), A itself or an orthonormal basis of its rows.
        total: (*batch,) float64, sum of ALL squared singular values (rsvd finds only the first ones).
        dead_norm: (*batch,) float64, length given to a row of A' whose singular value is zero when all are zero.
        given: (*batch,) bool, X and Y are the factors B and A themselves.
    """

    X: Float[Tensor, "*batch out p"]
    left: Float[Tensor, "*batch p n"]
    S: Float[Tensor, "*batch n"]
    right: Float[Tensor, "*batch n q"]
    Y: Float[Tensor, "*batch q in"]
    total: Float[Tensor, "*batch"]
    dead_norm: Float[Tensor, "*batch"]
    given: Bool[Tensor, "*batch"]

    def scaled(self, factor: float) -> Decomposition:
        """The decomposition of `factor` times the update."""
        return replace(
            self,
            left=self.left * math.copysign(1.0, factor),
            S=self.S * abs(factor),
            total=self.total * factor**2,
        )

    def factors(
        self, rank: int, scale: float, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "*batch out k"], Float[Tensor, "*batch k in"]]:
        """Balanced factors of the best approximation of rank k: scale * B' @ A' = U_k diag(S_k) Vh_k.

        B' = U_k (S_k / scale)^1/2 and A' = (S_k / scale)^1/2 Vh_k, so B'^T B' = A' A'^T = diag(S_k) / scale. Where a
        singular value is zero, the column of B' is zero and the row of A' is a unit direction times the median length
        of the other rows: the update is the same, and the direction can still learn.

        Args:
            rank: k, from 1 to the number of singular values.
            scale: scale the result is used with, > 0.
            dtype: dtype of the result.

        Returns:
            B' (*batch, out, k) and A' (*batch, k, in), contiguous.
        """
        P, R = self._within(rank, scale)
        new_B = self.X.new_empty((*self.X.shape[:-1], rank), dtype=dtype)
        new_A = self.Y.new_empty((*self.Y.shape[:-2], rank, self.Y.shape[-1]), dtype=dtype)
        _project(self.X, P, new_B, -2)
        _project(self.Y, R, new_A, -1)
        return new_B, new_A

    def coordinates(
        self,
        B: Float[Tensor, "*batch out r"],
        A: Float[Tensor, "*batch r in"],
        rank: int,
        scale: float,
    ) -> tuple[Float[Tensor, "*batch r k"], Float[Tensor, "*batch k r"]]:
        """P and R such that the new factors are B' = B @ P and A' = R @ A: what carries gradients to new coordinates.

        Args:
            B, A: the factors that were decomposed.
            rank, scale: as for `factors`.

        Returns:
            P (*batch, r, k) and R (*batch, k, r), float64.

        Notes:
            Where a basis was computed instead (ill-conditioned or rank-deficient factors), a pseudo-inverse leads back
            to the factors. It leaves out directions below 1e-6 of the largest: B @ P is then B' to that accuracy, and
            no entry of a map exceeds what float32 quantities can bear.
        """
        P, R = self._within(rank, scale)
        if bool(self.given.all()):
            return P, R
        wide_B, wide_A = B.detach().to(P), A.detach().to(P)
        from_B = torch.linalg.pinv(self.X.to(P).mT @ wide_B, rtol=_PINV_FLOOR) @ P
        from_A = R @ torch.linalg.pinv(wide_A @ self.Y.to(P).mT, rtol=_PINV_FLOOR)
        own = self.given[..., None, None]
        if self.X.shape[-1] != B.shape[-1]:  # a basis of other width: no item is given
            return from_B, from_A
        return torch.where(own, P, from_B), torch.where(own, R, from_A)

    def _within(self, rank: int, scale: float) -> tuple[Float[Tensor, "*batch p k"], Float[Tensor, "*batch k q"]]:
        """B' = X @ P and A' = R @ Y."""
        S = self.S[..., :rank]
        floor = max(self.X.shape[-2], self.Y.shape[-1]) * torch.finfo(torch.float64).eps
        live = self.S[..., :1].clamp_min(torch.finfo(torch.float64).tiny) * floor < S
        root = torch.where(live, S, 0).div(scale).sqrt()
        median = torch.where(live, root, torch.nan).nanmedian(-1).values
        spare = torch.where(live.any(-1), median, self.dead_norm).unsqueeze(-1)
        P = self.left[..., :rank] * root.unsqueeze(-2)
        R = self.right[..., :rank, :] * torch.where(live, root, spare).unsqueeze(-1)
        return P, R


def decompose(
    B: Float[Tensor, "*batch out r"],
    A: Float[Tensor, "*batch r in"],
    scale: float = 1.0,
    method: Method = "gram",
    *,
    rank: int | None = None,
    seed: int = 0,
) -> Decomposition:
    """Singular value decomposition of scale * B @ A.

    Args:
        B: (*batch, out, r), any float dtype.
        A: (*batch, r, in), same dtype and device.
        scale: any finite number; the singular values are those of scale * B @ A.
        method: "gram", "qr", "rsvd" or "dense", see the module's table.
        rank: with "rsvd", the number of leading singular values wanted; the others find all and ignore it.
        seed: with "rsvd", seed of the sketch. A local generator: the global one is never touched.

    Returns:
        Decomposition with n = min(r, out, in) singular values ("rsvd": `rank` of them).

    Raises:
        LoraSqueezeError: a factor holds NaN or infinity, or the method is unknown.

    Notes:
        gram costs 2 (out + in) r^2 + O(r^3) operations in float64; qr about four times that; rsvd
        2 (out + in) r (rank + 10) 6; dense out * in * min(out, in). All but dense need O((out + in) r) memory.
    """
    return decompose_all([(B, A)], method, ranks=[rank], seed=seed)[0].scaled(scale)


def decompose_all(
    pairs: Sequence[tuple[Tensor, Tensor]],
    method: Method = "gram",
    *,
    ranks: Sequence[int | None] | None = None,
    seed: int = 0,
) -> list[Decomposition]:
    """Singular value decompositions of many products B @ A.

    With "gram", all pairs of one rank share one batched Cholesky factorisation and one batched eigenproblem, whatever
    their other dimensions: with many small modules most of the time would go into calls.

    Args:
        pairs: (B, A) as in `decompose`, of any shapes.
        method: see `decompose`.
        ranks: with "rsvd", the number of singular values wanted of each.
        seed: with "rsvd", seed of the sketches.

    Returns:
        One decomposition per pair, in order.
    """
    if method not in METHODS:
        raise LoraSqueezeError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    if method == "rsvd" and not -(2**63) <= seed < 2**64:
        raise LoraSqueezeError(f"seed must be a whole number of at most 64 bits, got {seed}")
    flat = [(_flat(B.detach()), _flat(A.detach())) for B, A in pairs]
    found: dict[int, Decomposition] = {}
    alike: dict[tuple[int, torch.device], list[int]] = defaultdict(list)
    for i, (B, A) in enumerate(flat):
        r, limit = B.shape[-1], min(B.shape[-2:] + A.shape[-2:])
        if method == "gram" and r <= limit:
            alike[r, B.device].append(i)
        elif method == "rsvd":
            rank = min(ranks[i] or r if ranks else r, limit)
            found[i] = _in_unit_range(partial(_rsvd, rank=rank, seed=seed), B, A)
        else:
            found[i] = _in_unit_range(_dense if method == "dense" else _qr, B, A)
    for members in alike.values():
        found.update(zip(members, _gram([flat[i] for i in members]), strict=True))
    return [_unflat(found[i], B.shape[:-2]) for i, (B, _) in enumerate(pairs)]


def _flat(X: Tensor) -> Tensor:
    """One batch dimension; on the CPU where the device has no float64 (mps)."""
    X = X.cpu() if X.device.type == "mps" else X
    return X if X.ndim == 3 else X.reshape(-1, *X.shape[-2:])


def _unflat(found: Decomposition, batch: torch.Size) -> Decomposition:
    if len(batch) == 1:
        return found
    return Decomposition(*(t.reshape((*batch, *t.shape[1:])) for t in vars(found).values()))


def _gram(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Decomposition]:
    """Gram matrices, Cholesky and one symmetric eigenproblem; items where that is not accurate are redone by `_qr`.

    With G = B^T B = L L^T the columns of B L^-T are orthonormal, and with H = A A^T,
    (L^T A)(L^T A)^T = L^T H L = V S^2 V^T, so U = B L^-T V and Vh = S^-1 V^T L^T A.
    """
    G = torch.cat([gram_of_columns(B) for B, _ in pairs])
    H = torch.cat([gram_of_columns(A.mT) for _, A in pairs])
    b2, a2 = G.diagonal(dim1=-2, dim2=-1), H.diagonal(dim1=-2, dim2=-1)
    finite = b2.isfinite().all(-1) & a2.isfinite().all(-1)
    if not finite.all():  # NaN, infinity, or float64 factors too large to square: qr tells them apart
        G, H = (torch.where(finite[:, None, None], t, 0) for t in (G, H))
    eye = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device)
    L, info = torch.linalg.cholesky_ex(G)
    L = torch.where((info == 0)[:, None, None], L, eye)
    M = L.mT @ H @ L
    eigenvalues, V = torch.linalg.eigh((M + M.mT) / 2)
    eigenvalues, V = eigenvalues.flip(-1), V.flip(-1)
    L_inverse_T = torch.linalg.solve_triangular(L.mT, eye, upper=True)

    reach = torch.maximum((b2 * a2).sum(-1), eigenvalues[:, 0])
    inverse = (L_inverse_T * b2.sqrt().unsqueeze(-1)).square().sum((-2, -1)).sqrt()
    good = (info == 0) & finite & (inverse < _INVERSE_CEILING) & (eigenvalues[:, -1] > _EIGENVALUE_FLOOR * reach)
    exact = good & (reach < _CANCELLATION_CEILING**2 * eigenvalues[:, 0])  # float32 projections will do

    S = eigenvalues.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    right = (V / S.unsqueeze(-2)).mT @ L.mT
    small = (L_inverse_T @ V, S, right, S.square().sum(-1), _median_row_norm(a2), good, exact)
    results = []
    for (B, A), *parts in zip(pairs, *(t.split([len(B) for B, _ in pairs]) for t in small), strict=True):
        left, S, right, total, dead_norm, good, exact = parts
        if not exact.all():
            B, A = B.to(torch.float64, copy=True), A.to(torch.float64, copy=True)
        found = Decomposition(B, left, S, right, A, total, dead_norm, good)
        bad = (~good).nonzero().squeeze(-1)
        if len(bad):
            redone = _in_unit_range(_qr, B[bad], A[bad])
            for mine, other in zip(vars(found).values(), vars(redone).values(), strict=True):
                mine[bad] = other
        results.append(found)
    return results


def _in_unit_range(svd: Callable[[Tensor, Tensor], Decomposition], B: Tensor, A: Tensor) -> Decomposition:
    """`svd` of the float64 factors divided by powers of two, so that no product of them overflows or vanishes."""
    B, b_unit = _to_unit_range(B.double(), "B")
    A, a_unit = _to_unit_range(A.double(), "A")
    found = svd(B, A)
    unit = b_unit * a_unit
    return replace(
        found,
        S=found.S * unit[:, None],
        total=(found.total.sqrt() * unit).square(),
        dead_norm=_median_row_norm(A.square().sum(-1)) * a_unit,
    )


def _qr(B: Tensor, A: Tensor) -> Decomposition:
    """QR of both factors and SVD of the r x r core (algorithm 2 of the paper)."""
    Q_B, R_B = torch.linalg.qr(B)
    Q_A, R_A = torch.linalg.qr(A.mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    S = _above_noise(S, B, A)
    return Decomposition(Q_B, U, S, Vh, Q_A.mT, S.square().sum(-1), S[:, 0], _none(S))


def _rsvd(B: Tensor, A: Tensor, rank: int, seed: int) -> Decomposition:
    """Randomised SVD of B @ A (algorithm 1 of the paper), the product applied factor by factor."""
    total = (gram_of_columns(B) * gram_of_columns(A.mT)).sum((-2, -1)).clamp_min(0)
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + OVERSAMPLING, B.shape[-2], A.shape[-1])
    sketch = torch.randn(A.shape[-1], width, generator=generator, dtype=torch.float64).to(B.device)
    Y = B @ (A @ sketch)
    for _ in range(POWER_ITERATIONS):
        Q = torch.linalg.qr(Y).Q
        Z = torch.linalg.qr(A.mT @ (B.mT @ Q)).Q
        Y = B @ (A @ Z)
    Q = torch.linalg.qr(Y).Q
    U, S, Vh = torch.linalg.svd((Q.mT @ B) @ A, full_matrices=False)
    eye = torch.eye(rank, dtype=torch.float64, device=B.device).expand(len(B), -1, -1)
    return Decomposition(Q, U[..., :rank], S[..., :rank], eye, Vh[..., :rank, :], total, S[:, 0], _none(S))


def _dense(B: Tensor, A: Tensor) -> Decomposition:
    """SVD of the materialised product: the reference."""
    U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
    n = min(B.shape[-1], S.shape[-1])  # the others are zero by construction
    U, S, Vh = U[..., :n], _above_noise(S[..., :n], B, A), Vh[..., :n, :]
    eye = torch.eye(n, dtype=torch.float64, device=B.device).expand(len(B), -1, -1)
    return Decomposition(U, eye, S, eye, Vh, S.square().sum(-1), S[:, 0], _none(S))


def _above_noise(S: Tensor, B: Tensor, A: Tensor) -> Tensor:
    """S with zeros for what is rounding noise: the difference of two equal updates is no update."""
    reach = (B.square().sum(-2) * A.square().sum(-1)).sum(-1, keepdim=True).sqrt()
    return torch.where(reach * _NOISE < S, S, 0)


def _none(S: Tensor) -> Tensor:
    return torch.zeros(len(S), dtype=torch.bool, device=S.device)


def gram_of_columns(X: Float[Tensor, "batch n r"]) -> Float[Tensor, "batch r r"]:
    """X^T X in float64, converted piece by piece.

    Args:
        X: (batch, n, r), any float dtype; n is the long axis.

    Returns:
        (batch, r, r) float64.
    """
    gram = X.new_zeros((X.shape[0], X.shape[2], X.shape[2]), dtype=torch.float64)
    # NumPy sees that both operands are one matrix and computes one triangle only (syrk); torch computes both. But its
    # threads and torch's hinder each other: with more than one of torch's, small products take ten times as long.
    by_triangle = X.device.type == "cpu" and torch.get_num_threads() == 1
    for piece in X.split(_piece(X, -2), -2):
        wide = piece.double()
        if by_triangle:
            with np.errstate(all="ignore"):  # infinity is looked for afterwards
                for total, item in zip(gram.numpy(), wide.numpy(), strict=True):
                    total += item.T @ item
        else:
            gram.baddbmm_(wide.mT, wide)
    return gram


def _project(X: Tensor, P: Tensor, out: Tensor, dim: Literal[-2, -1]) -> None:
    """out = X @ P (dim -2) or P @ X (dim -1), the long axis `dim` of X and out going by in pieces.

    In float32, which loses nothing that the output dtype keeps; in float64 where X is float64 or P leaves the range
    of float32.
    """
    largest = P.abs().amax().item()
    wide = X.dtype == torch.float64 or not 1e-30 < largest < 1e30
    inner = torch.float64 if wide else torch.float32
    P = P.to(inner)
    for piece, result in zip(X.split(_piece(X, dim), dim), out.split(_piece(X, dim), dim), strict=True):
        result.copy_(piece.to(inner) @ P if dim == -2 else P @ piece.to(inner))


def _piece(X: Tensor, dim: int) -> int:
    """Length along `dim` of a piece whose float64 copy stays in the cache."""
    return max(1, _CHUNK_ELEMENTS * X.shape[dim] // X.numel())


def _to_unit_range(X: Float[Tensor, "batch n r"], factor: str) -> tuple[Tensor, Tensor]:
    """X divided by a power of two per item so that its largest entry is in [1/2, 1), and those powers."""
    largest = X.abs().amax((-2, -1))
    if not largest.isfinite().all():
        raise LoraSqueezeError(
            f"factor {factor} holds NaN or infinity: the adapter is broken (diverged training or a damaged file); "
            "use an earlier checkpoint"
        )
    unit = torch.frexp(largest).exponent.double().clamp(-1000, 1000).exp2()
    return X / unit[:, None, None], unit


def _median_row_norm(squared_norms: Float[Tensor, "batch r"]) -> Float[Tensor, " batch"]:
    """Median length of the rows of A, 1 where all are zero."""
    median = squared_norms.sqrt().median(-1).values
    return torch.where((median > 0) & median.isfinite(), median, torch.ones_like(median))
