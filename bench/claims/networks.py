"""Small multilayer networks whose weights come from a seed, trained on data that is drawn."""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench.claims.arms import Arm
from bench.claims.problems import fit

Data = tuple[Tensor, ...]  # tensors of one length, inputs first


def mlp(widths: Sequence[int], seed: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers `layer0`, `layer1`, ..., drawn as torch draws them, an activation between any two."""
    generator = torch.Generator().manual_seed(seed)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, (inner, outer) in enumerate(itertools.pairwise(widths)):
        layer = nn.utils.skip_init(nn.Linear, inner, outer)
        for parameter in layer.parameters():
            parameter.data = (torch.rand(parameter.shape, generator=generator) * 2 - 1) / math.sqrt(inner)
        parts[f"layer{number}"] = layer
        if number < len(widths) - 2:
            parts[f"activation{number}"] = activation()
    return nn.Sequential(parts)


def batches(data: Data, size: int, steps: int, seed: int) -> list[Data]:
    """One batch for each step, drawn with replacement."""
    places = torch.randint(len(data[0]), (steps, size), generator=torch.Generator().manual_seed(seed))
    return [tuple(tensor[row] for tensor in data) for row in places]


def squared(model: nn.Module, batch: Data) -> Tensor:
    """Mean squared error."""
    return functional.mse_loss(model(batch[0]), batch[1])


@torch.no_grad()
def error(model: nn.Module, data: Data) -> float:
    """Mean squared error as a number."""
    return float(squared(model, data))


def adapted(arm: Arm, base: nn.Module, seed: int, training: Sequence[Data], rate: float, **options: Any) -> Any:
    """A copy of the base with the arm on it, trained.

    Args:
        arm: of the experiment.
        base: stays as it is.
        seed: of what the arm draws.
        training: the batches.
        rate: of Adam.
        options: of `fit`.
    """
    model = arm.on(copy.deepcopy(base), seed)
    fit(model, squared, training, rate, **{"controlled": arm.config is not None, **options})
    return model
