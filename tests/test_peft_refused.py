"""Adapters that cannot be squeezed soundly: refused by name, with a way out that works, and nothing is written."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from command_cases import command
from peft_cases import llama, tokens
from peft_models import (
    CONFIG,
    WEIGHTS,
    Case,
    Menagerie,
    adapted,
    best,
    deltas,
    layers,
    outputs,
    randomise,
    reload,
    save,
    seeded,
    tensors,
    write_config,
)
from safetensors.torch import save_file

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError

TARGETS = ["q_proj", "down_proj"]


def refusal(folder: Path, out: Path) -> str:
    """The message of a refused squeeze; neither the source nor the target is touched."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(LoraSqueezeError) as caught:
        lora_squeeze.load(folder).squeeze(rank=2).save(out)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not out.exists() and os.listdir(out.parent) == [folder.name], "nothing is written"
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.fixture
def plain(menagerie: Menagerie, tmp_path: Path) -> Path:
    """A copy of a good adapter, to be spoilt."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((menagerie.source("linear").folder / name).read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_dora": True}, ["DoRA", "use_dora", "magnitude", "convert ADAPTER --to peft --rank N --base MODEL"]),
        ({"use_qalora": True}, ["QALoRA", "use_qalora", "convert ADAPTER"]),
        ({"use_bdlora": {"target_modules_bd_a": ["q_proj"]}}, ["BD-LoRA", "use_bdlora", "convert ADAPTER"]),
        ({"kasa_config": {"svd_init": True}}, ["KaSA", "kasa_config", "diagonal", "--base MODEL"]),
        ({"arrow_config": {"top_k": 3}}, ["Arrow", "arrow_config", "each expert adapter by itself"]),
        ({"monteclora_config": {"num_samples": 8}}, ["MonteCLoRA", "monteclora_config", "convert ADAPTER"]),
        ({"velora_config": {"num_groups": 4}}, ["VeLoRA", "velora_config", "convert ADAPTER"]),
        ({"init_lora_weights": "pissa"}, ["PiSSA", "pissa", "--initial ADAPTER"]),
        ({"init_lora_weights": "pissa_niter_16"}, ["PiSSA", "pissa_niter_16"]),
        ({"init_lora_weights": "olora"}, ["OLoRA", "--initial ADAPTER"]),
        ({"init_lora_weights": "corda"}, ["CorDA", "--initial ADAPTER"]),
        ({"init_lora_weights": "lora_ga"}, ["LoRA-GA", "--initial ADAPTER"]),
        ({"init_lora_weights": "loftq"}, ["LoftQ", "quantised", "merge_and_unload"]),
        ({"init_lora_weights": "newest"}, ["'newest'", "not known", "set it to true"]),
        ({"use_newlora": True}, ["'use_newlora'", "remove it"]),
        ({"newlora_config": {"depth": 2}}, ["'newlora_config'", "remove it"]),
        ({"peft_type": "LOHA"}, ["'LOHA'", "convert ADAPTER --to peft --rank N, with --base MODEL"]),
        ({"peft_type": "ADALORA"}, ["'ADALORA'", "convert ADAPTER"]),
        ({"peft_type": None}, ["None"]),
        ({"r": 0}, ["r must be", "0"]),
        ({"r": 2.5}, ["r must be", "2.5"]),
        ({"r": True}, ["r must be", "True"]),
        ({"lora_alpha": "16"}, ["lora_alpha", "'16'"]),
        ({"lora_alpha": None}, ["lora_alpha", "None"]),
        ({"rank_pattern": {"q_proj": "x"}}, ["rank_pattern", "q_proj", "'x'"]),
        ({"alpha_pattern": {"q_(proj": 4}}, ["alpha_pattern", "q_(proj", "regular expression"]),
        ({"alpha_pattern": [4]}, ["alpha_pattern", "list"]),
        ({"target_modules": "q_(proj"}, ["target_modules", "q_(proj", "regular expression"]),
        ({"target_modules": {"q_proj": 1}}, ["target_modules", "list"]),
        ({"exclude_modules": "q_(proj"}, ["exclude_modules", "q_(proj", "regular expression"]),
        ({"target_parameters": "experts"}, ["target_parameters", "list"]),
    ],
)
def test_a_setting_that_changes_the_meaning_is_named(
    plain: Path, tmp_path: Path, changes: dict[str, Any], words: list[str]
) -> None:
    write_config(plain, **changes)
    message = refusal(plain, tmp_path / "out")
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": False, "kasa_config": None, "use_bdlora": None, "arrow_config": {}, "newlora_config": None},
        {"init_lora_weights": False},
        {"init_lora_weights": None},
        {"init_lora_weights": "mica"},
        {"loftq_config": {}, "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"alora_invocation_tokens": [1, 2]},
    ],
)
def test_a_setting_that_changes_nothing_is_no_reason(plain: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    write_config(plain, **changes)
    lora_squeeze.load(plain).squeeze(rank=2).save(tmp_path / "out")
    kept = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert {key: kept[key] for key in changes if key != "init_lora_weights"} == {
        key: value for key, value in changes.items() if key != "init_lora_weights"
    }


def _trained(config: peft.PeftConfig, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(seeded(llama), config)
        randomise(model, 0.1)
    save(model, folder)
    return model.eval()


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (lambda: peft.LoHaConfig(r=4, target_modules=TARGETS), "LOHA"),
        (lambda: peft.LoKrConfig(r=4, target_modules=TARGETS), "LOKR"),
        (lambda: peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=TARGETS), "ADALORA"),
        (lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True), "DoRA"),
        (lambda: peft.LoraConfig(r=4, target_modules=TARGETS, kasa_config=peft.KasaConfig()), "KaSA"),
        (lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"), "PiSSA"),
        (lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"), "OLoRA"),
    ],
)
def test_adapters_as_peft_saves_them_are_refused(tmp_path: Path, config: Any, word: str) -> None:
    _trained(config(), tmp_path / "source")
    assert word in refusal(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("kind", ["dora", "kasa"])
def test_tensors_give_a_variant_away_when_the_configuration_does_not(tmp_path: Path, kind: str) -> None:
    """Tools that rewrite the configuration drop fields; the tensors still say what the adapter is."""
    options: dict[str, Any] = {"use_dora": True} if kind == "dora" else {"kasa_config": peft.KasaConfig()}
    _trained(peft.LoraConfig(r=4, target_modules=TARGETS, **options), tmp_path / "source")
    write_config(tmp_path / "source", use_dora=False, kasa_config=None)
    assert {"dora": "DoRA", "kasa": "KaSA"}[kind] in refusal(tmp_path / "source", tmp_path / "out")


@pytest.mark.parametrize("way", ["LoHa", "LoKr"])
def test_the_way_out_for_other_methods_works(tmp_path: Path, way: str) -> None:
    """convert, as the message says, gives the best approximation of what PEFT merges."""
    model = _trained(getattr(peft, f"{way}Config")(r=4, target_modules=TARGETS), tmp_path / "source")
    run = command(tmp_path, "convert", tmp_path / "source", "--to", "peft", "--rank", 3, "-o", tmp_path / "lora")
    assert run.code == 0, run.err
    found = deltas(reload(Case(llama, dict(r=4, target_modules=TARGETS), tokens), tmp_path / "lora"))
    for name, dW in found.items():
        whole = model.get_submodule(f"base_model.model.{name}").get_delta_weight("default").double()
        torch.testing.assert_close(dW[0], best(whole, 3), rtol=1e-4, atol=1e-6)


def test_the_way_out_for_dora_needs_the_base_and_is_the_merged_model(tmp_path: Path) -> None:
    """PEFT's save_as_lora leaves the magnitude out and gives another model, so no message may send people there."""
    case = Case(llama, dict(r=4, target_modules=TARGETS, use_dora=True), tokens)
    model = adapted(case)
    save(model, tmp_path / "dora")
    seeded(llama).save_pretrained(tmp_path / "base")
    arguments = ["convert", tmp_path / "dora", "--to", "peft", "--rank", 16]
    without = command(tmp_path, *arguments, "-o", tmp_path / "none")
    assert without.code == 1 and "base" in without.err
    run = command(tmp_path, *arguments, "--base", tmp_path / "base", "-o", tmp_path / "lora")
    assert run.code == 0, run.err
    expected = outputs(model.double().merge_and_unload(), case)
    lora = outputs(reload(Case(llama, {}, tokens), tmp_path / "lora"), case)
    torch.testing.assert_close(lora, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda key, t: None if key.endswith("0.mlp.up_proj.lora_B.weight") else t, ["orphan", "up_proj.lora_A"]),
        (lambda key, t: None if key.endswith("0.mlp.up_proj.lora_A.weight") else t, ["orphan", "up_proj.lora_B"]),
        (lambda key, t: t[:, :-1].contiguous() if "v_proj.lora_B" in key else t, ["do not fit", "v_proj", "[8, 7]"]),
        (lambda key, t: t.flatten() if "v_proj.lora_A" in key else t, ["v_proj.lora_A", "[128]", "ZeRO-3"]),
        (lambda key, t: t[:0] if "v_proj.lora_A" in key else t, ["v_proj.lora_A", "[0, 16]", "gathered"]),
        (lambda key, t: t.to(torch.int8) if "k_proj.lora_A" in key else t, ["k_proj.lora_A", "int8"]),
        (lambda key, t: t * float("nan") if "1.mlp.up_proj.lora_B" in key else t, ["NaN"]),
    ],
)
def test_damaged_factors_are_named(plain: Path, tmp_path: Path, spoil: Any, words: list[str]) -> None:
    spoilt = {key: spoil(key, tensor) for key, tensor in tensors(plain).items()}
    kept = {key: tensor for key, tensor in spoilt.items() if tensor is not None}
    save_file(kept, plain / WEIGHTS, metadata={"format": "pt"})
    if words == ["NaN"]:  # found when the factors are read, in the middle of writing
        with pytest.raises(LoraSqueezeError, match="NaN"):
            lora_squeeze.load(plain).squeeze(rank=2).save(tmp_path / "out")
        assert os.listdir(tmp_path) == [plain.name]
        return
    message = refusal(plain, tmp_path / "out")
    assert [word for word in words if word not in message] == [], message


