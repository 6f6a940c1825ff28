"""A few steps of a real `transformers.Trainer` on the tiny net of the parameterisations."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from adapters_cases import HIDDEN, IN, Net, batch, drawn_from
from torch import Tensor, nn
from torch.nn import functional


class Regression(nn.Module):
    """The net with a loss, as a trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        with drawn_from(0):
            self.net = Net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss against the labels."""
        return {"loss": functional.mse_loss(self.net(x), labels)}


def train(model: Any, callback: Any, steps: int) -> None:
    """Train with AdamW at a rate that moves tiny nets."""
    from transformers import Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(HIDDEN + IN)
    data = [{"x": x, "labels": torch.randn(8, 3, generator=generator)} for x in batch()]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, learning_rate=2e-2, per_device_train_batch_size=4, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model=model, args=args, train_dataset=data, callbacks=[callback]).train()  # type: ignore[arg-type]
