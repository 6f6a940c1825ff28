"""LIFT: which entries it trains, what a new choice keeps, and that it is SHiRA where it never chooses again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from trainer_cases import Regression, train

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.lift import LiftConfig, LiftController, LiftDelta
from lora_squeeze.methods.callback import ControllerCallback
from lora_squeeze.methods.control import deltas_of

LIFT = METHODS["lift"]
TARGET = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(3))


def lifts(model: nn.Module) -> dict[str, LiftDelta]:
    return {f"base_model.model.{name}": delta for name, delta in deltas_of(model).items()}


def mask(delta: LiftDelta) -> torch.Tensor:
    chosen = torch.zeros(delta.site.out_features * delta.site.in_features)
    chosen[delta.index.long()] = 1
    return chosen.view(delta.site.out_features, delta.site.in_features)


def top(score: torch.Tensor, count: int) -> set[int]:
    return set(score.flatten().topk(count).indices.tolist())


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr=1e-2, betas=(0.9, 0.95), eps=1e-6, **options)


def step(model: Any, optimizer: torch.optim.Optimizer, controller: LiftController | None = None) -> None:
    functional.mse_loss(model(batch()), TARGET).backward()
    optimizer.step()
    if controller is not None:
        controller.after_step()
    optimizer.zero_grad()


def weights(model: Any) -> dict[str, torch.Tensor]:
    """W + dW of every adapted layer."""
    return {n: (m.get_base_layer().weight + m.get_delta_weight("default")).detach() for n, m in layers(model).items()}


@pytest.mark.parametrize("rank", [2, 12], ids=["low", "full"])
def test_the_entries_are_the_largest_of_the_low_rank_approximation(rank: int) -> None:
    for delta in lifts(adapted(LIFT, filter_rank=rank)).values():
        W = delta.site.base_weight().detach()
        U, S, Vh = torch.linalg.svd(W)
        approximation = U[:, :rank] @ torch.diag(S[:rank]) @ Vh[:rank]
        count = LIFT.config().r * (delta.site.out_features + delta.site.in_features)
        assert set(delta.index.tolist()) == top(approximation.abs(), count)
        assert (set(delta.index.tolist()) == top(W.abs(), count)) == (rank == min(W.shape))


def test_other_choices_are_the_largest_of_w_and_random_ones() -> None:
    for delta in lifts(adapted(LIFT, choice="magnitude")).values():
        assert set(delta.index.tolist()) == top(delta.site.base_weight().abs(), len(delta.index))
    drawn = [adapted(LIFT, choice="random", seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([d.index.tolist() for d in lifts(model).values()] for model in drawn)
    assert first == again
    assert first != other
    assert all(len(set(index)) == len(index) for index in first)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # PEFT's
def test_never_chosen_again_it_trains_as_peft_shira_with_the_same_mask() -> None:
    model = adapted(LIFT)
    masks = iter([mask(delta) for delta in lifts(model).values()])
    config = ShiraConfig(r=LIFT.config().r, target_modules=["wide", "tall"])
    config.mask_fn = lambda base_layer, r, **kwargs: next(masks)
    shira = get_peft_model(net(), config)
    optimizers = adam(model), adam(shira)
    for _ in range(20):
        for each, optimizer in zip((model, shira), optimizers, strict=True):
            step(each, optimizer)
    for (name, found), delta in zip(weights(model).items(), lifts(model).values(), strict=True):
        layer: Any = shira.get_submodule(name)
        wanted = layer.get_base_layer().weight + layer.get_delta_weight("default").to_dense()
        assert (found - wanted).abs().max() < 1e-6
        outside = mask(delta) == 0
        assert torch.equal(found[outside], delta.site.base_weight()[outside])
        assert not torch.equal(found, delta.site.base_weight())


def test_with_all_entries_it_is_adam_on_the_weights() -> None:
    model, dense = adapted(LIFT, r=100), net()
    for name, parameter in dense.named_parameters():
        parameter.requires_grad_("wide.weight" in name or "tall.weight" in name)
    optimizers = adam(model), adam(dense)
    for _ in range(10):
        step(model, optimizers[0])
        step(dense, optimizers[1])
    for name, found in weights(model).items():
        wanted = dense.get_submodule(name.removeprefix("base_model.model.")).weight
        assert (found - wanted).abs().max() < 1e-5


def test_a_new_choice_carries_moments_and_keeps_what_was_trained() -> None:
    model = adapted(LIFT, refresh=7)
    optimizer = adam(model)
    controller = LiftController(model, 100, optimizer)
    for _ in range(6):
        step(model, optimizer, controller)
    functional.mse_loss(model(batch()), TARGET).backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    old = {name: delta.index.tolist() for name, delta in lifts(model).items()}
    trained = weights(model)
    controller.after_step()
    changed = 0
    for number, (name, delta) in enumerate(lifts(model).items()):
        assert torch.equal(weights(model)[name], trained[name]), "a choice changes no weight"
        U, S, Vh = torch.linalg.svd(trained[name])
        assert set(delta.index.tolist()) == top((U[:, :2] @ torch.diag(S[:2]) @ Vh[:2]).abs(), len(delta.index))
        state = optimizer.state[delta.values]
        assert sum(t.numel() for t in state.values() if t.dim()) == 2 * len(delta.index)
        assert state["step"] == 7
        for moment in ("exp_avg", "exp_avg_sq"):
            for place, found in zip(delta.index.tolist(), state[moment], strict=True):
                known = place in old[name]
                assert found == (before[number][moment][old[name].index(place)] if known else 0)
        gone = set(old[name]) - set(delta.index.tolist())
        assert set(delta.kept_index.tolist()) == gone
        changed += len(gone)
    assert changed


def test_entries_that_left_stand_still_and_come_back_with_their_value() -> None:
    model = adapted(LIFT, refresh=2)
    optimizer = adam(model)
    controller = LiftController(model, 100, optimizer)
    came_back = 0
    for _ in range(12):
        kept = {name: dict(zip(d.kept_index.tolist(), d.kept, strict=True)) for name, d in lifts(model).items()}
        before = weights(model)
        step(model, optimizer, controller)
        for name, delta in lifts(model).items():
            came_back += len(kept[name].keys() & set(delta.index.tolist()))
            assert not set(delta.index.tolist()) & set(delta.kept_index.tolist())
            for place in kept[name]:
                assert weights(model)[name].flatten()[place] == before[name].flatten()[place]
    assert came_back


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
@pytest.mark.parametrize("low_memory", [False, True], ids=["plain", "low-cpu-mem"])
def test_entries_of_earlier_choices_are_saved_and_merged_too(tmp_path: Path, trainable: bool, low_memory: bool) -> None:
    model = adapted(LIFT, refresh=2)
    optimizer = adam(model)
    controller = LiftController(model, 100, optimizer)
    for _ in range(5):
        step(model, optimizer, controller)
    assert any(len(delta.kept) for delta in lifts(model).values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path, is_trainable=trainable, low_cpu_mem_usage=low_memory)
    assert torch.equal(again.eval()(batch()), model(batch()))
    for name, layer in layers(again).items():
        W = layer.get_base_layer().weight
        before = W.clone()
        layer.merge()
        assert torch.allclose(W, weights(model)[name], atol=1e-7)
        layer.unmerge()
        assert torch.equal(W, before)


def test_unmerging_is_exact_where_subtracting_is_not() -> None:
    model = adapted(LIFT, net(torch.bfloat16), trained=True)
    for layer in layers(model).values():
        before = layer.get_base_layer().weight.clone()
        delta = layer.get_delta_weight("default").detach().to(torch.bfloat16)
        assert not torch.equal(before + delta - delta, before)
        layer.merge()
        layer.unmerge()
        assert torch.equal(layer.get_base_layer().weight, before)


def test_principal_entries_of_a_planted_matrix_are_found() -> None:
    n, rank = 384, 8
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, rank, generator=generator)).Q for _ in range(2))
    spikes = (U * torch.linspace(6, 3, rank)) @ V.T
    base = nn.Sequential(nn.Linear(n, n, bias=False))
    base[0].weight.data = spikes + torch.randn(n, n, generator=generator) / n**0.5
    found: dict[str, set[int]] = {}
    for name, options in {
        "exact": {},
        "randomised": {"power_iterations": 2},
        "magnitude": {"choice": "magnitude"},
    }.items():
        made = LiftConfig(r=10, filter_rank=rank, target_modules=["0"], **options)  # type: ignore[arg-type]
        model = get_peft_model(copy.deepcopy(base), made)
        (delta,) = lifts(model).values()
        found[name] = set(delta.index.tolist())
    count = 10 * 2 * n
    planted = top(spikes.abs(), count)
    shares = {name: len(index & planted) / count for name, index in found.items()}
    assert shares["exact"] > 0.6
    assert shares["magnitude"] < 0.4
    assert len(found["exact"] & found["randomised"]) / count >= 0.95


def test_the_default_dtype_changes_no_choice() -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        base = net()
        torch.set_default_dtype(dtype)
        try:
            found.append([d.index.tolist() for d in lifts(adapted(LIFT, base, power_iterations=2)).values()])
        finally:
            torch.set_default_dtype(torch.float32)
    assert found[0] == found[1]


def test_no_matrix_is_kept_for_the_backward_pass() -> None:
    model = adapted(LIFT, trained=True).train()
    saved: list[torch.Tensor] = []
    for layer in layers(model).values():
        W = layer.get_base_layer().weight
        saved.clear()
        x = torch.randn(2, layer.in_features)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x)
        assert max(t.numel() for t in saved if t.data_ptr() != W.data_ptr()) < W.numel()


def test_hooks_of_the_base_layer_are_called() -> None:
    model = adapted(LIFT, trained=True)
    wanted = model(batch())
    calls: list[int] = []
    for layer in layers(model).values():
        layer.get_base_layer().register_forward_hook(lambda *args: calls.append(1))
    assert torch.allclose(model(batch()), wanted, atol=1e-5)
    assert len(calls) == len(layers(model))


def test_the_trainers_callback_chooses_again_at_the_interval() -> None:
    model = get_peft_model(Regression(), LIFT.config(refresh=3))
    first = {name: delta.index.tolist() for name, delta in lifts(model).items()}
    callback = ControllerCallback()
    train(model, callback, steps=2)
    assert {name: delta.index.tolist() for name, delta in lifts(model).items()} == first
    train(model, callback, steps=3)
    assert isinstance(callback.controller, LiftController)
    assert callback.controller.steps_done == 3
    assert {name: delta.index.tolist() for name, delta in lifts(model).items()} != first


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"choice must be one of principal, magnitude, random, got 'best'"):
        LIFT.config(choice="best")
    with pytest.raises(ValueError, match=r"filter_rank must be a whole number from 1, got 0"):
        LIFT.config(filter_rank=0)
    with pytest.raises(ValueError, match=r"LIFT trains entries of W as they are and has no alpha, got 8"):
        LIFT.config(alpha=8)
    with pytest.raises(LoraSqueezeError, match=r"the model has no adapter 'other'; it has default"):
        LiftController(adapted(LIFT), 10, object(), adapter="other")
    with pytest.raises(LoraSqueezeError, match=r"LIFT exchanges entries while it trains; give the optimizer"):
        LiftController(adapted(LIFT), 10)
    model = adapted(LIFT, refresh=1)
    optimizer = adam(model)
    step(model, optimizer)
    first = next(iter(lifts(model).values()))
    optimizer.state[first.values]["row"] = torch.zeros(3)
    with pytest.raises(LoraSqueezeError, match=r"the optimiser's state 'row' is \(3,\) torch.float32 for 64 entries"):
        LiftController(model, 100, optimizer).after_step()
