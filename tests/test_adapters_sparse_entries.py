"""What LIFT and SaRA have in common: the base layer as it is, and files that every loader can read."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, Method, Net, adapted, batch, drawn_from, layers, net
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lora_squeeze.methods.control import controller_for, deltas_of

IDS = torch.arange(40).view(2, 20) % 50

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


def language_model() -> Any:
    with drawn_from(0):
        config = LlamaConfig(
            vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()


def trained_with_its_controller(method: Method) -> Any:
    """Some entries have been chosen anew or frozen, so that no configuration tells how many there are."""
    config = method.config(target_modules=["q_proj", "up_proj"], **({"refresh": 2} if method.name == "lift" else {}))
    with drawn_from(0):
        model = get_peft_model(language_model(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    controller = controller_for(model, 6, optimizer)
    for _ in range(5):
        model(IDS, labels=IDS).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    assert any(len(delta.kept) for delta in deltas_of(model).values())
    return model.eval()


@both
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_loaders_that_compare_shapes_can_read_it(method: Method, trainable: bool, tmp_path: Path) -> None:
    model = trained_with_its_controller(method)
    with torch.no_grad():
        wanted = model(IDS).logits
    model.save_pretrained(tmp_path)
    plain = language_model()
    found = plain.load_adapter(tmp_path, is_trainable=trainable)
    assert not found.mismatched_keys
    assert not found.missing_keys
    assert torch.equal(plain.eval()(IDS).logits, wanted)
    again = PeftModel.from_pretrained(
        language_model(), tmp_path, is_trainable=trainable, ignore_mismatched_sizes=True
    )  # without a warning
    assert torch.equal(again.eval()(IDS).logits, wanted)
    assert torch.equal(again.merge_and_unload()(IDS).logits.argmax(-1), wanted.argmax(-1))


@both
def test_a_configuration_that_was_saved_can_begin_another_adapter(method: Method, tmp_path: Path) -> None:
    config = method.config()
    get_peft_model(net(), config).save_pretrained(tmp_path)
    assert config.sizes  # type: ignore[attr-defined]
    with drawn_from(3):
        other = Net()
    wanted = deltas_of(get_peft_model(copy.deepcopy(other), method.config()))
    for name, delta in deltas_of(get_peft_model(other, config)).items():
        assert torch.equal(delta.index, wanted[name].index)


@both
def test_a_file_that_says_no_sizes_is_loaded(method: Method, tmp_path: Path) -> None:
    model = trained_with_its_controller(method)
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("sizes")
    file.write_text(json.dumps(settings))
    for trainable in (False, True):
        again = PeftModel.from_pretrained(language_model(), tmp_path, is_trainable=trainable).eval()
        assert torch.equal(again(IDS).logits, model(IDS).logits)
