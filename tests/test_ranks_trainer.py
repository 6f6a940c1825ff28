"""Every method that finds ranks in a real trainer: it trains, resumes and ends as a plain LoRA of the same function."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import drawn_from
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import lora_squeeze
import lora_squeeze.methods.ranks
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.callback import ControllerCallback
from lora_squeeze.methods.control import controller_for, parameter_groups
from lora_squeeze.training.callback import SqueezeCallback
from lora_squeeze.training.inplace import squeeze_

STEPS, CUT = 8, 4


@dataclass(frozen=True)
class Method:
    """One method.

    Args:
        name: as registered.
        settings: of its configuration, beside r and the targets.
        decay: weight decay.
    """

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    decay: float = 0.0


METHODS = [
    Method("maestro", {"lasso": 1e-3, "threshold": 0.005, "shrinks": 4}),
    Method(
        "blora",
        {"gates": 0.0, "warmup": 0.25, "penalty": 0.1, "gates_lr": 0.5},
    ),
    Method("diffora", {"search": 0.7}),
    Method("dylora"),
    Method("matryoshka"),
    Method(
        "sora",
        {"gate_init": "normal", "threshold": [0.5, 2.0], "times_lr": True, "l1": 0.1, "gates_lr": 3e-2},
        decay=0.1,
    ),
    Method("trp", {"period": 3, "energy": 0.8}),
    Method("trp", {"form": "factors", "period": 3, "energy": 0.8}),
]


def llama() -> LlamaForCausalLM:
    with drawn_from(0):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=16,
            )
        ).eval()  # fmt: skip


def ids() -> Tensor:
    return torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(1))


def trained(method: Method, folder: Path, checkpoint: Path | None = None) -> Any:
    """After a whole training, from its start or from a checkpoint on."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.name.upper())]
    model = get_peft_model(
        llama(), config(r=4, target_modules=["q_proj", "v_proj", "up_proj"], task_type="CAUSAL_LM", **method.settings)
    )  # fmt: skip
    args = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, learning_rate=1e-2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, save_strategy="steps", save_steps=CUT, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, weight_decay=method.decay))
    data: Any = [{"input_ids": row, "labels": row} for row in ids()]
    trainer = Trainer(model, args, train_dataset=data, callbacks=[ControllerCallback()], optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return model.eval()


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
def test_a_trainer_trains_resumes_and_ends_as_a_plain_lora(method: Method, tmp_path: Path) -> None:
    model = trained(method, tmp_path / "run")
    with torch.no_grad():
        wanted = model(ids()).logits
        assert (wanted - llama()(ids()).logits).abs().max() > 1e-3
    resumed = trained(method, tmp_path / "again", tmp_path / "run" / f"checkpoint-{CUT}")
    for (name, found), expected in zip(resumed.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    model.save_pretrained(tmp_path / "method")
    lora_squeeze.convert(load(tmp_path / "method", base=llama()), "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(llama(), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids()).logits, wanted, rtol=1e-5, atol=1e-5)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=1e-2, per_device_train_batch_size=2,
        save_strategy="steps", save_steps=CUT, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        remove_unused_columns=False,
    )  # fmt: skip
    return TrainingArguments(**(settings | more))


def run(folder: Path, model: Any, callbacks: list[Any], checkpoint: Path | None = None, **more: Any) -> Trainer:
    """A whole training with one optimiser for all that is trained."""
    data: Any = [{"input_ids": row, "labels": row} for row in ids()]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    trainer = Trainer(
        model, arguments(folder, **more), train_dataset=data, callbacks=callbacks, optimizers=(optimizer, None),
        eval_dataset=data,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def sora(threshold: Any = 0.01) -> Any:
    config = lora_squeeze.methods.ranks.SoraConfig(r=4, target_modules=["q_proj"], threshold=threshold)
    with drawn_from(0):
        return get_peft_model(llama(), config)


@pytest.mark.parametrize("restored", [False, True])
def test_each_of_several_callbacks_finds_its_own_state(tmp_path: Path, restored: bool) -> None:
    """The trainer trains the first adapter alone after it has loaded a checkpoint; both controllers go on."""

    def go(folder: Path, checkpoint: Path | None = None) -> dict[str, int]:
        model = sora()
        model.add_adapter("other", lora_squeeze.methods.ranks.SoraConfig(r=4, target_modules=["v_proj"]))
        model.base_model.set_adapter(["default", "other"])
        callbacks = [ControllerCallback("default"), ControllerCallback("other")]
        more = {"restore_callback_states_from_checkpoint": restored}
        trainer = run(folder, model, callbacks, checkpoint, **more)
        found = [one for one in trainer.callback_handler.callbacks if isinstance(one, ControllerCallback)]
        return {one.adapter: one._made.steps_done for one in found}

    assert go(tmp_path / "run") == {"default": STEPS, "other": STEPS}
    assert go(tmp_path / "again", tmp_path / "run" / f"checkpoint-{CUT}") == {"default": STEPS, "other": STEPS}


def test_a_checkpoint_without_the_controllers_state_is_gone_on_with_and_told_of(tmp_path: Path) -> None:
    run(tmp_path / "alone", sora(), [])
    callback = ControllerCallback()
    with pytest.warns(UserWarning, match=f"without the controller of adapter 'default': it begins at step {CUT} of"):
        run(tmp_path / "led", sora(), [callback], tmp_path / "alone" / f"checkpoint-{CUT}")
    assert callback._made.steps_done == STEPS
    again = ControllerCallback()
    run(tmp_path / "again", sora(), [again], tmp_path / "led" / f"checkpoint-{STEPS}")
    assert again._made.steps_done == STEPS


class Second(TrainerCallback):
    """The checkpoint of the second step is the best."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_place"] = abs(state.global_step - 2)


BEST = {
    "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True,
    "metric_for_best_model": "eval_place", "greater_is_better": False,
}  # fmt: skip


@pytest.mark.parametrize("squeezed", [False, True])
@pytest.mark.parametrize(
    "method",
    [*METHODS, Method("blora", {"warmup": 0.5}), Method("diffora", {"search": 0.7, "share_unselected": False})],
    ids=lambda method: method.name,
)
def test_the_best_checkpoint_is_what_it_was(method: Method, squeezed: bool, tmp_path: Path) -> None:
    """With `SqueezeCallback` in the list, it is squeezed then."""
    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.name.upper())]
    model = get_peft_model(llama(), config(r=4, target_modules=["q_proj", "v_proj", "up_proj"], **method.settings))
    callbacks = [Second(), ControllerCallback(), *([SqueezeCallback(2, mode="post")] if squeezed else [])]
    trainer = run(tmp_path, model, callbacks, **BEST)
    assert str(trainer.state.best_model_checkpoint).endswith("checkpoint-2")
    best = PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-2", is_trainable=True).eval()
    if squeezed:
        squeeze_(best, 2)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids()).logits, best(ids()).logits, rtol=0, atol=1e-6 * squeezed)
    model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(llama(), tmp_path / "saved").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, best(ids()).logits, rtol=0, atol=1e-6 * squeezed)


def test_a_best_checkpoint_of_before_the_change_to_a_lora_is_told_of(tmp_path: Path) -> None:
    squeezing = SqueezeCallback(2, mode="cont", last_steps=4)
    with pytest.warns(UserWarning, match="checkpoint-2 is of SORA, and the adapter 'default' has become a LoRA since"):
        run(tmp_path, sora(), [Second(), ControllerCallback(), squeezing], **BEST)


@pytest.mark.parametrize("method", METHODS, ids=[method.name for method in METHODS])
def test_training_without_the_controller_is_warned_of_once(method: Method) -> None:
    def model() -> Any:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(method.name.upper())]
        return get_peft_model(llama(), config(r=4, target_modules=["q_proj"], **method.settings)).train()

    def said(live: Any) -> list[str]:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            live(ids())
        return [str(warning.message) for warning in found if "without its controller" in str(warning.message)]

    alone, led = model(), model()
    with torch.no_grad():
        assert said(alone) == []
    expected = [] if method.name == "matryoshka" else [f"so as something else than {method.name}: add"]
    told = said(alone)
    assert len(told) == len(expected)
    assert all(words in message for words, message in zip(expected, told, strict=True))
    assert said(alone) == []
    controller = controller_for(led, STEPS)
    assert said(led) == []
    assert controller.steps_done == 0
