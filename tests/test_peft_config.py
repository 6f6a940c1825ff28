"""adapter_config.json of a squeezed adapter: what changes, what stays, and what PEFT makes of it."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft_cases import CASES, OddNames, llama, numbers, tokens
from peft_models import (
    WAYS,
    Case,
    Menagerie,
    adapted,
    best,
    deltas,
    layers,
    outputs,
    read_config,
    reload,
    save,
    scales,
    write_config,
)

import lora_squeeze
from lora_squeeze.formats.peft_config import pattern_value

# What a squeeze may write; every other field is the user's and stays.
OWNED = {"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "eva_config"}


def matches(pattern: str, name: str) -> bool:
    """PEFT's own test of a pattern (peft.utils.other.get_pattern_key)."""
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_the_fields_of_the_user_stay(menagerie: Menagerie, name: str, way: str) -> None:
    before, after = menagerie.source(name).config, menagerie.squeezed(name, way).config
    assert before.keys() == after.keys()
    assert {field for field in before if before[field] != after[field]} <= OWNED


@pytest.mark.parametrize("name", CASES)
def test_patterns_name_one_layer_each(menagerie: Menagerie, name: str) -> None:
    """Anchored, escaped and without overlap: PEFT sorts them, and in any order each layer finds its own."""
    small = menagerie.squeezed(name, "mixed")
    config, found = small.config, layers(small.model)
    for pattern in config["rank_pattern"]:
        hits = [layer for layer in found if matches(pattern, layer)]
        assert pattern.startswith("^") and hits, pattern
        assert len(hits) == 1 or all("experts" in hit for hit in hits), "only parameters of one module share a pattern"
    for layer in found:
        assert sum(matches(pattern, layer) for pattern in config["rank_pattern"]) <= 1
        assert not any(matches(pattern, f"tower.{layer}") for pattern in config["rank_pattern"]), "not in other towers"


def test_both_projections_of_an_attention_module_have_one_entry(menagerie: Menagerie, tmp_path: Path) -> None:
    """PEFT gives the output projection the rank of its attention module, and warns of patterns that match nothing."""
    case = menagerie.cases["attention module"]
    model = adapted(case)
    with torch.no_grad():
        for name in ("attention", "attention.out_proj"):
            layers(model)[name].lora_B["default"].weight[:, 1:] = 0
    lora_squeeze.load(save(model, tmp_path / "source")).squeeze(energy=1.0).save(tmp_path / "out")
    assert read_config(tmp_path / "out")["rank_pattern"] == {"^attention": 1}
    ranks = {name: layer.r["default"] for name, layer in layers(reload(case, tmp_path / "out")).items()}
    assert ranks == {"attention": 1, "attention.out_proj": 1, "head": 4}


@pytest.mark.parametrize("rank", [1000, 20])
def test_no_rank_is_above_what_a_matrix_can_have(tmp_path: Path, rank: int) -> None:
    """Rank 32 on matrices of 16 and 8 rows: the rest is dead weight."""
    case = Case(llama, dict(r=32, lora_alpha=12, target_modules=["q_proj", "k_proj"]), tokens)
    save(adapted(case), tmp_path / "source")
    lora_squeeze.load(tmp_path / "source").squeeze(rank=rank).save(tmp_path / "out")
    before, after = (reload(case, tmp_path / folder) for folder in ("source", "out"))
    for name, layer in layers(after).items():
        assert layer.r["default"] == (8 if "k_proj" in name else 16)
    torch.testing.assert_close(outputs(after, case), outputs(before, case), rtol=2e-5, atol=2e-6)


def test_a_name_with_the_characters_of_expressions_is_taken_literally(tmp_path: Path) -> None:
    """Every layer gets a rank of its own, so that a wrong match is a wrong shape."""
    case = Case(OddNames, dict(r=6, lora_alpha=9, target_modules=r".*"), numbers(3, 8))
    model = adapted(case)
    names = list(layers(model))
    with torch.no_grad():
        for rank, name in enumerate(names, start=1):
            layers(model)[name].lora_B["default"].weight[:, rank:] = 0
    small = lora_squeeze.load(save(model, tmp_path / "source")).squeeze(energy=1.0)
    small.save(tmp_path / "out")
    assert {name: small.modules[name].rank for name in names} == {name: k for k, name in enumerate(names, start=1)}
    found = reload(case, tmp_path / "out")
    assert {name: layer.r["default"] for name, layer in layers(found).items()} == {
        name: module.rank for name, module in small.modules.items()
    }


