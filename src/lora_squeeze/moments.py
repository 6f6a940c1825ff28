"""Truncation in the metric of the data, from two r x r matrices per module.

A module computes y = W x + dW x with dW = s B A. Let g be the gradient of the loss of one row (one token, one position)
with respect to that row of y. With the covariances of all inputs and all gradients, the loss of rank is measured by

    |F_y^1/2 (dW - dW_k) C_x^1/2|_F        C_x = E[x x^T] (in x in), F_y = E[g g^T] (out x out)

and its minimiser dW_k = F_y^-1/2 T_k(F_y^1/2 dW C_x^1/2) C_x^-1/2 (T_k: truncation of the SVD) has its columns among
those of B and its rows among those of A. So dW_k = s B M A, and M needs only

    C = A C_x A^T = E[(A x)(A x)^T]        F = B^T F_y B = E[(B^T g)(B^T g)^T]        (r x r each)

A x is what the branch computes forward and s B^T g what it computes backward: `training.statistics` collects both.
Half the squared loss of rank is also an estimate of what the squeeze adds to the training loss: the Fisher matrix of
the module is taken as the Kronecker product of C_x and F_y, as in K-FAC (Martens and Grosse 2015).

The estimate leaves out what modules do to each other, and the slope of the loss, which a truncation meets first:
`Truncation` adds the slope where it is known. A small share of the plain metric is mixed in, for directions about which
the data say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from lora_squeeze.decompose import gram_of_columns
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank

SHRINKAGE = 0.01  # share of the plain metric in each of the two weights

# An eigenvalue of a Gram matrix with unit diagonal below this is rounding: the factor is rank-deficient there.
_GRAM_FLOOR = 1e-13
# At least this share of the plain metric: it decides where the data say nothing, and bounds every inverse.
_LEAST_SHRINKAGE = 1e-8


@dataclass(frozen=True, eq=False)
class Moments:
    """What the data say about one module with update s * B @ A.

    Args:
        C: (*batch, r, r), E[(A x)(A x)^T] over the rows x of the input.
        F: (*batch, r, r), E[(B^T g)(B^T g)^T], g the gradient of one row's loss with respect to that row of the output.
        rows: effective number of rows seen.
        slope: (*batch, r, r), gradient of the loss with respect to M in s B M A, at M = I; None: not known. The sum of
            s (B^T g)(A x)^T over all rows, with g the gradient of the whole loss.

    Raises:
        LoraSqueezeError: the matrices do not fit together, or hold NaN or infinity.
    """

    C: Float[Tensor, "*batch r r"]
    F: Float[Tensor, "*batch r r"]
    rows: float
    slope: Float[Tensor, "*batch r r"] | None = None

    def __post_init__(self) -> None:
        found = {"C": self.C, "F": self.F, **({} if self.slope is None else {"slope": self.slope})}
        c = tuple(self.C.shape)
        if any(tuple(matrix.shape) != c for matrix in found.values()) or len(c) < 2 or c[-1] != c[-2]:
            shapes = ", ".join(f"{name} is {tuple(matrix.shape)}" for name, matrix in found.items())
            raise LoraSqueezeError(f"moments do not fit: {shapes}; expected (..., r, r) for all")
        if not all(bool(matrix.isfinite().all()) for matrix in found.values()):
            raise LoraSqueezeError(
                "moments hold NaN or infinity: the loss diverged while they were collected; collect them again"
            )

    def mapped(self, P: Float[Tensor, "*batch r k"], R: Float[Tensor, "*batch k r"]) -> Moments:
        """The moments in the coordinates of B' = B P and A' = R A: C' = R C R^T, F' = P^T F P, slope' = P^T slope R^T.

        Exact; but the slope is that of before, where B' M' A' with M' = I is another update than before.
        """
        wide_P, wide_R = P.to(self.F.device, torch.float64), R.to(self.C.device, torch.float64)
        C, F = wide_R @ self.C.double() @ wide_R.mT, wide_P.mT @ self.F.double() @ wide_P
        slope = None if self.slope is None else (wide_P.mT @ self.slope.double() @ wide_R.mT).to(self.slope)
        return Moments(C.to(self.C), F.to(self.F), self.rows, slope)

    def to(self, device: torch.device) -> Moments:
        """The same on another device."""
        slope = None if self.slope is None else self.slope.to(device)
        return Moments(self.C.to(device), self.F.to(device), self.rows, slope)


def weighted_truncation(
    moments: Moments,
    G: Float[Tensor, "*batch r r"],
    H: Float[Tensor, "*batch r r"],
    rank: int,
    *,
    shrinkage: float = SHRINKAGE,
    two_sided: bool = True,
) -> tuple[Float[Tensor, "*batch r k"], Float[Tensor, "*batch k r"], Float[Tensor, "*batch r"]]:
    """The best truncation in the metric of the data, as maps of the factors: B' = B P, A' = R A.

    M = P R minimises |F~^1/2 (I - M) C~^1/2|_F among all matrices of rank k, with

        C~ = (1 - l) C / c + l H, c = tr(G C) / tr(G H)        F~ = (1 - l) F / f + l G, f = tr(F H) / tr(G H)

    c and f are the mean variances of inputs and gradients as the update sees them, so l is the share of the plain
    metric (C~ = H, F~ = G) whatever the units, and the result does not depend on how the update is factored.

    Args:
        moments: C and F of the module.
        G: (*batch, r, r) float64, B^T B.
        H: (*batch, r, r) float64, A A^T.
        rank: k >= 1; from r on, P and R are the identity and nothing is lost.
        shrinkage: l from 0 (the data alone) to 1 (the plain truncation).
        two_sided: False puts F~ = G: only the inputs count.

    Returns:
        P (*batch, r, k), R (*batch, k, r) and the r singular values of the update in that metric, descending, without
        the scale s, all float64. The share kept is sum(values[:k]^2) / sum(values^2). The new factors are balanced, as
        those of `LowRank.truncate`: B'^T B' = A' A'^T.

    Raises:
        LoraSqueezeError: a rank or a shrinkage out of range, matrices of different sizes, NaN or infinity in G or H.

    Notes:
        O(r^3) per module, exact. A statistic that is zero on the update (B was zero, no rows) counts as isotropic.
        Where it is too poor to tell k directions apart (fewer rows than k), the plain metric decides among the others:
        its share is at least 1e-8, or 1e-6 for float32 moments. Columns of P are zero where the update has less rank.
        Source of the metric: K-FAC; with two_sided=False, activation-aware SVD as in the compression of whole models.
    """
    _check(moments, G, H, rank, shrinkage)
    C, F = moments.C.to(G), moments.F.to(G)
    share = max(shrinkage, _LEAST_SHRINKAGE, 8 * torch.finfo(moments.C.dtype).eps)
    root_G, inverse_G = _root(G)
    root_H, inverse_H = _root(H)
    core = root_G.mT @ root_H  # dW = s Q_B core Q_A^T with orthonormal Q_B and Q_A
    root_C, inverse_C = _weight(inverse_H @ C @ inverse_H.mT, core.mT, share)
    root_F, inverse_F = _weight(inverse_G @ F @ inverse_G.mT, core, share if two_sided else 1.0)
    U, values, Vh = torch.linalg.svd(root_F.mT @ core @ root_C)
    r = G.shape[-1]
    if rank >= r:
        eye = torch.eye(r, dtype=G.dtype, device=G.device).expand(G.shape)
        return eye, eye, values
    left = inverse_F.mT @ (U[..., :rank] * values[..., None, :rank])
    u, sigma, vh = torch.linalg.svd(left @ (Vh[..., :rank, :] @ inverse_C))
    sigma = sigma[..., :rank]
    live = sigma > r * torch.finfo(G.dtype).eps * sigma[..., :1]
    root = torch.where(live, sigma, 0).sqrt()
    P = inverse_G.mT @ (u[..., :rank] * root.unsqueeze(-2))
    R = (vh[..., :rank, :] @ inverse_H) * torch.where(live, root, _spare(root, live, H)).unsqueeze(-1)
    return P, R, values


@dataclass(frozen=True, eq=False)
class Truncation:
    """A truncation as maps of the factors, B' = B P and A' = R A, and what it costs.

    Args:
        P, R: (*batch, r, k) and (*batch, k, r), float64.
        lost: squared Frobenius norm of what is cut off, summed over the batch.
        loss_increase: predicted change of the loss, summed over the batch: `predicted_increase`, and with a slope K
            what the loss does in a straight line, sum K * (P R - I). That part can be negative, where a cut helps.
    """

    P: Float[Tensor, "*batch r k"]
    R: Float[Tensor, "*batch k r"]
    lost: float
    loss_increase: float


def truncation(update: LowRank, moments: Moments, rank: int) -> Truncation:
    """The best truncation of an update in the metric of the data, see `weighted_truncation`.

    Args:
        update: s B A.
        moments: of the module, in the coordinates of these factors.
        rank: k >= 1.
    """
    whole = update.B.ndim == 2
    G, H = (gram_of_columns(X[None] if whole else X) for X in (update.B, update.A.mT))
    if whole:
        G, H = G[0], H[0]
    P, R, _ = weighted_truncation(moments, G, H, rank)
    rest = torch.eye(update.rank, dtype=P.dtype, device=P.device) - P @ R
    lost = update.scale**2 * float((rest.mT @ G @ rest * H.mT).sum().clamp_min(0))
    increase = float(predicted_increase(moments, update.scale, P, R).sum())
    if moments.slope is not None:
        increase -= float((moments.slope.to(rest) * rest).sum())
    return Truncation(P, R, lost, increase)


def predicted_increase(
    moments: Moments, scale: float, P: Float[Tensor, "*batch r k"], R: Float[Tensor, "*batch k r"]
) -> Float[Tensor, "*batch"]:
    """Estimated increase of the loss when s B A becomes s B P R A.

    s^2/2 |F^1/2 (I - P R) C^1/2|_F^2 = s^2/2 tr((I - P R)^T F (I - P R) C)

    Args:
        moments: C and F of the module, F in units of one row's loss.
        scale: s.
        P, R: (*batch, r, k) and (*batch, k, r), as from `weighted_truncation`.

    Returns:
        (*batch,) float64, in units of the loss, never negative.

    Notes:
        Of second order, with rows, modules and the two sides of each taken as independent. Left out is the slope of the
        loss, which rules where little is cut and can make the true change negative, and that many modules cut together
        act in the same direction: their sum can be far below the true increase. Trust the order of truncations before
        the number, and measure the loss where the number matters.
    """
    C, F = moments.C.double(), moments.F.double()
    M = P.to(C) @ R.to(C)
    rest = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device) - M
    increase: Tensor = (rest * (F @ rest @ C)).sum((-2, -1)).clamp_min(0)
    return increase * (scale**2 / 2)


def predicted_curve(moments: Moments, scale: float) -> Float[Tensor, "*batch ranks"]:
    """Estimated increase of the loss for every rank from 0 to r, each at its own best truncation (shrinkage 0).

    With S the singular values of s F^1/2 C^1/2, the entry of rank k is half the sum of S_i^2 over i > k.

    Args:
        moments: C and F of the module, F in units of one row's loss.
        scale: s.

    Returns:
        (*batch, r + 1) float64, never increasing, the last one 0; the notes of `predicted_increase` hold.
    """
    root_F, root_C = (_positive_root(t.double()) for t in (moments.F, moments.C))
    energies = torch.linalg.svdvals(root_F.mT @ root_C).square() * (scale**2 / 2)
    tails = energies.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([tails, torch.zeros_like(tails[..., :1])], -1)


def _root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """L and its pseudo-inverse with gram = L L^T: B L^-T (or L^-1 A) is an orthonormal basis, zero where there is none.

    The factor is divided by its lengths first, so that what counts as rounding does not depend on how it is scaled.
    """
    lengths = gram.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
    lengths = torch.where(lengths > 0, lengths, 1.0)
    values, V = torch.linalg.eigh(gram / (lengths.unsqueeze(-1) * lengths.unsqueeze(-2)))
    values, V = values.flip(-1), V.flip(-1)  # descending: dead directions come last
    live = values > _GRAM_FLOOR
    root = torch.where(live, values, 0).sqrt()
    inverse = torch.where(live, 1 / root.clamp_min(_GRAM_FLOOR), 0)
    return V * root.unsqueeze(-2) * lengths.unsqueeze(-1), (V * inverse.unsqueeze(-2) / lengths.unsqueeze(-1)).mT


def _weight(W: Tensor, core: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Root and inverse root of (1 - share) W / w + share I, w such that W / w and I weigh the core alike."""
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    unit = ((core * (W @ core)).sum((-2, -1)) / core.square().sum((-2, -1)))[..., None, None]
    known = unit > torch.finfo(W.dtype).tiny  # not where W or the core is zero (0 / 0)
    mixed = torch.where(known, W / torch.where(known, unit, 1.0) * (1 - share) + eye * share, eye)
    values, V = torch.linalg.eigh((mixed + mixed.mT) / 2)
    root = values.clamp_min(share).sqrt().unsqueeze(-2)
    return V * root, (V / root).mT


