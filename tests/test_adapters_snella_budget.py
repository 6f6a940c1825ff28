"""SNELLA: layers compete for a number of entries that falls while training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, net
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from peft_models import seeded
from training_cases import Counting, small_llama
from transformers import Trainer, TrainingArguments

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.snella_budget import SnellaBudget, allot
from lora_squeeze.methods.adapters.snella_callback import SnellaCallback

SNELLA = METHODS["snella"]
ENTRIES = 4 * 12 * 20  # of the four layers of the tiny net


def model(sparsity: float = 0.0, **settings: Any) -> Any:
    return adapted(SNELLA, sparsity=sparsity, **settings).train()


def budget(network: Any, **settings: Any) -> SnellaBudget:
    return SnellaBudget(network, **{"sparsity": 0.9, "total_steps": 14, "interval": 2, **settings})


def gradients(network: Any) -> None:
    network.zero_grad()
    network(batch()).square().mean().backward()


@pytest.mark.parametrize(("warmup", "cooldown"), [(0, 0), (2, 0), (0, 3), (1, 2)])
def test_the_budget_falls_along_a_cubic_curve(warmup: int, cooldown: int) -> None:
    made = budget(model(0.25), total_steps=27, interval=3, warmup=warmup, cooldown=cooldown)
    first, last, E = 0.75 * ENTRIES, ENTRIES - 0.9 * ENTRIES, 8
    assert made.last_round == E == budget(model(), total_steps=25, interval=3).last_round
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
    network = model()
    made, found = budget(network), []
    for step in range(14):
        found.append(sum(int(delta.kept) for delta in made.layers.values()))
        assert found[-1] == made.entries_in(step // 2)
        assert all(0 <= int(delta.kept) <= delta.entries for delta in made.layers.values())
        trained_with = made.sparsity
        gradients(network)
        made.step()
    assert made.sparsity == trained_with  # nothing moves after the last step
    assert found[0] == ENTRIES
    assert found[-1] == int(ENTRIES - 0.9 * ENTRIES) == sum(int(delta.kept) for delta in made.layers.values())
    zero = sum(share * delta.entries for share, delta in zip(made.sparsity.values(), made.layers.values(), strict=True))
    assert zero == pytest.approx(0.9 * ENTRIES, abs=1)
    assert len(set(made.sparsity.values())) > 1


def test_the_shares_are_those_of_the_formula() -> None:
    network = model()
    made = budget(network, total_steps=100, interval=50, beta=0.7, beta_spread=0.6)
    means: dict[Any, Any] = {}
    spreads: dict[Any, Any] = {}
    for step in range(3):
        gradients(network)
        for name, delta in made.layers.items():
            for side, P in (("u", delta.u), ("v", delta.v)):
                P.grad *= torch.rand(P.shape, generator=torch.Generator().manual_seed(step))
                importance = (P * P.grad).detach().abs()
                key = name, side
                means[key] = 0.7 * means.get(key, 0) + 0.3 * importance
                spreads[key] = 0.6 * spreads.get(key, 0) + 0.4 * (importance - means[key]).abs()
        made.step()
    scores = {
        name: sum(float((means[name, side] * spreads[name, side]).mean()) for side in "uv") for name in made.layers
    }
    assert made.shares() == pytest.approx([score / sum(scores.values()) for score in scores.values()], rel=1e-5)


def test_a_layer_of_larger_gradients_gets_more() -> None:
    network = model()
    made = budget(network, total_steps=4, interval=2)
    for _ in range(2):
        for number, delta in enumerate(made.layers.values()):
            for factor in (delta.u, delta.v):
                factor.data.fill_(0.5)
                factor.grad = torch.full_like(factor, 1.0 + (number == 2))
        made.step()
    kept = [int(delta.kept) for delta in made.layers.values()]
    assert kept[2] > max(kept[:2] + kept[3:])
    assert max(kept[:2] + kept[3:]) - min(kept[:2] + kept[3:]) <= 1


def test_gradients_that_are_none_or_no_numbers_count_as_nothing() -> None:
    network = model()
    made = budget(network, total_steps=4, interval=2)
    deltas = list(made.layers.values())
    for bad, delta in zip((float("nan"), float("inf"), -float("inf")), deltas, strict=False):
        delta.u.grad = torch.full_like(delta.u, bad)
    made.step()
    assert made.shares() == [0.25] * 4
    deltas[3].u.grad = torch.ones_like(deltas[3].u)
    made.step()
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


def trainer(folder: Path, callback: SnellaCallback, network: Any, **arguments: Any) -> Trainer:
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=12, per_device_train_batch_size=16, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=100, seed=1,
    )  # fmt: skip
    return Trainer(network, TrainingArguments(**(settings | arguments)), train_dataset=Counting(), callbacks=[callback])


def llama(**settings: Any) -> Any:
    targets = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return adapted(SNELLA, seeded(small_llama), **{"sparsity": 0.0, **targets, **settings}).train()


def test_a_trainer_ends_at_the_sparsity_asked_for(tmp_path: Path) -> None:
    callback = SnellaCallback(0.7, cooldown=1)  # 64 rows in batches of 16: an epoch has 4 steps
    run = trainer(tmp_path, callback, llama())
    run.train()
    made = callback.budget
    assert (made.steps, made.interval, made.last_round) == (12, 4, 2)
    entries = sum(delta.entries for delta in made.layers.values())
    assert sum(int(delta.kept) for delta in made.layers.values()) == int(entries - 0.7 * entries)
    assert len(set(made.shares())) == len(made.layers)
    run.model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(seeded(small_llama), tmp_path / "adapter", is_trainable=True)
    assert budget(again).sparsity == made.sparsity


def test_a_run_taken_up_again_goes_on_in_its_round(tmp_path: Path) -> None:
    whole = SnellaCallback(0.7, interval=2)
    trainer(tmp_path, whole, llama(), save_strategy="steps", save_steps=7).train()
    resumed = SnellaCallback(0.7, interval=2)
    seen: list[int] = []
    network = llama()
    run = trainer(tmp_path, resumed, network)
    hook = network.register_forward_pre_hook(lambda *_: seen.append(sum(map(kept_of, resumed.budget.layers.values()))))
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    hook.remove()
    assert seen == [whole.budget.entries_in(step // 2) for step in range(7, 12)]
    assert resumed.budget.steps == 12


def kept_of(delta: Any) -> int:
    return int(delta.kept)


def test_without_a_length_an_epoch_is_no_interval(tmp_path: Path) -> None:
    callback, run = SnellaCallback(0.7), trainer(tmp_path, SnellaCallback(0.7), llama())
    run.state.max_steps, run.state.num_train_epochs = 12, 10**18
    with pytest.raises(
        LoraSqueezeError, match=r"a data set without a length has no epochs .*; give SnellaCallback int"
    ):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 0.2}, r"sparsity must rise, from 0.5 at the start to below 1, got 0.2"),
        ({"sparsity": 1.0}, r"sparsity must rise, from 0.5 at the start to below 1, got 1"),
        ({"interval": 0}, r"interval must be a whole number of steps from 1, got 0"),
        ({"interval": 14}, r"14 steps are 1 rounds of 14, too few for a first and a last one, 0 of warmup and 0 of"),
        (
            {"warmup": 3, "cooldown": 3},
            r"14 steps are 7 rounds of 2, too few .* 3 of warmup and 3 of cooldown; use a shorter",
        ),
    ],
    ids=["falls", "all", "interval", "rounds", "ends"],
)
def test_schedules_that_lead_nowhere_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(LoraSqueezeError, match=words):
        budget(model(0.5), **settings)


def test_there_must_be_an_adapter_that_is_trained() -> None:
    frozen = model().requires_grad_(False)
    for network in (frozen, net()):
        with pytest.raises(LoraSqueezeError, match="the model has no SNELLA adapter that is trained; add one"):
            budget(network)
