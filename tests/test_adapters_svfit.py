"""SVFit: which singular values it trains, what they do to the spectrum of W, and what it can and cannot reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.adapters import SvfitConfig
from lora_squeeze.methods.adapters.decomposed import fingerprint
from lora_squeeze.methods.adapters.svfit import SvfitDelta

SVFIT = METHODS["svfit"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas(model: nn.Module) -> list[SvfitDelta]:
    return [layer.deltas["default"] for layer in layers(model).values()]


def weight(delta: SvfitDelta) -> Tensor:
    return delta.site.base_weight().detach().double()


def trained(**settings: Any) -> list[SvfitDelta]:
    return deltas(adapted(SVFIT, trained=True, **settings).double())


@pytest.mark.parametrize("r", [1, 7, 12, None, 99], ids=str)
def test_the_largest_singular_values_are_trained(r: int | None) -> None:
    model = adapted(SVFIT, r=r)
    assert torch.equal(model(batch()), net()(batch()))
    for delta in deltas(model):
        count = 12 if r is None else min(r, 12)
        assert delta.z.numel() == delta.rank == count
        assert torch.allclose(delta.singular_values().double(), torch.linalg.svdvals(weight(delta))[:count])


@pytest.mark.parametrize("energy", [0.1, 0.6, 0.99, 1.0])
def test_as_many_as_hold_the_energy(energy: float) -> None:
    for delta in deltas(adapted(SVFIT, r=None, energy=energy)):
        squares = torch.linalg.svdvals(weight(delta)) ** 2
        r = delta.z.numel()
        assert squares[:r].sum() >= energy * squares.sum() * (1 - 1e-12)
        assert squares[: r - 1].sum() < energy * squares.sum()


def test_the_gradient_is_the_diagonal_in_the_basis_of_w() -> None:
    for delta in trained():
        G = drawn(delta.site.out_features, delta.site.in_features)
        (delta.weight() * G).sum().backward()
        U, _, Vh = torch.linalg.svd(weight(delta), full_matrices=False)
        wanted = (U.T @ G @ Vh.T).diagonal()[:5]
        assert delta.z.grad is not None
        assert torch.allclose(delta.z.grad, wanted, atol=1e-5)


@pytest.mark.parametrize("relative", [False, True], ids=["absolute", "relative"])
def test_the_merged_weight_has_the_trained_singular_values(relative: bool) -> None:
    for delta in trained(r=None, relative=relative):
        delta.z.data = drawn(12)
        s = delta.singular_values().detach()
        wanted = delta.s0 * (1 + delta.z) if relative else delta.s0 + delta.z
        assert torch.allclose(s, wanted.detach(), atol=1e-7)
        assert s.min() < 0
        found = torch.linalg.svdvals(weight(delta) + delta.weight())
        assert torch.allclose(found, s.abs().sort(descending=True).values, atol=1e-5)


def test_norms_and_rank_are_those_of_the_changes() -> None:
    for delta in trained():
        delta.z.data[2] = 0
        dW, changes = delta.weight().detach(), delta.z.detach()
        assert torch.allclose(dW.norm(), changes.norm(), rtol=1e-6)
        assert torch.allclose(torch.linalg.matrix_norm(dW, 2), changes.abs().max(), rtol=1e-6)
        assert torch.linalg.matrix_rank(dW, rtol=1e-6) == changes.count_nonzero()


def test_the_singular_vectors_stay() -> None:
    for delta in trained(r=None):
        core = delta.B.double().T @ (weight(delta) + delta.weight()) @ delta.A.double().T
        assert (core - core.diagonal().diag()).abs().max() < 1e-5


def test_the_best_lora_has_the_largest_changes(tmp_path: Path) -> None:
    model = adapted(SVFIT, trained=True, r=None)
    model.save_pretrained(tmp_path / "svfit")
    adapter = load(tmp_path / "svfit", base=net())
    lora_squeeze.convert(adapter, "peft", rank=4).save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora")
    for name, layer in layers(model).items():
        delta = layer.deltas["default"]
        dW, keep = delta.weight().detach(), delta.z.abs().topk(4).indices
        kept = (delta.B[:, keep] * delta.z[keep]) @ delta.A[keep]
        dropped = delta.z.detach().abs().sort().values[:-4].norm()
        found = plain.get_submodule(name).get_delta_weight("default")
        assert torch.allclose(found, kept, atol=1e-5)
        assert abs((dW - found).norm() - dropped) < 1e-6 * dW.norm()
        U, S, Vh = torch.linalg.svd(dW)
        assert torch.allclose(kept, (U[:, :4] * S[:4]) @ Vh[:4], atol=1e-5)


def test_all_singular_values_are_a_lora_too(tmp_path: Path) -> None:
    model = adapted(SVFIT, trained=True, r=None)
    model.save_pretrained(tmp_path / "svfit")
    lora_squeeze.convert(load(tmp_path / "svfit", base=net()), "peft", rank=12).save(tmp_path / "lora")
    plain, wanted = PeftModel.from_pretrained(net(), tmp_path / "lora").eval(), model(batch())
    assert (plain(batch()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_it_fits_what_lies_in_its_directions_and_nothing_else() -> None:
    """A linear model with white inputs: the loss is |dW - teacher|^2."""
    for delta in trained(r=None):
        U, _, Vh = torch.linalg.svd(weight(delta), full_matrices=False)
        delta.z.data.zero_()
        hollow = drawn(12, 12)
        hollow -= hollow.diagonal().diag()
        (delta.weight() - U @ hollow @ Vh).square().sum().backward()
        assert delta.z.grad is not None
        assert delta.z.grad.abs().max() < 1e-5
        teacher = (U * drawn(12)) @ Vh
        optimizer = torch.optim.SGD([delta.z], lr=0.25)
        for _ in range(40):
            optimizer.zero_grad()
            loss = (delta.weight() - teacher).square().sum()
            loss.backward()
            optimizer.step()
        assert loss < 1e-6 * teacher.square().sum()


def test_of_any_change_a_share_of_one_over_the_width_can_be_reached() -> None:
    """One over the wider side; a LoRA reaches the largest singular directions of either teacher."""
    delta, *_ = trained(r=None)
    shares = []
    for seed in range(200):
        teacher = drawn(20, 12, seed=seed)
        reached = (delta.B.double().T @ teacher @ delta.A.double().T).diagonal()
        shares.append(reached.square().sum() / teacher.square().sum())
    assert torch.stack(shares).mean() == pytest.approx(1 / 20, rel=0.1)


def test_relative_changes_move_large_values_by_more() -> None:
    for delta in trained(r=None, relative=True):
        delta.z.data.fill_(0.1)
        assert torch.allclose(delta.core(), 0.1 * delta.s0.double())
        assert torch.allclose(delta.weight(), 0.1 * weight(delta), atol=1e-6)


def test_singular_values_can_be_kept_from_falling_below_zero() -> None:
    for delta in trained(r=None, nonnegative=True):
        delta.z.data = -2 * delta.s0.double() * (torch.arange(12) % 2)
        s = delta.singular_values().detach()
        assert torch.equal(s, torch.where(torch.arange(12) % 2 == 1, 0.0, delta.s0.double()))
        delta.weight().sum().backward()
        assert delta.z.grad is not None
        assert torch.equal(delta.z.grad != 0, torch.arange(12) % 2 == 0)


@pytest.mark.parametrize("change", ["other", "dtype", "merged"])
def test_another_weight_is_refused(change: str, tmp_path: Path) -> None:
    model = adapted(SVFIT, trained=True)
    model.save_pretrained(tmp_path)
    base: Any = net(torch.bfloat16) if change == "dtype" else net()
    if change == "other":
        base.blocks[0].wide.weight.data[0, 0] += 1e-3
    if change == "merged":
        base = adapted(SVFIT, trained=True).merge_and_unload()
    wanted = (
        "blocks.0.wide: the adapter was trained over a weight with other numbers, of which its directions are made; "
        "load the same base model in the same dtype, with nothing merged into it, nor taken out again in 16 bits"
    )
    with pytest.raises(LoraSqueezeError, match=f"^{wanted}$"):
        PeftModel.from_pretrained(base, tmp_path)
    if change == "other":
        with pytest.raises(
            LoraSqueezeError,
            match=r"cannot load this SVFit on the base model \(blocks.0.wide: the adapter was trained over a",
        ):
            load(tmp_path, base=base)


def test_a_merge_that_was_taken_back_leaves_the_weight_good_enough(tmp_path: Path) -> None:
    model = adapted(SVFIT, trained=True)
    model.save_pretrained(tmp_path)
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(next(iter(layers(model).values())).get_base_layer().weight, net().blocks[0].wide.weight)
    model.load_adapter(str(tmp_path), "again")
    for layer in layers(model).values():
        assert torch.allclose(layer.get_delta_weight("again"), layer.get_delta_weight("default"), atol=1e-5)


def test_in_16_bits_it_leaves_another_one(tmp_path: Path) -> None:
    adapted(SVFIT, net(torch.bfloat16), trained=True).save_pretrained(tmp_path)
    model = adapted(SVFIT, net(torch.bfloat16), trained=True)
    model.merge_adapter()
    model.unmerge_adapter()
    with pytest.raises(LoraSqueezeError, match="nothing merged into it, nor taken out again in 16 bits"):
        model.load_adapter(str(tmp_path), "again")


@pytest.mark.parametrize("kind", ["one-entry", "scaled", "permuted", "transposed", "bfloat16", "float16"])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
def test_the_fingerprint_tells_weights_apart(kind: str, size: float) -> None:
    W = size * drawn(30, 30).float()
    other = W.clone()
    other[3, 4] += 2 * size
    others = {"one-entry": other, "scaled": 1.001 * W, "permuted": W.flip(0), "transposed": W.T}
    changed = others[kind] if kind in others else W.to(getattr(torch, kind)).float()
    found, wanted = fingerprint(changed), fingerprint(W)
    assert (found - wanted).abs().max() > 1e-4 * wanted[0]
    rounded = fingerprint((W + drawn(30, 30).float()) - drawn(30, 30).float())
    assert (rounded - wanted).abs().max() < 1e-5 * wanted[0] + 1


def test_a_base_in_half_precision_is_itself(tmp_path: Path) -> None:
    model = adapted(SVFIT, net(torch.bfloat16), trained=True)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(torch.bfloat16), tmp_path).eval()
    x = batch(torch.bfloat16)
    assert torch.equal(again(x), model(x))
    wider = PeftModel.from_pretrained(net(torch.bfloat16).float(), tmp_path).eval()
    for one, other in zip(deltas(wider), deltas(model), strict=True):
        assert torch.equal(one.weight(), other.weight())


def with_dead_rows(dtype: torch.dtype = torch.float32) -> Any:
    base = net()
    for block in base.blocks:
        block.wide.weight.data[3:] = 0  # type: ignore[union-attr, index]
        block.tall.weight.data[:, 4:] = block.tall.weight.data[:, :1]  # type: ignore[union-attr, index]
    return base.to(dtype)


@pytest.mark.parametrize("nonnegative", [False, True])
def test_zeros_of_w_are_not_trained(nonnegative: bool, tmp_path: Path) -> None:
    model = adapted(SVFIT, with_dead_rows(), trained=True, r=None, nonnegative=nonnegative)
    assert [delta.z.numel() for delta in deltas(model)] == [3, 4, 3, 4]
    assert model.get_nb_trainable_parameters()[0] == 14
    for delta in deltas(model):
        assert delta.rank == delta.z.numel() == torch.linalg.matrix_rank(weight(delta), rtol=1e-6)
    model.save_pretrained(tmp_path)
    base = with_dead_rows()
    for layer in base.modules():
        if isinstance(layer, nn.Linear):  # what a merge that was taken back leaves
            layer.weight.data += 3e-8 * drawn(*layer.weight.shape).float() * layer.weight.data.std()
    again = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.allclose(again(batch()), model(batch()), atol=1e-5)


def test_of_a_weight_of_zeros_nothing_moves() -> None:
    base = net()
    base.blocks[0].wide.weight.data.zero_()  # type: ignore[union-attr]
    delta = deltas(adapted(SVFIT, base, init_weights=False, r=None))[0]
    assert delta.z.numel() == 1
    assert not delta.weight().any()


def test_a_file_with_numbers_for_zeros_of_w_is_loaded_without_them(tmp_path: Path) -> None:
    """As files were written that have no fingerprint of the factors."""
    model = adapted(SVFIT, with_dead_rows(), trained=True, r=None)
    wanted = model(batch())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    state = {key: value for key, value in load_file(file).items() if "fingerprint_of_factors" not in key}
    save_file({key: torch.cat([z, torch.ones(8)]) if key.endswith(".z") else z for key, z in state.items()}, file)
    with pytest.warns(UserWarning, match=r"blocks.\d.\w+: 8 of 1[12] numbers are of singular values that"):
        again = PeftModel.from_pretrained(with_dead_rows(), tmp_path).eval()
    assert torch.equal(again(batch()), wanted)


@pytest.mark.parametrize("settings", [{}, {"relative": True}, {"nonnegative": True}, {"energy": 0.9}], ids=str)
def test_stored_factors_need_no_weight_of_their_own(settings: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(SVFIT, with_dead_rows(), trained=True, r=None, store_factors=True, **settings)
    model.save_pretrained(tmp_path)
    keys = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {"z", "s0", "A", "B"}
    again = PeftModel.from_pretrained(with_dead_rows(torch.bfloat16), tmp_path)
    for one, other in zip(deltas(again), deltas(model), strict=True):
        assert one.rank == other.rank
        assert torch.equal(one.weight(), other.weight())


def test_a_singular_value_of_zero_that_may_not_fall_has_its_whole_gradient() -> None:
    for delta in trained(r=None, nonnegative=True):
        delta.s0[3] = 0
        delta.z.data.zero_()
        delta.core().sum().backward()
        assert delta.z.grad is not None
        assert torch.equal(delta.z.grad, torch.ones(12, dtype=torch.float64))


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SVFit trains the singular values themselves and has no alpha, got 8"):
        SvfitConfig(alpha=8)
    with pytest.raises(ValueError, match=r"give r or energy, not both; got 4 and 0.9"):
        SvfitConfig(r=4, energy=0.9)
    for energy in (0.0, 1.5):
        with pytest.raises(ValueError, match=rf"energy must be in \(0, 1\], got {energy}"):
            SvfitConfig(energy=energy)
