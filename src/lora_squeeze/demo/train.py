"""A plain PyTorch loop around a PEFT model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lora_squeeze.demo.settings import Settings
from lora_squeeze.demo.task import COMPLETION_TOKENS, IGNORED, Batch
from lora_squeeze.runtime import autocast

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Report = Callable[[int, float], None]


def attach_lora(model: nn.Module, settings: Settings) -> Any:
    """A PEFT model with fresh LoRA factors on every linear layer of every block.

    PEFT draws A from torch's global generator; it is seeded for that moment and left as it was found.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        return get_peft_model(model, config)


def completion_logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Logits at the places that predict the completion, batch x COMPLETION_TOKENS x vocabulary, float32."""
    logits: torch.Tensor = model(
        input_ids=batch.ids, attention_mask=batch.mask, logits_to_keep=COMPLETION_TOKENS + 1, use_cache=False
    ).logits
    return logits[:, :-1].float()


def train(
    model: nn.Module, data: Sequence[Batch], settings: Settings, device: torch.device, report: Report
) -> list[float]:
    """Train the parameters that require a gradient, one step per batch, with AdamW and a warm-up then cosine curve.

    Args:
        model: a causal language model of transformers, wrapped by PEFT.
        data: one batch per step.
        settings: learning rate, warm-up, precision.
        device: where the model is.
        report: called after each step with the number of steps done and the loss.

    Returns:
        The training loss of each step, nats per token of the completion.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    model.train()
    losses: list[float] = []
    for step, batch in enumerate(data):
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _curve(step, len(data), settings.warmup)
        here = batch.to(device)
        with autocast(device, settings.precision):
            logits = completion_logits(model, here)
        loss = cross_entropy(logits.flatten(0, 1), here.labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        report(step + 1, losses[-1])
    return losses


def _curve(step: int, steps: int, warmup: float) -> float:
    """Share of the highest learning rate: a line up in the first `warmup * steps` steps, then half a cosine to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1.0 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
