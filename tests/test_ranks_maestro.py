"""Maestro: every claim against loops by hand, and its theory on problems whose solution a decomposition knows."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net
from peft import PeftModel, get_peft_model
from ranks_cases import cut_and_resumed, go_on, planted, same, trained
from torch import Tensor, nn
from torch.nn import functional

import lora_squeeze
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.control import controller_for
from lora_squeeze.methods.ranks import MaestroConfig
from lora_squeeze.methods.ranks.maestro_layers import (
    MaestroLinear,
    decompose,
    draw,
    group_lasso,
    importance,
    shrink,
)
from lora_squeeze.methods.ranks.prefix import set_rank

MAESTRO = METHODS["maestro"]


def config(**more: Any) -> MaestroConfig:
    return MaestroConfig(**{"r": 6, "target_modules": ["wide", "tall"], **more})


def factorised(out: int, columns: int, rank: int, seed: int = 0) -> MaestroLinear:
    """Random factors, no bias."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.randn(width, rank, generator=generator) / width**0.5 for width in (out, columns))
    return MaestroLinear(U, V)


@pytest.mark.parametrize(("bias", "shape"), [(True, (7, 5)), (False, (5, 9))])
def test_a_decomposed_layer_is_the_layer(bias: bool, shape: tuple[int, int]) -> None:
    with drawn_from(0):
        layer = nn.Linear(*shape, bias=bias)
        x = torch.randn(3, 4, shape[0])
    found = decompose(layer)
    assert found.U.shape[1] == min(shape)
    torch.testing.assert_close(found(x), layer(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.U.norm(dim=0), found.V.norm(dim=0))


def test_a_shortened_layer_multiplies_its_prefix_while_training_alone() -> None:
    with drawn_from(0):
        layer = decompose(nn.Linear(7, 5))
        x = torch.randn(4, 7)
    whole = layer(x)
    for prefix in range(1, 6):
        layer.prefix = prefix
        W = layer.U[:, :prefix] @ layer.V[:, :prefix].T
        torch.testing.assert_close(layer.train()(x), functional.linear(x, W, layer.bias))
        assert torch.equal(layer.eval()(x), whole)


def test_a_shortened_adapter_multiplies_its_prefix_while_training_alone() -> None:
    model = adapted(MAESTRO, trained=True, alpha=5)
    layer = next(iter(layers(model).values()))
    delta = layer.deltas["default"]
    x = batch()
    delta.prefix = 2
    by_hand = layer.get_base_layer()(x) + 5 / MAESTRO.settings["r"] * (x @ delta.V[:, :2] @ delta.U[:, :2].T)
    torch.testing.assert_close(layer.train()(x), by_hand)
    whole = layer.get_base_layer()(x) + 5 / MAESTRO.settings["r"] * (x @ delta.V @ delta.U.T)
    torch.testing.assert_close(layer.eval()(x), whole)


def test_the_lasso_is_the_double_sum_of_suffix_norms() -> None:
    layer = factorised(5, 7, 4).double()
    layer.kept = 3
    total = sum(factor[:, j:3].norm() for factor in (layer.U, layer.V) for j in range(3))
    torch.testing.assert_close(group_lasso(layer), total)
    wanted = torch.autograd.grad(total, [layer.U, layer.V])
    torch.testing.assert_close(torch.autograd.grad(group_lasso(layer), [layer.U, layer.V]), wanted)


def test_the_lasso_of_a_suffix_of_zeros_has_a_gradient() -> None:
    layer = factorised(5, 7, 4)
    layer.U.data[:, 2:] = 0
    gradient = torch.autograd.grad(group_lasso(layer), [layer.U])[0]
    assert gradient.isfinite().all()
    assert (gradient[:, 2:] == 0).all()


def test_importance_never_grows_with_the_column_and_decides_the_rank() -> None:
    layer = factorised(5, 7, 4)
    layer.U.data *= torch.tensor([1, 1, 1e-3, 1e-5])
    found = importance(layer)
    by_hand = torch.stack([layer.U[:, j:].norm() * layer.V[:, j:].norm() for j in range(4)])
    torch.testing.assert_close(found, by_hand, rtol=1e-3, atol=0)
    assert (found.diff() <= 0).all()
    for threshold, rank in ((0.0, 4), (1e-4, 3), (1e-2, 2), (1e9, 0)):
        fresh = copy.deepcopy(layer)
        assert shrink({"one": fresh}, threshold) == (rank < 4)
        assert fresh.kept == rank
        assert not shrink({"one": fresh}, threshold)


def test_a_shrunk_layer_is_the_masked_one_and_smaller() -> None:
    with drawn_from(0):
        layer = decompose(nn.Linear(12, 20))
        x = torch.randn(3, 12)
    for rank in range(13):
        layer.kept = rank
        mask = (torch.arange(12) < rank).float()
        masked = functional.linear(x, (layer.U * mask) @ layer.V.T, layer.bias)
        small = layer.shrunk()
        torch.testing.assert_close(layer(x), masked)
        torch.testing.assert_close(small(x), masked)
        numbers = sum(p.numel() for p in small.parameters()) - 20
        assert numbers == min(rank * (12 + 20), 12 * 20)
        assert isinstance(small, MaestroLinear) == (rank < 12 * 20 / (12 + 20))


def test_each_pass_shortens_every_layer_to_every_prefix_once() -> None:
    pool = {"one": factorised(5, 7, 4), "two": factorised(5, 7, 3), "gone": factorised(5, 7, 2)}
    pool["gone"].kept = 0
    pool["two"].kept = 2
    began, seen = 0, []
    for step in range(12):
        began = draw(pool, step, began, 0)
        shortened = [(name, layer.prefix) for name, layer in pool.items() if layer.prefix is not None]
        assert len(shortened) == 1
        seen += shortened
    wanted = {("one", 1), ("one", 2), ("one", 3), ("one", 4), ("two", 1), ("two", 2)}
    assert set(seen[:6]) == set(seen[6:]) == wanted
    assert seen[:6] != seen[6:]
    assert set(Counter(seen).values()) == {2}


def learned(layer: MaestroLinear, target: Tensor, factor: Tensor, steps: int = 800) -> None:
    """Ordered dropout on E |(U_b V_b^T - target) x|^2 with E x x^T = factor factor^T, in closed form."""
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    began = 0
    for step in range(steps):
        began = draw({"only": layer}, step, began, 0)
        b = layer.prefix
        optimizer.zero_grad()
        ((layer.U[:, :b] @ layer.V[:, :b].T - target) @ factor).square().sum().backward()
        optimizer.step()
        schedule.step()


def test_on_whitened_inputs_every_prefix_is_the_truncated_decomposition() -> None:
    """Theorem of the paper: the solution of a linear map is its singular value decomposition."""
    with drawn_from(1):
        Q, P = (torch.linalg.qr(torch.randn(n, 5)).Q for n in (6, 8))
    S = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    W = Q * S @ P.T
    layer = factorised(6, 8, 5)
    learned(layer, W, torch.eye(8))
    for b in range(1, 6):
        found = layer.U[:, :b] @ layer.V[:, :b].T
        assert (found - Q[:, :b] * S[:b] @ P[:, :b].T).norm() < 0.05 * W.norm(), b


def test_a_linear_autoencoder_finds_the_principal_subspaces() -> None:
    """Theorem of the paper: and that of an autoencoder is the principal component analysis of the data."""
    with drawn_from(2):
        directions = torch.linalg.qr(torch.randn(7, 7)).Q
    factor = directions * torch.tensor([3.0, 2.5, 2.0, 1.5, 1.0, 0.5, 0.2])
    layer = factorised(7, 7, 4)
    learned(layer, torch.eye(7), factor)
    for b in range(1, 5):
        span = torch.linalg.qr(layer.U[:, :b].detach()).Q
        cosine = torch.linalg.svdvals(directions[:, :b].T @ span).min()
        assert torch.rad2deg(torch.arccos(cosine.clamp(max=1))) < 5, b


def test_more_lasso_finds_lower_ranks() -> None:
    totals = []
    for lasso in (0.0, 1e-3, 1e-2):
        _, controller = trained(config(lasso=lasso), 100)
        totals.append(sum(delta.kept for delta in controller.deltas.values()))
    assert totals[0] == 4 * 6
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == 3


def test_the_step_sees_the_gradient_of_loss_and_lasso() -> None:
    lasso = 0.1
    model = get_peft_model(net().double(), config(lasso=lasso, init_weights=False)).double()
    controller = controller_for(model, 10)
    x, y = (t.double() for t in planted())
    controller.before_forward()
    functional.mse_loss(model(x), y).backward()
    controller.before_step()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    total = functional.mse_loss(model(x), y)
    for delta in controller.deltas.values():
        for factor in (delta.U, delta.V):
            total = total + lasso * torch.stack([factor[:, j:].norm() for j in range(6)]).sum()
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_ranks_found_are_those_of_the_saved_adapter_and_of_the_plain_lora(tmp_path: Path) -> None:
    model, controller = trained(config(lasso=1e-3), 100)
    ranks = {name: delta.kept for name, delta in controller.deltas.items()}
    assert model.peft_config["default"].found_ranks == ranks
    assert len(set(ranks.values())) > 1
    wanted = model(batch())
    model.save_pretrained(tmp_path / "maestro")
    again = PeftModel.from_pretrained(net(), tmp_path / "maestro").eval()
    assert torch.equal(again(batch()), wanted)
    adapter = load(tmp_path / "maestro", base=net())
    assert {name: module.rank for name, module in adapter.modules.items()} == {n: max(k, 1) for n, k in ranks.items()}
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(batch()), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_any_prefix_can_be_deployed(rank: int, tmp_path: Path) -> None:
    model, controller = trained(config(lasso=0.0), 10)
    for number, delta in enumerate(controller.deltas.values()):
        delta.kept = number + 1
    model.peft_config["default"].found_ranks = controller.state_dict()["ranks"]
    set_rank(model, rank)
    for number, delta in enumerate(controller.deltas.values()):
        k = min(rank, number + 1)
        assert delta.rank == k
        torch.testing.assert_close(delta.weight(), delta.U[:, :k] @ delta.V[:, :k].T)
    wanted = model(batch())
    model.save_pretrained(tmp_path / "maestro")
    adapter = load(tmp_path / "maestro", base=net())
    assert [module.rank for module in adapter.modules.values()] == [min(rank, n + 1) for n in range(4)]
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(batch()), wanted, rtol=1e-5, atol=1e-5)


