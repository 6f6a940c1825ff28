"""Maestro's mathematics: factors whose columns are ordered by importance, for layers of any kind.

A layer with U (out, r) and V (in, r) computes U V^T x. Two forces order the columns while training:

- ordered dropout: in each step one layer uses its first b columns alone, b uniform, and all others theirs in full;
- the hierarchical group lasso, HGL = sum_j ||U[:, j:]|| + ||V[:, j:]||: a later column is in more groups.

What is left in the last columns then falls, and with it the importance ||U[:, j:]|| ||V[:, j:]|| of column j: the rank
is the number of columns above a threshold, and every shorter prefix is a smaller layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.seeds import seeded

_FLOOR = 1e-16  # under the root of a norm, so that a suffix of zeros has the gradient zero


@runtime_checkable
class Ordered(Protocol):
    """A layer with ordered columns.

    Attributes:
        U, V: factors (out, r) and (in, r).
        kept: columns that are left, the first ones; the others are no part of the layer any more.
        prefix: columns that the present step uses; None: all that are kept.
    """

    U: nn.Parameter
    V: nn.Parameter
    kept: int
    prefix: int | None


def suffix_norms(factor: Float[Tensor, "width r"]) -> Float[Tensor, " r"]:
    """||factor[:, j:]|| for every j."""
    squares = (factor * factor).sum(0)
    return (squares.flip(0).cumsum(0).flip(0) + _FLOOR).sqrt()


def group_lasso(layer: Ordered) -> Float[Tensor, ""]:
    """HGL of the kept columns of a layer."""
    return suffix_norms(layer.U[:, : layer.kept]).sum() + suffix_norms(layer.V[:, : layer.kept]).sum()


@torch.no_grad()
def importance(layer: Ordered) -> Float[Tensor, " kept"]:
    """Of every kept column, non-increasing."""
    return suffix_norms(layer.U[:, : layer.kept]) * suffix_norms(layer.V[:, : layer.kept])


def shrink(layers: Mapping[str, Ordered], threshold: float) -> bool:
    """Keep the columns whose importance reaches the threshold.

    Returns:
        Whether a rank fell.
    """
    before = {name: layer.kept for name, layer in layers.items()}
    for layer in layers.values():
        layer.kept = int((importance(layer) >= threshold).sum())
    return any(layer.kept != before[name] for name, layer in layers.items())


def draw(layers: Mapping[str, Ordered], step: int, began: int, seed: int) -> int:
    """Shorten one layer for a step: the next of all pairs of layer and prefix, in an order drawn for each pass.

    Args:
        layers: by name, all with the ranks that they have since `began`.
        step: number of the step.
        began: step at which the present pass over the pairs began.
        seed: of the order.

    Returns:
        `began` of the pass that the step belongs to.
    """
    pairs = [(layer, prefix) for layer in layers.values() for prefix in range(1, layer.kept + 1)]
    for layer in layers.values():
        layer.prefix = None
    if not pairs:
        return began
    if step - began >= len(pairs):
        began = step
    order = torch.randperm(len(pairs), generator=seeded(seed, "maestro", began), device="cpu")
    layer, layer.prefix = pairs[int(order[step - began])]
    return began


class MaestroLinear(nn.Module):
    """A linear layer that is trained factorised, y = U V^T x + b, for models that are trained whole.

    Args:
        U, V, bias: factors (out, r) and (in, r), and the bias (out) or None.

    Attributes:
        kept, prefix: as of `Ordered`; `prefix` acts in training mode alone.

    Notes:
        r (in + out) multiplications for each row of the input, and as many numbers beside the bias: fewer than the
        plain layer's in out below rank in out / (in + out).
    """

    def __init__(self, U: Tensor, V: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.U, self.V = nn.Parameter(U), nn.Parameter(V)
        self.bias = None if bias is None else nn.Parameter(bias)
        self.kept, self.prefix = int(U.shape[1]), None

    kept: int
    prefix: int | None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """U V^T x + b, with the columns of the present step."""
        rank = used(self, self.training)
        return functional.linear(functional.linear(x, self.V[:, :rank].T), self.U[:, :rank], self.bias)

    @torch.no_grad()
    def shrunk(self) -> nn.Module:
        """The smaller one of this layer with its kept columns alone and a plain linear layer; of the same function."""
        (rows, _), (columns, _) = self.U.shape, self.V.shape
        U, V = self.U[:, : self.kept].clone(), self.V[:, : self.kept].clone()
        bias = None if self.bias is None else self.bias.clone()
        if self.kept * (rows + columns) < rows * columns:
            return MaestroLinear(U, V, bias)
        plain = nn.Linear(columns, rows, bias is not None, device=U.device, dtype=U.dtype)
        plain.weight.copy_(U @ V.T)
        if bias is not None:
            plain.bias.copy_(bias)
        return plain


def used(layer: Ordered, training: bool) -> int:
    """Columns that the forward pass uses."""
    return layer.kept if layer.prefix is None or not training else min(layer.prefix, layer.kept)


@torch.no_grad()
def decompose(layer: nn.Linear) -> MaestroLinear:
    """A linear layer factorised without loss: U S^1/2 and V S^1/2 of the singular value decomposition of its weight."""
    U, S, Vh = torch.linalg.svd(layer.weight.double(), full_matrices=False)
    root = S.sqrt()
    bias = None if layer.bias is None else layer.bias.clone()
    return MaestroLinear((U * root).to(layer.weight.dtype), (Vh.T * root).to(layer.weight.dtype), bias)
