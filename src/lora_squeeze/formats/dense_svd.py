"""The leading singular directions of one dense matrix, as factors.

A full decomposition of a 4096 x 4096 matrix takes many times what is needed for its first hundred directions. These
lie, up to what is measured in records/2026-11-28-conversion, in the space spanned by

    M X, (M M^T) M X, (M M^T)^2 M X, (M M^T)^3 M X      X random, of rank + 10 columns

a block Krylov space: one step of a power iteration throws away what the step before has found, and this keeps it. The
difference of a full fine-tune has a spectrum that falls slowly, which is where that tells.

Sources: Musco and Musco 2015 (arXiv 1504.05477), algorithm 2; Halko, Martinsson and Tropp 2011 for the sketch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lora_squeeze.decompose import OVERSAMPLING

STEPS = 3
_CROSSING = 0.75  # share of the smaller side from which on a full decomposition is the faster one


def leading_factors(
    matrix: Float[Tensor, "out in"], rank: int, seed: int = 0
) -> tuple[Float[Tensor, "out k"], Float[Tensor, "k in"]]:
    """Balanced factors B = U S^1/2 and A = S^1/2 V^T of the leading directions.

    Args:
        matrix: float32 or float64, finite.
        rank: number of directions, at most min(out, in) are found.
        seed: of the sketch. A local generator: the global one is never touched.

    Returns:
        B (out, k) and A (k, in) in the dtype of the matrix, k = min(rank, out, in), by descending S.

    Notes:
        22 out in (rank + 10) operations, and memory for about 8 (rank + 10) (out + in) numbers beside a copy of the
        matrix. Exact, by a full decomposition, where that takes no longer. A matrix of this rank or less is found to
        the rounding of float32, in float64 to 1e-8; of others the kept energy comes near to the best from below.
    """
    rows, columns = matrix.shape
    if rows > columns:
        B, A = leading_factors(matrix.mT, rank, seed)
        return A.mT, B.mT
    unit = matrix.abs().max()
    if not unit:
        return matrix.new_zeros(rows, min(rank, rows)), matrix.new_zeros(min(rank, rows), columns)
    unit = torch.frexp(unit).exponent.to(matrix).exp2()  # a power of two: products stay in range, nothing is rounded
    U, S, Vh = _directions(matrix / unit, rank, seed)
    root = (S * unit).sqrt()
    return U * root, root[:, None] * Vh


def _directions(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, Vh of the leading directions of a matrix that is no taller than wide."""
    width = rank + OVERSAMPLING
    Q = _krylov(matrix, width, seed) if (STEPS + 1) * width <= _CROSSING * len(matrix) else None
    inside = matrix if Q is None else Q.mT @ matrix
    # By the Gram matrix: U diag(S) Vh is a projection of the matrix, so squaring costs no accuracy that float32 has.
    wide = inside.double()
    squares, W = torch.linalg.eigh(wide @ wide.mT)
    S, W = squares.flip(0)[:rank].clamp_min(0).sqrt().to(matrix), W.flip(1)[:, :rank].to(matrix)
    return W if Q is None else Q @ W, S, (W.mT @ inside) / torch.where(S > 0, S, 1)[:, None]


def _krylov(matrix: Tensor, width: int, seed: int) -> Tensor:
    """An orthonormal basis of the space."""
    sketch = torch.randn(matrix.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=matrix.dtype)
    blocks = [torch.linalg.qr(matrix @ sketch).Q]
    for _ in range(STEPS):
        blocks.append(torch.linalg.qr(matrix @ (matrix.mT @ blocks[-1])).Q)
    basis: Tensor = torch.linalg.qr(torch.cat(blocks, 1)).Q
    return basis