@pytest.mark.parametrize("dropped", OddNames()._modules)
def test_a_layer_that_leaves_is_excluded_literally(tmp_path: Path, dropped: str) -> None:
    case = Case(OddNames, dict(r=4, lora_alpha=9, target_modules=r".*"), numbers(3, 8))
    model = adapted(case)
    with torch.no_grad():
        layers(model)[dropped].lora_B["default"].weight.zero_()
    small = lora_squeeze.load(save(model, tmp_path / "source")).squeeze(energy=0.9)
    small.save(tmp_path / "out")
    assert layers(reload(case, tmp_path / "out")).keys() == set(OddNames()._modules) - {dropped}


@pytest.mark.parametrize(
    "before",
    [
        None,
        ["k_proj", "layers.1.mlp.up_proj"],
        r".*layers\.1\.self_attn\.(k|v)_proj",
        r"model\.layers\.1\.mlp\.up_proj|model\.layers\.0\.self_attn\.k_proj",
    ],
)
def test_layers_that_leave_join_those_excluded_before(tmp_path: Path, before: Any) -> None:
    """A list excludes equal endings, an expression what it matches in full: both still do, and no more than that."""
    case = Case(llama, dict(r=4, lora_alpha=6, target_modules="all-linear", exclude_modules=before), tokens)
    model = adapted(case)
    names = list(layers(model))
    zero = [name for name in names if name.endswith(("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"))]
    with torch.no_grad():
        for name in zero:
            layers(model)[name].lora_B["default"].weight.zero_()
    source = lora_squeeze.load(save(model, tmp_path / "source"))
    once = source.squeeze(energy=0.99)
    once.save(tmp_path / "once")
    assert sorted(once.dropped) == sorted(zero)
    assert layers(reload(case, tmp_path / "once")).keys() == set(names) - set(zero)
    again = lora_squeeze.load(tmp_path / "once").squeeze(params=60)
    again.save(tmp_path / "twice")
    assert again.dropped, "more layers leave"
    assert layers(reload(case, tmp_path / "twice")).keys() == set(again.modules)


@pytest.mark.parametrize("init", ["orthogonal", "gaussian", "eva"])
@pytest.mark.parametrize("rank", [1, 3])
def test_an_initialisation_is_not_run_again(menagerie: Menagerie, tmp_path: Path, init: str, rank: int) -> None:
    """PEFT refuses an orthogonal initialisation of an odd rank, although the factors come from the file."""
    source = menagerie.source(init)
    assert source.config["init_lora_weights"] == init
    source.adapter.squeeze(rank=rank).save(tmp_path / "out")
    assert read_config(tmp_path / "out")["init_lora_weights"] is True
    assert read_config(tmp_path / "out")["eva_config"] is None
    assert len(layers(reload(source.case, tmp_path / "out"))) == 8


