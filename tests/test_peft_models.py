"""Real PEFT adapters of every kind: squeezed, loaded by PEFT again, and measured there."""

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel
from peft_cases import CASES, LAYERS, Grouped, llama, numbers, tokens
from peft_models import (
    WAYS,
    Case,
    Menagerie,
    adapted,
    best,
    delta,
    deltas,
    groups_of,
    layers,
    lost,
    outputs,
    randomise,
    read_config,
    reload,
    save,
    scales,
    seeded,
    tensors,
    with_updates,
)
from torch.nn import functional as F

import lora_squeeze

SCALED = ["patterns", "rslora", "rslora and patterns", "lora bias", "tied embedding and head", "negative alpha"]
PLAIN = [name for name, case in CASES.items() if case.plain]


@pytest.mark.parametrize(
    ("name", "alpha"), [*((name, "keep") for name in CASES), *((name, "fold") for name in [*LAYERS, *SCALED])]
)
def test_at_the_source_rank_nothing_changes(menagerie: Menagerie, tmp_path: Path, name: str, alpha: Any) -> None:
    source = menagerie.source(name)
    source.adapter.squeeze(rank=1000, alpha=alpha).save(tmp_path / "out")
    found, expected = outputs(reload(source.case, tmp_path / "out"), source.case), outputs(source.model, source.case)
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_every_update_is_the_best_of_its_rank(menagerie: Menagerie, name: str, way: str) -> None:
    source, small = menagerie.source(name), menagerie.squeezed(name, way)
    before, after = deltas(source.model), deltas(small.model)
    rows = {row.name: row for row in small.adapter.report.rows}
    assert before.keys() == after.keys() == rows.keys(), "every layer that PEFT adapts has its row, and no other"
    for layer, dW in before.items():
        rank = rows[layer].rank_after // groups_of(layers(source.model)[layer])
        tail, scale = lost(dW, rank), float(dW.norm())
        assert abs(float((dW - after[layer]).norm()) - tail) <= 1e-5 * tail + 1e-7 * scale, f"{layer} at rank {rank}"
        assert abs(rows[layer].discarded - tail) <= 1e-5 * tail + 1e-7 * scale, f"report of {layer}"
        assert math.isclose(rows[layer].norm, scale, rel_tol=1e-6)


def test_the_cases_change_the_model_discard_something_and_get_mixed_ranks(menagerie: Menagerie) -> None:
    """Equalities say nothing about an adapter without effect: these have one, and so has their squeeze."""
    for name, case in CASES.items():
        source, small = menagerie.source(name), menagerie.squeezed(name, "keep")
        full = outputs(source.model, case)
        for other in (outputs(seeded(case.base).double(), case), outputs(small.model, case)):
            assert float((full - other).norm()) > 1e-2 * float(full.norm()), name
        assert small.adapter.report.energy < 0.99, name
    mixed = [len({m.rank for m in menagerie.squeezed(name, "mixed").adapter.modules.values()}) > 1 for name in CASES]
    assert sum(mixed) > len(CASES) / 2


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PLAIN)
def test_forward_is_that_of_best_updates_added_to_the_base(menagerie: Menagerie, name: str, way: str) -> None:
    source, small = menagerie.source(name), menagerie.squeezed(name, way)
    ranks = {row.name: row.rank_after for row in small.adapter.report.rows}
    updates = {layer: best(dW, ranks[layer]) for layer, dW in deltas(source.model).items()}
    expected = outputs(with_updates(source.case, updates, source.model), source.case)
    torch.testing.assert_close(outputs(small.model, source.case), expected, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_one_scale_for_all_layers_and_readers(menagerie: Menagerie, name: str, way: str) -> None:
    """PEFT computes it per layer, a server such as vLLM takes lora_alpha / r: the same number. r is the top rank."""
    source, small = menagerie.source(name), menagerie.squeezed(name, way)
    config = small.config
    (scale,) = scales(small.model)
    assert math.isclose(scale, config["lora_alpha"] / config["r"], rel_tol=1e-12)
    before = source.config
    kept = before["lora_alpha"] / (math.sqrt(before["r"]) if before["use_rslora"] else before["r"])
    expected = kept if way != "fold" and kept > 0 else 1.0
    assert math.isclose(scale, expected, rel_tol=1e-12)
    assert config["use_rslora"] is False
    assert config["r"] == max(layer.r["default"] for layer in layers(small.model).values())
    assert config["rank_pattern"].keys() == config["alpha_pattern"].keys()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_all_but_the_factors_is_bitwise_the_same(menagerie: Menagerie, name: str, way: str) -> None:
    source, small = menagerie.source(name), menagerie.squeezed(name, way)
    before, after = tensors(source.folder), tensors(small.folder)
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype
        if key.endswith("lora_B.bias"):
            continue  # its contribution is scale * bias: see below
        if ".lora_" not in key:
            assert torch.equal(before[key], after[key]), key
    factors = sum(tensor.numel() for key, tensor in after.items() if ".lora_" in key and not key.endswith(".bias"))
    assert factors == small.adapter.parameters < source.adapter.parameters


@pytest.mark.parametrize("way", WAYS)
def test_the_contribution_of_a_lora_bias_stays(menagerie: Menagerie, way: str) -> None:
    """Readers multiply it with the scale of its layer, which a squeeze may change."""
    before, after = (
        {name: layer.scaling["default"] * layer.lora_B["default"].bias for name, layer in layers(model).items()}
        for model in (menagerie.source("lora bias").model, menagerie.squeezed("lora bias", way).model)
    )
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "parity"), [(name, i) for name in CASES for i in (0, 1) if i == 0 or name in LAYERS or name not in PLAIN]
)
def test_layers_without_an_update_leave_and_are_not_missed(
    menagerie: Menagerie, tmp_path: Path, name: str, parity: int
) -> None:
    """Every other update is zero. All that leaves is that: PEFT finds every key, and the outputs are the same."""
    case = menagerie.cases[name]
    model = adapted(case)
    with torch.no_grad():
        for layer in list(layers(model).values())[parity::2]:
            for factors in (layer.lora_B, layer.lora_embedding_B):
                for parameter in factors.parameters():
                    parameter.zero_()
    source = lora_squeeze.load(save(model, tmp_path / "source"))
    small = source.squeeze(energy=1.0)
    small.save(tmp_path / "out")
    found = reload(case, tmp_path / "out")
    assert layers(found).keys() == {row.name for row in small.report.rows if row.rank_after}
    assert {name for name, module in source.modules.items() if module.floor == 0 and module.group is None} >= set(
        small.dropped
    )
    expected = outputs(reload(case, tmp_path / "source"), case)
    torch.testing.assert_close(outputs(found, case), expected, rtol=2e-5, atol=2e-6)


