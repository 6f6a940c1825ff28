"""Squeezer: interrupted runs, their states, and what takes them up."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from training_cases import SOURCE, STEPS, TARGET, adamw, in_squeeze, model, train, trained_parameters, widths

from lora_squeeze import LoraSqueezeError
from lora_squeeze.schedule import make_schedule
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.squeezer import Squeezer


def saved(network: Any, optimizer: Any, squeezer: Any) -> dict[str, Any]:
    """A checkpoint through a file, as people write it."""
    file = io.BytesIO()
    torch.save(
        {
            "model": get_peft_model_state_dict(network),
            "optimizer": optimizer.state_dict(),
            "squeezer": squeezer.state_dict(),
        },
        file,
    )
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


@pytest.mark.parametrize("way", ["replace", "mask"])
@pytest.mark.parametrize("options", [{}, {"data_aware": True}, {"allocate": "global"}])
@pytest.mark.parametrize("stop", [1, 3, 4, 5, 8, 11])
def test_resumed_runs_are_bit_identical(stop: int, options: dict[str, Any], way: str) -> None:
    """Right before a squeeze, right after it, and between; squeezes are due after 4 and after 8 steps."""
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, in_squeeze(), in_place=way, **options)
    train(network, optimizer, squeezer, range(stop))
    checkpoint = saved(network, optimizer, squeezer)
    expected = train(network, optimizer, squeezer, range(stop, STEPS))

    again = model()
    optimizer = adamw(again)
    resumed = Squeezer(again, optimizer, in_squeeze(), in_place=way, state=checkpoint["squeezer"], **options)
    set_peft_model_state_dict(again, checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert train(again, optimizer, resumed, range(stop, STEPS)) == expected
    for key, value in get_peft_model_state_dict(network).items():
        assert torch.equal(value, get_peft_model_state_dict(again)[key]), key
    kept = ("step", "rank", "energy", "parameters_after")
    history = [[{k: e[k] for k in kept} for e in s.history] for s in (squeezer, resumed)]
    assert history[0] == history[1]


def test_the_model_may_be_loaded_first() -> None:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, in_squeeze())
    train(network, optimizer, squeezer, range(6))
    checkpoint = saved(network, optimizer, squeezer)
    again = model()
    optimizer = adamw(again)
    resumed = Squeezer(again, optimizer, in_squeeze())
    set_peft_model_state_dict(again, checkpoint["model"])
    assert widths(again) == {4}
    optimizer.load_state_dict(checkpoint["optimizer"])
    resumed.load_state_dict(checkpoint["squeezer"])
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in trained_parameters(again)]
    assert train(again, optimizer, resumed, range(6, STEPS)) == train(
        network, squeezer.optimizer, squeezer, range(6, STEPS)
    )


def test_a_state_does_not_change_as_training_goes_on() -> None:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, in_squeeze())
    state = squeezer.state_dict()
    train(network, optimizer, squeezer, range(STEPS))
    assert state["history"] == [] != squeezer.history


def test_a_state_loaded_into_a_copy_of_the_model_leaves_the_model_alone() -> None:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, in_squeeze())
    early = {key: value.clone() for key, value in network.state_dict().items()}
    train(network, optimizer, squeezer, range(6))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    other = copy.deepcopy(network)
    other.load_state_dict(early)
    assert (widths(network), widths(other)) == ({4}, {SOURCE})
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in trained_parameters(network)]


def test_a_new_squeezer_takes_the_place_of_an_interrupted_one() -> None:
    """Nothing is left in the model of the old one, which would resize the layers for its own optimiser alone."""
    network = model()
    optimizer = adamw(network)
    first = Squeezer(network, optimizer, in_squeeze(), data_aware=True)
    early = {key: value.clone() for key, value in network.state_dict().items()}
    train(network, optimizer, first, range(6))
    optimizer = adamw(network)
    second = Squeezer(network, optimizer, make_schedule(4, TARGET, STEPS), data_aware=True)
    network.load_state_dict(early)
    assert first.statistics is not None and not first.statistics._handles
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in held] == [id(p) for p in trained_parameters(network)]
    second.close()
    assert not network._load_state_dict_pre_hooks


def test_a_model_loaded_without_its_statistics_is_squeezed_plainly() -> None:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, in_squeeze(), data_aware=True)
    train(network, optimizer, squeezer, range(3))
    early = {key: value.clone() for key, value in network.state_dict().items()}
    train(network, optimizer, squeezer, range(3, 9))
    network.load_state_dict(early)
    with pytest.warns(UserWarning, match=r"4 layers have another rank than their statistics, \S+ 8 instead of 2"):
        squeezer.finish()
    expected = model()
    expected.load_state_dict(early)
    squeeze_(expected, TARGET)
    for key, value in network.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


def test_another_schedule_on_resume_is_refused() -> None:
    network = model()
    state = Squeezer(network, adamw(network), in_squeeze()).state_dict()
    with pytest.raises(
        LoraSqueezeError, match=r"another schedule: steps was \[4, 4, 4\] and is \[5, 5, 5\]; go on with the same"
    ):
        Squeezer(network, adamw(network), in_squeeze(15)).load_state_dict(state)


def test_a_refused_state_changes_nothing() -> None:
    network = model()
    optimizer = adamw(network)
    state = Squeezer(network, optimizer, in_squeeze()).state_dict()
    hooks = dict(network._load_state_dict_pre_hooks)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    curves = list(scheduler.lr_lambdas)
    with pytest.raises(LoraSqueezeError, match="another schedule"):
        Squeezer(network, optimizer, in_squeeze(15), state=state, learning_rate="rank", scheduler=scheduler)
    assert scheduler.lr_lambdas == curves and network._load_state_dict_pre_hooks == hooks
