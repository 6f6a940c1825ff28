"""Sums of real PEFT adapters of every kind, loaded by PEFT: its layers and its model are those of the sum."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft_cases import CASES, LAYERS, Towers, biased_llama, llama, numbers, qwen_moe, tokens
from peft_models import (
    Case,
    Loaded,
    Menagerie,
    adapted,
    best,
    deltas,
    groups_of,
    layers,
    outputs,
    reload,
    save,
    scales,
    tensors,
    with_updates,
)

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.combine import merge, rank_up, subtract
from lora_squeeze.errors import LoraSqueezeError

WEIGHTS = (0.75, -1.3)
# Grouped convolutions take even ranks.
OTHER_RANK, OTHER_ALPHA = 2, 5


def other_numbers(model: PeftModel, like: PeftModel | None = None) -> PeftModel:
    """The factors become other ones; what is trained beside them becomes equal to that of `like`."""
    generator = torch.Generator().manual_seed(7)
    known = dict(like.named_parameters()) if like else {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif parameter.requires_grad and name in known:
                parameter.copy_(known[name])
    return model


def loaded(case: Case, model: PeftModel, folder: Path) -> Loaded:
    save(model, folder)
    return Loaded(case, folder, lora_squeeze.load(folder), reload(case, folder))


def another(case: Case, folder: Path, **changes: Any) -> Loaded:
    """A second adapter of the case: other numbers, another rank and scale, the same carried tensors."""
    settings = {"r": OTHER_RANK, "lora_alpha": OTHER_ALPHA, "use_rslora": False, **changes}
    settings |= {name: {} for name in ("rank_pattern", "alpha_pattern")}
    return loaded(case, other_numbers(adapted(case, **settings), adapted(case)), folder)


def weighted_sum(members: list[Loaded], weights: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """What PEFT adds to each layer, of all adapters together."""
    total: dict[str, torch.Tensor] = {}
    for member, weight in zip(members, weights, strict=True):
        for name, dW in deltas(member.model).items():
            total[name] = total.get(name, 0) + weight * dW
    return total


def assert_is(found: PeftModel, expected: dict[str, torch.Tensor]) -> None:
    by_layer = deltas(found)
    assert by_layer.keys() == expected.keys(), "PEFT makes the layers of the sum and no others"
    for name, dW in expected.items():
        torch.testing.assert_close(by_layer[name], dW, rtol=1e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_every_layer_that_peft_loads_has_the_sum(menagerie: Menagerie, tmp_path: Path, name: str) -> None:
    one, two = menagerie.source(name), another(menagerie.cases[name], tmp_path / "other")
    both = merge([one.adapter, two.adapter], WEIGHTS)
    both.save(tmp_path / "sum")
    found = reload(one.case, tmp_path / "sum")
    expected = weighted_sum([one, two], WEIGHTS)
    assert_is(found, expected)
    assert len(scales(found)) == 1
    before, after = tensors(one.folder), tensors(tmp_path / "sum")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if ".lora_" not in key)
    if one.case.plain:
        dense = with_updates(one.case, expected, one.model)
        torch.testing.assert_close(outputs(found, one.case), outputs(dense, one.case), rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("name", LAYERS)
def test_with_a_rank_every_layer_has_the_best_of_the_sum(menagerie: Menagerie, tmp_path: Path, name: str) -> None:
    one, two = menagerie.source(name), another(menagerie.cases[name], tmp_path / "other")
    small = merge([one.adapter, two.adapter], WEIGHTS, rank=one.case.rank)
    small.save(tmp_path / "sum")
    found = reload(one.case, tmp_path / "sum")
    ranks = {row.name: row.rank_after for row in small.report.rows}
    whole = weighted_sum([one, two], WEIGHTS)
    expected = {layer: best(dW, ranks[layer] // groups_of(layers(one.model)[layer])) for layer, dW in whole.items()}
    assert max(ranks.values()) == one.case.rank
    assert_is(found, expected)


TARGETS: dict[str, tuple[Case, dict[str, Any], dict[str, Any]]] = {
    "lists": (CASES["patterns"], {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["v_proj", "up_proj"]}),
    "a list and an expression": (
        CASES["patterns"],
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    ),
    "some layers": (CASES["patterns"], {"layers_to_transform": [0]}, {"layers_to_transform": [1]}),
    "an excluded layer": (CASES["patterns"], {"exclude_modules": ["layers.1.self_attn.q_proj"]}, {}),
    "towers": (
        Case(Towers, dict(r=4, target_modules=["q_proj"]), numbers(3, 12)),
        {"target_modules": r"model\.layers\.0\.q_proj"},
        {"target_modules": r"vision\.model\.layers\.1\.q_proj"},
    ),
    "parameters of experts": (
        LAYERS["experts"],
        {"target_parameters": ["mlp.experts.down_proj"]},
        {"target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": ["v_proj"]},
    ),
    "one parameter beside both": (
        LAYERS["experts"], {"target_parameters": ["mlp.experts.gate_up_proj"]}, {"target_modules": []}
    ),
    "embedding": (LAYERS["embedding"], {"target_modules": ["words"]}, {"target_modules": ["head"]}),
    "attention": (LAYERS["attention module"], {"target_modules": ["attention"]}, {"target_modules": ["head"]}),
}  # fmt: skip


@pytest.mark.parametrize("order", ["as given", "reversed"])
@pytest.mark.parametrize("name", TARGETS)
def test_a_module_that_one_adapter_does_not_have_adds_nothing(tmp_path: Path, name: str, order: str) -> None:
    case, *settings = TARGETS[name]
    members = [another(case, tmp_path / str(i), r=2 + 2 * i, **changes) for i, changes in enumerate(settings)]
    if order == "reversed":
        members.reverse()
    assert members[0].adapter.modules.keys() != members[1].adapter.modules.keys()
    merge([member.adapter for member in members], WEIGHTS).save(tmp_path / "sum")
    assert_is(reload(case, tmp_path / "sum"), weighted_sum(members, WEIGHTS))


def test_tensors_of_a_layer_that_another_adapter_wraps_find_their_place(tmp_path: Path) -> None:
    """A bias of a layer without LoRA is stored under another key than that of a layer with one."""
    case = Case(biased_llama, dict(r=4, bias="all", target_modules=["q_proj"]), tokens)
    one = loaded(case, adapted(case), tmp_path / "one")
    two = another(case, tmp_path / "two", bias="none", target_modules=["k_proj"])
    both = merge([one.adapter, two.adapter])
    both.save(tmp_path / "sum")
    found = reload(case, tmp_path / "sum")
    assert_is(found, weighted_sum([one, two], (1, 1)))
    before, after = dict(one.model.named_parameters()), dict(found.named_parameters())
    biases = [name for name in before if name.endswith(".bias") and ".lora_" not in name]
    assert biases
    for name in biases:
        inner = name.replace("k_proj.bias", "k_proj.base_layer.bias")
        torch.testing.assert_close(after[inner], before[name], rtol=0, atol=0)
    assert any("bias: tensors of adapter 1 alone" in note for note in both.notes)


def test_biases_of_B_are_part_of_the_sum(tmp_path: Path) -> None:
    """One adapter has them in fewer modules, the other in none: missing ones are zero."""
    case = Case(biased_llama, dict(r=4, lora_alpha=6, lora_bias=True, target_modules=["q_proj", "v_proj"]), tokens)
    members = [
        another(case, tmp_path / "one"),
        another(case, tmp_path / "two", r=6),
        another(case, tmp_path / "three", lora_bias=False, target_modules=["q_proj", "k_proj"]),
    ]
    weights = (0.5, -2.0, 3.0)
    merge([member.adapter for member in members], weights).save(tmp_path / "sum")
    found = reload(case, tmp_path / "sum")
    assert_is(found, weighted_sum(members, weights))
    for name, layer in layers(found).items():
        expected = torch.zeros(layer.out_features, dtype=torch.float64)
        for member, weight in zip(members, weights, strict=True):
            theirs = layers(member.model).get(name)
            if theirs is not None and theirs.lora_B["default"].bias is not None:
                expected += weight * theirs.scaling["default"] * theirs.lora_B["default"].bias.detach()
        bias = layer.scaling["default"] * layer.lora_B["default"].bias.detach()
        torch.testing.assert_close(bias, expected, rtol=1e-5, atol=1e-6)


def test_a_squeezed_adapter_that_lost_modules_is_added_as_it_is(tmp_path: Path) -> None:
    case = CASES["linear"]
    one = loaded(case, adapted(case), tmp_path / "one")
    two = another(case, tmp_path / "two", target_modules=["q_proj"])
    few = one.adapter.squeeze(plan=zero_plan(one.adapter))
    few.save(tmp_path / "few")
    merge([few, two.adapter]).save(tmp_path / "sum")
    less = Loaded(case, tmp_path / "few", few, reload(case, tmp_path / "few"))
    assert few.dropped
    assert_is(reload(case, tmp_path / "sum"), weighted_sum([less, two], (1, 1)))


def zero_plan(adapter: Adapter) -> Any:
    """All of layer 1 leaves the adapter."""
    from lora_squeeze.plan import Plan, PlanRow

    return Plan({name: PlanRow(0 if "layers.1" in name else m.rank) for name, m in adapter.modules.items()})


def test_adding_and_subtracting_again_gives_the_adapter_back(menagerie: Menagerie, tmp_path: Path) -> None:
    one, two = menagerie.source("patterns"), another(CASES["patterns"], tmp_path / "two")
    both = merge([one.adapter, two.adapter])
    subtract(both, two.adapter, rank=one.adapter.rank).save(tmp_path / "back")
    assert_is(reload(one.case, tmp_path / "back"), deltas(one.model))


def test_a_sum_is_that_of_peft_cat_and_svd(menagerie: Menagerie, tmp_path: Path) -> None:
    """PEFT's own merges of linear layers: `cat` is exact at the sum of the ranks, `svd` is dense."""
    case = CASES["patterns"]
    one, two = menagerie.source("patterns"), another(case, tmp_path / "two")
    model = reload(case, one.folder)
    model.load_adapter(str(two.folder), "second")
    for kind, rank in (("cat", None), ("svd", 3)):
        model.add_weighted_adapter(["default", "second"], [0.7, 0.4], kind, combination_type=kind, svd_rank=rank)
        small = merge([one.adapter, two.adapter], [0.7, 0.4], rank=rank)
        for name, layer in layers(model).items():
            expected = layer.get_delta_weight(kind).detach().double()
            torch.testing.assert_close(small.update(name).dense().double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*LAYERS, "rslora and patterns", "lora bias", "tied embedding and head", "towers"])
