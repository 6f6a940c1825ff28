"""LoRA-XS: its basis, its best smaller LoRA in closed form, and the basis when it is computed again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.adapters import LoraXsConfig
from lora_squeeze.methods.adapters.lora_xs import LoraXsDelta

LORA_XS = METHODS["loraxs"]


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def deltas(model: nn.Module) -> list[LoraXsDelta]:
    return [layer.deltas["default"] for layer in layers(model).values()]


def weight(delta: LoraXsDelta) -> Tensor:
    return delta.site.base_weight().detach().double()


def trained(**settings: Any) -> list[LoraXsDelta]:
    return deltas(adapted(LORA_XS, trained=True, **settings).double())


def test_with_zeros_it_is_the_base_model_and_with_the_usual_start_nearly_so() -> None:
    model, wanted = adapted(LORA_XS), net()(batch())
    for delta in deltas(model):
        assert 0 < delta.R.abs().max() < 1e-4
        assert delta.R.std().item() == pytest.approx(1e-5, rel=0.5)
    assert 0 < (model(batch()) - wanted).abs().max() < 1e-3 * wanted.abs().max()
    for delta in deltas(model):
        delta.R.data.zero_()
    assert torch.equal(model(batch()), wanted)


def test_zeros_have_a_gradient() -> None:
    for delta in trained():
        delta.R.data.zero_()
        (delta.weight() * weight(delta)).sum().backward()
        assert delta.R.grad is not None
        assert (delta.R.grad.diagonal().abs() > 1e-3).all()


def test_the_basis_is_orthonormal_with_the_singular_values_on_the_side_of_the_input() -> None:
    for delta in trained(r=4):
        B, A = delta.B.double(), delta.A.double()
        S = torch.linalg.svdvals(weight(delta))[:4]
        assert torch.allclose(B.T @ B, torch.eye(4, dtype=B.dtype), atol=1e-6)
        assert torch.allclose(A @ A.T, (S**2).diag(), atol=1e-6)


def test_the_identity_adds_the_best_approximation_of_w_and_its_negative_takes_it_out() -> None:
    for delta in trained(r=4):
        delta.R.data = torch.eye(4, dtype=torch.float64)
        U, S, Vh = torch.linalg.svd(weight(delta), full_matrices=False)
        assert torch.allclose(delta.weight(), (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-6)
        delta.R.data.neg_()
        assert torch.allclose(torch.linalg.svdvals(weight(delta) + delta.weight())[: len(S) - 4], S[4:], atol=1e-6)


def test_the_gradient_is_that_of_the_weight_between_the_factors() -> None:
    for delta in trained(alpha=7.0):
        G = drawn(delta.site.out_features, delta.site.in_features)
        (delta.weight() * G).sum().backward()
        assert delta.R.grad is not None
        assert torch.allclose(delta.R.grad, 7 / 3 * delta.B.double().T @ G @ delta.A.double().T)
        assert [name for name, p in delta.named_parameters() if p.requires_grad] == ["R"]


def test_the_update_lies_in_the_leading_singular_spaces() -> None:
    for delta in trained():
        U, _, Vh = torch.linalg.svd(weight(delta))
        assert (U[:, 3:].T @ delta.weight()).abs().max() < 1e-6
        assert (delta.weight() @ Vh[3:].T).abs().max() < 1e-6


def test_the_best_smaller_lora_comes_from_the_small_matrix(tmp_path: Path) -> None:
    model = adapted(LORA_XS, init_weights=False, r=6)
    model.save_pretrained(tmp_path / "loraxs")
    adapter = load(tmp_path / "loraxs", base=net())
    lora_squeeze.convert(adapter, "peft", rank=2).save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora")
    for name, layer in layers(model).items():
        delta = layer.deltas["default"]
        dW = delta.weight().detach().double()
        U, S, Vh = torch.linalg.svd(weight(delta), full_matrices=False)
        signs = (delta.B.double() * U[:, :6]).sum(0).sign()
        left, core, right = torch.linalg.svd(signs[:, None] * delta.core().double() * signs * S[:6])
        best = U[:, :6] @ (left[:, :2] * core[:2]) @ right[:2] @ Vh[:6]
        dense = torch.linalg.svdvals(dW)[2:].norm()
        found = plain.get_submodule(name).get_delta_weight("default").detach()
        assert abs((dW - best).norm() - dense) < 1e-6 * dW.norm()
        assert (found - best).norm() < 1e-5 * dW.norm()


@pytest.mark.parametrize("r", [12, 99])
def test_r_beyond_the_width_is_the_width(r: int) -> None:
    for delta in trained(r=r, alpha=24.0):
        assert delta.rank == 12
        assert delta.R.shape == (12, 12)
        assert delta.scale == 24 / r


def other_svd(monkeypatch: pytest.MonkeyPatch, turn: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> None:
    """A library that gives the same decomposition with other vectors."""
    real = torch.linalg.svd

    def svd(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return turn(*real(*args, **kwargs))

    monkeypatch.setattr(torch.linalg, "svd", svd)


def test_signs_of_another_library_do_no_harm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = adapted(LORA_XS, trained=True)
    wanted = model(batch())
    model.save_pretrained(tmp_path)

    def flipped(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, ...]:
        sign = torch.where(torch.arange(len(S)) % 2 == 0, -1.0, 1.0)
        return U * sign, S, Vh * sign[:, None]

    other_svd(monkeypatch, flipped)
    assert torch.equal(PeftModel.from_pretrained(net(), tmp_path).eval()(batch()), wanted)


def orthogonal() -> nn.Module:
    """Weights whose singular values are all the same."""
    base = net()
    for layer in base.modules():
        if isinstance(layer, nn.Linear):
            U, _, Vh = torch.linalg.svd(layer.weight.data, full_matrices=False)
            layer.weight.data = U @ Vh
    return base


@pytest.mark.parametrize("stored", [False, True], ids=["computed-again", "stored"])
def test_repeated_singular_values_need_stored_factors(
    stored: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = adapted(LORA_XS, orthogonal(), init_weights=False, store_factors=stored)
    wanted = model(batch())
    model.save_pretrained(tmp_path)
    base = orthogonal()
    other_svd(monkeypatch, lambda U, S, Vh: (U.flip(1), S, Vh.flip(0)))
    if not stored:
        with pytest.raises(LoraSqueezeError, match="just those decide about its factors"):
            PeftModel.from_pretrained(base, tmp_path)
        return
    assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(batch()), wanted)


def test_with_stored_factors_the_base_may_come_in_another_dtype(tmp_path: Path) -> None:
    model = adapted(LORA_XS, trained=True, store_factors=True)
    model.save_pretrained(tmp_path / "stored")
    keys = load_file(tmp_path / "stored" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in keys} == {"R", "B", "A"}
    again: Any = PeftModel.from_pretrained(net(torch.bfloat16), tmp_path / "stored")
    for one, other in zip(deltas(again), deltas(model), strict=True):
        assert torch.equal(one.weight(), other.weight())
    adapted(LORA_XS, trained=True).save_pretrained(tmp_path / "drawn")
    with pytest.raises(LoraSqueezeError, match="trained over a weight with other numbers"):
        PeftModel.from_pretrained(net(torch.bfloat16), tmp_path / "drawn")


def test_a_random_basis_has_the_size_of_a_fresh_lora(tmp_path: Path) -> None:
    model = adapted(LORA_XS, init_weights=False, basis="random")
    for delta in deltas(model):
        for factor, width in ((delta.B, delta.B.shape[1]), (delta.A, delta.A.shape[1])):
            assert factor.abs().max() <= width**-0.5
            assert factor.std() == pytest.approx((3 * width) ** -0.5, rel=0.25)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), model(batch()))
    elsewhere = PeftModel.from_pretrained(net(torch.bfloat16), tmp_path)
    assert all(torch.equal(a.weight(), b.weight()) for a, b in zip(deltas(elsewhere), deltas(model), strict=True))
    other = deltas(adapted(LORA_XS, init_weights=False, basis="random", seed=1))
    assert not any(torch.equal(a.B, b.B) or torch.equal(a.A, b.A) for a, b in zip(deltas(model), other, strict=True))


def test_the_default_scale_is_one() -> None:
    assert [delta.scale for delta in deltas(adapted(LORA_XS, r=7))] == [1.0] * 4


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="basis must be svd or random, got 'qr'"):
        LoraXsConfig(basis="qr")
