"""DiffoRA: whose turn it is, what the search finds, and the plain LoRA that it ends in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net, shake
from peft import LoraConfig, PeftModel, get_peft_model
from ranks_cases import cut_and_resumed, go_on, planted, same, trained
from torch import Tensor, nn
from torch.nn import functional

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.control import controller_for, parameter_groups
from lora_squeeze.methods.ranks import DifforaConfig
from lora_squeeze.methods.ranks.diffora import (
    choose,
    factors,
    kind_and_block,
    lora_config,
)

DIFFORA = METHODS["diffora"]


def config(**more: Any) -> DifforaConfig:
    return DifforaConfig(**{"r": 3, "alpha": 6, "target_modules": ["wide", "tall"], **more})


def adam(model: nn.Module) -> torch.optim.Optimizer:
    first, gates = parameter_groups(model, lr=2e-2)
    return torch.optim.AdamW([first, {**gates, "lr": 5e-2}])


def plain(model: Any) -> Any:
    """PEFT's own LoRA with the result of a search."""
    lora = get_peft_model(net(), lora_config(model)).eval()
    for name, (B, A) in factors(model).items():
        layer = lora.base_model.model.get_submodule(name)
        layer.lora_B["default"].weight.data, layer.lora_A["default"].weight.data = B, A
    return lora


@pytest.mark.parametrize("logit", [-3.0, 0.0, 2.0, 100.0])
def test_the_start_is_the_base_model_whatever_the_gate(logit: float) -> None:
    model = adapted(DIFFORA)
    for layer in layers(model).values():
        layer.deltas["default"].a.data.fill_(logit)
    assert torch.equal(model(batch()), net()(batch()))


@pytest.mark.parametrize(("logit", "gate"), [(100.0, 1.0), (-200.0, 0.0), (0.0, 0.5)])
def test_the_gate_weighs_a_lora(logit: float, gate: float) -> None:
    model = adapted(DIFFORA, trained=True)
    lora = get_peft_model(net(), LoraConfig(r=3, lora_alpha=6, target_modules=["wide", "tall"])).eval()
    for name, layer in layers(model).items():
        delta, twin = layer.deltas["default"], lora.get_submodule(name)
        delta.a.data.fill_(logit)
        twin.lora_A["default"].weight.data, twin.lora_B["default"].weight.data = delta.A.data, gate * delta.B.data
    torch.testing.assert_close(model(batch()), lora(batch()))
    if gate == 0:
        assert torch.equal(model(batch()), net()(batch()))


def test_the_gradient_of_a_gate_is_the_slope_of_the_loss_and_zero_at_the_start() -> None:
    x, y = (t.double() for t in planted())
    fresh = adapted(DIFFORA, net().double()).double()
    functional.mse_loss(fresh(x), y).backward()
    assert all((layer.deltas["default"].a.grad == 0).all() for layer in layers(fresh).values())
    model = adapted(DIFFORA, net().double()).double()
    shake(model)
    functional.mse_loss(model(x), y).backward()
    for layer in layers(model).values():
        a, h = layer.deltas["default"].a, 1e-5
        losses = []
        for step in (h, -2 * h):
            a.data += step
            losses.append(functional.mse_loss(model(x), y).item())
        a.data += h
        assert a.grad.item() == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-5)
        assert a.grad != 0


def test_gates_move_in_their_turns_alone_and_all_else_in_the_others() -> None:
    model = get_peft_model(net(), config(search=0.5, warmup=0.4, modules_to_save=["head"]))
    optimizer, steps = adam(model), 20
    controller = controller_for(model, steps, optimizer)
    turns = []
    for _ in range(steps):
        phase = controller.phase
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        chosen = model.peft_config["default"].chosen
        go_on(model, controller, optimizer, 1)
        turns.append(phase[0])
        if chosen is None and model.peft_config["default"].chosen is not None:
            continue  # the factors begin anew
        moved = {name for name, p in model.named_parameters() if name in before and not torch.equal(p, before[name])}
        gates = {name for name in moved if name.endswith(".a")}
        assert gates == (moved if phase == "gates" else set())
        assert moved
    assert "".join(turns) == "wwww" + "gw" * 3 + "w" * 10