def test_more_rank_is_the_same_model_to_peft(menagerie: Menagerie, tmp_path: Path, name: str) -> None:
    source = menagerie.source(name)
    rank_up(source.adapter, 10).save(tmp_path / "out")
    found = reload(source.case, tmp_path / "out")
    torch.testing.assert_close(outputs(found, source.case), outputs(source.model, source.case), rtol=2e-5, atol=2e-6)
    assert {layer.r["default"] for layer in layers(found).values()} == {10}
    assert len(scales(found)) == 1


def test_new_directions_learn(tmp_path: Path) -> None:
    case = Case(llama, dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]), tokens)
    source = lora_squeeze.load(save(adapted(case), tmp_path / "source"))
    rank_up(source, 7).save(tmp_path / "out")
    trained = reload(case, tmp_path / "out", is_trainable=True).train()
    trained(case.batch(), labels=case.batch()).loss.backward()
    rows = []
    for layer in layers(trained).values():
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert not B[:, 4:].any() and (B.grad[:, 4:].norm(dim=0) > 0).all()
        rows.append(A.detach()[4:])
    assert rows[0].abs().max() <= 1 / math.sqrt(rows[0].shape[-1])
    alike = [row for row in rows if row.shape == rows[0].shape]
    assert len(alike) > 1 and not torch.equal(alike[0], alike[1]), "modules of one shape get rows of their own"


