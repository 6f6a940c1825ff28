"""SqueezeCallback in the trainers of TRL, on a tiny model with a tokenizer made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from peft_cases import llama
from peft_models import seeded
from tokenizers import Tokenizer, models, pre_tokenizers
from training_cases import SOURCE, STEPS, TARGET, TARGETS
from transformers import PreTrainedTokenizerFast

import lora_squeeze
from lora_squeeze.training.callback import SqueezeCallback
from lora_squeeze.training.live import live_modules

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEXTS = [" ".join(WORDS[i:j]) for i in range(8) for j in range(i + 2, 10)]
LORA = LoraConfig(r=SOURCE, lora_alpha=2 * SOURCE, target_modules=TARGETS, task_type="CAUSAL_LM")
# What these libraries say about their own names for each other's settings.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning")


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def arguments(folder: Path, **more: Any) -> dict[str, Any]:
    return dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1, bf16=False, **more,
    )  # fmt: skip


def check(run: Any, callback: SqueezeCallback, folder: Path) -> None:
    """It ended at the target, the loss jump was measured, and what is saved is a plain LoRA of that rank."""
    assert {m.width for m in live_modules(run.model, "default")} == {TARGET}
    assert [(e["step"], e["rank"]) for e in callback.history] == [(7, 4), (10, 2)]
    assert all(e["loss_before"] == e["loss_before"] > 0 for e in callback.history)
    assert all(abs(e["loss_after"] - e["loss_before"]) < 1 for e in callback.history)
    run.save_model(str(folder / "final"))
    saved = lora_squeeze.load(folder / "final")
    assert saved.rank == TARGET
    for module in live_modules(run.model, "default"):
        assert float(saved.update(module.name).distance(module.update())) < 1e-6


@pytest.mark.parametrize("options", [{}, {"packing": True, "max_length": 16}], ids=["plain", "packed"])
def test_sft(tmp_path: Path, options: dict[str, Any]) -> None:
    from trl import SFTConfig, SFTTrainer

    callback = SqueezeCallback(TARGET, data_aware=True)
    run = SFTTrainer(
        seeded(llama), SFTConfig(**arguments(tmp_path, **options)), train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer(), peft_config=LORA, callbacks=[callback],
    )  # fmt: skip
    run.train()
    check(run, callback, tmp_path)
    losses = [e["loss"] for e in run.state.log_history if "loss" in e]
    assert losses[-1] < losses[0]


def test_dpo(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    pairs = {
        "prompt": [" ".join(WORDS[i : i + 2]) for i in range(6)],
        "chosen": [" " + WORDS[i + 2] for i in range(6)],
        "rejected": [" " + WORDS[i] for i in range(6)],
    }
    callback = SqueezeCallback(TARGET)
    run = DPOTrainer(
        seeded(llama), args=DPOConfig(**arguments(tmp_path)), train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer(), peft_config=LORA, callbacks=[callback],
    )  # fmt: skip
    run.train()
    check(run, callback, tmp_path)


def test_grpo(tmp_path: Path) -> None:
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(text.count("three")) for text in completions]

    prompts = {"prompt": [" ".join(WORDS[i : i + 2]) for i in range(8)]}
    callback = SqueezeCallback(TARGET)
    run = GRPOTrainer(
        seeded(llama), args=GRPOConfig(**arguments(tmp_path, num_generations=4, max_completion_length=4)),
        reward_funcs=reward, train_dataset=Dataset.from_dict(prompts),
        processing_class=tokenizer(), peft_config=LORA, callbacks=[callback],
    )  # fmt: skip
    run.train()
    check(run, callback, tmp_path)
    assert torch.isfinite(torch.tensor([e["loss"] for e in run.state.log_history if "loss" in e])).all()
