"""PaCA: columns of W are trained, and W is as it was before whenever anybody looks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net, shake
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import lora_squeeze
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.adapters import PacaConfig

PACA = METHODS["paca"]
IN, OUT, R, ALPHA = 10, 14, 4, 6


def turned(*, bias: bool) -> nn.Module:
    del bias  # it always has one
    return Conv1D(OUT, IN)


def linear(*, bias: bool) -> nn.Module:
    return nn.Linear(IN, OUT, bias=bias)


def one_layer(
    kind: Callable[..., nn.Module] = linear, *, bias: bool = True, trained: bool = True, **settings: Any
) -> Any:
    """A PaCA layer in float64 around a linear one, alone in a model."""
    with drawn_from(0):
        model = nn.ModuleDict({"only": kind(bias=bias)}).double()
    config = PacaConfig(**{"target_modules": ["only"], "r": R, "alpha": ALPHA, **settings})
    adapted_model = get_peft_model(model, config)
    if trained:
        shake(adapted_model)
    return adapted_model.base_model.model["only"].double()


def delta_of(layer: Any) -> Any:
    return layer.deltas["default"]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()


def dense(layer: Any) -> tuple[Tensor, Tensor | None]:
    """The effective weight (out, in) by its definition, as a leaf, and the bias."""
    base, delta = layer.get_base_layer(), delta_of(layer)
    weight = (base.weight.T if isinstance(base, Conv1D) else base.weight).detach().clone()
    weight[:, delta.columns] += ALPHA / R * delta.D.detach()
    return weight.requires_grad_(), base.bias


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(("kind", "bias"), [(linear, True), (linear, False), (turned, True)])
def test_gradients_are_those_of_the_dense_layer_in_the_trained_columns(
    shape: tuple[int, ...], kind: Callable[..., nn.Module], bias: bool
) -> None:
    layer = one_layer(kind, bias=bias)
    weight, base_bias = dense(layer)
    x, y = inputs(*shape), inputs(*shape)
    upstream = torch.randn(*shape, OUT, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    functional.linear(x, weight, base_bias).backward(upstream)
    output = layer(y)
    output.backward(upstream)
    assert weight.grad is not None
    torch.testing.assert_close(output, functional.linear(x, weight, base_bias))
    torch.testing.assert_close(delta_of(layer).D.grad, ALPHA / R * weight.grad[:, delta_of(layer).columns])
    torch.testing.assert_close(y.grad, x.grad)


def test_a_trained_bias_has_its_gradient() -> None:
    layer = one_layer(bias=True, trained=True)
    layer.get_base_layer().bias.requires_grad_()
    layer(inputs(2, 3)).sum().backward()
    assert torch.equal(layer.get_base_layer().bias.grad, torch.full((OUT,), 6.0, dtype=torch.float64))


@pytest.mark.parametrize("asked", ["x", "D"])
def test_only_the_gradients_asked_for_are_computed(asked: str) -> None:
    layer, x = one_layer(), inputs(3)
    x.requires_grad_(asked == "x")
    delta_of(layer).D.requires_grad_(asked == "D")
    layer(x).sum().backward()
    assert (x.grad is not None, delta_of(layer).D.grad is not None) == (asked == "x", asked == "D")


@pytest.mark.parametrize("kind", [linear, turned])
def test_gradients_can_be_differentiated_again(kind: Callable[..., nn.Module]) -> None:
    layer, x = one_layer(kind), inputs(3)
    D = delta_of(layer).D

    def output(x: Tensor, D: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(layer, {"paca_delta.default.D": D}, (x,)).tanh()
        return found

    assert torch.autograd.gradcheck(output, (x, D))
    once = torch.autograd.grad(output(x, D).sum(), (x, D))
    torch.testing.assert_close(torch.autograd.grad(output(x, D).sum(), (x, D), create_graph=True), once)
    assert torch.autograd.gradgradcheck(output, (x, D))


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer, x, y = one_layer(), inputs(2, 3), inputs(2, 3)
    layer(x).tanh().sum().backward()
    D = delta_of(layer).D
    wanted, D.grad = D.grad, None
    checkpoint(lambda x: layer(x).tanh(), y, use_reentrant=reentrant).sum().backward()
    assert torch.equal(D.grad, wanted)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weight_is_bit_identical_after_every_pass(dtype: torch.dtype) -> None:
    """At the end of training, too: nothing of what was written for a while stays."""
    model = adapted(PACA, net(dtype), trained=True)
    weights = {name: layer.get_base_layer().weight for name, layer in layers(model).items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        output = model(batch(dtype))
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
        output.float().square().mean().backward()
        assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
        optimizer.step()
    model.merge_adapter()
    for name, layer in layers(model).items():
        others = torch.ones(layer.in_features, dtype=torch.bool)
        others[delta_of(layer).columns] = False
        assert torch.equal(weights[name][:, others], before[name][:, others])
        assert not torch.equal(weights[name], before[name])
    model.unmerge_adapter()
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())


def test_the_weight_is_put_back_when_the_product_fails() -> None:
    layer = one_layer()
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.ones(2, IN + 1, dtype=torch.float64))
    assert torch.equal(layer.get_base_layer().weight, before)


def test_whoever_else_keeps_the_weight_for_its_gradient_finds_it_unchanged() -> None:
    layer, x, y = one_layer(), inputs(3), inputs(3)
    weight = layer.get_base_layer().weight
    elsewhere = functional.linear(y, weight)
    layer(x).sum().backward()
    elsewhere.sum().backward()  # autograd refuses where a kept tensor counts as changed
    torch.testing.assert_close(y.grad, weight.sum(0).expand(3, -1))


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """What a layer's forward pass keeps for its backward pass, beside parameters and buffers."""
    kept: dict[int, int] = {}
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["one-product", "dropout"])
def test_the_backward_pass_needs_the_chosen_inputs_alone(dropout: float) -> None:
    """Where a LoRA keeps all of x and the rank's numbers between its factors."""
    tokens, size = (8, 64), 4
    x = torch.ones(*tokens, 96)

    def layer(config: Any) -> Any:
        model = get_peft_model(nn.ModuleDict({"only": nn.Linear(96, 96)}), config)
        return model.train(dropout == 0).base_model.model["only"]

    count = tokens[0] * tokens[1] * size
    lora = saved_bytes(layer(LoraConfig(r=8, target_modules=["only"])), x)
    paca = saved_bytes(layer(PacaConfig(r=8, dropout=dropout, target_modules=["only"])), x)
    assert lora == count * (96 + 8)
    small = 96 * 8 * size  # alpha / r D, of which the second product keeps a copy
    assert count * 8 <= paca <= count * 8 + small
    if not dropout:
        frozen = layer(PacaConfig(r=8, target_modules=["only"])).requires_grad_(False)
        assert saved_bytes(frozen, x.requires_grad_()) <= small


