"""Distillation from an adapter into its squeezed self: the loss, the two adapters of one model, what is never read."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from folder_cases import tree
from peft import PeftModel
from torch import Tensor
from train_cases import (
    RANK,
    Place,
    conversations,
    examples,
    private_cache,
    tensors,
    tokenizer,
    write_adapter,
    write_rows,
)
from transformers import AutoModelForCausalLM
from trl.trainer.sft_config import SFTConfig

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.training.distill import (
    IGNORED,
    TEACHER,
    DistillTrainer,
    add_teacher,
    as_teacher,
    complete_prompts,
    kl_divergence,
    prompts_of,
)
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.sft import train


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("distill")
    with private_cache(folder / "cache"):
        made = Place(folder).written()
        write_rows(folder / "texts.jsonl", [{"text": row["prompt"] + row["completion"]} for row in examples(48)])
        yield made


def pair(place: Place, adapter: str = "adapter") -> Any:
    """The squeezed adapter and its teacher on one base model."""
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    model = PeftModel.from_pretrained(base, place.folder / adapter, is_trainable=True)
    squeeze_(model, RANK)
    add_teacher(model, str(place.folder / adapter))
    return model


def parts(model: Any) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Copies of the parameters of student, teacher and base."""
    found: tuple[dict[str, Tensor], ...] = ({}, {}, {})
    for name, parameter in model.named_parameters():
        owner = 0 if ".default" in name else 1 if f".{TEACHER}" in name else 2
        found[owner][name] = parameter.detach().clone()
    return found  # type: ignore[return-value]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logits_of(place: Place, adapter: Path) -> Tensor:
    """Logits over held-out texts, position by position."""
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    model = PeftModel.from_pretrained(base, adapter).eval()
    ids = torch.tensor([tokenizer()(row["prompt"] + row["completion"])["input_ids"] for row in examples(24, seed=2)])
    with torch.no_grad():
        return model(input_ids=ids).logits[:, :-1].flatten(0, 1)


def divergence(expected: Tensor, found: Tensor) -> float:
    """KL by its definition."""
    p, q = expected.double().softmax(-1), found.double().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


# --- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_divergence_is_that_of_the_definition(temperature: float) -> None:
    teacher, student = torch.randn(7, 11) * 3, torch.randn(7, 11)
    p, q = (teacher.double() / temperature).softmax(-1), (student.double() / temperature).softmax(-1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(kl_divergence(teacher, student, temperature), expected.float(), rtol=1e-5, atol=1e-6)


def test_the_divergence_of_equals_is_zero_and_pulls_nowhere() -> None:
    student = torch.randn(5, 9, requires_grad=True)
    found = kl_divergence(student.detach() + 2.5, student)
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros(5), atol=1e-6, rtol=0.0)
    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.zeros(5, 9), atol=1e-6, rtol=0.0)


def test_no_gradient_reaches_the_teacher() -> None:
    teacher, student = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    kl_divergence(teacher, student).sum().backward()
    assert teacher.grad is None and student.grad is not None


# --- two adapters of one model --------------------------------------------------------------------------------------


def test_the_teacher_is_the_source_adapter_and_the_student_the_squeezed_one(place: Place) -> None:
    model = pair(place)
    ids = torch.tensor([tokenizer()(row["prompt"])["input_ids"] for row in examples(4)])
    plain = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    source = PeftModel.from_pretrained(plain, place.folder / "adapter").eval()
    with torch.no_grad():
        expected = source(input_ids=ids).logits
        student = model.eval()(input_ids=ids).logits
        with as_teacher(model):
            assert torch.equal(model(input_ids=ids).logits, expected)
        assert torch.equal(model(input_ids=ids).logits, student) and not torch.allclose(student, expected)


def test_only_the_student_is_trainable_before_inside_and_after_the_teachers_turn(place: Place) -> None:
    model = pair(place).train()

    def trainable() -> set[str]:
        return {name.rsplit(".", 2)[-2] for name, p in model.named_parameters() if p.requires_grad}

    assert trainable() == {"default"}
    with pytest.raises(KeyError), as_teacher(model):
        assert trainable() == set() and not model.training and not torch.is_grad_enabled()
        raise KeyError
    assert trainable() == {"default"} and model.training and model.active_adapter == "default"


