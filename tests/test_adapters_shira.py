"""SHiRA's masks, and adapters that go in and out of the weights by their entries."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import batch, layers, net
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn
from torch.nn import functional

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.shira_masks import (
    calibration_gradients,
    gradient_mask,
    magnitude_mask,
    set_mask,
    snip_mask,
    struct_mask,
)
from lora_squeeze.methods.adapters.shira_switch import ShiraSwitch, changed_share, overlaps

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # PEFT's
R = 2
TARGETS = ["wide", "tall"]
TARGET = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(3))


def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return functional.mse_loss(model(x), TARGET[: len(x)])


def batches() -> list[torch.Tensor]:
    return [batch(), batch().flip(0)]


MASKS: dict[str, Callable[[nn.Module], Any]] = {
    "struct": lambda model: struct_mask(),
    "wm": lambda model: magnitude_mask(),
    "grad": lambda model: gradient_mask(calibration_gradients(model, batches(), TARGETS, loss)),
    "snip": lambda model: snip_mask(calibration_gradients(model, batches(), TARGETS, loss)),
}


def shira(name: str = "wm", base: nn.Module | None = None) -> Any:
    base = net() if base is None else base
    config = set_mask(ShiraConfig(r=R, target_modules=TARGETS), name, MASKS[name](base))
    return get_peft_model(base, config).eval()


def trained(name: str = "wm", base: nn.Module | None = None) -> Any:
    model = shira(name, base)
    generator = torch.Generator().manual_seed(2)
    for layer in layers(model).values():
        values = layer.shira_weight["default"].data
        values += 0.3 * torch.randn(values.shape, generator=generator).to(values.dtype)
    return model


def places(layer: Any, adapter: str = "default") -> set[tuple[int, ...]]:
    return {tuple(place) for place in layer.shira_indices[adapter].T.tolist()}


def top(score: torch.Tensor) -> set[tuple[int, ...]]:
    order = score.flatten().topk(R * sum(score.shape)).indices
    return {divmod(int(place), score.shape[1]) for place in order}


@pytest.mark.parametrize("name", MASKS)
def test_a_fresh_adapter_is_the_base_and_has_the_numbers_of_a_lora(name: str) -> None:
    model = shira(name)
    assert torch.equal(model(batch()), net()(batch()))
    wanted = sum(R * (layer.in_features + layer.out_features) for layer in layers(model).values())
    assert model.get_nb_trainable_parameters()[0] == wanted


def test_scores_choose_the_largest_entries() -> None:
    base = net()
    weights = {name: base.get_submodule(name).weight for name in (f"blocks.{i}.{t}" for i in (0, 1) for t in TARGETS)}
    sums = [
        sum(parts)
        for parts in zip(*(torch.autograd.grad(loss(base, x), weights.values()) for x in batches()), strict=True)
    ]
    found = {kind: layers(shira(kind)) for kind in ("wm", "grad", "snip")}
    for (name, W), gradient in zip(weights.items(), sums, strict=True):
        chosen = {kind: places(each[f"base_model.model.{name}"]) for kind, each in found.items()}
        assert chosen["wm"] == top(W.abs())
        assert chosen["grad"] == top(gradient.abs())
        assert chosen["snip"] == top((W * gradient).abs())
        assert chosen["grad"] != chosen["snip"] != chosen["wm"]


@pytest.mark.parametrize("shape", [(32, 32), (20, 48), (48, 20), (64, 8)], ids=str)
@pytest.mark.parametrize("r", [1, 3])
def test_struct_is_the_diagonal_and_whole_rows(shape: tuple[int, int], r: int) -> None:
    layer = nn.Linear(shape[1], shape[0])
    mask = struct_mask()(layer, r)
    assert mask.sum() == r * sum(shape)
    assert mask.unique().tolist() == [0, 1]
    assert mask.diagonal().all()
    diagonal = torch.eye(*shape)
    partly = [row for row, whole in zip(mask - diagonal, mask.all(1), strict=True) if row.any() and not whole]
    assert len(partly) <= 1
    full = mask.all(1).nonzero().flatten()
    assert len(full) >= 1
    assert len(full.diff().unique()) <= 2, "at equal distances, but for rounding"
    assert full[-1] >= (len(full) - 1) * shape[0] // (len(full) + 1), "over the whole height"
    S = mask * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(S) >= min(shape) - len(full) - 1


def test_random_entries_have_a_high_rank_where_lora_has_its_own() -> None:
    n = 32
    base = nn.Sequential(nn.Linear(n, n))
    model = get_peft_model(base, ShiraConfig(r=2, random_seed=0, target_modules=["0"], init_weights=False))
    S = model.base_model.model[0].get_delta_weight("default").to_dense()
    assert torch.linalg.matrix_rank(S) > n / 2


def test_parts_of_a_score_do_not_overlap_and_are_in_order() -> None:
    layer = nn.Linear(30, 20)
    one, two = (magnitude_mask(part)(layer, 2).bool() for part in (0, 1))
    assert not (one & two).any()
    assert layer.weight.abs()[one].min() > layer.weight.abs()[two].max()
    assert set((one | two).flatten().nonzero().flatten().tolist()) == set(
        layer.weight.abs().flatten().topk(2 * 2 * 50).indices.tolist()
    )


def test_calibration_leaves_the_model_as_it_was() -> None:
    base = net().train()
    base.head.weight.requires_grad_(False)
    base.head.bias.grad = torch.ones(3)
    wanted = {name: (p.clone(), p.requires_grad) for name, p in base.named_parameters()}
    calibration_gradients(base, batches(), TARGETS, loss)
    assert base.training
    for name, parameter in base.named_parameters():
        assert torch.equal(parameter, wanted[name][0])
        assert parameter.requires_grad == wanted[name][1]
        assert (parameter.grad is None) == (name != "head.bias")


def test_calibration_leaves_each_module_in_its_mode() -> None:
    base = net().train()
    base.blocks[0].eval()
    calibration_gradients(base, batches(), TARGETS, loss)
    assert [name for name, module in base.named_modules() if not module.training] == [
        "blocks.0", "blocks.0.wide", "blocks.0.tall",
    ]  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_a_model_with_a_mask_can_be_pickled(name: str) -> None:
    model = trained(name)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(batch()), model(batch()))


def test_training_the_entries_is_training_the_weight_with_a_masked_gradient() -> None:
    model, dense = shira(), net()
    masks = {}
    for name, layer in layers(model).items():
        weight = dense.get_submodule(name.removeprefix("base_model.model.")).weight
        masks[weight] = torch.zeros_like(weight)
        masks[weight][tuple(layer.shira_indices["default"].long())] = 1
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1),
        torch.optim.SGD(masks, lr=0.1),
    ]
    for _ in range(10):
        loss(model, batch()).backward()
        loss(dense, batch()).backward()
        for weight, mask in masks.items():
            weight.grad *= mask
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        dense.zero_grad()
    for layer, weight in zip(layers(model).values(), masks, strict=True):
        S = layer.get_delta_weight("default").to_dense()
        assert S.norm() > 0
        assert (layer.get_base_layer().weight + S - weight).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_on_and_off_give_the_weights_back_bit_by_bit(dtype: torch.dtype) -> None:
    model = trained(base=net(dtype))
    x = batch(dtype)
    wanted = model(x)
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    switch = ShiraSwitch(model)
    switch.on("default")
    assert switch.active == ["default"]
    assert (model(x) - wanted).abs().max() < (1e-6 if dtype == torch.float32 else 0.1)
    changed = 0
    for name, layer in layers(model).items():
        moved = (layer.get_base_layer().weight != before[name]).nonzero()
        assert {tuple(place) for place in moved.tolist()} <= places(layer)
        changed += len(moved)
        S = layer.get_delta_weight("default").to_dense()
        assert not torch.equal(layer.get_base_layer().weight - S, before[name]), "subtracting is not exact"
    assert changed
    switch.off()
    for name, layer in layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, before[name])
        assert not layer.merged
    assert torch.equal(model(x), wanted)


def test_a_scale_of_0_is_the_base_and_of_2_twice_the_update() -> None:
    model = trained()
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    switch = ShiraSwitch(model)
    for scale in (0.0, 2.0):
        switch.on("default", scale)
        for name, layer in layers(model).items():
            wanted = before[name] + scale * layer.get_delta_weight("default").to_dense()
            assert torch.equal(layer.get_base_layer().weight, wanted)
        switch.off()


def two() -> Any:
    """An adapter on the largest entries, and one on random ones."""
    model = trained()
    model.add_adapter("other", ShiraConfig(r=R, random_seed=1, target_modules=TARGETS))
    generator = torch.Generator().manual_seed(5)
    for layer in layers(model).values():
        layer.shira_weight["other"].data = torch.randn(len(layer.shira_weight["other"]), generator=generator)
    return model


def test_disabled_while_on_the_base_speaks_and_its_weights_come_back() -> None:
    model = trained()
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    switch = ShiraSwitch(model)
    switch.on("default")
    with model.disable_adapter():
        assert torch.allclose(model(batch()), net()(batch()), atol=1e-6)
    switch.off()
    for name, layer in layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, before[name])


def test_several_are_on_at_once_and_their_updates_add_up() -> None:
    model = two()
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    switch = ShiraSwitch(model)
    switch.on("default")
    switch.on("other", 0.5)
    for name, layer in layers(model).items():
        assert places(layer) & places(layer, "other")
        one, other = (layer.get_delta_weight(adapter).to_dense() for adapter in ("default", "other"))
        assert torch.allclose(layer.get_base_layer().weight, before[name] + one + 0.5 * other, atol=1e-6)
    switch.off()
    for name, layer in layers(model).items():
        assert torch.equal(layer.get_base_layer().weight, before[name])


def test_overlap_and_changed_share_are_those_of_the_dense_updates() -> None:
    model = two()
    changed = total = 0
    for name, found in overlaps(model, "default", "other").items():
        layer = model.get_submodule(name)
        one, other = (layer.get_delta_weight(adapter).to_dense().detach().double() for adapter in ("default", "other"))
        product = one.T @ other
        assert abs(found.magnitude - product.norm()) < 1e-9
        assert found.zeros == (product == 0).double().mean()
        assert 0 < found.zeros < 1
        changed += int(((one != 0) | (other != 0)).sum())
        total += one.numel()
    assert changed_share(model, "default", "other") == changed / total
    assert changed_share(model, "default") == sum(R * (12 + 20) for _ in range(4)) / total


def test_what_is_saved_is_loaded_without_the_mask(tmp_path: Path) -> None:
    model = trained("snip")
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), model(batch()))
    switch = ShiraSwitch(again)
    switch.on("default")
    assert (again(batch()) - model(batch())).abs().max() < 1e-6


def test_what_is_refused() -> None:
    base = net()
    with pytest.raises(LoraSqueezeError, match=r"r = 9 asks for 288 entries of a weight \(20, 12\) that has 240"):
        magnitude_mask()(base.blocks[0].wide, 9)
    with pytest.raises(
        LoraSqueezeError, match=r"part 3 of 64 entries each is beyond the 240 of a weight of \(20, 12\)"
    ):
        magnitude_mask(3)(base.blocks[0].wide, 2)
    with pytest.raises(LoraSqueezeError, match=r"there is no gradient of this Linear\(in_features=12, out_features=3"):
        gradient_mask(calibration_gradients(base, batches(), TARGETS, loss))(base.head, 1)
    with pytest.raises(LoraSqueezeError, match=r"no linear layer of the model is called q_proj; name target_modules"):
        calibration_gradients(base, batches(), ["q_proj"], loss)
    with pytest.raises(LoraSqueezeError, match=r"there is no batch to take gradients of"):
        calibration_gradients(base, [], TARGETS, loss)
    with pytest.raises(LoraSqueezeError, match=r"blocks.1.wide: the loss does not depend on it"):
        calibration_gradients(base, batches(), TARGETS, lambda model, x: model.blocks[0](x).sum())
    with pytest.raises(LoraSqueezeError, match=r"blocks.0.wide: the loss does not depend on it"):
        calibration_gradients(base, batches(), TARGETS, lambda model, x: x.sum())
    with pytest.raises(LoraSqueezeError, match=r"the model has no SHiRA layer"):
        ShiraSwitch(base)
    model = trained()
    with pytest.raises(LoraSqueezeError, match=r"no layer has both SHiRA adapters 'default' and 'other'"):
        overlaps(model, "default", "other")
    switch = ShiraSwitch(model)
    with pytest.raises(LoraSqueezeError, match=r"no layer has a SHiRA adapter 'other'; there are default"):
        switch.on("other")
    switch.on("default")
    with pytest.raises(LoraSqueezeError, match=r"adapter 'default' is on already; turn it off first"):
        switch.on("default")
    switch.off()
    model.merge_adapter()
    with pytest.raises(LoraSqueezeError, match=r"PEFT has merged an adapter into these weights"):
        switch.on("default")
