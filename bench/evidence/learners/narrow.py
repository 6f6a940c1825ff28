"""Frozen weights in the precision of the products.

Autocast rounds every weight of the base model anew in every pass, to the same numbers. Rounding them once, after the
adapter is on, gives the same losses to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lora_squeeze.runtime import choose_precision

Wide = list[tuple[nn.Module, nn.Parameter]]


def narrow(model: Any, device: torch.device) -> Wide:
    """Round the weights under plain LoRA layers, and the output layer's; an embedding that is tied to it stays.

    Args:
        model: a PEFT model; nothing happens if its method reads the base model's weights, or in float32.
        device: where it computes.

    Returns:
        Layers and their weights as they were, for `widen`.
    """
    from peft.tuners.lora import LoraLayer

    dtype = getattr(torch, choose_precision(device))
    if dtype == torch.float32 or not is_plain(model):
        return []
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    owners = [*(layer.get_base_layer() for layer in layers), model.get_output_embeddings()]
    wide = [(m, m.weight) for m in owners if isinstance(m, nn.Linear) and not m.weight.requires_grad]
    for owner, weight in wide:
        owner.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    return wide


def is_plain(model: nn.Module) -> bool:
    """Whether the adapter is LoRA as first published, on linear layers: it sees each token alone, and no weight."""
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    return bool(layers) and all(type(layer) is Linear and not layer.lora_variant for layer in layers)


def widen(wide: Wide) -> None:
    """Put them back: an adapter that is made on narrow weights would be rounded as well."""
    for owner, weight in wide:
        owner.weight = weight
