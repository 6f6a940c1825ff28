"""Intruder directions: singular vectors that an update brings into a weight and that the weight did not have before.

Let u_i be the left singular vectors of W and y_j those of W + dW, in the order of their singular values. An intruder
is one of the first `top` of the y_j with

    max_i |u_i^T y_j| < threshold

Fine-tunes with many of them have been found to forget more of what the base model knew, and to add up badly with other
adapters (Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence"). The measure is the one that PEFT
mitigates with `reduce_intruder_dimension`, with its defaults.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

TOP = 10
THRESHOLD = 0.5


def intruders(
    W: Float[Tensor, "out in"],
    dW: Float[Tensor, "out in"],
    *,
    top: int = TOP,
    threshold: float = THRESHOLD,
) -> int:
    """Number of intruder directions of an update in its base weight.

    Args:
        W: base weight.
        dW: update.
        top: how many singular vectors of W + dW are looked at; fewer where the matrix has fewer.
        threshold: a vector is an intruder if its largest absolute cosine with any singular vector of W is below this.

    Notes:
        Two symmetric eigenproblems of size n = min(out, in) in float64, O(out in n + n^3), and a few copies of W in
        memory: half a minute for n = 4096 on two cores. Directions in which W is zero count as not there.
    """
    wide, update = W.double(), W.double() + dW.double()
    if W.shape[0] <= W.shape[1]:
        U, Y = _vectors(wide @ wide.mT), _vectors(update @ update.mT)[:, :top]
        cosines = U.mT @ Y
    else:  # u_i = W v_i / s_i: U^T y from the smaller side
        values, V = torch.linalg.eigh(wide.mT @ wide)
        alive = values > torch.finfo(values.dtype).eps * len(values) * values[-1]
        y = update @ _vectors(update.mT @ update)[:, :top]
        y = y / torch.linalg.vector_norm(y, dim=0).clamp_min(torch.finfo(y.dtype).tiny)
        cosines = (V[:, alive] / values[alive].sqrt()).mT @ (wide.mT @ y)
    if not len(cosines):  # a weight of zeros
        return int(cosines.shape[1])
    return int((cosines.abs().amax(0) < threshold).sum())


def _vectors(gram: Tensor) -> Tensor:
    """Eigenvectors in columns, those of the largest eigenvalues first; without those of zero ones."""
    values, V = torch.linalg.eigh(gram)
    alive = values > torch.finfo(values.dtype).eps * len(values) * values[-1].clamp_min(0)
    found: Tensor = V[:, alive].flip(-1)
    return found
