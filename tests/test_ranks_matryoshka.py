"""MatryoshkaLoRA: the diagonal against the sum that it stands for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import LoraConfig, PeftModel, get_peft_model
from ranks_cases import cut_and_resumed, go_on, planted, same, trained
from torch.nn import functional

import lora_squeeze
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.control import Controller, controller_for
from lora_squeeze.methods.ranks import DyloraConfig, MatryoshkaConfig
from lora_squeeze.methods.ranks.matryoshka import component_scales
from lora_squeeze.methods.ranks.prefix import set_rank

MATRYOSHKA = METHODS["matryoshka"]
SCALES = {"none": lambda k: 1, "rank": lambda k: 1 / k, "sqrt": lambda k: k**-0.5}
SETS = [[1, 2, 4], [4], [1, 3], [2], [1, 2, 3, 4]]


def config(**more: Any) -> MatryoshkaConfig:
    return MatryoshkaConfig(**{"r": 6, "target_modules": ["wide", "tall"], **more})


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("ranks", SETS, ids=str)
@pytest.mark.parametrize("normalise", [False, True], ids=["sum", "mean"])
def test_one_pass_is_the_sum_of_the_nested_loras(scaling: str, ranks: list[int], normalise: bool) -> None:
    model = adapted(MATRYOSHKA, trained=True, scaling=scaling, ranks=ranks, normalise=normalise).double().train()
    layer = next(iter(layers(model).values()))
    delta, x = layer.deltas["default"], batch(torch.float64)
    by_hand = layer.get_base_layer()(x)
    for k in ranks:
        scale = SCALES[scaling](k) / (len(ranks) if normalise else 1)
        by_hand = by_hand + scale * (x @ delta.A[:k].T @ delta.B[:, :k].T)
    found = layer(x)
    torch.testing.assert_close(found, by_hand, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(found.shape, dtype=torch.float64)
    for parameter in (delta.A, delta.B):
        one, other = (torch.autograd.grad((y * upstream).sum(), parameter, retain_graph=True) for y in (found, by_hand))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("ranks", SETS, ids=str)
def test_a_deployed_rank_has_its_own_scale(scaling: str, ranks: list[int]) -> None:
    """And none of the diagonal; ranks that were not trained too."""
    model = adapted(MATRYOSHKA, trained=True, scaling=scaling, ranks=ranks).double()
    layer = next(iter(layers(model).values()))
    delta, x = layer.deltas["default"], batch(torch.float64)
    for k in range(1, 5):
        set_rank(model, k)
        by_hand = layer.get_base_layer()(x) + SCALES[scaling](k) * (x @ delta.A[:k].T @ delta.B[:, :k].T)
        torch.testing.assert_close(layer(x), by_hand)
    set_rank(model, None)
    largest = layer(x)
    set_rank(model, max(ranks))
    assert torch.equal(layer(x), largest)


@pytest.mark.parametrize("scaling", SCALES)
@pytest.mark.parametrize("ranks", SETS, ids=str)
def test_the_diagonal_never_rises_and_ends_with_the_largest_rank(scaling: str, ranks: list[int]) -> None:
    p = component_scales(ranks, scaling, 6)
    by_hand = [sum(SCALES[scaling](k) for k in ranks if k >= j) for j in range(1, 7)]
    torch.testing.assert_close(p, torch.tensor(by_hand, dtype=torch.float64))
    assert (p.diff() <= 0).all()
    assert (p[max(ranks) :] == 0).all()
    assert p[0] == pytest.approx(sum(map(SCALES[scaling], ranks)))


def test_a_diagonal_by_hand() -> None:
    assert component_scales([1, 2, 4], "none", 4).tolist() == [3, 2, 1, 1]
    assert component_scales([1, 2, 4], "rank", 4).tolist() == [1.75, 0.75, 0.25, 0.25]


@pytest.mark.parametrize(("r", "wanted"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_without_a_choice_powers_of_two_are_trained_and_r(r: int, wanted: list[int]) -> None:
    assert config(r=r).trained_ranks() == wanted
    assert config(r=8, ranks=[5, 2]).trained_ranks() == [2, 5]


@pytest.mark.parametrize("scaling", SCALES)
def test_a_single_rank_is_a_lora(scaling: str) -> None:
    """Step by step, with the same start."""
    model = get_peft_model(net(), config(ranks=[6], scaling=scaling))
    alpha = 6 * SCALES[scaling](6)
    lora = get_peft_model(net(), LoraConfig(r=6, lora_alpha=alpha, target_modules=["wide", "tall"]))
    for one, other in zip(layers(lora).values(), layers(model).values(), strict=True):
        one.lora_A["default"].weight.data = other.deltas["default"].A.data.clone()
    for each in (model, lora):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        go_on(each, controller_for(each, 20, optimizer), optimizer, 20)
    x, _ = planted()
    torch.testing.assert_close(model.eval()(x), lora.eval()(x), rtol=1e-4, atol=1e-5)


def test_it_begins_as_the_base_in_training_and_at_every_rank() -> None:
    model = adapted(MATRYOSHKA)
    base = net()(batch())
    assert torch.equal(model.train()(batch()), base)
    for rank in range(5):
        set_rank(model, rank)
        assert torch.equal(model.eval()(batch()), base)


def test_components_above_the_largest_rank_are_never_trained() -> None:
    model, _ = trained(config(ranks=[1, 3]), 5)
    fresh = get_peft_model(net(), config(ranks=[1, 3]))
    for one, other in zip(layers(model).values(), layers(fresh).values(), strict=True):
        assert (one.deltas["default"].B[:, 3:] == 0).all()
        assert not torch.equal(one.deltas["default"].B[:, :3], other.deltas["default"].B[:, :3])


@pytest.mark.parametrize("normalise", [False, True], ids=["sum", "mean"])
def test_the_sum_can_be_deployed_and_converted(normalise: bool, tmp_path: Path) -> None:
    model = adapted(MATRYOSHKA, trained=True, ranks=[1, 3], normalise=normalise)
    wanted = model.train()(batch())
    set_rank(model, 0)
    torch.testing.assert_close(model.eval()(batch()), wanted)
    model.save_pretrained(tmp_path / "sum")
    again = PeftModel.from_pretrained(net(), tmp_path / "sum").eval()
    torch.testing.assert_close(again(batch()), wanted)
    adapter = load(tmp_path / "sum", base=net())
    assert {module.rank for module in adapter.modules.values()} == {3}
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(batch()), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(copy.deepcopy(again).merge_and_unload()(batch()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scaling", SCALES)
def test_a_rank_is_a_lora_of_the_alpha_that_is_told(scaling: str) -> None:
    model = adapted(MATRYOSHKA, trained=True, scaling=scaling)
    for rank in range(1, 5):
        set_rank(model, rank)
        alpha = rank * SCALES[scaling](rank)
        lora = get_peft_model(net(), LoraConfig(r=rank, lora_alpha=alpha, target_modules=["wide", "tall"])).eval()
        for one, other in zip(layers(lora).values(), layers(model).values(), strict=True):
            delta = other.deltas["default"]
            one.lora_A["default"].weight.data = delta.A.data[:rank]
            one.lora_B["default"].weight.data = delta.B.data[:, :rank]
        torch.testing.assert_close(model(batch()), lora(batch()), rtol=1e-5, atol=1e-6)


def test_the_diagonal_is_no_parameter_and_follows_the_model() -> None:
    delta = next(iter(layers(adapted(MATRYOSHKA)).values())).deltas["default"]
    assert dict(delta.named_buffers()).keys() == {"p"}
    assert dict(delta.named_parameters()).keys() == {"A", "B"}
    assert "p" not in delta.state_dict()
    assert delta.to("meta").p.device.type == "meta"


def test_the_loss_sees_the_sum_alone() -> None:
    """On a regression the sum is learned; its prefixes are of another size, and DyLoRA's are better."""
    x, y = planted()

    def losses(made: Any, ranks: tuple[int, ...]) -> list[float]:
        model, _ = trained(made, 150)
        found = []
        for rank in ranks:
            set_rank(model, rank)
            found.append(functional.mse_loss(model(x), y).item())
        return found

    base = functional.mse_loss(net()(x), y).item()
    ranks = (1, 2, 4, 6)
    nested = DyloraConfig(r=6, alpha=9, update="plain", target_modules=["wide", "tall"])
    whole, *prefixes = losses(config(), (0, *ranks))
    assert whole < 0.02 * base
    assert all(0.2 * base < loss < base for loss in prefixes)
    assert all(2 * one < other for one, other in zip(losses(nested, ranks), prefixes, strict=True))


def test_a_resumed_training_is_the_uncut_one() -> None:
    whole, one = trained(config(), 20)
    again, _ = cut_and_resumed(config(), 20, 7)
    same(whole, again)
    assert type(one) is Controller


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 6.0}, r"MatryoshkaLoRA has scaling in the place of alpha, got alpha = 6.0"),
        ({"scaling": "log"}, "scaling must be one of none, rank, sqrt, got 'log'"),
        ({"ranks": []}, r"ranks must be whole numbers from 1 to r = 6, got \[\]"),
        ({"ranks": [0, 2]}, r"ranks must be whole numbers from 1 to r = 6, got \[0, 2\]"),
        ({"ranks": [2, 7]}, r"ranks must be whole numbers from 1 to r = 6, got \[2, 7\]"),
        ({"ranks": [2, 2]}, r"ranks must be different from each other, got \[2, 2\]"),
    ],
    ids=["alpha", "scaling", "none", "zero", "above", "twice"],
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
