"""Updates that are no plain pair of factors: Tucker convolutions, LoHa, LoKr and full differences, as plain factors.

Every one of them is B @ A exactly, without a decomposition. A, B with an index are those of one part, K is the number
of positions of a convolution's kernel.

=============  ==============================  ===================================================  ===================
form           dW                              B, A                                                 rank
=============  ==============================  ===================================================  ===================
Tucker LoCon   up, mid and down contracted     up; mid and down contracted                          r
LoHa           (B1 A1) * (B2 A2), by element   products of columns of B1 and B2, of rows of A1, A2  r1 r2
LoKr           kron(W1, W2)                    kron(B1, B2); kron(A1, A2), with W1 = B1 A1 and so   rank(W1) rank(W2)
full           the matrix itself               the matrix and an identity                           min(out, in K)
=============  ==============================  ===================================================  ===================

The rank is what the shapes say. Where that of a LoHa, or of a part of a LoKr, is above the smaller side of the matrix,
the matrix is formed and taken like a full one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]  # by role: the last part of the key, "up", "down", "mid" for the factors of a LoRA
Tensors = Mapping[str, Tensor]

PLAIN, TUCKER, LOHA, LOKR, FULL = "LoRA", "Tucker LoCon", "LoHa", "LoKr", "full difference"
_HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_KRON_1 = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_KRON_2 = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
_COMPLETE: dict[frozenset[str], str] = {
    frozenset({"up", "down"}): PLAIN,
    frozenset({"up", "down", "mid"}): TUCKER,
    _HADA: LOHA,
    _HADA | {"hada_t1", "hada_t2"}: LOHA,
    frozenset({"diff"}): FULL,
    **{one | two: LOKR for one in _KRON_1 for two in _KRON_2},
}
ROLES = frozenset().union(*_COMPLETE)


@dataclass(frozen=True)
class Facts:
    """What the shapes of an update's tensors say.

    Args:
        rank: of B and A.
        dims: what alpha is divided by: none where the scale is 1 whatever alpha says, two where readers differ.
        out_features, in_features: rows and columns of dW, the kernel counted in the columns.
        kernel: trailing dimensions of a convolution's weight, as far as the tensors show them.
    """

    rank: int
    dims: tuple[int, ...]
    out_features: int
    in_features: int
    kernel: Shape = ()


def form_of(roles: Collection[str]) -> str | None:
    """The form that these tensors make up, None where one is missing or they belong to several forms."""
    return _COMPLETE.get(frozenset(roles))


def facts(form: str, shapes: Shapes) -> Facts | None:
    """Rank and sizes of an update of this form, None where the shapes do not fit together."""
    if any(len(shape) < 2 for shape in shapes.values()):
        return None
    return {PLAIN: _lora, TUCKER: _lora, LOHA: _loha, LOKR: _lokr, FULL: _full}[form](shapes)


def factors(form: str, tensors: Tensors) -> tuple[Float[Tensor, "out r"], Float[Tensor, "r in"]]:
    """B and A of an update whose shapes fit.

    Args:
        form: of these tensors; not for plain factors, which are B and A already.
        tensors: role -> tensor; products are formed in their dtype.

    Returns:
        B and A with columns and rows of like length, so that a 16-bit dtype holds both: they are multiplied with powers
        of two, which rounds nothing.
    """
    return _balanced(
        *{TUCKER: _tucker_factors, LOHA: _loha_factors, LOKR: _lokr_factors, FULL: _full_factors}[form](tensors)
    )


def _balanced(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    ratio = torch.linalg.vector_norm(A, dim=1) / torch.linalg.vector_norm(B, dim=0)
    usable = ratio.isfinite() & (ratio > 0)
    power = torch.where(usable, ratio, 1.0).log2().div(2).round().exp2()
    return B * power, A / power[:, None]


def _lora(shapes: Shapes) -> Facts | None:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    rank = down[0]
    if up[1] != rank or set(up[2:]) - {1}:
        return None
    if mid is not None and (mid[:2] != (rank, rank) or set(down[2:]) - {1}):
        return None
    kernel = down[2:] if mid is None else mid[2:]
    return Facts(rank, (rank,), up[0], down[1] * math.prod(kernel), kernel)


def _tucker_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    A = torch.einsum("mn...,ni->mi...", tensors["mid"], tensors["down"].flatten(1))
    return tensors["up"].flatten(1), A.flatten(1)


def _loha(shapes: Shapes) -> Facts | None:
    one, two = _part(shapes, "hada_w1", "hada_t1"), _part(shapes, "hada_w2", "hada_t2")
    if one is None or two is None or (one.kernel and "hada_t1" not in shapes):
        return None
    if (one.out_features, one.in_features, one.kernel) != (two.out_features, two.in_features, two.kernel):
        return None
    rank = min(one.dims[0] * two.dims[0], one.out_features, one.in_features)
    return replace(one, rank=rank)


def _loha_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    (B1, A1), (B2, A2) = _product(tensors, "hada_w1", "hada_t1"), _product(tensors, "hada_w2", "hada_t2")
    if B1.shape[1] * B2.shape[1] > min(len(B1), A1.shape[1]):
        return _trivial((B1 @ A1) * (B2 @ A2))
    return (B1[:, :, None] * B2[:, None]).flatten(1), (A1[:, None] * A2[None]).flatten(0, 1)


def _lokr(shapes: Shapes) -> Facts | None:
    one, two = _part(shapes, "lokr_w1"), _part(shapes, "lokr_w2", "lokr_t2")
    if one is None or two is None or one.kernel:
        return None
    out, columns = one.out_features * two.out_features, one.in_features * two.in_features
    return Facts(one.rank * two.rank, tuple(dict.fromkeys(one.dims + two.dims)), out, columns, two.kernel)


def _lokr_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    (B1, A1), (B2, A2) = _least(tensors, "lokr_w1"), _least(tensors, "lokr_w2", "lokr_t2")
    return _kron(B1, B2), _kron(A1, A2)


def _kron(one: Tensor, other: Tensor) -> Tensor:
    """The Kronecker product of two matrices of any strides, of which torch.kron takes some only."""
    return (one[:, None, :, None] * other[None, :, None]).flatten(2).flatten(0, 1)


def _least(tensors: Tensors, stem: str, core: str = "") -> tuple[Tensor, Tensor]:
    """Factors of one matrix of a Kronecker product, with no more columns than its shape allows."""
    if stem in tensors:
        return _trivial(tensors[stem].flatten(1))
    B, A = _product(tensors, stem, core)
    return (B, A) if B.shape[1] <= min(len(B), A.shape[1]) else _trivial(B @ A)


def _part(shapes: Shapes, stem: str, core: str = "") -> Facts | None:
    """Facts of one of the two matrices, which is stored as it is or as `stem`_a, `stem`_b and perhaps a Tucker core.

    a is (out, r), b is (r, in K); with a core (r, r, *kernel), a is (r, out) and b is (r, in).
    """
    if stem in shapes:
        return _full({"diff": shapes[stem]})
    a, b = shapes[f"{stem}_a"], shapes[f"{stem}_b"]
    if core in shapes:
        out, rank, kernel = a[1], a[0], shapes[core][2:]
        fits = len(b) == 2 and shapes[core][:2] == (rank, rank)
    else:
        out, rank, kernel = a[0], a[1], b[2:]
        fits = True
    columns = b[1] * math.prod(kernel)
    fits = fits and len(a) == 2 and b[0] == rank
    return Facts(min(rank, out, columns), (rank,), out, columns, kernel) if fits else None


def _product(tensors: Tensors, stem: str, core: str = "") -> tuple[Tensor, Tensor]:
    """B and A of a matrix that is stored in parts, see `_part`."""
    a, b = tensors[f"{stem}_a"], tensors[f"{stem}_b"]
    if core in tensors:
        return a.T, torch.einsum("ij...,jr->ir...", tensors[core], b).flatten(1)
    return a, b.flatten(1)


def _full(shapes: Shapes) -> Facts | None:
    out, columns = shapes["diff"][0], math.prod(shapes["diff"][1:])
    return Facts(min(out, columns), (), out, columns, shapes["diff"][2:])


def _full_factors(tensors: Tensors) -> tuple[Tensor, Tensor]:
    return _trivial(tensors["diff"].flatten(1))


def _trivial(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix and an identity, as factors of rank min(out, in)."""
    rows, columns = matrix.shape
    eye = torch.eye(min(rows, columns), dtype=matrix.dtype)
    return (eye, matrix) if rows <= columns else (matrix, eye)
