"""RandLoRA: the paper's scale for PEFT's own tuner (arXiv 2502.00987, ICLR 2025).

    dW = s * sum_j B_j diag(lambda_j) A diag(gamma_j),  j = 1 ... n,  n = ceil(min(out, in) / r)

B_j and A are random and frozen; lambda (r, n) and gamma (n, min(out, in)) are trained, about min(out, in)^2 / r
numbers: fewer with a HIGHER r. PEFT 0.21.2 has it (`RandLoraConfig`), with s = alpha / r. The paper and the authors'
code have s = alpha / r / sqrt(n), where n differs from layer to layer, so no alpha of PEFT's configuration says it;
theirs is 2 r for language models, so s = 2 / sqrt(n), where PEFT's default is 20.

    model = get_peft_model(model, RandLoraConfig(r=64, ...))
    set_paper_scale(model)          # before training, also where a checkpoint of it is to be resumed
    ... train ...
    fold_scale(model)               # before saving: a file has no scale of a layer
    model.save_pretrained(folder)

PEFT flattens A by ranks first and B by bases first, so column q of B is base q // r, number q % r, and row q of A is
number q // n with the scales of base q % n: not literally the sum above but the same with B's random columns in
another order, as in the authors' code.

As a plain LoRA: only squeezed, at full rank. `randlora_ranks` has the paper's variants of lower rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from lora_squeeze.errors import LoraSqueezeError


def set_paper_scale(model: nn.Module, adapter: str = "default", alpha: float | None = None) -> dict[str, float]:
    """Give every RandLoRA layer the scale alpha / r / sqrt(n).

    Args:
        model: with a RandLoRA adapter.
        adapter: its name.
        alpha: above 0; default 2 r, as the paper for language models; about 1 for images.

    Returns:
        Layer -> scale.

    Raises:
        LoraSqueezeError: no layer has the adapter, one is merged, or alpha is not above 0.

    Notes:
        The update stays what it is: what has been trained in lambda is brought to the new scale. The scale is of the
        live layers; a file has PEFT's alone, so call `fold_scale` before saving for use.
    """
    if alpha is not None and alpha <= 0:
        raise LoraSqueezeError(f"alpha must be above 0, got {alpha}")
    scales = {}
    for name, layer in _layers(model, adapter).items():
        r = layer.r[adapter]
        bases = layer.randlora_lambda[adapter].shape[1]
        scales[name] = (2 * r if alpha is None else alpha) / r / math.sqrt(bases)
        _rescale(layer, adapter, scales[name])
    return scales


def fold_scale(model: nn.Module, adapter: str = "default") -> None:
    """Bring the layers back to PEFT's scale, with the difference in lambda: the update stays what it is.

    Args:
        model: with an adapter after `set_paper_scale`.
        adapter: its name.

    Raises:
        LoraSqueezeError: no layer has the adapter, or one is merged.
    """
    layers = _layers(model, adapter)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    for layer in layers.values():
        _rescale(layer, adapter, config.randlora_alpha / config.r)


@torch.no_grad()
def _rescale(layer: Any, adapter: str, scale: float) -> None:
    layer.randlora_lambda[adapter].mul_(layer.scaling[adapter] / scale)
    layer.scaling[adapter] = scale


def _layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    from peft.tuners.randlora.layer import RandLoraLayer

    found: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RandLoraLayer) and adapter in module.randlora_lambda
    }
    if not found:
        raise LoraSqueezeError(f"no layer has a RandLoRA adapter {adapter!r}; make one with get_peft_model")
    merged = [name for name, layer in found.items() if layer.merged]
    if merged:
        raise LoraSqueezeError(f"{merged[0]}: an adapter is merged, so its scale cannot change; unmerge it first")
    return found
