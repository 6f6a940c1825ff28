"""Copies of an adapted model, in memory and through pickle: the same function, and nothing trained in common."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, Method, adapted, batch, layers, net, shake
from torch import nn

METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_a_file])


@METHOD
@WAYS
def test_a_copy_is_independent(method: Method, copied: Callable[[Any], Any]) -> None:
    model = adapted(method, trained=True)
    wanted = model(batch())
    twin = copied(model)
    assert torch.equal(twin(batch()), wanted)
    shake(twin, seed=11)
    assert torch.equal(model(batch()), wanted)
    assert not torch.equal(twin(batch()), wanted)


@METHOD
@WAYS
def test_a_copy_has_the_base_weights_of_its_own(method: Method, copied: Callable[[Any], Any]) -> None:
    model = adapted(method, trained=True)
    twin = copied(model)
    wanted = twin(batch())
    for parameter in model.unload().parameters():
        parameter.data.zero_()
    assert torch.equal(twin(batch()), wanted)
    if method.static:
        merged = twin.merge_and_unload()(batch())
        assert (merged - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.static], ids=lambda m: m.name)
@WAYS
def test_a_merged_copy_can_be_unmerged(method: Method, copied: Callable[[Any], Any]) -> None:
    model = adapted(method, trained=True)
    model.merge_adapter()
    twin = copied(model)
    twin.unmerge_adapter()
    before = dict(net().named_parameters())
    for name, layer in layers(twin).items():
        found, wanted = layer.get_base_layer().weight, before[f"{name.removeprefix('base_model.model.')}.weight"]
        assert torch.allclose(found, wanted, atol=1e-6)


@METHOD
def test_a_copy_can_be_cast(method: Method) -> None:
    twin = copy.deepcopy(adapted(method, trained=True)).bfloat16()
    assert twin(batch(torch.bfloat16)).dtype == torch.bfloat16


@METHOD
@WAYS
def test_gradients_stay_in_the_copy(method: Method, copied: Callable[[Any], Any]) -> None:
    model = adapted(method, trained=True, bias="all").train()
    twin = copied(model)
    twin(batch()).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(layer.get_base_layer().bias.grad is not None for layer in list(layers(twin).values())[::2])


@METHOD
def test_a_copy_of_one_layer_is_no_copy_of_the_model(method: Method) -> None:
    model = adapted(method, trained=True)
    last = list(layers(model).values())[-1]
    assert len(pickle.dumps(last)) < len(pickle.dumps(model))


def test_what_is_drawn_again_anyway_is_common_to_copies_and_not_pickled() -> None:
    model = adapted(METHODS["tera"])
    before = len(pickle.dumps(model))
    model(batch())
    assert len(pickle.dumps(model)) == before
    delta, twin = (next(iter(layers(each).values())).deltas["default"] for each in (model, copy.deepcopy(model)))
    assert delta.network()[0] is twin.network()[0]


@pytest.mark.parametrize("name", ["nola", "sora"])  # one of each package of methods
def test_another_process_reads_a_pickled_model(name: str, tmp_path: Path) -> None:
    layer = nn.Sequential(nn.Linear(4, 3))
    model = adapted(METHODS[name], layer, trained=True, target_modules=["0"])
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = "import pickle, sys, torch; print(pickle.load(open(sys.argv[1], 'rb'))(torch.ones(4)).tolist())"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model.pickle")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(model(torch.ones(4)).tolist())
