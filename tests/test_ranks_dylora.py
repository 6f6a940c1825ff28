"""DyLoRA: every claim of its module against products by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import LoraConfig, get_peft_model
from ranks_cases import adam, cut_and_resumed, go_on, planted, same, trained
from torch.nn import functional

from lora_squeeze.methods.control import controller_for
from lora_squeeze.methods.ranks import DyloraConfig
from lora_squeeze.methods.ranks.prefix import set_rank

DYLORA = METHODS["dylora"]
R = DYLORA.settings["r"]


def config(**more: Any) -> DyloraConfig:
    return DyloraConfig(**{"r": 6, "alpha": 9, "target_modules": ["wide", "tall"], **more})


def draw(model: Any, rank: int | None) -> None:
    for layer in layers(model).values():
        layer.deltas["default"].drawn = rank


@pytest.mark.parametrize("update", ["frozen", "plain"])
def test_a_step_is_the_lora_of_its_rank(update: str) -> None:
    model = adapted(DYLORA, trained=True, update=update).double()
    layer = next(iter(layers(model).values()))
    delta, x = layer.deltas["default"], batch(torch.float64)
    for rank in range(1, R + 1):
        delta.drawn = rank
        by_hand = layer.get_base_layer()(x) + 6 / rank * (x @ delta.A[:rank].T @ delta.B[:, :rank].T)
        torch.testing.assert_close(layer.train()(x), by_hand)
        set_rank(model, rank)
        torch.testing.assert_close(layer.eval()(x), by_hand)


def test_a_prefix_is_a_lora_with_the_same_alpha() -> None:
    """Nothing has to be rescaled: the scale of a LoRA is alpha over its rank."""
    model = adapted(DYLORA, trained=True)
    for rank in range(1, R + 1):
        set_rank(model, rank)
        lora = get_peft_model(net(), LoraConfig(r=rank, lora_alpha=6, target_modules=["wide", "tall"])).eval()
        for one, other in zip(layers(lora).values(), layers(model).values(), strict=True):
            delta = other.deltas["default"]
            one.lora_A["default"].weight.data = delta.A.data[:rank]
            one.lora_B["default"].weight.data = delta.B.data[:, :rank]
        torch.testing.assert_close(model(batch()), lora(batch()), rtol=1e-5, atol=1e-6)


def test_every_rank_begins_as_the_base() -> None:
    model = adapted(DYLORA)
    base = net()(batch())
    for rank in range(1, R + 1):
        draw(model, rank)
        set_rank(model, rank)
        assert torch.equal(model.train()(batch()), base)
        assert torch.equal(model.eval()(batch()), base)


@pytest.mark.parametrize("update", ["frozen", "plain"])
@pytest.mark.parametrize("rank", range(1, R + 1))
def test_gradients_reach_what_the_step_trains_alone(update: str, rank: int) -> None:
    model = adapted(DYLORA, trained=True, update=update).train()
    draw(model, rank)
    model(batch()).square().sum().backward()
    wanted = [rank - 1] if update == "frozen" else list(range(rank))
    for layer in layers(model).values():
        delta = layer.deltas["default"]
        assert delta.A.grad.abs().sum(1).nonzero().flatten().tolist() == wanted
        assert delta.B.grad.abs().sum(0).nonzero().flatten().tolist() == wanted


def test_the_frozen_update_has_the_plain_ones_gradient_where_it_has_one() -> None:
    found = {}
    for update in ("frozen", "plain"):
        model = adapted(DYLORA, trained=True, update=update).train()
        draw(model, 2)
        model(batch()).square().sum().backward()
        delta = next(iter(layers(model).values())).deltas["default"]
        found[update] = delta.A.grad[1], delta.B.grad[:, 1]
    torch.testing.assert_close(found["frozen"], found["plain"])


def test_without_momentum_and_decay_a_frozen_step_moves_one_component() -> None:
    model = get_peft_model(net(), config(init_weights=False))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    controller = controller_for(model, 8, optimizer)
    for _ in range(8):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        go_on(model, controller, optimizer, 1)
        drawn = next(iter(controller.deltas.values())).drawn
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                dim = 1 if name.endswith("A") else 0
                moved = (parameter != before[name]).any(dim).nonzero().flatten().tolist()
                assert moved == [drawn - 1]


def test_all_layers_share_a_rank_that_depends_on_seed_and_step() -> None:
    def ranks(seed: int) -> list[int]:
        model = get_peft_model(net(), config(seed=seed))
        controller = controller_for(model, 300)
        found = []
        for _ in range(300):
            controller.before_forward()
            assert len({delta.drawn for delta in controller.deltas.values()}) == 1
            found.append(controller.deltas["blocks.0.wide"].drawn)
            controller.before_forward()  # a second call in one step draws the same
            assert controller.deltas["blocks.0.wide"].drawn == found[-1]
            controller.after_step()
        controller.finish()
        assert {delta.drawn for delta in controller.deltas.values()} == {None}
        return found

    one = ranks(0)
    assert ranks(0) == one
    assert ranks(1) != one
    counts = Counter(one)
    assert set(counts) == {1, 2, 3, 4, 5, 6}
    assert all(abs(count - 50) < 4 * (300 * 5 / 36) ** 0.5 for count in counts.values())


def test_odds_decide_what_is_drawn() -> None:
    model = get_peft_model(net(), config(odds=[0, 3, 0, 1, 0, 0]))
    controller = controller_for(model, 400)
    counts: Counter[int] = Counter()
    for _ in range(400):
        controller.before_forward()
        counts[controller.deltas["blocks.0.wide"].drawn] += 1
        controller.after_step()
    assert set(counts) == {2, 4}
    assert abs(counts[2] - 300) < 4 * (400 * 3 / 16) ** 0.5


def test_nothing_is_drawn_in_eval_mode() -> None:
    model = adapted(DYLORA, trained=True)
    wanted = model(batch())
    draw(model, 1)
    assert torch.equal(model(batch()), wanted)
    assert not torch.equal(model.train()(batch()), wanted)


def test_always_at_the_highest_rank_it_is_a_lora() -> None:
    """Step by step, with the same start."""
    model = get_peft_model(net(), config(update="plain", odds=[0, 0, 0, 0, 0, 1]))
    lora = get_peft_model(net(), LoraConfig(r=6, lora_alpha=9, target_modules=["wide", "tall"]))
    for one, other in zip(layers(lora).values(), layers(model).values(), strict=True):
        one.lora_A["default"].weight.data = other.deltas["default"].A.data.clone()
    for each in (model, lora):
        optimizer = adam(each)
        go_on(each, controller_for(each, 20, optimizer), optimizer, 20)
    x, _ = planted()
    torch.testing.assert_close(model.eval()(x), lora.eval()(x), rtol=1e-3, atol=1e-4)


def test_low_ranks_of_one_training_beat_those_cut_from_a_lora() -> None:
    """The components of a LoRA have no order, so that its prefixes lack some of all directions."""
    x, y = planted()

    def losses(scale: float | None = None, **settings: Any) -> list[float]:
        model, controller = trained(config(**settings), 200)
        found = []
        for rank in range(1, 4):
            set_rank(model, rank)
            for delta in controller.deltas.values():
                delta.scale_at = (lambda rank: scale) if scale else delta.scale_at
            found.append(functional.mse_loss(model(x), y).item())
        return found

    cut = losses(scale=9 / 6, update="plain", odds=[0, 0, 0, 0, 0, 1])
    for update, share in (("frozen", 0.6), ("plain", 0.4)):
        assert all(one < share * other for one, other in zip(losses(update=update), cut, strict=True)), update


@pytest.mark.parametrize("cut", [7, 20])
@pytest.mark.parametrize("update", ["frozen", "plain"])
def test_a_resumed_training_is_the_uncut_one(update: str, cut: int) -> None:
    whole, one = trained(config(update=update), 30)
    again, other = cut_and_resumed(config(update=update), 30, cut)
    same(whole, again)
    assert one.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"update": "both"}, "update must be one of frozen, plain, got 'both'"),
        ({"odds": [1.0, 2.0]}, "odds must be 6 numbers, one for each rank up to r, got 2"),
        ({"odds": [0.0] * 6}, "odds must be finite, 0 or more and not all 0, got "),
        ({"odds": [1.0] * 5 + [-1.0]}, "odds must be finite, 0 or more and not all 0, got "),
        ({"odds": [1.0] * 5 + [float("nan")]}, "odds must be finite, 0 or more and not all 0, got "),
    ],
    ids=["update", "count", "zeros", "negative", "nan"],
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
