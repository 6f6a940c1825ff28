"""The training loop of small problems: any model and loss, with the controller of the model's method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.methods.control import controller_for, parameter_groups

Loss = Callable[[Any, Any], Tensor]


def fit(
    model: nn.Module,
    loss: Loss,
    batches: Sequence[Any],
    rate: float,
    *,
    controlled: bool = True,
    decay: float = 0.0,
) -> list[float]:
    """One step of Adam for each batch, at a rate that falls to zero in half a cosine; returns the losses.

    Args:
        model: whose parameters that ask for gradients are trained.
        loss: of model and batch.
        batches: one for each step; the same one many times for a problem without noise.
        rate: the first learning rate.
        controlled: whether the model is PEFT's, so that its method's controller and its own rates are used.
        decay: weight decay, as AdamW's.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = parameter_groups(model, rate, weight_decay=decay) if controlled else trained
    optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    controller = controller_for(model, len(batches), optimizer) if controlled else None
    model.train()
    losses = []
    for batch in batches:
        if controller is not None:
            controller.before_forward()
        value = loss(model, batch)
        value.backward()
        if controller is not None:
            controller.before_step()
        optimizer.step()
        if controller is not None:
            controller.after_step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(value.item())
    if controller is not None:
        controller.finish()
    model.eval()
    return losses
