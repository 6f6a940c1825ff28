"""Tensors beside the factors that a conversion leaves out, since the base has them, or makes modules of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_cases import PREFIX, plain_config, plain_tensors, write_folder
from peft import LoHaConfig, PeftModel, get_peft_model
from peft_cases import CASES
from peft_models import Case, adapted, outputs, randomise, read_config, reload, save, seeded, tensors

import lora_squeeze
from lora_squeeze.conversion import convert
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import dense
from lora_squeeze.formats.peft_targets import Saved
from lora_squeeze.sources import open_source

SAVED = CASES["modules to save"]


def trained(changed: str) -> PeftModel:
    """The language model of the case with one of the modules that are saved whole unlike the base's."""
    model = adapted(SAVED)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            original = model.get_parameter(name.replace("modules_to_save.default", "original_module"))
            parameter.data.copy_(original + 0.1 * (changed in name))
    return model


def written_base(case: Case, folder: Path) -> Path:
    seeded(case.base).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("changed", ["embed_tokens", "lm_head", "norm", "nothing"])
def test_peft_loads_what_is_left_and_computes_the_same(tmp_path: Path, changed: str) -> None:
    model = trained(changed)
    source, base = save(model, tmp_path / "in"), written_base(SAVED, tmp_path / "base")
    result = convert(lora_squeeze.load(source), "peft", base=base, extras="changed")
    result.save(tmp_path / "out")
    kept = [name for name in tensors(tmp_path / "out") if "lora_" not in name]
    assert len(kept) == {"nothing": 0, "norm": 5}.get(changed, 1) and all(changed in name for name in kept)
    assert read_config(tmp_path / "out")["modules_to_save"] == ([changed] if kept else None)
    assert any("tensors beside the factors are left out, since" in note for note in result.notes)
    torch.testing.assert_close(outputs(reload(SAVED, tmp_path / "out"), SAVED), outputs(model.double(), SAVED))


def test_a_module_of_several_tensors_stays_whole(tmp_path: Path) -> None:
    base = {"head.weight": torch.ones(30, 20), "head.bias": torch.ones(30), "norm.weight": torch.ones(20)}
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file(base, tmp_path / "base" / "model.safetensors")
    carried = {f"{PREFIX}{name}": t + (name == "head.bias") for name, t in base.items()}
    folder = write_folder(
        tmp_path / "in", plain_tensors() | carried, plain_config() | {"modules_to_save": ["head", "norm", "classifier"]}
    )
    result = convert(lora_squeeze.load(folder), "peft", base=tmp_path / "base", extras="changed")
    assert result.extras.keys() == {f"{PREFIX}head.weight", f"{PREFIX}head.bias"}
    assert result.config["modules_to_save"] == ["head", "classifier"]


def test_what_cannot_be_compared_stays_and_is_told(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file({"lm_head.weight": torch.ones(30, 21)}, tmp_path / "base" / "model.safetensors")
    carried = {f"{PREFIX}{name}.weight": torch.ones(30, 20) for name in ("lm_head", "embed_tokens")}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors() | carried))
    result = convert(adapter, "peft", base=tmp_path / "base", extras="changed")
    assert result.extras.keys() == adapter.extras.keys()
    told = "\n".join(result.notes)
    assert "none of the 2 tensors beside the factors is left out" in told
    assert "not compared with the base, no tensor of that name in it" in told
    assert "not compared with the base, its shape is [30, 21] in it" in told


def test_without_the_base_model_nothing_is_known_to_be_equal(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match=r"only that tells: name it with base= \(--base\)"):
        convert(lora_squeeze.load(write_folder(tmp_path / "in")), "peft", extras="changed")


@pytest.mark.parametrize(
    ("saved", "name", "held"),
    [
        ("norm", "model.layers.0.input_layernorm.weight", True),
        ("norm", "model.norm.weight", True),
        ("norm", "model.normal.weight", False),
        ("model.norm", "base.submodel.norm.weight", True),
        ("model.norm", "model.layernorm.weight", False),
        ("head", "head.dense.0.weight", True),
        ("x" * 300, f"{'x' * 300}.weight", True),
        ("x" * 300, f"y{'x' * 300}.weight", False),
        ("", "head.weight", False),
    ],
)
def test_a_name_stands_for_all_modules_that_end_with_it(saved: str, name: str, held: bool) -> None:
    """As PEFT looks them up; it takes an empty name for all modules, which nobody means."""
    assert Saved(["other.module", saved]).holds(name) == held


# --- layers that are carried whole become modules --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("modules to save", 5),  # the norms
        ("embedding and head", 0),
        ("trained tokens", 0),
        ("trained tokens of tied embeddings", 0),
        ("trained tokens of tied embeddings untied", 0),
    ],
)
def test_carried_layers_as_modules_compute_the_same_in_peft(tmp_path: Path, name: str, kept: int) -> None:
    case = CASES[name.removesuffix(" untied")]
    if name.endswith("untied"):  # PEFT trains them in both all the same
        case = replace(case, config=case.config | {"ensure_weight_tying": False})
    model = adapted(case)
    source, base = save(model, tmp_path / "in"), written_base(case, tmp_path / "base")
    adapter = open_source(source, base=base, vocabulary="lora")
    convert(adapter, "peft", rank=16).save(tmp_path / "out")
    found = lora_squeeze.load(tmp_path / "out")
    assert len(found.extras) == kept and "model.embed_tokens" in found.modules
    assert read_config(tmp_path / "out")["modules_to_save"] == (["norm"] if kept else None)
    wanted = outputs(model.double(), case)
    torch.testing.assert_close(outputs(reload(case, tmp_path / "out"), case), wanted, rtol=1e-4, atol=1e-5)
    if "tokens" in name:
        assert found.modules["model.embed_tokens"].rank == len(next(iter(tokens_of(source).values())))
        assert ("lm_head" in found.modules) == ("tied" in name)


