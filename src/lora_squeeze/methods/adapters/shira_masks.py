"""SHiRA: masks by structure, weight and gradient for PEFT's own tuner (arXiv 2406.13175, NeurIPS 2024).

    dW = S, r (out + in) entries at places that a mask fixes before the training; they begin at 0, the scale is 1

PEFT 0.21.2 has the tuner (`ShiraConfig`) and one mask, random, which is the same for all layers of one shape where a
seed is given. Here are the paper's four others, for `set_mask`:

    struct_mask()               the main diagonal and whole rows at equal distances
    magnitude_mask()            the largest |W|
    gradient_mask(gradients)    the largest |gradient|
    snip_mask(gradients)        the largest |W * gradient|

The gradients come from `calibration_gradients`: those of the target weights, summed with their signs over some batches
of the training data (8 to 64; the paper does not say how many, nor whether signed: this is our reading). The budget is
PEFT's, the numbers of a LoRA of rank r: the paper's 1 % of a square matrix n wide is r = n / 200. `shira_switch` puts
trained entries into the base weight and back, and has the paper's figures.

As a plain LoRA: only squeezed. The update has full rank and a flat spectrum, so a squeeze loses much of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.lift import largest
from lora_squeeze.methods.modes import evaluating

Mask = Callable[..., Tensor]
Loss = Callable[[nn.Module, Any], Tensor]


def set_mask(config: Any, name: str, mask: Mask) -> Any:
    """Give PEFT's configuration a mask.

    Args:
        config: a `ShiraConfig`; changed.
        name: that adapter_config.json shall have as `mask_type`; PEFT reads the places from the file, not the mask.
        mask: one of this module, or f(base_layer, r, **kwargs) -> 0 and 1 of the weight's shape. To pickle the model,
            f must be a function of a module, as these are.

    Returns:
        The configuration.

    Example:
        >>> config = set_mask(ShiraConfig(r=8, target_modules=["q_proj"]), "wm", magnitude_mask())  # doctest: +SKIP
        >>> model = get_peft_model(model, config)  # doctest: +SKIP
    """
    config.mask_type, config.mask_fn = name, mask
    return config


def struct_mask() -> Mask:
    """The main diagonal, which gives the rank, and whole rows at equal distances; the last row is cut to the budget."""
    return _struct


def magnitude_mask(part: int = 0) -> Mask:
    """The largest |W|, the paper's WM.

    Args:
        part: 0 takes the largest, 1 those that come after them, and so on: masks that do not overlap, one for each of
            several tasks whose adapters will be added.
    """
    return partial(_by_score, _size, part)


def gradient_mask(gradients: Mapping[int, Tensor], part: int = 0) -> Mask:
    """The largest |gradient|.

    Args:
        gradients: of `calibration_gradients`, on the model that the adapter is put on.
        part: as in `magnitude_mask`.
    """
    return partial(_by_score, partial(_gradient_size, gradients), part)


def snip_mask(gradients: Mapping[int, Tensor], part: int = 0) -> Mask:
    """The largest |W * gradient|: entries without which the loss would change most.

    Args:
        gradients: of `calibration_gradients`, on the model that the adapter is put on.
        part: as in `magnitude_mask`.
    """
    return partial(_by_score, partial(_sensitivity, gradients), part)


def calibration_gradients(
    model: nn.Module, batches: Iterable[Any], targets: Iterable[str], loss: Loss | None = None
) -> dict[int, Tensor]:
    """Gradients of the base model's weights, summed over batches of the training data.

    Args:
        model: before `get_peft_model`. It is in eval mode for the time of this call; parameters, their gradients and
            `requires_grad` are afterwards what they were.
        batches: what `loss` takes; never the data that the adapter is tested on.
        targets: names of the layers as in `target_modules`, whole or the last parts.
        loss: of model and batch; default `model(**batch).loss`.

    Returns:
        id of the layer -> gradient (out, in) in float32 on the CPU. The ids are those of this model's layers: PEFT
        puts its own around them, and hands them to the mask.

    Raises:
        LoraSqueezeError: no target, no batch, or a target that the loss does not depend on.

    Notes:
        One dense gradient of each target is in memory.
    """
    ends = tuple(targets)
    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(name == end or name.endswith(f".{end}") for end in ends)
    }
    if not found:
        raise LoraSqueezeError(f"no linear layer of the model is called {' or '.join(ends)}; name target_modules")
    parameters = list(model.parameters())
    wanted = [p.requires_grad for p in parameters]
    weights = [module.weight for module in found.values()]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        with evaluating(model):
            sums = _summed(model, weights, batches, loss or (lambda model, batch: model(**batch).loss))
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
    for name, gradient in zip(found, sums, strict=True):
        if gradient is None:
            raise LoraSqueezeError(f"{name}: the loss does not depend on it; leave it out, or give batches that use it")
    return {id(module): gradient for module, gradient in zip(found.values(), sums, strict=True) if gradient is not None}


def _summed(model: nn.Module, weights: list[Tensor], batches: Iterable[Any], loss: Loss) -> list[Tensor | None]:
    sums: list[Tensor | None] = [None] * len(weights)
    count = 0
    for count, batch in enumerate(batches, start=1):  # noqa: B007 (the count is of use)
        value = loss(model, batch)
        if not value.requires_grad:  # it depends on none of them
            continue
        for number, gradient in enumerate(torch.autograd.grad(value, weights, allow_unused=True)):
            if gradient is not None:
                before, new = sums[number], gradient.float().cpu()
                sums[number] = new if before is None else before + new
    if not count:
        raise LoraSqueezeError("there is no batch to take gradients of; give some of the training data")
    return sums


def _struct(base_layer: nn.Module, r: int, **kwargs: Any) -> Tensor:
    weight = _weight(base_layer)
    out, columns = weight.shape
    chosen = torch.eye(out, columns, dtype=torch.bool)
    rest = _budget(weight, r) - int(chosen.sum())
    for row in _spread(out, rest, columns - chosen.sum(1)):
        free = (~chosen[row]).nonzero().flatten()[:rest]
        chosen[row, free] = True
        rest -= len(free)
    return chosen.to(weight)


def _by_score(
    score: Callable[[nn.Module], Tensor], part: int, base_layer: nn.Module, r: int, **kwargs: Any
) -> Tensor:  # fmt: skip
    weight = _weight(base_layer)
    count = _budget(weight, r)
    if (part + 1) * count > weight.numel():
        raise LoraSqueezeError(
            f"part {part} of {count} entries each is beyond the {weight.numel()} of a weight of "
            f"{tuple(weight.shape)}; lower r or use fewer parts"
        )
    chosen = torch.zeros(weight.numel(), device=weight.device, dtype=weight.dtype)
    chosen[largest(score(base_layer), count, part * count).to(weight.device)] = 1
    return chosen.view(weight.shape)


def _size(layer: nn.Module) -> Tensor:
    return _weight(layer).abs()


def _gradient_size(gradients: Mapping[int, Tensor], layer: nn.Module) -> Tensor:
    return _gradient(gradients, layer).abs()


def _sensitivity(gradients: Mapping[int, Tensor], layer: nn.Module) -> Tensor:
    return (_weight(layer).float().cpu() * _gradient(gradients, layer)).abs()


def _budget(weight: Float[Tensor, "out in"], r: int) -> int:
    count = r * sum(weight.shape)
    if count > weight.numel():
        raise LoraSqueezeError(
            f"r = {r} asks for {count} entries of a weight {tuple(weight.shape)} that has {weight.numel()}; lower r"
        )
    return count


def _spread(out: int, rest: int, free: Tensor) -> list[int]:
    """The fewest rows at equal distances that together have room for the rest, by the room of each row."""
    grids = ([number * out // rows for number in range(rows)] for rows in range(1, out + 1))
    return next(grid for grid in grids if int(free[grid].sum()) >= rest)


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight.detach()
    return weight


def _gradient(gradients: Mapping[int, Tensor], layer: nn.Module) -> Tensor:
    if id(layer) not in gradients:
        raise LoraSqueezeError(
            f"there is no gradient of this {layer}; take them with calibration_gradients of the same model and targets"
        )
    return gradients[id(layer)]
