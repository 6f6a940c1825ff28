"""A small language model with a LoRA, its data, and loops that train it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import llama
from peft_models import seeded
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_squeeze.schedule import Schedule, make_schedule
from lora_squeeze.training.live import live_modules

SOURCE, TARGET, STEPS = 8, 2, 12
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def small_llama() -> nn.Module:
    return llama(num_hidden_layers=1)


def model(base: Callable[[], nn.Module] = small_llama, **config: Any) -> PeftModel:
    """A fresh LoRA of rank SOURCE on a tiny model, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        settings = {"r": SOURCE, "lora_alpha": 2 * SOURCE, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
        return get_peft_model(seeded(base), LoraConfig(**(settings | config))).train()


def batch(step: int, rows: int = 4) -> dict[str, Tensor]:
    """Sequences that count upwards, from places that depend on the step."""
    generator = torch.Generator().manual_seed(1000 + step)
    first = torch.randint(3, 30, (rows, 1), generator=generator)
    ids = first + torch.arange(8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


class Counting(Dataset[dict[str, Tensor]]):
    """The same sequences, one by one, for the Trainer."""

    def __init__(self, size: int = 64) -> None:
        self.rows = [{key: value[0] for key, value in batch(i, 1).items()} for i in range(size)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


def trained_parameters(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]


def adamw(network: nn.Module, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained_parameters(network), **({"lr": 1e-2, "weight_decay": 0.01} | options))


def train(
    network: nn.Module, optimizer: Any, squeezer: Any, steps: Iterable[int], scheduler: Any = None
) -> list[float]:
    """One optimiser step per number; the loss of each."""
    losses = []
    for step in steps:
        loss = network(**batch(step)).loss
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if squeezer is not None:
            squeezer.step()
    return losses


def widths(network: torch.nn.Module) -> set[int]:
    return {m.width for m in live_modules(network, "default")}


def in_squeeze(steps: int = STEPS) -> Schedule:
    return make_schedule(SOURCE, TARGET, steps, steps="equal")
