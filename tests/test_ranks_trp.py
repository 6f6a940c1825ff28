"""Trained rank pruning as an adapter, in both forms: projections against a loop by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, batch, layers, net, shake
from peft import LoraConfig, PeftModel, get_peft_model
from ranks_cases import adam, cut_and_resumed, fresh, go_on, planted, same, trained
from torch import Tensor, nn
from torch.nn import functional

import lora_squeeze
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.control import Controller, controller_for
from lora_squeeze.methods.ranks import TrpConfig
from lora_squeeze.methods.ranks.trp import Factors

FORMS = ("dense", "factors")
each_form = pytest.mark.parametrize("form", FORMS)


def config(form: str = "dense", **more: Any) -> TrpConfig:
    return TrpConfig(**{"form": form, "r": 6, "target_modules": ["wide", "tall"], **more})


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def truncated(W: Tensor, energy: float, most: int) -> tuple[Tensor, Tensor]:
    """T(W) and U V^T, by hand."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    share = S.square().cumsum(0) / S.square().sum()
    k = min(int((share < energy).sum()) + 1, most)
    return U[:, :k] * S[:k] @ Vh[:k], U[:, :k] @ Vh[:k]


def moved(form: str, **more: Any) -> Any:
    """An adapter whose updates are something."""
    model = get_peft_model(net(), config(form, **more))
    shake(model)
    return model.double()


@each_form
def test_projections_cut_every_update_as_the_energy_says(form: str) -> None:
    for energy, r in ((0.5, 6), (0.9, 6), (0.9, 2), (1.0, 6)):
        model = moved(form, energy=energy, r=r)
        wanted = {
            name: truncated(layer.get_delta_weight("default"), energy, r)[0] for name, layer in layers(model).items()
        }
        controller = controller_for(model, 10)
        controller.before_forward()
        for (name, layer), kept in zip(layers(model).items(), controller.pruning.kept.values(), strict=True):
            found = layer.get_delta_weight("default")
            torch.testing.assert_close(found, wanted[name], rtol=1e-7, atol=1e-9)
            assert torch.linalg.matrix_rank(found, rtol=1e-9) == kept
            delta = layer.deltas["default"]
            assert delta.rank == (kept if kept < 12 else None)


@each_form
def test_a_step_after_a_projection_is_the_one_by_hand(form: str) -> None:
    """Projection first, the gradient there, the nuclear norm's part in those steps alone, plain steps between."""
    lr, nuclear, energy = 0.1, 0.02, 0.8
    model = moved(form, period=3, nuclear=nuclear, energy=energy, **({"alpha": 9} if form == "factors" else {}))
    scale = 1.5 if form == "factors" else 1
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    controller = controller_for(model, 7, optimizer)
    deltas = controller.deltas
    hand = {
        name: [p.detach().clone().requires_grad_() for p in ([d.D] if form == "dense" else [d.B, d.A])]
        for name, d in deltas.items()
    }
    x, y = (t.double() for t in planted())
    for step in range(7):
        subgradients = {}
        for name, own in hand.items():
            if step % 3 == 0:
                dW = own[0].detach() if form == "dense" else scale * own[0].detach() @ own[1].detach()
                T, subgradients[name] = truncated(dW, energy, 6)
                left = torch.linalg.svd(T)[0][:, : torch.linalg.matrix_rank(T, rtol=1e-9)]
                own[0].data = T if form == "dense" else left @ left.T @ own[0].data
        by_hand = net().double()
        penalty = torch.zeros((), dtype=torch.float64)
        updates = {name: own[0] if form == "dense" else scale * own[0] @ own[1] for name, own in hand.items()}
        for name, update in updates.items():
            if name in subgradients:
                penalty = penalty + nuclear * (subgradients[name] * update).sum()
        weights = {f"{name}.weight": by_hand.get_submodule(name).weight.detach() + u for name, u in updates.items()}
        loss = functional.mse_loss(torch.func.functional_call(by_hand, weights, (x,)), y) + penalty
        flat = [p for own in hand.values() for p in own]
        for p, gradient in zip(flat, torch.autograd.grad(loss, flat), strict=True):
            p.data = p.data - lr * gradient
        controller.before_forward()
        functional.mse_loss(model.train()(x), y).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        for name, delta in deltas.items():
            for one, other in zip([delta.D] if form == "dense" else [delta.B, delta.A], hand[name], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, msg=f"{name} in step {step}")


