"""Hydra: a head that reads the layer's own output, merged, exported, and taken out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net, shake
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_squeeze
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.adapters import HydraConfig

HYDRA = METHODS["hydra"]
IN, OUT, R, R_S, ALPHA = 10, 14, 3, 5, 6
SCALE = ALPHA / R
MODES = {"both": R + R_S, "parallel": R, "sequential": R_S}
every_mode = pytest.mark.parametrize("mode", MODES)
either_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])


def base(*, bias: bool = True) -> nn.Module:
    with drawn_from(0):
        return nn.ModuleDict({"only": nn.Linear(IN, OUT, bias=bias)}).double()


def model_of(mode: str = "both", *, bias: bool = True, trained: bool = True, **settings: Any) -> Any:
    """A Hydra on a single layer, all in float64."""
    given = {"r": R, "r_sequential": R_S, "alpha": ALPHA, "mode": mode, "target_modules": ["only"], **settings}
    model = get_peft_model(base(bias=bias), HydraConfig(**given))
    if trained:
        shake(model)
    return model.double()


def one_layer(mode: str = "both", **settings: Any) -> Any:
    return model_of(mode, **settings).base_model.model["only"]


def delta_of(layer: Any) -> Any:
    return layer.deltas["default"]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def same(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@every_mode
@either_bias
def test_the_heads_by_their_definition(mode: str, bias: bool) -> None:
    layer = one_layer(mode, bias=bias)
    delta, x = delta_of(layer), inputs(2, 3)
    z = layer.get_base_layer()(x)
    wanted = z.clone()
    if mode != "sequential":
        wanted += SCALE * x @ delta.A_p.T @ delta.B_p.T
    if mode != "parallel":
        wanted += SCALE * z @ delta.A_s.T @ delta.B_s.T
    same(layer(x), wanted)


@every_mode
@either_bias
@pytest.mark.parametrize("shape", [(7,), (2, 3)], ids=str)
def test_merged_it_is_the_same_function(mode: str, bias: bool, shape: tuple[int, ...]) -> None:
    layer = one_layer(mode, bias=bias)
    linear = layer.get_base_layer()
    weight, before = linear.weight.clone(), linear.bias.clone() if bias else None
    wanted = layer(inputs(*shape))
    layer.merge()
    same(linear(inputs(*shape)), wanted)
    layer.unmerge()
    same(linear.weight, weight)
    if before is not None:
        assert torch.equal(linear.bias, before)
    same(layer(inputs(*shape)), wanted)


@every_mode
def test_a_fresh_one_is_the_base_bit_by_bit(mode: str) -> None:
    for training in (True, False):
        model = model_of(mode, trained=False, dropout=0.5).train(training)
        assert torch.equal(model.base_model.model["only"](inputs(4)), base()["only"](inputs(4)))


@every_mode
def test_count_and_rank(mode: str) -> None:
    layer = one_layer(mode)
    count = {"parallel": R * (IN + OUT), "sequential": 2 * R_S * OUT}
    count["both"] = sum(count.values())
    assert sum(p.numel() for p in delta_of(layer).parameters()) == count[mode]
    dW = layer.get_delta_weight("default")
    assert delta_of(layer).rank == int(torch.linalg.matrix_rank(dW)) == MODES[mode]
    B, A = delta_of(layer).factors()
    assert (B.shape, A.shape) == ((OUT, MODES[mode]), (MODES[mode], IN))
    same(B @ A, dW)


def test_the_parallel_head_is_lora() -> None:
    layer, x = one_layer("parallel"), inputs(4)
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["only"])
    lora = get_peft_model(base(), config).double().base_model.model["only"]
    lora.lora_A["default"].weight.data = delta_of(layer).A_p.detach()
    lora.lora_B["default"].weight.data = delta_of(layer).B_p.detach()
    same(layer(x), lora(x))


@either_bias
def test_the_sequential_head_is_a_matrix_on_the_output(bias: bool) -> None:
    layer, x = one_layer("sequential", bias=bias), inputs(4)
    delta = delta_of(layer)
    turned = torch.eye(OUT, dtype=torch.float64) + SCALE * delta.B_s @ delta.A_s
    same(layer(x), layer.get_base_layer()(x) @ turned.T)


def test_the_sequential_head_stays_within_the_row_space_of_the_weight() -> None:
    seen = {}
    for mode in ("sequential", "parallel"):
        layer = one_layer(mode)
        U, S, Vh = torch.linalg.svd(layer.get_base_layer().weight.detach(), full_matrices=False)
        layer.get_base_layer().weight.data = U[:, :6] * S[:6] @ Vh[:6]  # 6 dimensions, 4 that it does not see
        dW = layer.get_delta_weight("default").detach()
        seen[mode] = (dW @ Vh[6:].T).norm() / dW.norm()
        if mode == "sequential":
            B = delta_of(layer).B_s.detach()
            assert (dW - B @ torch.linalg.lstsq(B, dW).solution).norm() < 1e-12 * dW.norm()
    assert seen["sequential"] < 1e-12
    assert seen["parallel"] > 0.1


def test_gradients_reach_all_factors_from_the_second_step_on() -> None:
    model = model_of(trained=False)
    layer = model.base_model.model["only"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for moved in ({"B_p", "B_s"}, {"A_p", "A_s", "B_p", "B_s"}):
        layer(inputs(6)).square().sum().backward()
        found = {name for name, p in delta_of(layer).named_parameters() if p.grad is not None and p.grad.any()}
        assert found == moved
        optimizer.step()
        optimizer.zero_grad()


def test_dropout_acts_between_the_factors_and_not_on_the_input() -> None:
    """With A_s = A_p = all ones, each token's numbers between the factors are equal: kept and doubled, or zero."""
    layer = one_layer("parallel", dropout=0.5, r=1)
    layer.train()
    x = inputs(400)
    with drawn_from(1):
        added = layer(x) - layer.get_base_layer()(x)
    whole = ALPHA * x @ delta_of(layer).A_p.T @ delta_of(layer).B_p.T
    share = added.norm(dim=1) / whole.norm(dim=1)
    zero, twice = share < 1e-9, (share - 2).abs() < 1e-9
    assert (zero | twice).all()
    assert zero.any()
    assert twice.any()