SAVED = Case(llama, dict(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), tokens)


def test_a_head_that_one_adapter_trained_comes_along(tmp_path: Path) -> None:
    one, two = another(CASES["patterns"], tmp_path / "one"), loaded(SAVED, adapted(SAVED), tmp_path / "two")
    both = merge([one.adapter, two.adapter], WEIGHTS)
    both.save(tmp_path / "sum")
    found = reload(SAVED, tmp_path / "sum")
    assert_is(found, weighted_sum([one, two], WEIGHTS))
    (key,) = [key for key in tensors(two.folder) if "lm_head" in key]
    assert torch.equal(tensors(tmp_path / "sum")[key], tensors(two.folder)[key])
    assert [note for note in both.notes if "adapter 2 alone" in note and "module to save" in note]


def test_of_different_heads_one_is_chosen(tmp_path: Path) -> None:
    one = loaded(SAVED, adapted(SAVED), tmp_path / "one")
    changed = adapted(SAVED)
    with torch.no_grad():
        next(p for name, p in changed.named_parameters() if "lm_head.modules_to_save" in name).mul_(2)
    two = loaded(SAVED, changed, tmp_path / "two")
    with pytest.raises(LoraSqueezeError, match=r"lm_head.weight: adapters 1 and 2 carry different .*extras_from=1"):
        merge([one.adapter, two.adapter])
    for chosen, member in ((1, one), (2, two)):
        merge([one.adapter, two.adapter], extras_from=chosen).save(tmp_path / f"sum {chosen}")
        found = tensors(tmp_path / f"sum {chosen}")
        (key,) = [key for key in found if "lm_head" in key]
        assert torch.equal(found[key], tensors(member.folder)[key])
        assert_is(reload(SAVED, tmp_path / f"sum {chosen}"), weighted_sum([one, two], (1, 1)))