@pytest.mark.parametrize("keep", [0.01, 0.25, 0.4, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("scope", ["block", "model"])
def test_the_largest_gates_are_chosen_and_of_equal_ones_the_first(keep: float, scope: str) -> None:
    names = [f"layers.{i}.{kind}" for i in range(3) for kind in "qkvo"]
    with drawn_from(0):
        gates = dict(zip(names, torch.randint(0, 3, (12,)).float().tolist(), strict=True))
    found = choose(gates, keep, scope)
    for group in [names] if scope == "model" else [names[i : i + 4] for i in (0, 4, 8)]:
        count = max(1, int(keep * len(group) + 0.5))
        inside = [name for name in group if name in found]
        assert len(inside) == count
        by_hand = sorted(range(len(group)), key=lambda i: (-gates[group[i]], i))[:count]
        assert inside == [group[i] for i in sorted(by_hand)]
    assert found == [name for name in names if name in found]


@pytest.mark.parametrize(
    ("name", "kind", "block"),
    [
        ("model.layers.3.mlp.up_proj", "model.layers.*.mlp.up_proj", "model.layers.3"),
        ("layer.10.experts.2.w1", "layer.*.experts.2.w1", "layer.10"),
        ("encoder2.dense", "encoder2.dense", ""),
        ("lm_head", "lm_head", ""),
        ("7", "*", "7"),
    ],
)
def test_a_name_tells_kind_and_block(name: str, kind: str, block: str) -> None:
    assert kind_and_block(name) == (kind, block)


class Side(nn.Module):
    """Layers side by side, so that no layer can do the work of another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({kind: nn.Linear(8, 8) for kind in "qkvo"}) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 8) -> (batch, 16, 8)."""
        blocks: Any = self.blocks
        return torch.stack([block[kind](x) for block in blocks for kind in "qkvo"], 1)


def side() -> Side:
    with drawn_from(0):
        return Side()


def test_the_search_finds_the_layers_that_a_teacher_changed() -> None:
    """Both halves of the data are noisy: what the factors learn elsewhere does not hold for the gates' half."""
    changed = {"blocks.0.q", "blocks.0.v", "blocks.1.k", "blocks.1.o", "blocks.2.q", "blocks.2.k", "blocks.3.v"}
    teacher = side()
    with drawn_from(5):
        for name in sorted(changed):
            teacher.get_submodule(name).weight.data += 0.3 * torch.randn(8, 2) @ torch.randn(2, 8)
        x = torch.randn(64, 8)
        y = teacher(x).detach()
        y += torch.randn(y.shape)
    settings = {"search": 1.0, "scope": "model", "keep": 7 / 16, "target_modules": r"blocks\.\d\.."}
    model = get_peft_model(side(), config(**settings))
    optimizer, steps = adam(model), 150
    controller = controller_for(model, steps, optimizer)
    for _ in range(steps):
        half = slice(32, 64) if controller.phase == "gates" else slice(0, 32)
        go_on(model, controller, optimizer, 1, (x[half], y[half]))
    gates = {name: delta.a.item() for name, delta in controller.deltas.items()}
    pairs = [gates[one] > gates[other] for one in changed for other in set(gates) - changed]
    assert sum(pairs) > 0.9 * len(pairs)
    assert len(set(controller.config.chosen) & changed) >= 6


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("restart", [True, False])
def test_what_is_exported_is_what_was_trained(share: bool, restart: bool, tmp_path: Path) -> None:
    model, controller = trained(config(search=0.5, share_unselected=share, restart=restart), 12, adam)
    wanted = model(batch())
    chosen = model.peft_config["default"].chosen
    assert len(chosen) == 2
    assert (wanted - net()(batch())).abs().max() > 1e-3
    lora = plain(model)
    assert set(lora.peft_config["default"].target_modules) == (set(controller.deltas) if share else set(chosen))
    torch.testing.assert_close(lora(batch()), wanted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "diffora")
    again = PeftModel.from_pretrained(net(), tmp_path / "diffora").eval()
    assert torch.equal(again(batch()), wanted)
    adapter = load(tmp_path / "diffora", base=net())
    ranks = {name: 3 if share or name in chosen else 1 for name in controller.deltas}
    assert {name: module.rank for name, module in adapter.modules.items()} == ranks
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    back = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(back(batch()), wanted, rtol=1e-5, atol=1e-5)
    if not share:
        for name in set(controller.deltas) - set(chosen):
            assert not back.base_model.model.get_submodule(name).get_delta_weight("default").any()


def searched(**more: Any) -> tuple[Any, Any, Any]:
    """A training of ten steps, just after its search of four."""
    model = get_peft_model(net(), config(search=0.4, **more))
    optimizer = adam(model)
    controller = controller_for(model, 10, optimizer)
    go_on(model, controller, optimizer, 4)
    return model, controller, optimizer


def test_shared_factors_are_one_storage_and_are_trained_as_one() -> None:
    model, controller, optimizer = searched(scope="model", keep=0.25)
    chosen = controller.config.chosen
    rest = [name for name in controller.deltas if name not in chosen]
    kinds = {name.rpartition(".")[2] for name in rest}
    used = {id(p): p for delta in controller.deltas.values() for p in (delta.A, delta.B)}
    assert sum(p.numel() for p in used.values()) == (len(chosen) + len(kinds)) * 3 * (12 + 20)
    kind = next(kind for kind in kinds if sum(name.endswith(kind) for name in rest) == 2)
    one, other = (controller.deltas[name] for name in rest if name.endswith(kind))
    assert one.B is other.B
    before = one.B.detach().clone()
    go_on(model, controller, optimizer, 6)
    assert not torch.equal(one.B, before)
    assert torch.equal(one.weight(), other.weight())
    own = controller.deltas[chosen[0]]
    assert own.B is not one.B


def test_after_the_search_the_factors_begin_anew_with_their_moments() -> None:
    model, controller, optimizer = searched()
    assert torch.equal(model.eval()(batch()), net()(batch()))
    for delta in controller.deltas.values():
        assert delta.A not in optimizer.state
        assert delta.B not in optimizer.state
    go_on(model, controller, optimizer, 1)
    assert all(optimizer.state[controller.deltas[name].B]["step"] == 1 for name in controller.config.chosen)


def test_without_beginning_anew_the_update_of_the_chosen_layers_stays() -> None:
    model = get_peft_model(net(), config(search=1.0, restart=False))
    optimizer = adam(model)
    controller = controller_for(model, 6, optimizer)
    go_on(model, controller, optimizer, 5)
    before: dict[str, Tensor] = {}
    optimizer.register_step_post_hook(
        lambda *_: before.update({name: delta.weight().detach() for name, delta in controller.deltas.items()})
    )
    go_on(model, controller, optimizer, 1)
    assert len(controller.config.chosen) == 2
    for name in controller.config.chosen:
        torch.testing.assert_close(controller.deltas[name].weight(), before[name])


def test_a_result_is_there_when_the_search_is_over() -> None:
    model = adapted(DIFFORA)
    for ask in (lora_config, factors):
        with pytest.raises(
            LoraSqueezeError, match=r"the search is not over: no layers are chosen yet; train to its end"
        ):
            ask(model)


def test_layers_chosen_before_are_trained_from_the_first_step_on() -> None:
    _, controller = trained(config(chosen=["blocks.0.wide", "blocks.1.tall"], share_unselected=False), 5, adam)
    assert controller.phase == "weights"
    moved = [name for name, delta in controller.deltas.items() if delta.weight().abs().max() > 0]
    assert moved == ["blocks.0.wide", "blocks.1.tall"]


def test_layers_chosen_before_leave_the_others_sharing() -> None:
    _, controller = trained(config(chosen=["blocks.0.tall"], share_unselected=True), 3, adam)
    first, _, second, _ = controller.deltas.values()
    assert first.B is second.B
    assert first.weight().abs().max() > 0


def test_groups_hold_every_trained_number_once_and_gates_have_the_settings_of_searches() -> None:
    model = adapted(DIFFORA, modules_to_save=["head"], gates_lr=0.1)
    rest, gates = parameter_groups(model, lr=1e-4)
    assert {id(p) for p in gates["params"]} == {id(layer.deltas["default"].a) for layer in layers(model).values()}
    held = {id(p) for p in [*rest["params"], *gates["params"]]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW([rest, gates])
    assert [(g["lr"], g["betas"]) for g in optimizer.param_groups] == [(1e-4, (0.9, 0.999)), (0.1, (0.5, 0.999))]


@pytest.mark.parametrize("cut", [3, 7, 9])
@pytest.mark.parametrize("share", [True, False])
def test_a_resumed_training_is_the_uncut_one(cut: int, share: bool) -> None:
    asked: dict[str, Any] = {"search": 0.6, "scope": "model", "keep": 0.25, "share_unselected": share}
    whole, one = trained(config(**asked), 12, adam)
    again, other = cut_and_resumed(config(**asked), 12, cut, adam)
    same(whole, again)
    assert one.state_dict() == other.state_dict()
    assert len(one.config.chosen) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "keep must be a share above 0 and at most 1, got 0.0"),
        ({"scope": "layer"}, "scope must be one of block, model, got 'layer'"),
        ({"search": 0.0}, "search must be a share above 0 and at most 1, got 0.0"),
        ({"warmup": 1.5}, "warmup must be a share from 0 to 1, got 1.5"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
