"""What several of the methods that find ranks need."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.methods.adapters.engine import Site
from lora_squeeze.methods.seeds import usual_defaults


def lora_pair(site: Site, config: Any, generator: torch.Generator | None = None) -> tuple[nn.Parameter, nn.Parameter]:
    """B (out, r) and A (r, in) as a LoRA begins: B = 0, A uniform in +-1 / sqrt(in); see `init_weights`.

    Args:
        site, config: of the layer.
        generator: on the CPU; default torch's global one.
    """
    bound = 1 / math.sqrt(site.in_features)
    with usual_defaults():
        A = torch.rand(config.r, site.in_features, generator=generator) * 2 - 1
        B = torch.zeros(site.out_features, config.r)
        if not config.init_weights:
            B = (torch.rand(B.shape, generator=generator) * 2 - 1) * bound
    return nn.Parameter(B), nn.Parameter(A * bound)


def add_gradient(penalty: Tensor, parameters: Iterable[nn.Parameter]) -> None:
    """Add the gradient of a penalty to that of the loss, in `grad`.

    Not with `penalty.backward()`: to distributed data parallel that is a second backward pass of the model, with an
    exchange of its own. A penalty of parameters alone is the same in all processes and needs none.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def steps_of(share: float, steps: int) -> int:
    """The first steps that are a share of all, rounded up; 0.1 of 30 are 3, whatever floating-point numbers say."""
    return math.ceil(round(share * steps, 6))