def test_zero_updates_do_leave_where_nothing_else_depends_on_them(tmp_path: Path) -> None:
    case = CASES["linear"]
    model = adapted(case)
    zero = [name for name in layers(model) if "layers.0" in name]
    with torch.no_grad():
        for name in zero:
            layers(model)[name].lora_B["default"].weight.zero_()
    small = lora_squeeze.load(save(model, tmp_path / "source")).squeeze(energy=0.9)
    assert sorted(small.dropped) == sorted(zero)


def test_a_small_budget_lets_the_weakest_layers_leave(tmp_path: Path) -> None:
    case = CASES["linear"]
    model = adapted(case)
    with torch.no_grad():
        for name, layer in layers(model).items():
            if "q_proj" in name or "layers.1.mlp" in name:
                layer.lora_B["default"].weight.mul_(1e-3)
    source = lora_squeeze.load(save(model, tmp_path / "source"))
    small = source.squeeze(params=source.parameters // 10)
    small.save(tmp_path / "out")
    assert small.parameters <= source.parameters // 10
    assert {name for name in source.modules if "q_proj" in name or "layers.1.mlp" in name} <= set(small.dropped)
    found = deltas(reload(case, tmp_path / "out"))
    for name, dW in deltas(reload(case, tmp_path / "source")).items():
        if name in found:
            torch.testing.assert_close(found[name], best(dW, small.modules[name].rank), rtol=1e-4, atol=1e-6)


def test_a_grouped_convolution_works_as_the_best_dense_convolution(menagerie: Menagerie) -> None:
    """The update of a grouped convolution sees all channels, each group of outputs through its own rows of A."""
    source, small = menagerie.source("grouped convolution"), menagerie.squeezed("grouped convolution", "keep")
    base, x = seeded(Grouped).double(), source.case.batch().double()
    dW = best(delta(layers(source.model)["conv"]), 1).reshape(6, 8, 3, 3)
    with torch.no_grad():
        expected = base.conv(x) + F.conv2d(x, dW, padding=1)
        found = small.model.get_submodule("base_model.model.conv")(x)
    assert small.config["r"] == 2, "the rank of the file counts both groups"
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["keep", "fold"])
@pytest.mark.parametrize("base_rank", [(14, 14), (1000, 16), (8, 8)])
def test_parameters_of_one_expert_module_keep_one_rank(tmp_path: Path, base_rank: Any, way: str) -> None:
    """Rank 16 on matrices of 12 columns beside 16: PEFT gives both parameters one rank, so the smaller is filled up."""
    asked, rank = base_rank
    case = Case(LAYERS["experts"].base, LAYERS["experts"].config | {"r": 16}, tokens)
    source = lora_squeeze.load(save(adapted(case), tmp_path / "source"))
    source.squeeze(rank=asked, alpha=way).save(tmp_path / "out")
    before, after = (reload(case, tmp_path / folder) for folder in ("source", "out"))
    assert {layer.r["default"] for name, layer in layers(after).items() if "experts" in name} == {rank}
    for name, dW in deltas(before).items():
        torch.testing.assert_close(deltas(after)[name], best(dW, rank), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_peft_convert_to_lora_gives_the_same_updates(menagerie: Menagerie, tmp_path: Path, rank: int) -> None:
    """PEFT's dense conversion of a LoRA to a smaller one, on linear layers, is an independent implementation."""
    source = menagerie.source("patterns")
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        _, converted = peft.convert_to_lora(source.model, rank=rank)
    small = source.adapter.squeeze(rank=rank, alpha="fold")
    for name in source.adapter.modules:
        key = f"base_model.model.{name}"
        expected = converted[f"{key}.lora_B.weight"].double() @ converted[f"{key}.lora_A.weight"].double()
        torch.testing.assert_close(small.update(name).dense().double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("energy", [0.5, 0.8, 0.95])
def test_peft_convert_to_lora_chooses_the_same_ranks(menagerie: Menagerie, energy: float) -> None:
    source = menagerie.source("patterns")
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, _ = peft.convert_to_lora(source.model, rank=energy)
    small = source.adapter.squeeze(energy=energy)
    assert {name: module.rank for name, module in small.modules.items()} == {
        name: config.rank_pattern.get(name, config.r) for name in source.adapter.modules
    }


@pytest.mark.parametrize("state", ["random", "zero", "zero A and B", "rank 2 of 8"])
def test_training_goes_on_in_every_direction(tmp_path: Path, state: str) -> None:
    """Directions without energy come back with B zero and A not: their B has a gradient, so they can learn."""
    case = Case(llama, dict(r=8, lora_alpha=12, target_modules=["q_proj", "down_proj"]), tokens)
    model = adapted(case)
    with torch.no_grad():
        for layer in layers(model).values():
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            if state.startswith("zero"):
                B.zero_()
            if state == "zero A and B":
                A.zero_()
            if state == "rank 2 of 8":
                B[:, 2:] = B[:, :2].repeat(1, 3)
                A[2:] = A[:2].repeat(3, 1)
    lora_squeeze.load(save(model, tmp_path / "source")).squeeze(rank=4).save(tmp_path / "out")
    trained = reload(case, tmp_path / "out", is_trainable=True).train()
    before = outputs(trained, case)
    trained(case.batch(), labels=case.batch()).loss.backward()
    for name, layer in layers(trained).items():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert A.requires_grad and B.requires_grad and A.shape[0] == 4
        assert (B.grad.norm(dim=0) > 0).all(), f"{name}: a column of B cannot learn"
        assert (A.grad is None) == (not A.requires_grad)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter -= 0.1 * parameter.grad
    assert not torch.equal(outputs(trained, case), before)


def test_a_converted_pissa_adapter_is_a_plain_lora_and_is_squeezed(tmp_path: Path) -> None:
    """The way out that the refusal of PiSSA names: its whole change against the original base, at twice the rank."""
    case = Case(llama, dict(r=3, lora_alpha=3, target_modules=["q_proj"], init_lora_weights="pissa"), tokens)
    model = peft.get_peft_model(seeded(llama), LoraConfig(**case.config))
    save(model, tmp_path / "start")
    randomise(model, 0.1)
    expected = outputs(model.double(), case)
    save(model.float(), tmp_path / "source", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    source = lora_squeeze.load(tmp_path / "source")
    assert source.rank == 6
    source.squeeze(rank=5, alpha="fold").save(tmp_path / "out")
    plain = reload(case, tmp_path / "source")
    torch.testing.assert_close(outputs(plain, case), expected, rtol=1e-3, atol=1e-4)
    for name, dW in deltas(plain).items():
        found = deltas(reload(case, tmp_path / "out"))[name]
        torch.testing.assert_close(found, best(dW, 5), rtol=1e-4, atol=1e-6)


def test_ranks_of_two_towers_do_not_leak(menagerie: Menagerie, tmp_path: Path) -> None:
    """Paths that end alike: "model.layers.0.q_proj" is also the end of "vision.model.layers.0.q_proj"."""
    source = menagerie.source("towers")
    small = source.adapter.squeeze(energy=0.97)
    small.save(tmp_path / "out")
    ranks = {name: layer.r["default"] for name, layer in layers(reload(source.case, tmp_path / "out")).items()}
    assert ranks == {name: module.rank for name, module in small.modules.items()}
    assert any(rank != ranks.get(f"vision.{name}", rank) for name, rank in ranks.items()), "the ranks are mixed"


def test_a_layer_of_one_tower_leaves_alone(tmp_path: Path) -> None:
    case = Case(CASES["towers"].base, dict(r=4, target_modules=["q_proj"]), numbers(3, 12))
    model = adapted(case)
    with torch.no_grad():
        layers(model)["model.layers.0.q_proj"].lora_B["default"].weight.zero_()
    small = lora_squeeze.load(save(model, tmp_path / "source")).squeeze(energy=0.9)
    small.save(tmp_path / "out")
    assert small.dropped == ("model.layers.0.q_proj",)
    assert layers(reload(case, tmp_path / "out")).keys() == set(small.modules)
    assert isinstance(PeftModel.from_pretrained(seeded(case.base), str(tmp_path / "out")), PeftModel)
    assert read_config(tmp_path / "out")["target_modules"] == ["q_proj"]
