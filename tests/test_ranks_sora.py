"""SoRA: proximal steps against their definition, gates against products by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net
from peft import LoraConfig, PeftModel, get_peft_model
from ranks_cases import PLANTED, adam, cut_and_resumed, go_on, planted, same, trained
from torch.nn import functional

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.control import controller_for, parameter_groups
from lora_squeeze.methods.ranks import SoraConfig
from lora_squeeze.methods.ranks.sora import shrunk

SORA = METHODS["sora"]


def config(**more: Any) -> SoraConfig:
    return SoraConfig(**{"r": 6, "alpha": 6, "target_modules": ["wide", "tall"], **more})


def kept(controller: Any) -> dict[str, int]:
    return {name: delta.kept for name, delta in controller.deltas.items()}


def grouped(model: Any) -> torch.optim.Optimizer:
    first, gates = parameter_groups(model, 2e-2)
    return torch.optim.AdamW([first, {**gates, "lr": 1e-2}])


def test_the_soft_threshold_is_the_proximal_minimum() -> None:
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    for threshold in (0.0, 0.3, 1.0):
        for u in (-2.0, -1.0, -0.31, -0.2, 0.0, 0.29, 0.3, 1.7):
            best = grid[(0.5 * (grid - u) ** 2 + threshold * grid.abs()).argmin()]
            assert shrunk(torch.tensor([u]), threshold).item() == pytest.approx(best.item(), abs=1.1e-4)


def test_the_official_threshold_is_three_steps_in_place() -> None:
    gates = torch.linspace(-1, 1, 401)
    by_hand = gates.clone()
    by_hand[by_hand > 0.25] -= 0.25
    by_hand[by_hand < -0.25] += 0.25
    by_hand[by_hand.abs() < 0.25] = 0
    found = shrunk(gates, 0.25, "official")
    torch.testing.assert_close(found, by_hand)
    zero = gates[found == 0].abs().max()
    assert 0.49 < zero < 0.5 + 1e-6
    assert shrunk(torch.tensor([0.4]), 0.25).item() == pytest.approx(0.15)


@pytest.mark.parametrize("mode", ["soft", "official"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_thresholds_keep_the_dtype(mode: str, dtype: torch.dtype) -> None:
    found = shrunk(torch.tensor([-1.0, 0.0, 0.125, 0.75], dtype=dtype), 0.25, mode)
    assert torch.equal(found, torch.tensor([-0.75, 0.0, 0.0, 0.5], dtype=dtype))


def test_the_gate_stands_between_the_factors() -> None:
    model = adapted(SORA, trained=True).double()
    layer = next(iter(layers(model).values()))
    delta, x = layer.deltas["default"], batch(torch.float64)
    by_hand = layer.get_base_layer()(x) + 6 / 3 * ((x @ delta.A.T) * delta.gate) @ delta.B.T
    for mode in (True, False):
        torch.testing.assert_close(layer.train(mode)(x), by_hand)


def test_a_separable_problem_ends_at_the_soft_threshold_of_its_solution() -> None:
    """1/2 |g - u|^2 + lambda |g| by gradient descent at the rate eta and thresholds of eta lambda."""
    eta, penalty = 0.1, 0.4
    for settings in ({"threshold": eta * penalty}, {"threshold": penalty, "times_lr": True}):
        model = get_peft_model(net(), config(**settings))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=eta)
        controller = controller_for(model, 200, optimizer)
        gates = [delta.gate for delta in controller.deltas.values()]
        wanted = [torch.randn(6, generator=torch.Generator().manual_seed(i)) for i in range(len(gates))]
        for _ in range(200):
            controller.before_forward()
            sum(0.5 * (gate - u).square().sum() for gate, u in zip(gates, wanted, strict=True)).backward()
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
        for gate, u in zip(gates, wanted, strict=True):
            torch.testing.assert_close(gate.detach(), u.sign() * (u.abs() - penalty).clamp(min=0), atol=1e-4, rtol=0)
            assert ((gate == 0) == (u.abs() < penalty)).all()


def test_larger_thresholds_close_more_gates_and_differently_by_layer() -> None:
    totals = []
    for threshold in (0.0, 2.0, 2.3, 3.0):
        _, controller = trained(config(threshold=threshold, times_lr=True), 150, grouped)
        totals.append(sum(kept(controller).values()))
        assert len(set(kept(controller).values())) > 1 or totals[-1] in (0, 24)
    assert totals[0] == 4 * 6
    assert totals == sorted(set(totals), reverse=True)


def test_the_rank_of_a_planted_update_is_found_to_a_factor_of_two() -> None:
    x, y = planted()
    model, controller = trained(config(threshold=2.0, times_lr=True), 300, grouped)
    found = kept(controller)
    assert len(set(found.values())) > 1
    assert 0.5 * sum(PLANTED.values()) <= sum(found.values()) <= 2 * sum(PLANTED.values())
    assert functional.mse_loss(model(x), y) < 0.1 * functional.mse_loss(net()(x), y)


def test_a_closed_gate_has_a_gradient_and_its_component_none() -> None:
    model = adapted(SORA, trained=True).train()
    delta = next(iter(layers(model).values())).deltas["default"]
    delta.gate.data[1] = 0
    model(batch()).square().sum().backward()
    assert delta.gate.grad[1] != 0
    assert (delta.A.grad[1] == 0).all()
    assert (delta.B.grad[:, 1] == 0).all()
    assert delta.A.grad[0].abs().sum() > 0


def test_open_gates_are_the_rank_of_what_is_converted(tmp_path: Path) -> None:
    model = adapted(SORA, trained=True)
    closed = [[], [1], [0, 2], [0, 1, 2]]
    for layer, gates in zip(layers(model).values(), closed, strict=True):
        layer.deltas["default"].gate.data[gates] = 0
    wanted = model(batch())
    model.save_pretrained(tmp_path / "sora")
    again = PeftModel.from_pretrained(net(), tmp_path / "sora").eval()
    assert torch.equal(again(batch()), wanted)
    adapter = load(tmp_path / "sora", base=net())
    assert [module.rank for module in adapter.modules.values()] == [3, 2, 1, 1]
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(batch()), wanted, rtol=1e-5, atol=1e-6)
    for layer, gates in zip(layers(model).values(), closed, strict=True):
        delta = layer.deltas["default"]
        B, A = delta.factors()
        assert (B.shape[1], A.shape[0]) == (3 - len(gates), 3 - len(gates)) == (delta.kept, delta.kept)
        torch.testing.assert_close(B @ A, delta.scale * delta.B * delta.gate @ delta.A)


def test_with_gates_that_rest_it_is_a_lora() -> None:
    """Step by step, with the same start."""
    model = get_peft_model(net(), config(threshold=0.0, alpha=9))
    lora = get_peft_model(net(), LoraConfig(r=6, lora_alpha=9, target_modules=["wide", "tall"]))
    for one, other in zip(layers(lora).values(), layers(model).values(), strict=True):
        delta = other.deltas["default"]
        delta.gate.requires_grad_(False)
        one.lora_A["default"].weight.data = delta.A.data.clone()
    x, _ = planted()
    stepping = [(each, adam(each)) for each in (model, lora)]
    controllers = [controller_for(each, 20) for each, _ in stepping]
    for _ in range(20):
        for (each, optimizer), controller in zip(stepping, controllers, strict=True):
            go_on(each, controller, optimizer, 1)
        torch.testing.assert_close(model(x), lora(x), rtol=1e-3, atol=1e-4)


def test_the_loss_has_the_mean_of_all_gates() -> None:
    model = get_peft_model(net().double(), config(l1=0.5, threshold=0.0, init_weights=False)).double()
    controller = controller_for(model, 5)
    gates = [delta.gate for delta in controller.deltas.values()]
    for i, gate in enumerate(gates):
        gate.data = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
    x, y = (t.double() for t in planted())
    functional.mse_loss(model(x), y).backward()
    controller.before_step()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    (functional.mse_loss(model(x), y) + 0.5 * sum(gate.abs().sum() for gate in gates) / 24).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_thresholds_follow_each_other_over_the_training() -> None:
    model = get_peft_model(net(), config(threshold=[0.0, 0.01, 0.1]))
    controller = controller_for(model, 7)
    taken = []
    for _ in range(7):
        before = controller.deltas["blocks.0.wide"].gate[0].item()
        controller.after_step()
        taken.append(round(before - controller.deltas["blocks.0.wide"].gate[0].item(), 5))
    assert taken == [0.0, 0.0, 0.0, 0.01, 0.01, 0.1, 0.1]


def test_the_threshold_follows_the_learning_rate_of_the_gates() -> None:
    model = get_peft_model(net(), config(threshold=2.0, times_lr=True, gates_lr=0.01))
    optimizer = torch.optim.SGD(parameter_groups(model, 1.0))
    controller = controller_for(model, 5, optimizer)
    gate = controller.deltas["blocks.0.wide"].gate
    controller.after_step()
    assert gate[0].item() == pytest.approx(1 - 0.02)
    optimizer.param_groups[1]["lr"] = 0.05
    controller.after_step()
    assert gate[0].item() == pytest.approx(1 - 0.02 - 0.1)


@pytest.mark.parametrize("other", [None, "another"], ids=str)
def test_without_the_gates_optimiser_there_is_no_learning_rate(other: str | None) -> None:
    optimizer = other and torch.optim.SGD(net().parameters(), lr=1)
    controller = controller_for(get_peft_model(net(), config(times_lr=True)), 5, optimizer)
    with pytest.raises(LoraSqueezeError, match="times_lr takes the gates' learning rate from the optimiser; give the"):
        controller.after_step()


def test_groups_have_every_trained_number_once_and_gates_no_decay() -> None:
    model = get_peft_model(net(), config(modules_to_save=["head"], gates_lr=0.3))
    rest, gates = parameter_groups(model, 0.1, weight_decay=0.2)
    assert (rest["lr"], rest["weight_decay"], gates["lr"], gates["weight_decay"]) == (0.1, 0.2, 0.3, 0.0)
    assert {p.shape for p in gates["params"]} == {(6,)}
    found = [id(p) for p in [*rest["params"], *gates["params"]]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert parameter_groups(get_peft_model(net(), config()), 0.1)[1]["lr"] == 0.1


def test_drawn_gates_depend_on_the_global_generator() -> None:
    def gates(seed: int) -> torch.Tensor:
        with drawn_from(seed):
            model = get_peft_model(net(), config(gate_init="normal"))
        return torch.cat([layer.deltas["default"].gate.detach() for layer in layers(model).values()])

    assert torch.equal(gates(0), gates(0))
    assert not torch.equal(gates(0), gates(1))
    assert len(gates(0).unique()) == 24
    assert torch.equal(get_peft_model(net(), config(gate_init="normal"))(batch()), net()(batch()))


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, "0.002"), (torch.float16, "0.0002")])
def test_gates_too_coarse_for_thresholds_are_warned_of(dtype: torch.dtype, step: str) -> None:
    model = get_peft_model(net(dtype), config(), autocast_adapter_dtype=False)
    with pytest.warns(UserWarning, match=f"are {dtype}: steps and thresholds below {step} are rounded away"):
        controller = controller_for(model, 10)
    below = float(step)
    assert all(torch.equal(d.gate - 0.9 * below, d.gate) for d in controller.deltas.values())
    controller_for(get_peft_model(net(dtype), config()), 10)  # warns of nothing: a warning is an error here


@pytest.mark.parametrize("cut", [7, 20])
def test_a_resumed_training_is_the_uncut_one(cut: int) -> None:
    settings = {"threshold": [0.5, 1.0, 2.0], "times_lr": True, "l1": 0.01, "gate_init": "normal"}
    whole, one = trained(config(**settings), 60, grouped)
    again, other = cut_and_resumed(config(**settings), 60, cut, grouped)
    same(whole, again)
    assert one.state_dict() == other.state_dict()
    assert kept(one) == kept(other)
    assert sum(kept(one).values()) < 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": -1.0}, "threshold must be 0 or more, or a list of such that never falls, got -1.0"),
        (
            {"threshold": [0.1, 0.0]},
            r"threshold must be 0 or more, or a list of such that never falls, got \[0.1, 0.0\]",
        ),
        ({"threshold": []}, r"threshold must be 0 or more, or a list of such that never falls, got \[\]"),
        ({"threshold_mode": "hard"}, "threshold_mode must be one of soft, official, got 'hard'"),
        ({"gate_init": "zeros"}, "gate_init must be one of ones, normal, got 'zeros'"),
        ({"l1": -1.0}, "l1 must be 0 or more, got -1.0"),
    ],
    ids=["negative", "falling", "none", "mode", "init", "l1"],
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