def _positive_root(W: Tensor) -> Tensor:
    """L with W = L L^T, up to negative eigenvalues, which are rounding."""
    values, V = torch.linalg.eigh((W + W.mT) / 2)
    root: Tensor = V * values.clamp_min(0).sqrt().unsqueeze(-2)
    return root


def _spare(root: Tensor, live: Tensor, H: Tensor) -> Tensor:
    """Length of a row of A' that meets a zero column of B': the median of the live ones, else of the rows of A."""
    median: Tensor = torch.where(live, root, torch.nan).nanmedian(-1).values
    rows = H.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt().median(-1).values
    spare: Tensor = torch.where(live.any(-1), median, torch.where(rows > 0, rows, 1.0))
    return spare.unsqueeze(-1)


def _check(moments: Moments, G: Tensor, H: Tensor, rank: int, shrinkage: float) -> None:
    if rank < 1:
        raise LoraSqueezeError(f"rank must be at least 1, got {rank}")
    if not 0 <= shrinkage <= 1:
        raise LoraSqueezeError(f"shrinkage must be from 0 to 1, got {shrinkage}")
    c, g, h = (tuple(t.shape) for t in (moments.C, G, H))
    if not c == g == h:
        raise LoraSqueezeError(
            f"moments of shape {c} do not fit factors with Gram matrices {g} and {h}: the rank has changed since they "
            "were collected; map them or collect them again"
        )
    if not bool((G.isfinite().all() & H.isfinite().all()).item()):
        raise LoraSqueezeError(
            "a Gram matrix holds NaN or infinity: the adapter is broken (diverged training or a damaged file); "
            "use an earlier checkpoint"
        )