def tokens_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in tensors(folder).items() if "trainable_tokens" in key}


def test_layers_beside_another_method_become_modules_too(tmp_path: Path) -> None:
    case = CASES["linear"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoHaConfig(r=2, alpha=3, target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = get_peft_model(seeded(case.base), config)
        randomise(model)
    source, base = save(model.eval(), tmp_path / "in"), written_base(case, tmp_path / "base")
    adapter = open_source(source, base=base, vocabulary="lora")
    convert(adapter, "peft", base=base, rank=16).save(tmp_path / "out")
    wanted = outputs(model.double(), case)
    torch.testing.assert_close(outputs(reload(case, tmp_path / "out"), case), wanted, rtol=1e-4, atol=1e-5)
    assert "lm_head" in lora_squeeze.load(tmp_path / "out").modules


@pytest.mark.parametrize(
    ("rows", "indices"), [(3, [1, 2]), (2, [1, 40]), (2, [1, "x"]), (2, {"lm_head": [1, 2]}), (2, None)], ids=str
)
def test_rows_of_which_nobody_knows_the_tokens_stay(tmp_path: Path, rows: int, indices: Any) -> None:
    (tmp_path / "base").mkdir()
    safetensors.torch.save_file({"embed_tokens.weight": torch.ones(40, 20)}, tmp_path / "base" / "model.safetensors")
    name = f"{PREFIX}embed_tokens.token_adapter.trainable_tokens_delta"
    tensors_ = plain_tensors() | {name: torch.zeros(rows, 20)}
    folder = write_folder(tmp_path / "in", tensors_, plain_config() | {"trainable_token_indices": indices})
    with pytest.raises(LoraSqueezeError, match="which rows of the base's these are is not known"):
        open_source(folder, base=tmp_path / "base", vocabulary="lora")


def test_what_is_cut_off_a_carried_layer_counts_as_lost(tmp_path: Path) -> None:
    source, base = save(adapted(SAVED), tmp_path / "in"), written_base(SAVED, tmp_path / "base")
    before = safetensors.torch.load_file(base / "model.safetensors")["lm_head.weight"]
    after = next(tensor for name, tensor in tensors(source).items() if "lm_head" in name)
    S = torch.linalg.svdvals((after - before).double()).square()
    report = convert(open_source(source, base=base, vocabulary="lora", rank=3), "peft", rank=3).report
    (row,) = [row for row in report.rows if row.name == "lm_head"]
    assert row.energy == pytest.approx(float(S[:3].sum() / S.sum()), rel=1e-4)


def test_a_layer_that_no_lora_holds_stays_whole(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    base = {"lm_head.weight": torch.ones(30, 20), "norm.weight": torch.ones(20), "score.weight": torch.ones(2, 20)}
    safetensors.torch.save_file(base, tmp_path / "base" / "model.safetensors")
    carried = {
        "lm_head.weight": torch.ones(31, 20), "norm.weight": torch.zeros(20), "score.weight": torch.zeros(2, 20),
        "score.bias": torch.ones(2), "new.weight": torch.ones(3, 20),
    }  # fmt: skip
    config = plain_config() | {"modules_to_save": ["score", "norm", "new"]}
    folder = write_folder(tmp_path / "in", plain_tensors() | {PREFIX + key: t for key, t in carried.items()}, config)
    text = (
        "nothing that the adapter carries whole becomes a module.*no tensor of that name in it: .*new.*"
        "the base has 30 rows, here there are 31: .*lm_head.*no LoRA holds a vector: .*norm.*"
        "its name in modules_to_save stands for tensors that stay: .*score"
    )
    with pytest.raises(LoraSqueezeError, match=text):
        open_source(folder, base=tmp_path / "base", vocabulary="lora")


def test_layers_become_modules_only_beside_a_base(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match=r"only that tells: name it with base= \(--base\)"):
        open_source(write_folder(tmp_path / "in"), vocabulary="lora")


# --- sums of updates whose norm is known ------------------------------------------------------------------------------


def test_the_energy_of_a_sum_is_a_share_of_the_sum(tmp_path: Path) -> None:
    """Of one update alone, weighted, a share of all of it; of two, of what their factors hold."""
    generator = torch.Generator().manual_seed(0)
    base, one, two = ({"up.weight": torch.randn(30, 20, generator=generator)} for _ in range(3))
    for name, tensors_ in (("base", base), ("one", one), ("two", two)):
        (tmp_path / name).mkdir()
        safetensors.torch.save_file(tensors_, tmp_path / name / "model.safetensors")
    first, second = (
        convert(dense.extract(tmp_path / name, tmp_path / "base", max_rank=6), "peft", rank=6)
        for name in ("one", "two")
    )
    whole = dense.extract(tmp_path / "one", tmp_path / "base", max_rank=6)
    wanted = whole.squeeze(rank=4).report.energy
    assert lora_squeeze.merge([whole], [3.0], rank=4).report.energy == pytest.approx(wanted, rel=1e-6)
    both = [dense.extract(tmp_path / name, tmp_path / "base", max_rank=6) for name in ("one", "two")]
    wanted = lora_squeeze.merge([first, second], rank=4).report.energy
    assert lora_squeeze.merge(both, rank=4).report.energy == pytest.approx(wanted, rel=1e-4)