@pytest.mark.parametrize("pattern", ["alpha_pattern", "rank_pattern"])
def test_experts_that_cannot_be_told_apart_are_refused(tmp_path: Path, pattern: str) -> None:
    """Keys do not name parameters. Two of one module nest in the order of declaration, which a file does not hold."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down_proj = torch.nn.Parameter(torch.randn(3, 8, 6) / 3)
            self.gate_up_proj = torch.nn.Parameter(torch.randn(3, 12, 8) / 3)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Experts()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = torch.einsum("bi,eoi->beo", x, self.experts.gate_up_proj).chunk(2, -1)
            return torch.einsum("beo,eio->bi", gate.tanh() * up, self.experts.down_proj)

    targets = ["experts.gate_up_proj", "experts.down_proj"]
    config = dict(r=4, lora_alpha=6, target_modules=[], target_parameters=targets)
    batch = torch.randn(5, 8)
    case = Case(Model, config, lambda: batch)
    save(adapted(case, **{pattern: {"down_proj": 2}}), tmp_path / "source")
    message = refusal(tmp_path / "source", tmp_path / "out")
    assert "experts" in message and ("which is which" in message or "cannot be told apart" in message)
    save(adapted(case), tmp_path / "source")
    lora_squeeze.load(tmp_path / "source").squeeze(rank=3).save(tmp_path / "out")
    found = deltas(reload(case, tmp_path / "out"))
    for name, dW in deltas(reload(case, tmp_path / "source")).items():
        torch.testing.assert_close(found[name], best(dW, 3), rtol=1e-4, atol=1e-6)


def test_experts_declared_as_usual_may_have_ranks_and_alphas_of_their_own(tmp_path: Path) -> None:
    """One rank afterwards, as the two nest under one pattern."""
    from peft_cases import LAYERS

    config = LAYERS["experts"].config | {"alpha_pattern": {"down_proj": 24}, "rank_pattern": {"down_proj": 3}}
    case = Case(LAYERS["experts"].base, config, tokens)
    save(adapted(case), tmp_path / "source")
    source = reload(case, tmp_path / "source")
    assert {layer.scaling["default"] for layer in layers(source).values()} == {6 / 4, 24 / 3}
    for rank in (1000, 2):
        lora_squeeze.load(tmp_path / "source").squeeze(rank=rank).save(tmp_path / str(rank))
        found = deltas(reload(case, tmp_path / str(rank)))
        for name, dW in deltas(source).items():
            torch.testing.assert_close(found[name], best(dW, rank), rtol=1e-4, atol=1e-6)