def arguments(folder: Path, **changes: Any) -> SFTConfig:
    return SFTConfig(
        output_dir=str(folder), learning_rate=1e-2, report_to=[], bf16=False, save_strategy="no", disable_tqdm=True,
        dataloader_pin_memory=False, logging_steps=1,
        **{"per_device_train_batch_size": 8, "max_steps": 3, "activation_checkpointing": False, **changes},
    )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_moves_the_student_only(place: Place, tmp_path: Path, checkpointing: bool) -> None:
    write_adapter(place.folder / "dropping", dropout=0.5)
    model = pair(place, "dropping")
    student, teacher, base = parts(model)
    rows = Dataset.from_list([{"text": row["prompt"] + row["completion"]} for row in examples(16)])
    trainer = DistillTrainer(
        model=model, args=arguments(tmp_path, activation_checkpointing=checkpointing), train_dataset=rows,
        processing_class=tokenizer(),
    )  # fmt: skip
    trainer.train()
    after = parts(model)
    assert same(teacher, after[1]) and same(base, after[2])
    assert all(not torch.equal(value, after[0][name]) for name, value in student.items())
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for name, p in model.named_parameters() if ".default" in name}


def test_the_loss_is_the_mean_divergence_over_the_tokens_that_count(place: Place, tmp_path: Path) -> None:
    """Whatever the labels say; also over several batches per step."""
    model = pair(place).eval()
    rows = [{"input_ids": [7, 8, 9, 4, 7], "labels": [IGNORED, IGNORED, 1, 1, 1]},
            {"input_ids": [9, 8, 7], "labels": [5, 5, 5]},
            {"input_ids": [10, 11, 12, 2], "labels": [IGNORED, 3, IGNORED, 3]}]  # fmt: skip
    total = count = 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            student = model(input_ids=ids).logits[0]
            with as_teacher(model):
                teacher = model(input_ids=ids).logits[0]
        for at, label in enumerate(row["labels"][1:]):
            if label != IGNORED:
                total, count = total + divergence(teacher[at : at + 1], student[at : at + 1]), count + 1
    args = arguments(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=3, max_steps=1)
    data = Dataset.from_list(rows)
    trainer = DistillTrainer(
        model=model, args=args, train_dataset=data, eval_dataset=data, processing_class=tokenizer()
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)
    trainer.train()
    assert trainer.state.log_history[-2]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_model_without_a_teacher_is_refused(place: Place, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(place.folder / "model")
    model = PeftModel.from_pretrained(base, place.folder / "adapter", is_trainable=True)
    rows = Dataset.from_list([{"text": "a b"}])
    with pytest.raises(LoraSqueezeError, match=r"no adapter 'teacher'; load it with add_teacher"):
        DistillTrainer(model=model, args=arguments(tmp_path), train_dataset=rows, processing_class=tokenizer())


# --- what the teacher answers ---------------------------------------------------------------------------------------


def test_answers_are_those_of_a_plain_greedy_loop(place: Place) -> None:
    model, words = pair(place), tokenizer()
    prompts = [row["prompt"] for row in examples(6)] + ["a", "b c d e"]
    rows = complete_prompts(model, words, prompts, new_tokens=5, max_length=20, batch_size=3)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = words(prompt)["input_ids"]
        start = len(ids)
        with as_teacher(model):
            while len(ids) < start + 5 and (len(ids) == start or ids[-1] != words.eos_token_id):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert row == {"input_ids": ids, "labels": [IGNORED] * start + ids[start:]}
    assert model.active_adapter == "default"


def test_an_answer_ends_with_the_token_that_ends_it(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = pair(place), tokenizer()
    (row,) = complete_prompts(model, words, ["a b ="], new_tokens=6, max_length=20, batch_size=1)
    second = row["input_ids"][4]
    model.generation_config.eos_token_id = [words.eos_token_id, second]
    (cut,) = complete_prompts(model, words, ["a b ="], new_tokens=6, max_length=20, batch_size=1)
    end = 3 + row["input_ids"][3:].index(second) + 1
    assert cut["input_ids"] == row["input_ids"][:end] and end < len(row["input_ids"])


def test_prompts_that_do_not_fit_are_left_out_and_none_at_all_is_refused(place: Place) -> None:
    model, words = pair(place), tokenizer()
    rows = complete_prompts(model, words, ["a b c d", "", "a b"], new_tokens=2, max_length=5, batch_size=4)
    assert [row["input_ids"][:2] for row in rows] == [words("a b")["input_ids"]]
    with pytest.raises(LoraSqueezeError, match=r"none of 1 prompts has from 1 to 1 tokens, the length of 5 less 4 new"):
        complete_prompts(model, words, ["a b"], new_tokens=4, max_length=5, batch_size=4)


def test_conversations_are_asked_without_the_answer_at_their_end() -> None:
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = {"messages": [[user, answer], [user], [user, answer, user, answer, answer], [answer]]}
    assert prompts_of(rows, ("messages",)) == [[user], [user], [user, answer, user], []]
    assert prompts_of({"prompt": ["a", [user, answer]]}, ("prompt",)) == ["a", [user]]


# --- the whole way --------------------------------------------------------------------------------------------------


def test_the_student_comes_closer_to_the_teacher_on_texts_that_it_has_not_seen(place: Place, tmp_path: Path) -> None:
    before = tree(place.folder / "adapter"), tree(place.folder / "model")
    texts = place.folder / "texts.jsonl"
    trained = train(place.continued(tmp_path / "out", data=texts, distill=True, steps=24, eval_data=str(texts)))
    lora_squeeze.load(place.folder / "adapter").squeeze(rank=RANK).save(tmp_path / "plain")
    teacher = logits_of(place, place.folder / "adapter")
    plain = divergence(teacher, logits_of(place, tmp_path / "plain"))
    ours = divergence(teacher, logits_of(place, tmp_path / "out"))
    assert ours < 0.75 * plain
    assert trained.evaluations[24] < 0.6 * trained.losses[1]
    assert {t.shape[0] for name, t in tensors(tmp_path / "out").items() if "lora_A" in name} == {RANK}
    assert not list(tmp_path.glob("out/teacher*")), "the output is the student alone"
    assert (tree(place.folder / "adapter"), tree(place.folder / "model")) == before


@pytest.mark.parametrize("form", ["prompt", "messages"])
def test_labels_are_not_used(place: Place, tmp_path: Path, form: str) -> None:
    """Bit for bit the same adapter, whatever the data give as answers."""

    def rows(answer: str | None) -> list[dict[str, Any]]:
        if form == "prompt":
            found: list[dict[str, Any]] = [{"prompt": row["prompt"]} for row in examples(16)]
            return found if answer is None else [{**row, "completion": answer, "labels": [3]} for row in found]
        chats = conversations(16)
        for row in chats:
            row["messages"][1:] = [] if answer is None else [{"role": "assistant", "content": answer}]
        return chats

    for name, answer in (("none", None), ("some", "p p p p")):
        data = write_rows(tmp_path / f"{name}.jsonl", rows(answer))
        train(place.continued(tmp_path / name, data=data, distill=True, generate=4, steps=2, learning_rate=1e-2))
    assert same(tensors(tmp_path / "none"), tensors(tmp_path / "some"))


def test_a_distillation_resumes_too(place: Place, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(step: int, steps: int, logged: Any) -> None:
        if step == 3:
            raise Stop

    def settings(name: str, **changes: Any) -> Any:
        return place.continued(tmp_path / name, distill=True, generate=4, steps=4, save_steps=2, **changes)

    train(settings("whole"))
    with pytest.raises(Stop):
        train(settings("cut"), stop)
    train(settings("cut", resume=True))
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "cut"))
