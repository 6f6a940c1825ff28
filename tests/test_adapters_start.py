"""Where a parameterisation begins: what comes from torch's global generator, what from its seed, and in which mode."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from adapters_cases import HIDDEN, IN, METHODS, Method, adapted, batch, drawn_from, layers, net
from peft import get_peft_model
from torch import nn

from lora_squeeze.methods.control import deltas_of

pytestmark = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def test_a_step_leaves_the_global_generator_alone(method: Method) -> None:
    with drawn_from(4):
        model = adapted(method).train()
        state = torch.get_rng_state()
        model(batch()).sum().backward()
        assert torch.equal(torch.get_rng_state(), state)


def outputs(model: nn.Module) -> list[torch.Tensor]:
    x = {size: torch.eye(size) for size in (IN, HIDDEN)}
    return [layer(x[layer.in_features]).detach() for layer in layers(model).values()]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_is_trained_begins_with_the_global_generator(method: Method) -> None:
    def numbers(seed: int) -> list[torch.Tensor]:
        with drawn_from(seed):
            return outputs(get_peft_model(net(), method.config(init_weights=False)).eval())

    assert all_equal(numbers(1), numbers(1))
    assert not all_equal(numbers(1), numbers(2))


def test_two_adapters_of_one_configuration_begin_apart(method: Method) -> None:
    model = get_peft_model(net(), method.config(init_weights=False)).eval()
    model.add_adapter("second", method.config(init_weights=False))
    first = outputs(model)
    model.set_adapter("second")
    assert not all_equal(first, outputs(model.eval()))


def test_an_adapter_that_is_deleted_and_made_anew_is_a_new_one(method: Method) -> None:
    config = method.config(init_weights=False)
    model = adapted(method)

    def added() -> list[torch.Tensor]:
        with drawn_from(1):
            model.add_adapter("second", config)
        model.set_adapter("second")
        return outputs(model.eval())

    first, count = added(), len(list(model.named_parameters()))
    model.set_adapter("default")
    model.delete_adapter("second")
    assert all_equal(added(), first)
    assert len(list(model.named_parameters())) == count


def test_nothing_of_a_deleted_adapter_stays_alive(method: Method) -> None:
    model = adapted(method)
    model.add_adapter("second", method.config(seed=1))
    model.set_adapter("second")
    model(batch())
    held = [weakref.ref(delta) for delta in deltas_of(model, "second").values()]
    held += [weakref.ref(t) for t in next(iter(deltas_of(model, "second").values())).site.shared.values()
             if isinstance(t, torch.Tensor)]  # fmt: skip
    model.set_adapter("default")
    model.delete_adapter("second")
    gc.collect()
    assert not any(reference() is not None for reference in held)


@pytest.mark.parametrize("training", [False, True])
def test_a_new_adapter_is_in_the_mode_of_the_model(method: Method, training: bool) -> None:
    model = get_peft_model(net().train(training), method.config(dropout=0.5))
    model.add_adapter("second", method.config(dropout=0.5))
    modes = {module.training for layer in layers(model).values() for module in layer.modules()}
    assert modes == {training}


def test_what_is_frozen_comes_from_the_seed_alone(method: Method) -> None:
    def stored(global_seed: int, seed: int) -> list[torch.Tensor]:
        with drawn_from(global_seed):
            model = get_peft_model(net(), method.config(seed=seed, init_weights=False)).eval()
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "_delta.default." in name:
                parameter.data = torch.randn(parameter.shape, generator=generator)
        return outputs(model)

    assert all_equal(stored(1, 5), stored(2, 5))
    assert all_equal(stored(1, 5), stored(1, 6)) == (not method.draws)
