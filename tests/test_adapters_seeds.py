"""What is drawn by a layer's name and not stored: the seeds are stored, so that names may change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters_cases import METHODS, Inside, Method, adapted, batch, layers, net
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.seeds import seeded

CASES = {
    "nola": METHODS["nola"],
    "nola drawn in each pass": replace(METHODS["nola"], settings={"r": 3, "bases": 12, "keep_bases": False}),
    "lora-xs random": replace(METHODS["loraxs"], settings={"r": 3, "basis": "random"}),
}
pytestmark = pytest.mark.parametrize("method", CASES.values(), ids=CASES)
OTHER_NAMES = {r"^0\.": "inner."}


def in_sequence(method: Method, folder: Path, **settings: object) -> torch.Tensor:
    """Train and save an adapter; its output."""
    model = adapted(method, nn.Sequential(net()), trained=True, **settings)
    model.save_pretrained(folder)
    found: torch.Tensor = model(batch()).detach()
    return found


def test_two_adapters_under_other_names_keep_their_own(method: Method, tmp_path: Path) -> None:
    wanted = {name: in_sequence(method, tmp_path / name, seed=seed) for seed, name in enumerate(("first", "second"))}
    model = PeftModel.from_pretrained(Inside(), tmp_path / "first", "first", key_mapping=OTHER_NAMES)
    model.load_adapter(str(tmp_path / "second"), "second", key_mapping=OTHER_NAMES)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert torch.equal(model.eval()(batch()), wanted[name])


def test_a_loaded_one_goes_on_as_it_was(method: Method, tmp_path: Path) -> None:
    """A copy, a merge and a training step of it use the numbers of the file."""
    wanted = in_sequence(method, tmp_path)
    model = PeftModel.from_pretrained(Inside(), tmp_path, key_mapping=OTHER_NAMES, is_trainable=True).eval()
    model(batch()).square().sum().backward()
    original = adapted(method, nn.Sequential(net()), trained=True)
    original(batch()).square().sum().backward()
    for found, same in zip(model.parameters(), original.parameters(), strict=True):
        assert found.grad is same.grad or torch.equal(found.grad, same.grad)
    torch.testing.assert_close(model.merge_and_unload()(batch()), wanted, rtol=1e-4, atol=1e-5)


def test_converted_it_has_the_numbers_of_the_file(method: Method, tmp_path: Path) -> None:
    in_sequence(method, tmp_path / "first")
    moved = PeftModel.from_pretrained(Inside(), tmp_path / "first", key_mapping=OTHER_NAMES)
    moved.save_pretrained(tmp_path / "moved")
    adapter = load(tmp_path / "moved", base=Inside())
    for name, layer in layers(moved).items():
        update = adapter.update(name.removeprefix("base_model.model."))
        torch.testing.assert_close(update.scale * update.B @ update.A, layer.get_delta_weight("default").detach())


def test_a_file_without_seeds_is_of_layers_with_these_names(method: Method, tmp_path: Path) -> None:
    wanted = in_sequence(method, tmp_path, seed=3)
    file = tmp_path / "adapter_model.safetensors"
    numbers = {key: tensor for key, tensor in load_file(file).items() if not key.endswith("_delta.seeds")}
    assert len(numbers) < len(load_file(file))
    save_file(numbers, file)
    assert torch.equal(PeftModel.from_pretrained(nn.Sequential(net()), tmp_path).eval()(batch()), wanted)


def test_the_seeds_are_those_of_the_layers_name(method: Method) -> None:
    for layer in layers(adapted(method, seed=5)).values():
        labels = ("A0", "A", "B") if method.name == "nola" else ("B", "A")
        wanted = [seeded(5, layer.name, label).initial_seed() for label in labels]
        assert layer.deltas["default"].seeds.tolist() == wanted


def test_a_model_made_on_the_meta_device_draws_when_its_state_is_read(method: Method) -> None:
    model = adapted(method, trained=True)
    empty = adapted(method, net().to("meta"))
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(batch()), model(batch()))
