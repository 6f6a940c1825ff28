"""What controllers of all methods have in common: whose configuration they write to, and who is warned."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from adapters_cases import net
from peft import get_peft_model
from ranks_cases import adam, fresh, go_on, planted, trained

from lora_squeeze.methods.adapters.engine import AdapterConfig
from lora_squeeze.methods.control import controller_for
from lora_squeeze.methods.ranks.blora import BloraConfig
from lora_squeeze.methods.ranks.diffora import DifforaConfig
from lora_squeeze.methods.ranks.dylora import DyloraConfig
from lora_squeeze.methods.ranks.maestro import MaestroConfig
from lora_squeeze.methods.ranks.prefix import set_rank

TARGETS = ["wide", "tall"]
FINDING: dict[str, AdapterConfig] = {
    "maestro": MaestroConfig(r=4, target_modules=TARGETS, lasso=1e-2, threshold=0.5),
    "blora": BloraConfig(r=4, target_modules=TARGETS),
    "diffora": DifforaConfig(r=4, target_modules=TARGETS, search=0.5),
}
FOUND = {"maestro": "found_ranks", "blora": "quantised", "diffora": "chosen"}


@pytest.mark.parametrize("name", FINDING)
def test_a_configuration_serves_again_as_it_was(name: str) -> None:
    config = copy.copy(FINDING[name])
    before = dict(vars(config))
    first, controller = trained(config, 6)
    assert vars(config) == before
    assert getattr(first.peft_config["default"], FOUND[name])
    assert controller.config is first.peft_config["default"]
    second, _ = trained(config, 6)
    for key, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], value), key


@pytest.mark.parametrize("name", FINDING)
def test_two_adapters_of_one_configuration_find_their_own(name: str) -> None:
    config = copy.copy(FINDING[name])
    model = fresh(config)
    model.add_adapter("other", config)
    optimizer = adam(model)
    controller = controller_for(model, 6, optimizer)
    go_on(model, controller, optimizer, 6)
    assert getattr(model.peft_config["default"], FOUND[name])
    assert not getattr(model.peft_config["other"], FOUND[name])


def test_all_controllers_of_an_adapter_write_to_one_configuration() -> None:
    model = fresh(MaestroConfig(r=4, target_modules=TARGETS))
    first, second = controller_for(model, 6), controller_for(model, 6)
    set_rank(model, 2)
    assert first.config is second.config is model.peft_config["default"]


def test_a_chosen_rank_is_of_one_model() -> None:
    config = DyloraConfig(r=4, target_modules=TARGETS)
    model = get_peft_model(net(), config)
    set_rank(model, 2)
    assert config.deploy_rank is None
    assert model.peft_config["default"].deploy_rank == 2


def test_a_controller_of_one_adapter_silences_no_other_one() -> None:
    def said(model: Any) -> int:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            model.train()(planted()[0])
        return sum("without its controller" in str(warning.message) for warning in found)

    config = DyloraConfig(r=4, target_modules=TARGETS)
    led = get_peft_model(net(), config)
    controller = controller_for(led, 5)
    assert said(led) == 0
    assert said(get_peft_model(net(), config)) == 1
    assert controller.steps_done == 0