def test_sgd_trains_as_a_dense_layer_whose_gradient_is_masked() -> None:
    layer = one_layer(trained=False, alpha=R)
    base, columns = layer.get_base_layer(), delta_of(layer).columns
    weight = base.weight.detach().clone().requires_grad_()
    mask = torch.zeros(IN, dtype=torch.float64).index_fill(0, columns, 1.0)
    ours, theirs = torch.optim.SGD([delta_of(layer).D], lr=0.1), torch.optim.SGD([weight], lr=0.1)
    x, target = inputs(32).detach(), torch.ones(32, OUT, dtype=torch.float64)
    for _ in range(20):
        for output, optimizer in ((layer(x), ours), (functional.linear(x, weight, base.bias), theirs)):
            optimizer.zero_grad()
            functional.mse_loss(output.tanh(), target).backward()
            if optimizer is theirs and weight.grad is not None:
                weight.grad *= mask
            optimizer.step()
    layer.merge()
    assert (weight - base.weight).abs().max() <= 1e-14
    assert (delta_of(layer).D != 0).all()


def test_in_half_precision_the_merged_model_computes_the_very_same() -> None:
    model = adapted(PACA, net(torch.bfloat16), trained=True)
    wanted = model(batch(torch.bfloat16))
    model.merge_adapter()
    assert torch.equal(model(batch(torch.bfloat16)), wanted)


