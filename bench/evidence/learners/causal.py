"""Language models that write answers: the loss and the scores are those of the answer's tokens and its end."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from bench.evidence.data import Data, Example
from bench.evidence.learners.base import Batch, Scores
from bench.evidence.learners.narrow import Wide, is_plain, narrow, widen
from bench.evidence.learners.packed import pack
from lora_squeeze.runtime import autocast, choose_device, choose_precision, quiet_libraries

IGNORED = -100


class SmolLM2:
    """SmolLM2-135M-Instruct.

    Every example has one shape: the prompt is padded on the left and the answer on the right. With `packs`, plain
    LoRA sees the examples of a batch one after another without padding. Only the answers' logits are computed.
    """

    name = "smollm2"
    task_type: str | None = "CAUSAL_LM"
    targets: Any = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    device = choose_device(None)
    build: str | None = None
    packs = False

    def __init__(self) -> None:
        self._base: Any = None
        self._adapted: Any = None
        self._wide: Wide = []

    @property
    def weights(self) -> str:
        """See `Learner`."""
        from lora_squeeze.demo.model import find_model

        return find_model().origin

    def attach(self, config: Any, data: Data, seed: int) -> Any:
        """See `Learner`. The base is loaded again after a method that changes its weights."""
        from peft import get_peft_model

        widen(self._wide)
        self._wide = []
        if self._adapted is not None:
            self._base = self._adapted.unload() if _leaves_base_alone(self._adapted) else None
            self._adapted = None
        if self._base is None:
            self._base = self._load().to(self.device).eval()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            self._adapted = get_peft_model(self._base, config)
        return self._adapted

    def narrow(self, model: Any) -> None:
        """See `Learner`."""
        self._wide = narrow(model, self.device)

    def _load(self) -> Any:
        from transformers import AutoModelForCausalLM

        from lora_squeeze.demo.model import find_model

        with quiet_libraries():  # attention of short sequences is faster on a CPU without the fused kernel
            return AutoModelForCausalLM.from_pretrained(
                find_model().path, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
            )

    def base_folder(self) -> Path | None:
        """See `Learner`."""
        from lora_squeeze.demo.model import find_model

        return find_model().path

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        from lora_squeeze.demo.model import find_model

        return AutoTokenizer.from_pretrained(find_model().path, local_files_only=True)

    def _tokens(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    @cached_property
    def _end(self) -> int:
        found: int = self._tokenizer.eos_token_id
        return found

    def _parts(self, example: Example) -> tuple[list[int], list[int]]:
        return self._tokens(example.prompt), [*self._tokens(f" {example.answer}"), self._end]

    def _room(self, data: Data) -> int:
        """Tokens before the answer."""
        return data.prompt_tokens

    def usable(self, data: Data, examples: Sequence[Example]) -> list[Example]:
        """See `Learner`."""
        room = self._room(data)
        parts = ((example, *self._parts(example)) for example in examples)
        return [e for e, p, a in parts if len(p) <= room and len(a) <= data.answer_tokens]

    def batches(self, data: Data, examples: Sequence[Example], size: int) -> list[Batch]:
        """See `Learner`."""
        return [self._batch(data, examples[start : start + size]) for start in range(0, len(examples), size)]

    def _batch(self, data: Data, examples: Sequence[Example]) -> Batch:
        ids, masks, labels = [], [], []
        for example in examples:
            prompt, answer = self._parts(example)
            before, after = self._room(data) - len(prompt), data.answer_tokens - len(answer)
            ids.append([self._end] * before + prompt + answer + [self._end] * after)
            masks.append([0] * before + [1] * (len(prompt) + len(answer)) + [0] * after)
            labels.append(answer + [IGNORED] * after)
        found = {"ids": torch.tensor(ids), "mask": torch.tensor(masks), "labels": torch.tensor(labels)}
        return {name: tensor.to(self.device) for name, tensor in found.items()}

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of the answers' tokens alone, (units, vocabulary): each is told at the place before it."""
        answers = batch["labels"] != IGNORED
        before = torch.zeros_like(batch["mask"], dtype=torch.bool)
        before[:, -answers.shape[1] - 1 : -1] = answers
        with autocast(self.device, choose_precision(self.device)):
            if self._packed(model):
                found: Tensor = model(**pack(batch["ids"], batch["mask"], before), use_cache=False).logits[0]
            else:
                columns = torch.arange(before.shape[1], device=before.device)[-answers.shape[1] - 1 : -1]
                found = model(**self.inputs(batch), logits_to_keep=columns, use_cache=False).logits[answers]
        return found.float()

    def _packed(self, model: nn.Module) -> bool:
        return self.packs and is_plain(model)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Learner`."""
        return {"input_ids": batch["ids"], "attention_mask": batch["mask"]}

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean over the tokens of the answers."""
        labels = batch["labels"]
        return cross_entropy(self._logits(model, batch), labels[labels != IGNORED])

    def score(self, model: nn.Module, batch: Batch) -> Scores:
        """By token of the answers."""
        return Scores.of(self._logits(model, batch), batch["labels"], IGNORED)


class Tiny(SmolLM2):
    """A random Llama of two layers that reads bytes: the bench's own tests run with it in seconds."""

    name = "tiny"
    device = torch.device("cpu")
    weights = "random"

    def _load(self) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = dict(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
        config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return LlamaForCausalLM(config)

    def base_folder(self) -> Path | None:
        """See `Learner`."""
        return None

    def _tokens(self, text: str) -> list[int]:
        return list(text.encode())

    @cached_property
    def _end(self) -> int:
        return 0

    def _parts(self, example: Example) -> tuple[list[int], list[int]]:
        prompt, answer = super()._parts(example)
        return prompt[-8:], answer[:4]  # bytes are many: what fits into any task's room


def _leaves_base_alone(model: Any) -> bool:
    """Whether unloading gives the base back as it was: plain LoRA with its usual start, and no more."""
    from peft import LoraConfig

    config = next(iter(model.peft_config.values()))
    return type(config) is LoraConfig and config.init_lora_weights is True and not config.modules_to_save
