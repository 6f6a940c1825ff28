"""The LoRA layers of live models: names, matrices, configuration."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import peft_cases
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_cases import CASES, LAYERS
from peft_models import Menagerie, adapted, delta, deltas, layers, outputs, reload, save
from torch import nn

from lora_squeeze import LoraSqueezeError
from lora_squeeze.data_aware import base_name
from lora_squeeze.training.live import alpha_of, live_modules, sync_config, trained_adapters


@pytest.mark.parametrize("name", CASES)
def test_names_and_ranks_are_those_of_the_file(name: str, menagerie: Menagerie) -> None:
    source = menagerie.source(name)
    live = {m.name: m.width * m.step for m in live_modules(source.model, "default")}
    file = {m.name: m.rank * m.step for m in source.adapter.modules.values()}
    assert live == file


@pytest.mark.parametrize("name", LAYERS)
def test_update_is_what_peft_adds(name: str) -> None:
    model = adapted(CASES[name])
    by_name = layers(model)
    for module in live_modules(model, "default"):
        mine, theirs = module.update().dense(), delta(by_name[module.name])
        mine = mine if mine.ndim == 3 else mine[None]
        fits = [t for t in (theirs, theirs.mT) if t.shape == mine.shape and torch.allclose(t.float(), mine, atol=1e-5)]
        assert fits, f"{module.name}: {mine.shape} is not the update that PEFT computes"


@pytest.mark.parametrize("name", LAYERS)
def test_matrices_lead_back_to_the_layers_tensors(name: str) -> None:
    for module in live_modules(adapted(CASES[name]), "default"):
        assert torch.equal(module.like_A(module.rows(module.A)), module.A)
        assert torch.equal(module.like_B(module.columns(module.B)), module.B)


def test_names_lose_the_prefixes_of_wrappers() -> None:
    path = "module._orig_mod.base_model.model.layers.0._checkpoint_wrapped_module.q_proj"
    assert base_name(path) == "layers.0.q_proj"
    assert base_name("base_model.model.my_module.proj") == "my_module.proj"


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_gives_the_scale_back(rslora: bool) -> None:
    for scale, rank in ((2.0, 8), (0.3, 7), (-1.5, 64)):
        alpha = alpha_of(scale, rank, rslora)
        assert math.isclose(alpha / (rank**0.5 if rslora else rank), scale, rel_tol=1e-12)
    assert isinstance(alpha_of(2.0, 8, False), int)


@pytest.mark.parametrize("name", ["patterns", "rslora and patterns", "towers", "odd names", "experts", "convolutions"])
def test_configuration_follows_the_layers(name: str, tmp_path: Path) -> None:
    """Without any squeeze, what PEFT saves after the update of the configuration is the same adapter."""
    case = CASES[name]
    model = adapted(case)
    sync_config(model, "default", live_modules(model, "default"))
    again = reload(case, save(model, tmp_path / "a"))
    expected, found = deltas(model.double()), deltas(again)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[n], found[n], atol=1e-12) for n in expected)
    assert torch.allclose(outputs(model.double(), case), outputs(again, case), atol=1e-9)


def test_variants_are_refused_by_name() -> None:
    case = CASES["linear"]
    for config, word in (({"use_dora": True}, "DoRA"), ({"init_lora_weights": "pissa"}, "PiSSA")):
        model = adapted(replace(case, config=case.config | config))
        with pytest.raises(LoraSqueezeError, match=word):
            live_modules(model, "default")


def test_merged_weights_are_refused() -> None:
    model = adapted(CASES["linear"])
    model.merge_adapter()
    with pytest.raises(LoraSqueezeError, match=r"merged into the base weights; call unmerge_adapter"):
        live_modules(model, "default")


def test_missing_adapters_are_named() -> None:
    with pytest.raises(LoraSqueezeError, match=r"Linear has no LoRA adapter; make one with peft.get_peft_model"):
        live_modules(nn.Linear(2, 2), "default")
    with pytest.raises(LoraSqueezeError, match=r"no adapter 'mine' in the model; it has 'default'"):
        live_modules(adapted(CASES["linear"]), "mine")


def test_only_active_and_trainable_adapters_are_trained() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(peft_cases.llama(), config)
    model.add_adapter("other", config)
    assert trained_adapters(model) == ["default"]
    model.set_adapter("other")
    assert trained_adapters(model) == ["other"]
    model.base_model.set_adapter(["default", "other"])
    assert trained_adapters(model) == ["default", "other"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(LoraSqueezeError, match=r"none of the adapters default, other is both active and trainable"):
        trained_adapters(model)


def test_adapters_inside_a_transformers_model_are_found() -> None:
    model = peft_cases.llama()
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]))
    found = [m.name for m in live_modules(model, "default")]
    assert found == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
