"""What the harness asks of a base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.evidence.data import Data, Example

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Scores:
    """How a model did on some examples. A unit is what is predicted at once: a token of an answer, or a class.

    Args:
        loss: nats of each unit.
        right: whether the likeliest choice is the right one, by unit.
        confidence: by example, the product of the probabilities of the likeliest choices.
        exact: whether all units of an example are right, by example: greedy decoding then writes the right answer, and
            `confidence` is the probability that the model gives to what it writes.
    """

    loss: Tensor
    right: Tensor
    confidence: Tensor
    exact: Tensor

    @staticmethod
    def of(logits: Tensor, labels: Tensor, ignored: int) -> Scores:
        """Scores from labels (examples, most units) and the logits (units, choices) of those that are not ignored."""
        counted = labels != ignored
        found = logits.float().log_softmax(-1)
        best, choice = found.max(-1)
        gold = labels[counted]
        right = choice == gold
        confidence = best.new_zeros(labels.shape).masked_scatter(counted, best).sum(-1).exp()
        exact = torch.ones_like(counted).masked_scatter(counted, right).all(-1)
        return Scores(-found.gather(-1, gold.unsqueeze(-1)).squeeze(-1), right, confidence, exact)

    @staticmethod
    def join(parts: Sequence[Scores]) -> Scores:
        """Scores of several batches as one."""
        return Scores(*(torch.cat([getattr(part, name) for part in parts]) for name in Scores.__dataclass_fields__))


class Learner(Protocol):
    """A base model, and how it learns a task."""

    name: str
    device: torch.device
    targets: Any  # PEFT's target_modules for plain LoRA
    task_type: str | None
    packs: bool  # whether padding is left out under plain LoRA, where the model can; others may look at whole rows

    @property
    def weights(self) -> str:
        """What the base model's numbers are, in words that are the same wherever these numbers are."""

    @property
    def build(self) -> str | None:
        """Digest of what is trained before, by each machine for itself and a little otherwise; None: nothing is."""

    def attach(self, config: Any, data: Data, seed: int) -> Any:
        """A PEFT model with a fresh adapter; the one before is taken off."""

    def narrow(self, model: Any) -> None:
        """Round frozen weights to the precision of the products, if no result depends on it; see `narrow`."""

    def base_folder(self) -> Path | None:
        """The base model on disk, for methods whose update needs its weights; None: there is none."""

    def batches(self, data: Data, examples: Sequence[Example], size: int) -> list[Batch]:
        """Examples in their order, by batches of one shape; the last one may be smaller."""

    def usable(self, data: Data, examples: Sequence[Example]) -> list[Example]:
        """The examples that fit."""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the model is called with, without labels."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of one batch, in nats a unit."""

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """Scores of one batch."""