def test_columns_that_are_cut_never_come_back() -> None:
    model = get_peft_model(net(), config(lasso=1e-3))
    controller = controller_for(model, 20)
    for delta in controller.deltas.values():
        delta.kept = 2
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    go_on(model, controller, optimizer, 20)
    assert all(delta.kept <= 2 for delta in controller.deltas.values())
    assert all(torch.linalg.matrix_rank(d.eval().weight()) <= 2 for d in controller.deltas.values())


def test_a_layer_that_no_step_has_moved_is_not_judged() -> None:
    """As in the warm-up of a learning rate, which begins at zero."""
    model = get_peft_model(net(), config(shrinks=3))
    controller = controller_for(model, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    go_on(model, controller, optimizer, 3)
    assert {delta.kept for delta in controller.deltas.values()} == {6}


@pytest.mark.parametrize("cut", [7, 20, 31])
def test_a_resumed_training_is_the_uncut_one(cut: int) -> None:
    whole, one = trained(config(lasso=1e-3, threshold=0.05), 40)
    again, other = cut_and_resumed(config(lasso=1e-3, threshold=0.05), 40, cut)
    same(whole, again)
    assert one.state_dict() == other.state_dict()
    assert whole.peft_config["default"].found_ranks == again.peft_config["default"].found_ranks
    assert min(delta.kept for delta in one.deltas.values()) < 6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lasso": -1.0}, "lasso and threshold must be 0 or more, got -1.0 and 1e-05"),
        ({"threshold": -1.0}, "lasso and threshold must be 0 or more, got 0.0001 and -1.0"),
        ({"shrinks": 0}, "shrinks must be a whole number from 1, got 0"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