def test_a_layer_updated_here_and_trained_whole_there_is_refused(tmp_path: Path) -> None:
    case = Case(llama, dict(r=4, target_modules=["q_proj"], modules_to_save=["o_proj"]), tokens)
    one, two = another(CASES["patterns"], tmp_path / "one"), loaded(case, adapted(case), tmp_path / "two")
    for options in ({}, {"extras_from": 2}):
        with pytest.raises(LoraSqueezeError, match=r"o_proj: one adapter has an update of it.*extras_from"):
            merge([one.adapter, two.adapter], **options)
    merge([one.adapter, two.adapter], extras_from=1).save(tmp_path / "sum")
    assert_is(reload(CASES["patterns"], tmp_path / "sum"), weighted_sum([one, two], (1, 1)))


@pytest.mark.parametrize(
    ("field", "one", "two"),
    [
        ("alora_invocation_tokens", CASES["activated"], Case(llama, CASES["activated"].config | {
            "alora_invocation_tokens": None}, tokens)),
        ("layer_replication", CASES["replicated layers"], CASES["patterns"]),
        ("ensure_weight_tying", CASES["trained tokens of tied embeddings"], CASES["patterns"]),
    ],
)  # fmt: skip
def test_settings_that_no_sum_can_have_are_refused(tmp_path: Path, field: str, one: Case, two: Case) -> None:
    members = [lora_squeeze.load(save(adapted(case), tmp_path / str(i))) for i, case in enumerate((one, two))]
    with pytest.raises(LoraSqueezeError, match=f"differ in {field}"):
        merge(members)


def test_experts_of_other_numbers_are_refused(tmp_path: Path) -> None:
    def fewer() -> Any:
        from transformers import Qwen3MoeForCausalLM

        config = qwen_moe().config
        config.num_experts = 3
        return Qwen3MoeForCausalLM(config)

    config = LAYERS["one parameter of experts"].config
    members = [
        lora_squeeze.load(save(adapted(Case(base, config, tokens)), tmp_path / base.__name__))
        for base in (qwen_moe, fewer)
    ]
    with pytest.raises(
        LoraSqueezeError, match=r"down_proj: adapter 1 has experts .*4 copies, adapter 2 has .*3 copies"
    ):
        merge(members)
