"""A tiny language model with a tokenizer of letters, data that it can learn, and an adapter: all made here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pytest
import safetensors.torch
import torch
from peft import LoraConfig, get_peft_model
from peft_cases import VOCABULARY, llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lora_squeeze.training.sft_settings import TrainSettings

SOURCE_RANK, RANK = 8, 2
LETTERS = "abcdefghijklmnop"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {{ eos_token }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


@contextmanager
def private_cache(folder: Path) -> Iterator[None]:
    """What `datasets` keeps of files that it has read goes here, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "=", "user", "assistant", *LETTERS]
    assert len(words) <= VOCABULARY
    plain = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        chat_template=template,
    )  # fmt: skip


def write_model(folder: Path) -> Path:
    """Weights large enough that the frozen output head can be sure of something."""
    torch.manual_seed(0)
    llama(initializer_range=0.3).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def examples(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Two letters, to be written again."""
    picks = torch.randint(len(LETTERS), (count, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [{"prompt": f"{LETTERS[i]} {LETTERS[j]} =", "completion": f" {LETTERS[i]} {LETTERS[j]}"} for i, j in picks]


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The same as question and answer."""
    return [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in examples(count, seed)
    ]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_adapter(folder: Path, dropout: float = 0.0) -> Path:
    """An adapter of the tiny model at the source rank, far from zero and with a spectrum that falls."""
    torch.manual_seed(0)
    config = LoraConfig(
        r=SOURCE_RANK, lora_alpha=SOURCE_RANK, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"],
        lora_dropout=dropout, task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(llama(initializer_range=0.3), config)
    falling = 0.8 ** torch.arange(SOURCE_RANK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape) * falling)
    model.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


@dataclass(frozen=True)
class Place:
    """A model, data for it, and an adapter of it."""

    folder: Path

    def written(self) -> Place:
        """The same, with everything in it."""
        write_model(self.folder / "model")
        write_adapter(self.folder / "adapter")
        write_rows(self.folder / "train.jsonl", examples(48))
        write_rows(self.folder / "held.jsonl", examples(16, seed=1))
        return self

    def settings(self, output: Path, **changes: Any) -> TrainSettings:
        """A short training of a new adapter."""
        asked: dict[str, Any] = {
            "rank": RANK, "source_rank": SOURCE_RANK, "steps": 12, "learning_rate": 3e-2, "save_steps": 0,
            "gradient_checkpointing": False, "dtype": "float32", **changes,
        }  # fmt: skip
        data = asked.pop("data", self.folder / "train.jsonl")
        return TrainSettings(asked.pop("model", str(self.folder / "model")), str(data), output, **asked)

    def continued(self, output: Path, **changes: Any) -> TrainSettings:
        """A short training of the adapter that is there."""
        adapter = str(self.folder / "adapter")
        return self.settings(output, **{"adapter": adapter, "source_rank": None, **changes})
