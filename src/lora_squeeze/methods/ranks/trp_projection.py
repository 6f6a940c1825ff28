"""Trained rank pruning of matrices: low-rank projections while training, and the nuclear norm's sub-gradient.

Every few steps each matrix becomes the nearest one that has a share of its energy,

    T(W) = U_k diag(S_k) V_k^T,   k the smallest with  sum_{i <= k} S_i^2 >= energy sum_i S_i^2

the gradient of that step is taken there, and nuclear * U_k V_k^T is added to it, a sub-gradient of the sum of the
singular values. Between, training goes on in full width. A matrix that is projected often enough loses little the last
time, so that it can be replaced by its factors.

For models that are trained whole:

    pruning = RankPruning({name: Weight(layer.weight) for name, layer in layers.items()}, energy=0.9, nuclear=3e-4)
    for step, batch in enumerate(data):
        due = step % 20 == 0
        if due:
            pruning.project()
        loss(model, batch).backward()
        if due:
            pruning.add_gradients()
        optimizer.step()
        optimizer.zero_grad()
    pruning.finish()
    small = {name: factorised(layer, pruning.kept[name]) for name, layer in layers.items()}

The optimiser's momentum is not projected, and weight decay acts on all of the matrix, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.ranks.trp_layers import SCHEMES, as_matrix, as_weight
from lora_squeeze.ranks import shortest_head

Triple = tuple[Float[Tensor, "rows k"], Float[Tensor, " k"], Float[Tensor, "k columns"]]  # U, S and V^T


@runtime_checkable
class Prunable(Protocol):
    """A matrix that is trained, in whatever form."""

    def svd(self) -> Triple:
        """U, S and V^T of the matrix."""
        ...

    def become(self, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        """Take the value U diag(S) V^T: the matrix's own decomposition, cut short."""
        ...

    def push(self, direction_U: Tensor, direction_Vh: Tensor, weight: float) -> None:
        """Add to the gradients those of weight * <U V^T, matrix>."""
        ...


class Weight:
    """A weight of a linear layer or a convolution, trained as it is.

    Args:
        parameter: (out, in), or (out, in, height, width).
        scheme: as for `as_matrix`.

    Raises:
        LoraSqueezeError: an unknown scheme.
    """

    def __init__(self, parameter: nn.Parameter, scheme: str = "channel") -> None:
        if scheme not in SCHEMES:
            raise LoraSqueezeError(f"scheme must be one of {', '.join(SCHEMES)}, got {scheme!r}")
        self.parameter, self.scheme = parameter, scheme

    def svd(self) -> Triple:
        """As of `Prunable`, in float32 at least."""
        matrix = as_matrix(self.parameter.detach(), self.scheme)
        U, S, Vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
        return U, S, Vh

    def become(self, U: Tensor, S: Tensor, Vh: Tensor) -> None:
        """As of `Prunable`."""
        with torch.no_grad():
            self.parameter.copy_(as_weight((U * S) @ Vh, self.parameter.shape, self.scheme))

    def push(self, direction_U: Tensor, direction_Vh: Tensor, weight: float) -> None:
        """As of `Prunable`."""
        change = as_weight(direction_U @ direction_Vh, self.parameter.shape, self.scheme)
        add_to_gradient(self.parameter, weight * change)


class RankPruning:
    """Projects matrices, and knows their ranks.

    Args:
        matrices: by name.
        energy: share of the squared singular values that a projection keeps at least, in (0, 1].
        nuclear: weight of the sum of the singular values in the loss, for the steps with a projection.
        most: bound of the rank that a projection keeps, even if the energy falls short; None: none.

    Attributes:
        kept: name -> rank of its last projection. A matrix that was zero, or whose decomposition failed, is left out
            and stays as it is.

    Notes:
        One singular value decomposition of each matrix for each projection.
    """

    def __init__(
        self, matrices: Mapping[str, Prunable], *, energy: float = 0.9, nuclear: float = 0.0, most: int | None = None
    ) -> None:
        self.matrices, self.energy, self.nuclear, self.most = matrices, energy, nuclear, most
        self.kept: dict[str, int] = {}
        self._directions: dict[str, tuple[Tensor, Tensor]] = {}

    def project(self) -> None:
        """Cut every matrix to the rank that the energy asks for."""
        self._directions = {name: found for name in self.matrices if (found := self._cut(name, None)) is not None}

    def add_gradients(self) -> None:
        """Add the nuclear norm's part, as it was at the last projection, to the gradients: after backward, once."""
        for name, (U, Vh) in self._directions.items():
            if self.nuclear:
                self.matrices[name].push(U, Vh, self.nuclear)
        self._directions = {}

    def finish(self) -> None:
        """Cut every matrix to the rank of its last projection: what the steps since then have added goes."""
        for name in self.matrices:
            self._cut(name, self.kept.get(name))

    def _cut(self, name: str, rank: int | None) -> tuple[Tensor, Tensor] | None:
        """Cut one matrix to a rank, None: as the energy asks. U_k and V_k^T, None where nothing can be done."""
        matrix = self.matrices[name]
        try:
            U, S, Vh = matrix.svd()
        except (torch.linalg.LinAlgError, LoraSqueezeError):  # type: ignore[attr-defined]
            return None  # a training that goes wrong is seen in its loss
        if rank is None:
            rank = shortest_head(S.double().square().tolist(), 1 - self.energy)
            rank = rank if self.most is None else min(rank, self.most)
        if not rank or not S[0]:
            return None
        if rank < len(S):
            matrix.become(U[:, :rank], S[:rank], Vh[:rank])
        self.kept[name] = rank
        return U[:, :rank], Vh[:rank]


def add_to_gradient(parameter: nn.Parameter, change: Tensor) -> None:
    """Add to `grad`, whether there is one or not."""
    change = change.to(parameter.dtype)
    parameter.grad = change if parameter.grad is None else parameter.grad + change
