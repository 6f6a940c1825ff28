"""Weights of linear layers and convolutions as matrices, and the two smaller layers that one of low rank becomes."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lora_squeeze.errors import LoraSqueezeError

SCHEMES = ("channel", "spatial")


def as_matrix(weight: Tensor, scheme: str = "channel") -> Float[Tensor, "rows columns"]:
    """A weight as a matrix.

    Args:
        weight: (out, in), or a convolution's (out, in, height, width).
        scheme: of a convolution: "channel", (out, in * height * width); "spatial", (in * height, out * width).
    """
    if scheme == "spatial" and weight.dim() == 4:
        out, columns, height, width = weight.shape
        return weight.permute(1, 2, 0, 3).reshape(columns * height, out * width)
    return weight.flatten(1)


def as_weight(matrix: Float[Tensor, "rows columns"], shape: torch.Size, scheme: str = "channel") -> Tensor:
    """The weight of this shape that `as_matrix` makes the matrix of."""
    if scheme == "spatial" and len(shape) == 4:
        out, columns, height, width = shape
        return matrix.reshape(columns, height, out, width).permute(2, 0, 1, 3)
    return matrix.reshape(shape)


@torch.no_grad()
def factorised(layer: nn.Linear | nn.Conv2d, rank: int, scheme: str = "channel") -> nn.Sequential:
    """A layer as two of them with `rank` channels between: the same function if its matrix has that rank.

    Args:
        layer: linear, or a convolution with zeros around its input and one group.
        rank: k. A linear layer then has k (in + out) numbers beside the bias.
        scheme: of a convolution: "channel", all of the kernel first; "spatial", its height first and then its width.

    Raises:
        LoraSqueezeError: a convolution of another kind.
    """
    matrix = as_matrix(layer.weight, scheme)
    U, S, Vh = torch.linalg.svd(matrix.to(torch.promote_types(matrix.dtype, torch.float32)), full_matrices=False)
    root = S[:rank].sqrt()
    left, right = U[:, :rank] * root, root[:, None] * Vh[:rank]
    made: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        first = skip_init(nn.Linear, layer.in_features, rank, bias=False, **made)
        last = skip_init(nn.Linear, rank, layer.out_features, bias=bias, **made)
    else:
        first, last = _convolutions(layer, rank, scheme, bias, made)
    inner, outer = right, left
    if scheme == "spatial" and isinstance(layer, nn.Conv2d):
        inner, outer = left.T, right.unflatten(1, (layer.out_channels, -1)).transpose(0, 1)
    first.weight.copy_(inner.reshape(first.weight.shape))
    last.weight.copy_(outer.reshape(last.weight.shape))
    if bias:
        last.bias.copy_(layer.bias)
    return nn.Sequential(first, last)


def _convolutions(layer: nn.Conv2d, rank: int, scheme: str, bias: bool, made: dict[str, Any]) -> tuple[Any, Any]:
    """Two convolutions in the place of one; the weights are yet to be set."""
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise LoraSqueezeError(
            f"a convolution of {layer.groups} groups with padding {layer.padding!r} of {layer.padding_mode} cannot be "
            "factorised; it must have one group and a number of zeros"
        )
    settings = ((layer.kernel_size, 1), (layer.stride, 1), (layer.padding, 0), (layer.dilation, 1))
    of_first, of_last = zip(*(_shared(values, idle, scheme) for values, idle in settings), strict=True)
    return (
        skip_init(nn.Conv2d, layer.in_channels, rank, *of_first, bias=False, **made),
        skip_init(nn.Conv2d, rank, layer.out_channels, *of_last, bias=bias, **made),
    )


def _shared(values: Any, idle: int, scheme: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """What a convolution has along its two axes, as two convolutions share it."""
    height, width = values
    return ((height, width), (idle, idle)) if scheme == "channel" else ((height, idle), (idle, width))