def test_overlapping_rank_patterns_are_resolved_by_the_tensors(tmp_path: Path) -> None:
    """PEFT sorts the patterns on saving, and the first that matches counts: such an adapter does not load again.

    Trained with rank 4 everywhere, its file says 2 for layer 0. The tensors tell the rank, and the squeezed adapter
    loads.
    """
    patterns = {"q_proj": 4, "layers.0.self_attn.q_proj": 2}
    case = Case(llama, dict(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"], rank_pattern=patterns), tokens)
    model = adapted(case)
    save(model, tmp_path / "source")
    with pytest.raises(RuntimeError, match="size mismatch"):
        reload(case, tmp_path / "source")
    source = lora_squeeze.load(tmp_path / "source")
    assert any("the tensors have 4" in note for note in source.notes)
    source.squeeze(rank=3).save(tmp_path / "out")
    found = deltas(reload(case, tmp_path / "out"))
    for name, dW in deltas(model.double()).items():
        torch.testing.assert_close(found[name], best(dW, 3), rtol=1e-4, atol=1e-6)


def test_overlapping_alpha_patterns_count_as_peft_loads_them(tmp_path: Path) -> None:
    """In memory the first pattern counts, in the sorted file another one: the file is what everybody loads."""
    patterns = {"q_proj": 4, "layers.0.self_attn.q_proj": 20}
    case = Case(llama, dict(r=8, lora_alpha=12, target_modules=["q_proj", "v_proj"], alpha_pattern=patterns), tokens)
    save(adapted(case), tmp_path / "source")
    loaded = reload(case, tmp_path / "source")
    assert scales(loaded) == {4 / 8, 20 / 8, 12 / 8}
    source = lora_squeeze.load(tmp_path / "source")
    assert any("several alpha patterns match" in note for note in source.notes)
    source.squeeze(rank=8).save(tmp_path / "out")
    torch.testing.assert_close(
        outputs(reload(case, tmp_path / "out"), case), outputs(loaded, case), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_looked_up_as_peft_does(field: str) -> None:
    from peft.utils.other import get_pattern_key

    patterns = {r"layers\.0\.q_proj": 2, "q_proj": 3, "^model.layers.1.v_proj": 4, r"(.*\.)?o_proj|k": 5, "v_pro.": 6}
    for path in ("q_proj", "a.layers.0.q_proj", "model.layers.1.v_proj", "x.model.layers.1.v_proj", "xo_proj", "b.k"):
        expected = patterns.get(get_pattern_key(patterns.keys(), path), 8)
        assert pattern_value(patterns, path, 8) == expected, f"{field} of {path}"


@pytest.mark.parametrize("alpha", [3, 0.1, 1e-3, 7.5, 1 / 3])
def test_alpha_is_never_rounded(tmp_path: Path, alpha: float) -> None:
    """lora_alpha 0.1 at rank 8 is 0.0125 at rank 1: not 0."""
    case = Case(llama, dict(r=8, lora_alpha=alpha, target_modules=["q_proj"]), tokens)
    save(adapted(case), tmp_path / "source")
    lora_squeeze.load(tmp_path / "source").squeeze(rank=1).save(tmp_path / "out")
    (found,) = scales(reload(case, tmp_path / "out"))
    assert math.isclose(found, alpha / 8, rel_tol=1e-12)


@pytest.mark.parametrize("alpha", [0, -6])
def test_a_scale_that_is_not_positive_is_replaced(tmp_path: Path, alpha: int) -> None:
    """Nothing can be kept of it: balanced factors need a positive one. At 0 the update is zero, and stays so."""
    case = Case(llama, dict(r=4, lora_alpha=alpha, target_modules=["q_proj"]), tokens)
    save(adapted(case), tmp_path / "source")
    lora_squeeze.load(tmp_path / "source").squeeze(rank=2).save(tmp_path / "out")
    found, expected = (deltas(reload(case, tmp_path / folder)) for folder in ("out", "source"))
    for name in expected:
        torch.testing.assert_close(found[name], best(expected[name], 2), rtol=1e-4, atol=1e-6)
    assert scales(reload(case, tmp_path / "out")) == {1.0}


def test_a_sparse_configuration_has_the_defaults_of_peft(tmp_path: Path) -> None:
    """Files of old or foreign tools name only what they set; r and lora_alpha are 8 when missing."""
    case = Case(llama, dict(r=8, lora_alpha=8, target_modules=["q_proj"]), tokens)
    save(adapted(case), tmp_path / "source")
    expected = reload(case, tmp_path / "source")
    (tmp_path / "source" / "adapter_config.json").write_text('{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    assert scales(reload(case, tmp_path / "source")) == {LoraConfig().lora_alpha / LoraConfig().r}
    lora_squeeze.load(tmp_path / "source").squeeze(rank=4).save(tmp_path / "out")
    for name, dW in deltas(expected).items():
        found = deltas(reload(case, tmp_path / "out"))[name]
        torch.testing.assert_close(found, best(dW, 4), rtol=1e-4, atol=1e-6)


def test_a_configuration_with_rank_against_its_tensors_follows_the_tensors(tmp_path: Path) -> None:
    case = Case(llama, dict(r=4, lora_alpha=6, target_modules=["q_proj"]), tokens)
    save(adapted(case), tmp_path / "source")
    write_config(tmp_path / "source", r=16)
    source = lora_squeeze.load(tmp_path / "source")
    assert {module.rank for module in source.modules.values()} == {4}
    assert {module.scale for module in source.modules.values()} == {6 / 4}
    assert any("the configuration says rank 16, the tensors have 4" in note for note in source.notes)
    source.squeeze(rank=4).save(tmp_path / "out")
    assert {layer.r["default"] for layer in layers(reload(case, tmp_path / "out")).values()} == {4}