def test_under_autocast_gradients_come_in_the_dtype_of_their_parameters() -> None:
    model = adapted(PACA, trained=True)
    x = batch().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x)
    assert rough.dtype == torch.bfloat16
    rough.float().square().sum().backward()
    found = [delta_of(layer).D.grad.clone() for layer in layers(model).values()]
    model.zero_grad()
    model(x).square().sum().backward()
    for one, layer in zip(found, layers(model).values(), strict=True):
        wanted = delta_of(layer).D.grad
        assert one.dtype == wanted.dtype == torch.float32
        assert (one - wanted).norm() <= 0.05 * wanted.norm()


def test_the_columns_are_loaded_and_not_drawn_again(tmp_path: Path) -> None:
    model = adapted(PACA, trained=True)
    for layer in layers(model).values():
        columns = delta_of(layer).columns
        columns.copy_((columns + 1) % layer.in_features)  # what no seed gives
    wanted = model(batch())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), wanted)


def test_the_lora_of_it_is_exact(tmp_path: Path) -> None:
    model = adapted(PACA, trained=True)
    model.save_pretrained(tmp_path / "paca")
    lora_squeeze.convert(load(tmp_path / "paca", base=net()), "peft").save(tmp_path / "lora")
    lora = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    wanted = model.merge_and_unload()(batch())
    assert (lora(batch()) - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_columns_are_distinct_and_differ_from_layer_to_layer() -> None:
    chosen = {name: set(delta_of(layer).columns.tolist()) for name, layer in layers(adapted(PACA, r=6)).items()}
    assert all(len(columns) == 6 for columns in chosen.values())
    first, second = (chosen[f"base_model.model.blocks.{block}.wide"] for block in (0, 1))
    assert first != second


@pytest.mark.parametrize(("selection", "sign"), [("largest", -1), ("smallest", 1)])
def test_columns_can_be_chosen_by_their_norm(selection: str, sign: int) -> None:
    layer = one_layer(columns=selection)
    norms = layer.get_base_layer().weight.norm(dim=0)
    assert set(delta_of(layer).columns.tolist()) == set((sign * norms).argsort()[:R].tolist())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def hooked(layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, output: 2 * output)


def hooked_before(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: 2 * args[0])


def given_another_forward(layer: Any) -> None:
    """As accelerate does it for layers that are elsewhere until they are needed."""
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


def of_another_class(layer: Any) -> None:
    layer.__class__ = Scaled


@pytest.mark.parametrize("change", [hooked, hooked_before, given_another_forward, of_another_class])
def test_a_layer_that_does_more_than_multiply_is_called(change: Callable[[Any], None]) -> None:
    layer, x = one_layer(), inputs(3)
    change(layer.get_base_layer())
    torch.testing.assert_close(layer(x), layer.get_base_layer()(x) + functional.linear(x, delta_of(layer).weight()))


def test_a_weight_that_is_trained_itself_has_its_whole_gradient() -> None:
    layer, x = one_layer(), inputs(3)
    weight = layer.get_base_layer().weight.requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(weight.grad, x.detach().sum(0).expand(OUT, -1))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": IN + 1}, rf"only: r is {IN + 1}, and the weight has {IN} columns; lower r or leave the layer out"),
        ({"columns": "best"}, "columns must be one of random, largest, smallest, got 'best'"),
    ],
    ids=["r", "columns"],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        one_layer(**settings)
