"""Nested ranks: what is chosen after the training is what is evaluated, merged, saved and converted."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from adapters_cases import METHODS, Method, adapted, batch, layers, net, shake
from peft import PeftModel

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.ranks.prefix import set_rank

NESTED = {name: METHODS[name] for name in ("dylora", "matryoshka")}
each_method = pytest.mark.parametrize("method", NESTED.values(), ids=NESTED)


@each_method
def test_every_rank_is_saved_and_converted_as_it_is_evaluated(method: Method, tmp_path: Path) -> None:
    model = adapted(method, trained=True)
    outputs = []
    for rank in range(1, method.settings["r"] + 1):
        set_rank(model, rank)
        outputs.append(model(batch()))
        folder = tmp_path / str(rank)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(net(), folder).eval()
        assert torch.equal(again(batch()), outputs[-1])
        adapter = load(folder, base=net())
        assert {module.rank for module in adapter.modules.values()} == {rank}
        lora_squeeze.convert(adapter, "peft").save(folder / "lora")
        plain = PeftModel.from_pretrained(net(), folder / "lora").eval()
        torch.testing.assert_close(plain(batch()), outputs[-1], rtol=1e-5, atol=1e-5)
        merged = copy.deepcopy(model).merge_and_unload()
        torch.testing.assert_close(merged(batch()), outputs[-1], rtol=1e-5, atol=1e-5)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in pairwise(outputs))


@each_method
def test_prefixes_share_their_numbers(method: Method) -> None:
    model = adapted(method, trained=True)
    delta = next(iter(layers(model).values())).deltas["default"]
    found = []
    for rank in range(1, method.settings["r"] + 1):
        set_rank(model, rank)
        B, A = delta.factors()
        found.append((B / delta.scale_at(rank), A))
    for (B, A), (next_B, next_A) in pairwise(found):
        torch.testing.assert_close(next_B[:, : len(A)], B, rtol=1e-6, atol=0)
        assert torch.equal(next_A[: len(A)], A)


@each_method
def test_no_choice_is_the_largest_rank_and_a_choice_in_the_configuration_holds(method: Method) -> None:
    model = adapted(method, trained=True)
    wanted = model(batch())
    set_rank(model, 2)
    chosen = model(batch())
    assert torch.equal(adapted(method, trained=True, deploy_rank=2)(batch()), chosen)
    set_rank(model, None)
    assert torch.equal(model(batch()), wanted)
    assert torch.equal(adapted(method, trained=True, deploy_rank=method.settings["r"])(batch()), wanted)


@each_method
def test_what_is_merged_is_what_is_deployed_in_training_mode_too(method: Method) -> None:
    model = adapted(method, trained=True)
    set_rank(model, 2)
    wanted = model(batch())
    model.train().merge_adapter()
    torch.testing.assert_close(model(batch()), wanted, rtol=1e-5, atol=1e-5)


@each_method
def test_another_adapter_keeps_its_rank(method: Method) -> None:
    model = adapted(method, trained=True)
    model.add_adapter("other", method.config(seed=7, target_modules=["wide"]))
    shake(model, "other", seed=8)
    wanted = model.eval()(batch())
    model.set_adapter("other")
    before = model(batch())
    set_rank(model, 1, adapter="other")
    assert not torch.equal(model(batch()), before)
    model.set_adapter("default")
    assert torch.equal(model(batch()), wanted)


@each_method
def test_a_merged_adapter_keeps_its_rank_so_that_it_can_be_taken_out(method: Method) -> None:
    model = adapted(method, trained=True)
    model.merge_adapter()
    with pytest.raises(LoraSqueezeError, match=r"adapter 'default' is merged; call unmerge_adapter\(\) before another"):
        set_rank(model, 1)
    model.unmerge_adapter()
    set_rank(model, 1)


@pytest.mark.parametrize(
    ("name", "rank", "adapter", "message"),
    [
        ("dylora", 0, "default", "rank must be from 1 to r = 3, got 0"),
        ("dylora", 4, "default", "rank must be from 1 to r = 3, got 4"),
        ("matryoshka", -1, "default", "rank must be from 0 to r = 4, got -1"),
        ("sora", 1, "default", "adapter 'default' must be of a method with nested ranks, it is SORA"),
        ("dylora", 1, "none", "adapter 'none' must be of a method with nested ranks, there is none"),
    ],
)
def test_ranks_that_cannot_be_chosen_are_refused(name: str, rank: int, adapter: str, message: str) -> None:
    with pytest.raises(LoraSqueezeError) as refused:
        set_rank(adapted(METHODS[name]), rank, adapter)
    assert str(refused.value) == message


def test_impossible_ranks_in_the_configuration_are_refused() -> None:
    with pytest.raises(ValueError, match="deploy_rank must be from 1 to r = 3, got 4"):
        METHODS["dylora"].config(deploy_rank=4)
    with pytest.raises(ValueError, match="deploy_rank must be from 0 to r = 4, got -1"):
        METHODS["matryoshka"].config(deploy_rank=-1)
