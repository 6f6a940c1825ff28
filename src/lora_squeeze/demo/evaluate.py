"""Loss and accuracy on held-out words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lora_squeeze.demo.task import IGNORED, Batch
from lora_squeeze.demo.train import completion_logits
from lora_squeeze.runtime import autocast


@dataclass(frozen=True)
class Score:
    """How well a model speaks the held-out words.

    Args:
        loss: nats per token of the completion.
        token_accuracy: share of the tokens that are most likely after the right beginning.
        word_accuracy: share of the words that greedy decoding pronounces right from the first token to the end.
    """

    loss: float
    token_accuracy: float
    word_accuracy: float


@torch.no_grad()
def evaluate(
    model: nn.Module, data: Sequence[Batch], device: torch.device, precision: str, report: Callable[[], None]
) -> Score:
    """Measure a model with one forward pass per batch.

    Greedy decoding writes the right completion if and only if the right token is the most likely one after every right
    beginning: the word accuracy needs no decoding.

    Args:
        model: a causal language model of transformers, plain or wrapped by PEFT.
        data: held-out words; rows without any label are not counted.
        device: where the model is.
        precision: number format of the products.
        report: called after each batch.
    """
    model.eval()
    loss, tokens, right_tokens, words, right_words = 0.0, 0, 0, 0, 0
    for batch in data:
        here = batch.to(device)
        with autocast(device, precision):
            logits = completion_logits(model, here)
        counted = here.labels != IGNORED
        right = (logits.argmax(dim=-1) == here.labels) & counted
        loss += cross_entropy(logits.flatten(0, 1), here.labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
        tokens += int(counted.sum())
        right_tokens += int(right.sum())
        words += int(counted.any(dim=1).sum())
        right_words += int(((right == counted).all(dim=1) & counted.any(dim=1)).sum())
        report()
    return Score(loss / tokens, right_tokens / tokens, right_words / words)