@each_form
def test_without_projections_it_is_plain_training(form: str) -> None:
    """Bit by bit; the first step's projection finds nothing to cut at the start."""
    model, plain = fresh(config(form, period=1000, nuclear=0.0)), fresh(config(form))
    controller = controller_for(model, 30)
    optimizers = adam(model), adam(plain)
    go_on(model, controller, optimizers[0], 30)
    go_on(plain, Controller(plain, 30), optimizers[1], 30)
    same(model, plain)


def test_factors_without_projections_are_a_lora() -> None:
    model = get_peft_model(net(), config("factors", alpha=9, period=1000))
    lora = get_peft_model(net(), LoraConfig(r=6, lora_alpha=9, target_modules=["wide", "tall"]))
    for one, other in zip(layers(lora).values(), layers(model).values(), strict=True):
        one.lora_A["default"].weight.data = other.deltas["default"].A.data.clone()
    for each in (model, lora):
        optimizer = sgd(each)
        go_on(each, controller_for(each, 20, optimizer), optimizer, 20)
    x, _ = planted()
    torch.testing.assert_close(model(x), lora(x), rtol=1e-4, atol=1e-5)


def test_factors_go_on_in_full_width() -> None:
    """After a projection, every component still has a gradient."""
    model = moved("factors", energy=0.5)
    controller = controller_for(model, 10)
    controller.before_forward()
    assert max(controller.pruning.kept.values()) < 6
    model.train()(batch(torch.float64)).square().sum().backward()
    for delta in controller.deltas.values():
        assert (delta.A.grad.norm(dim=1) > 0).all()
        assert (delta.B.grad.norm(dim=0) > 0).all()


def test_the_factors_decompose_their_product() -> None:
    generator = torch.Generator().manual_seed(0)
    B, A = (nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((7, 3), (3, 9)))
    U, S, Vh = Factors(B, A, 1.5).svd()
    torch.testing.assert_close((U * S @ Vh).float(), 1.5 * B @ A, rtol=1e-5, atol=1e-5)
    for one in (U.T @ U, Vh @ Vh.T):
        torch.testing.assert_close(one, torch.eye(3, dtype=one.dtype), rtol=1e-6, atol=1e-6)


@each_form
def test_the_end_has_the_ranks_of_the_last_projection(form: str, tmp_path: Path) -> None:
    model, controller = trained(config(form, period=10, energy=0.95), 120)
    ranks = controller.pruning.kept
    assert len(ranks) == 4
    assert len(set(ranks.values())) > 1
    wanted = model(batch())
    model.save_pretrained(tmp_path / "trp")
    again = PeftModel.from_pretrained(net(), tmp_path / "trp").eval()
    assert torch.equal(again(batch()), wanted)
    adapter = load(tmp_path / "trp", base=net())
    assert {name: module.rank for name, module in adapter.modules.items()} == ranks
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(batch()), wanted, rtol=1e-5, atol=1e-5)
    numbers = sum(p.numel() for name, p in plain.named_parameters() if "lora_" in name)
    assert numbers == sum(rank * (12 + 20) for rank in ranks.values())
    torch.testing.assert_close(model.merge_and_unload()(batch()), wanted, rtol=1e-5, atol=1e-5)


def test_a_training_too_short_for_a_projection_is_cut_at_its_end() -> None:
    model, controller = trained(config(period=1000, energy=0.7), 5)
    assert set(controller.pruning.kept) == {"blocks.0.wide", "blocks.0.tall", "blocks.1.wide", "blocks.1.tall"}
    for layer, rank in zip(layers(model).values(), controller.pruning.kept.values(), strict=True):
        assert torch.linalg.matrix_rank(layer.get_delta_weight("default"), rtol=1e-5) == rank <= 6