def test_a_safe_merge_looks_at_the_bias_too() -> None:
    layer = one_layer().half()
    layer.get_base_layer().bias.data.fill_(6e4)
    delta_of(layer).A_s.data.fill_(1e-2)
    delta_of(layer).B_s.data.fill_(1e-1)
    before = {name: tensor.clone() for name, tensor in layer.get_base_layer().state_dict().items()}
    assert (before["weight"] + layer.get_delta_weight("default").half()).isfinite().all()
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default"):
        layer.merge(safe_merge=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.get_base_layer().state_dict().items())


def test_what_an_adapter_converts_to_does_not_depend_on_the_one_beside_it() -> None:
    model = model_of("parallel")
    model.add_adapter("other", HydraConfig(mode="sequential", target_modules=["only"]))
    (layer,) = layers(model).values()
    assert layer.supports_lora_conversion("default")
    assert not layer.supports_lora_conversion("other")


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("together", [True, False], ids=["at-once", "one-by-one"])
def test_merged_beside_another_it_still_belongs_to_the_first_weight(together: bool) -> None:
    model = adapted(HYDRA, trained=True)
    model.add_adapter("other", HYDRA.config(seed=7))
    shake(model, "other", seed=8)
    names = ["default", "other"]
    model.base_model.set_adapter(names)
    model.eval()
    wanted = model(batch())
    before = {name: layer.get_base_layer().weight.clone() for name, layer in layers(model).items()}
    updates = {name: [layer.get_delta_weight(n) for n in names] for name, layer in layers(model).items()}
    for some in [names] if together else [[name] for name in names]:
        model.merge_adapter(adapter_names=some)
    torch.testing.assert_close(model(batch()), wanted, rtol=1e-4, atol=1e-5)
    for name, layer in layers(model).items():
        for found, first in zip([layer.get_delta_weight(n) for n in names], updates[name], strict=True):
            torch.testing.assert_close(found, first, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    for name, layer in layers(model).items():
        torch.testing.assert_close(layer.get_base_layer().weight, before[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model(batch()), wanted, rtol=1e-4, atol=1e-5)


def test_exported_it_is_a_lora_with_biases_where_it_moves_them(tmp_path: Path) -> None:
    class OneLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = base()["only"].float()

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.only(x)
            return found

    for mode in MODES:
        given = {"r": R, "r_sequential": R_S, "mode": mode, "target_modules": ["only"]}
        model = get_peft_model(OneLayer(), HydraConfig(**given))
        shake(model)
        model.save_pretrained(tmp_path / mode)
        adapter = load(tmp_path / mode, base=OneLayer())
        assert adapter.modules["only"].rank == MODES[mode]
        lora_squeeze.convert(adapter, "peft", rank=adapter.rank).save(tmp_path / f"{mode}-lora")
        plain: Any = PeftModel.from_pretrained(OneLayer(), tmp_path / f"{mode}-lora")
        assert plain.peft_config["default"].lora_bias == (mode != "parallel")
        x = inputs(9).float()
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain.merge_and_unload()(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_sequential_rank_is_the_parallel_one_unless_given() -> None:
    assert delta_of(one_layer(r_sequential=None)).A_s.shape == (R, OUT)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of both, parallel, sequential, got 'none'"):
        HYDRA.config(mode="none")
    with pytest.raises(ValueError, match=r"r_sequential must be a whole number from 1, got 0"):
        HYDRA.config(r_sequential=0)


def test_layers_without_a_sequential_head_move_no_bias() -> None:
    assert net().blocks[0].wide.bias is not None
    for mode in MODES:
        for name, layer in layers(adapted(HYDRA, mode=mode)).items():
            assert delta_of(layer).moves_bias == (mode != "parallel" and "wide" in name)
