"""Effective ranks: how many directions an update uses, counted in three ways.

With S the singular values of an update, p_i = S_i^2 / sum S^2 the share of the energy in direction i:

=========  ====================  =====================================================================================
rank       definition            what it says
=========  ====================  =====================================================================================
stable     1 / p_1               |dW|_F^2 / |dW|_2^2: how far the first direction is from being everything
entropy    exp(-sum p ln p)      number of equally strong directions with the same spread of energy
numerical  #{S_i > eps S_1}      directions above the resolution of the stored numbers
=========  ====================  =====================================================================================

1 <= stable <= entropy <= number of directions, for every update but zero, whose effective ranks are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def stable_rank(energies: Sequence[float]) -> float:
    """Stable rank: all energy over the energy of the first direction.

    Args:
        energies: squared singular values, descending; any common factor.

    Returns:
        A number from 1 to the number of directions; 0 for a zero update.

    Notes:
        It is low as soon as one direction dominates, whatever the others are: a sign of spikes, not a rank to ask for.

    Example:
        >>> stable_rank([4.0, 2.0, 2.0])
        2.0
    """
    return math.fsum(energies) / energies[0] if energies and energies[0] > 0 else 0.0


def entropy_rank(energies: Sequence[float]) -> float:
    """Entropy rank: exp of the entropy of the shares of energy, exp(-sum p_i ln p_i).

    Args:
        energies: squared singular values; any common factor.

    Returns:
        A number from 1 to the number of directions; 0 for a zero update.

    Notes:
        The effective rank of Roy and Vetterli (EUSIPCO 2007) takes p_i = S_i / sum S. Here p_i = S_i^2 / sum S^2, since
        all rules and reports of this package count energy; the squares make it smaller.

    Example:
        >>> round(entropy_rank([1.0, 1.0, 1.0, 1.0]), 6), entropy_rank([1.0, 0.0])
        (4.0, 1.0)
    """
    total = math.fsum(energies)
    shares = [e / total for e in energies] if total > 0 else []
    return math.exp(-math.fsum(p * math.log(p) for p in shares if p > 0)) if shares else 0.0


def numerical_rank(values: Sequence[float], dtype: torch.dtype) -> int:
    """Numerical rank: number of singular values above eps times the largest, eps that of the stored dtype.

    Args:
        values: singular values, descending.
        dtype: dtype of the stored factors; eps is 2^-7 for bfloat16, 2^-10 for float16, 2^-23 for float32.

    Returns:
        From 1 to the number of values; 0 for a zero update.

    Notes:
        The customary threshold max(out, in) eps S_1 (numpy.linalg.matrix_rank) bounds the rounding of a dense SVD in
        that dtype. Here the factors are decomposed in float64, and only the rounding of the stored numbers is left: for
        4096 columns in bfloat16 the customary threshold would be 32 S_1, and nothing would count.

    Example:
        >>> numerical_rank([1.0, 0.01, 0.001], torch.bfloat16)
        2
    """
    eps = torch.finfo(dtype).eps
    return sum(s > eps * values[0] for s in values)