@each_form
@pytest.mark.parametrize("autocast", [True, False], ids=["float32", "bfloat16"])
def test_beside_a_base_of_half_precision(form: str, autocast: bool) -> None:
    made = config(form, period=2, nuclear=0.01, energy=0.8)
    model = get_peft_model(net(torch.bfloat16), made, autocast_adapter_dtype=autocast)
    optimizer = adam(model)
    controller = controller_for(model, 6, optimizer)
    x, y = (t.bfloat16() for t in planted())
    go_on(model, controller, optimizer, 6, (x, y))
    controller.finish()
    for name, delta in controller.deltas.items():
        assert {p.dtype for p in delta.parameters()} == {torch.float32 if autocast else torch.bfloat16}
        S = torch.linalg.svdvals(delta.weight().detach().double())
        rest = S[controller.pruning.kept[name] :].norm() / S.norm()
        assert rest < (1e-6 if autocast else torch.finfo(torch.bfloat16).eps)
        assert S[0] > 0


def test_a_noisy_low_rank_update_is_found() -> None:
    """Linear regression, a rank of 3 and noise: plain training has full rank."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 12, generator=generator)
    base = nn.Sequential()
    base.add_module("wide", nn.Linear(12, 20))
    B, A = torch.randn(20, 3, generator=generator), torch.randn(3, 12, generator=generator)
    W = base.wide.weight.detach() + B @ A
    y = x @ W.T + base.wide.bias.detach() + torch.randn(400, 20, generator=generator)
    found = {}
    for name, settings in (("plain", {"period": 1000, "energy": 1.0}), ("pruned", {"period": 10, "nuclear": 0.05})):
        made = TrpConfig(r=12, target_modules=["wide"], **{"energy": 0.98, **settings})
        model = get_peft_model(copy.deepcopy(base), made)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        controller = controller_for(model, 100, optimizer)
        go_on(model, controller, optimizer, 100, (x, y))
        controller.finish()
        found[name] = controller.pruning.kept["wide"]
    assert found == {"plain": 12, "pruned": 3}


@each_form
@pytest.mark.parametrize("cut", [7, 10, 26])
def test_a_resumed_training_is_the_uncut_one(form: str, cut: int) -> None:
    settings = {"period": 5, "energy": 0.99, "nuclear": 0.01}
    whole, one = trained(config(form, **settings), 27)
    again, other = cut_and_resumed(config(form, **settings), 27, cut)
    same(whole, again)
    assert one.state_dict() == other.state_dict()


@each_form
def test_it_begins_as_the_base_and_with_init_weights_elsewhere(form: str) -> None:
    base = net()(batch())
    assert torch.equal(get_peft_model(net(), config(form))(batch()), base)
    assert not torch.equal(get_peft_model(net(), config(form, init_weights=False))(batch()), base)


def test_the_factors_pass_what_the_dense_form_is_asked_elsewhere(tmp_path: Path) -> None:
    """Merging, saving, two adapters; the common tests ask it of the dense form."""
    model = get_peft_model(net(), config("factors", alpha=3)).eval()
    shake(model)
    wanted = model(batch())
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path).eval()(batch()), wanted)
    model.merge_adapter()
    torch.testing.assert_close(model(batch()), wanted, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    model.add_adapter("other", METHODS["trp"].config())
    torch.testing.assert_close(model(batch()), wanted, rtol=1e-5, atol=1e-5)
    assert {delta.rank for delta in controller_for(model, 1).deltas.values()} == {6}
    assert model.get_nb_trainable_parameters()[0] == 4 * 6 * (12 + 20)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "sparse"}, "form must be one of dense, factors, got 'sparse'"),
        ({"alpha": 2.0}, "a dense update has no alpha, got 2.0; form='factors' has"),
        ({"energy": 0.0}, r"energy must be in \(0, 1\], got 0.0"),
        ({"energy": 1.5}, r"energy must be in \(0, 1\], got 1.5"),
        ({"period": 0}, "period must be a whole number from 1, got 0"),
        ({"nuclear": -1.0}, "nuclear must be 0 or more, got -1.0"),
    ],
    ids=["form", "alpha", "zero", "above", "period", "nuclear"],
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
