"""What LIFT and SaRA have in common: the base layer as it is, and files that every loader can read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, Method, Net, adapted, batch, layers, net
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

both = pytest.mark.parametrize("method", [METHODS["lift"], METHODS["sara"]], ids=["lift", "sara"])


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def subclassed(base: Net) -> nn.Module:
    for block in base.blocks:
        for layer in block.children():
            layer.__class__ = _Doubled
    return base


def replaced_on_the_object(base: Net) -> nn.Module:
    for block in base.blocks:
        for layer in block.children():
            before = layer.forward
            layer.forward = lambda x, before=before: 2 * before(x)  # type: ignore[method-assign, misc]
    return base


def already_adapted(base: Net) -> nn.Module:
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["wide", "tall"], init_lora_weights=False)
    found: Any = get_peft_model(base, config).base_model.model
    del found.peft_config  # or PEFT takes the two for adapters of one method
    return found  # type: ignore[no-any-return]


@both
@pytest.mark.parametrize("change", [subclassed, replaced_on_the_object, already_adapted], ids=lambda c: c.__name__)
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_what_the_base_layer_does_is_kept(method: Method, change: Callable[[Net], nn.Module]) -> None:
    base = change(net())
    wanted = base(batch())
    model = adapted(method, base)
    assert torch.equal(model(batch()), wanted)


@both
def test_a_base_weight_that_is_trained_has_its_gradient(method: Method) -> None:
    model = adapted(method, trained=True)
    gradients = []
    for one_product in (False, True):
        for layer in layers(model).values():
            layer.get_base_layer().weight.requires_grad_(not one_product)
        model.zero_grad()
        model(batch()).square().sum().backward()
        gradients.append([layer.deltas["default"].values.grad.clone() for layer in layers(model).values()])
        if not one_product:
            of_the_base = [layer.get_base_layer().weight.grad for layer in layers(model).values()]
    for layer, of_base, one, other in zip(layers(model).values(), of_the_base, *gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-6)
        assert torch.allclose(of_base.flatten()[layer.deltas["default"].index.long()], one, rtol=1e-4, atol=1e-6)


@both
def test_hooks_of_the_backward_pass_are_called(method: Method) -> None:
    model = adapted(method, trained=True)
    calls: list[Any] = []
    for layer in layers(model).values():
        layer.get_base_layer().register_full_backward_hook(lambda *args: calls.append(1))
    model(batch().requires_grad_()).sum().backward()
    assert len(calls) == len(layers(model))
