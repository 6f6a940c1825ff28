"""SNELLA: layers compete for a number of entries that falls while training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft_models import seeded
from training_cases import Counting, small_llama
from transformers import Trainer, TrainingArguments

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.snella_budget import allot
from lora_squeeze.methods.callback import ControllerCallback
from lora_squeeze.methods.control import controller_for, deltas_of

SNELLA = METHODS["snella"]
ENTRIES = 4 * 12 * 20  # of the four layers of the tiny net


def model(sparsity: float = 0.0, **settings: Any) -> Any:
    return adapted(SNELLA, sparsity=sparsity, **settings).train()


def budget(
    sparsity: float = 0.9, total_steps: int = 14, interval: int = 2, start: float = 0.0, **settings: Any
) -> Any:  # fmt: skip
    """The controller of a fresh model."""
    rounds = -(-total_steps // interval)
    return controller_for(model(start, final_sparsity=sparsity, rounds=rounds, **settings), total_steps)


def gradients(network: Any) -> None:
    network.zero_grad()
    network(batch()).square().mean().backward()


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (2, 0), (0, 3), (1, 2)])
def test_the_budget_falls_along_a_cubic_curve(warmup: int, cooldown: int) -> None:
    made = budget(start=0.25, total_steps=27, interval=3, warmup=warmup, cooldown=cooldown)
    first, last, E = 0.75 * ENTRIES, ENTRIES - 0.9 * ENTRIES, 8
    assert made.last_round == E == budget(total_steps=25, interval=3).last_round
    curve = [made.entries_in(e) for e in range(E + 1)]
    assert curve == sorted(curve, reverse=True)
    assert curve[: warmup + 1] == [first] * (warmup + 1)
    assert curve[E - cooldown :] == [int(last)] * (cooldown + 1)
    for e in range(warmup, E - cooldown + 1):
        rest = (E - cooldown - e) / (E - cooldown - warmup)
        assert abs(curve[e] - (last + (first - last) * rest**3)) <= 1
    if not warmup and not cooldown:
        assert curve[E // 2] == int(last + (first - last) / 8)


def test_the_layers_have_the_budget_of_every_round_together() -> None:
    made, found = budget(), []
    network = made.model
    for step in range(14):
        found.append(sum(int(delta.kept) for delta in made.deltas.values()))
        assert found[-1] == made.entries_in(step // 2)
        assert all(0 <= int(delta.kept) <= delta.entries for delta in made.deltas.values())
        trained_with = made.sparsity
        gradients(network)
        made.before_step()
        made.after_step()
    assert made.sparsity == trained_with  # nothing moves after the last step
    assert found[0] == ENTRIES
    assert found[-1] == int(ENTRIES - 0.9 * ENTRIES) == sum(int(delta.kept) for delta in made.deltas.values())
    zero = sum(share * delta.entries for share, delta in zip(made.sparsity.values(), made.deltas.values(), strict=True))
    assert zero == pytest.approx(0.9 * ENTRIES, abs=1)
    assert len(set(made.sparsity.values())) > 1


def test_the_shares_are_those_of_the_formula() -> None:
    made = budget(total_steps=100, interval=50)
    network = made.model
    means: dict[Any, Any] = {}
    spreads: dict[Any, Any] = {}
    for step in range(3):
        gradients(network)
        for name, delta in made.deltas.items():
            for side, P in (("u", delta.u), ("v", delta.v)):
                P.grad *= torch.rand(P.shape, generator=torch.Generator().manual_seed(step))
                importance = (P * P.grad).detach().abs()
                key = name, side
                means[key] = 0.85 * means.get(key, 0) + 0.15 * importance
                spreads[key] = 0.85 * spreads.get(key, 0) + 0.15 * (importance - means[key]).abs()
        made.before_step()
        made.after_step()
    scores = {
        name: sum(float((means[name, side] * spreads[name, side]).mean()) for side in "uv") for name in made.deltas
    }
    assert made.shares() == pytest.approx([score / sum(scores.values()) for score in scores.values()], rel=1e-5)


def test_a_layer_of_larger_gradients_gets_more() -> None:
    made = budget(total_steps=4, interval=2)
    for _ in range(2):
        for number, delta in enumerate(made.deltas.values()):
            for factor in (delta.u, delta.v):
                factor.data.fill_(0.5)
                factor.grad = torch.full_like(factor, 1.0 + (number == 2))
        made.before_step()
        made.after_step()
    kept = [int(delta.kept) for delta in made.deltas.values()]
    assert kept[2] > max(kept[:2] + kept[3:])
    assert max(kept[:2] + kept[3:]) - min(kept[:2] + kept[3:]) <= 1


def test_gradients_that_are_none_or_no_numbers_count_as_nothing() -> None:
    made = budget(total_steps=4, interval=2)
    deltas = list(made.deltas.values())
    for bad, delta in zip((float("nan"), float("inf"), -float("inf")), deltas, strict=False):
        delta.u.grad = torch.full_like(delta.u, bad)
    made.before_step()
    made.after_step()
    assert made.shares() == [0.25] * 4
    deltas[3].u.grad = torch.ones_like(deltas[3].u)
    made.before_step()
    made.after_step()
    assert made.shares() == [0, 0, 0, 1]
    assert sum(int(delta.kept) for delta in deltas) == made.entries_in(1)


@given(st.data())
def test_all_is_given_and_nobody_has_more_than_there_is_room(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 1000), min_size=1, max_size=8))
    shares = data.draw(st.lists(st.sampled_from([0.0, 1e-12, 0.1, 0.3, 0.9]), min_size=len(sizes), max_size=len(sizes)))
    total = data.draw(st.integers(0, sum(sizes)))
    found = allot(total, shares, sizes)
    assert sum(found) == total
    assert all(0 <= count <= size for count, size in zip(found, sizes, strict=True))
    for one, other in itertools.permutations(range(len(sizes)), 2):
        if shares[one] > shares[other] and found[one] < sizes[one]:
            assert found[one] >= found[other]


def test_with_room_for_all_each_has_its_share() -> None:
    assert allot(1000, [0.5, 0.3, 0.2], [1000] * 3) == [500, 300, 200]
    assert allot(7, [0.0, 0.0], [100, 100]) in ([4, 3], [3, 4])


def llama(**settings: Any) -> Any:
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return adapted(SNELLA, seeded(small_llama), **{"sparsity": 0.0, **targets, **settings}).train()


def trained(folder: Path, callback: ControllerCallback, network: Any, checkpoint: str | None = None) -> Any:
    args = TrainingArguments(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=16, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="steps", save_steps=7, logging_steps=100, seed=1,
    )  # fmt: skip
    run = Trainer(network, args, train_dataset=Counting(), callbacks=[callback])
    run.train(resume_from_checkpoint=checkpoint)
    return callback.controller


def test_a_trainer_ends_at_the_sparsity_asked_for(tmp_path: Path) -> None:
    network = llama(final_sparsity=0.7, rounds=3, cooldown=1)
    made = trained(tmp_path, ControllerCallback(), network)
    assert (made.steps_done, made.interval, made.last_round) == (12, 4, 2)
    entries = sum(delta.entries for delta in made.deltas.values())
    assert sum(int(delta.kept) for delta in made.deltas.values()) == int(entries - 0.7 * entries)
    assert len(set(made.shares())) == len(made.deltas)
    network.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(seeded(small_llama), tmp_path / "adapter", is_trainable=True)
    assert controller_for(again, 12).sparsity == made.sparsity  # type: ignore[attr-defined]


def test_a_run_taken_up_again_goes_on_in_its_round(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"final_sparsity": 0.7, "rounds": 6}
    whole = trained(tmp_path, ControllerCallback(), llama(**settings))
    resumed, network, seen = ControllerCallback(), llama(**settings), list[int]()
    deltas = deltas_of(network).values()
    hook = network.register_forward_pre_hook(lambda *_: seen.append(sum(int(delta.kept) for delta in deltas)))
    controller = trained(tmp_path, resumed, network, str(tmp_path / "checkpoint-7"))
    hook.remove()
    assert seen == [whole.entries_in(step // 2) for step in range(7, 12)]
    assert controller.steps_done == 12


def test_without_a_final_sparsity_nothing_moves() -> None:
    made: Any = controller_for(model(0.5), 4)
    for _ in range(4):
        gradients(made.model)
        made.before_step()
        made.after_step()
    assert {int(delta.kept) for delta in made.deltas.values()} == {12 * 20 // 2}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"final_sparsity": 0.2}, r"final_sparsity must be from sparsity to below 1, got 0.2"),
        ({"final_sparsity": 1.0}, r"final_sparsity must be from sparsity to below 1, got 1"),
        ({"rounds": 0}, r"rounds must be 1 or more, warmup and cooldown 0 or more, got 0, 0 and 0"),
        ({"cooldown": -1}, r"rounds must be 1 or more, warmup and cooldown 0 or more, got 10, 0 and -1"),
    ],
    ids=["falls", "all", "rounds", "cooldown"],
)
def test_values_that_lead_nowhere_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(0.5, **settings)


def test_rounds_that_do_not_fit_are_refused() -> None:
    with pytest.raises(
        LoraSqueezeError, match=r"14 steps are 1 rounds of 14, too few for a first and a last one, 0 of"
    ):
        budget(interval=14)
    words = r"14 steps are 7 rounds of 2, too few .* 3 of warmup and 3 of cooldown; train longer or change rounds"
    with pytest.raises(LoraSqueezeError, match=words):
        budget(warmup=3, cooldown=3)
