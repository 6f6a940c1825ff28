"""What `check` says of PEFT and of vLLM: compared with PEFT itself, and with vLLM's rules written down once more."""

from __future__ import annotations

import json
import math
import re
import time
import warnings
from pathlib import Path
from typing import Any

import check_cases as cases
import pytest
import torch
from check_cases import TRIGGERS
from command_cases import command
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from peft_cases import CASES
from peft_models import Menagerie, layers
from safetensors.torch import load_file
from torch import nn

from lora_squeeze.readers import check
from lora_squeeze.readers.facts import Facts
from lora_squeeze.readers.peft import FIELDS
from lora_squeeze.readers.read import read_facts
from lora_squeeze.readers.rule import global_scale
from lora_squeeze.readers.vllm import scales

PREFIX = "base_model.model."
PEFT_RULES = sorted(rule for rule, trigger in TRIGGERS.items() if trigger.reader == "peft")
# What differs from training, and not between the file and what is loaded: see the tests of their own.
UNSEEN = ("peft-lora-ga", "peft-variant")


def base(names: tuple[str, ...] = tuple(cases.SHAPES)) -> nn.Module:
    """Layers under the names of the cases."""
    root = nn.Module()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name in names:
            *path, last = name.split(".")
            parent = root
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            out, columns = cases.SHAPES[name]
            parent.add_module(last, nn.Linear(columns, out, bias=False))
    return root


def load(folder: Path) -> PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base(), str(folder))


def outcome(folder: Path) -> str:
    """What PEFT does: "no" for an error, "in part" where a tensor finds no place or a place no tensor, else "yes"."""
    try:
        model = load(folder)
        result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    except Exception:  # whatever it is, the adapter is not loaded
        return "no"
    return "in part" if result.unexpected_keys or any("lora_" in key for key in result.missing_keys) else "yes"


# --- PEFT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves_is_read_as_meant_with_the_scales_of_peft(name: str, menagerie: Menagerie) -> None:
    source = menagerie.source(name)
    found = check(source.folder, "peft")[0]
    assert found.findings == ()
    taken = {layer: module.scaling["default"] for layer, module in layers(source.model).items()}
    assert {pair.name: pair.scale for pair in read_facts(source.folder).pairs} == pytest.approx(taken)


@pytest.mark.parametrize("rule", [rule for rule in PEFT_RULES if rule not in UNSEEN])
def test_peft_does_with_a_broken_file_what_is_said(rule: str, tmp_path: Path) -> None:
    folder = TRIGGERS[rule].build(tmp_path)
    assert outcome(folder) == check(folder, "peft")[0].answer


def test_peft_loads_the_plain_sibling_whole(tmp_path: Path) -> None:
    assert outcome(cases.peft()(tmp_path)) == "yes"


def test_the_end_of_a_name_is_no_target(tmp_path: Path) -> None:
    folder = cases.peft(target_modules=["q_proj", "_proj"])(tmp_path)
    (found,) = check(folder, "peft")[0].findings
    assert outcome(folder) == "in part" and found.rule == "peft-target"
    assert found.modules == tuple(name for name in cases.SHAPES if "v_proj" in name)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_that_backtracks_takes_no_time(field: str, tmp_path: Path) -> None:
    name = "a" * 60

    def long_name(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {f"{PREFIX}{name}.lora_{side}.weight": torch.ones(8, 8) for side in "AB"}

    folder = cases.peft(long_name, **{"target_modules": [*cases.TARGETS, name], field: "(a+)+b"})(tmp_path)
    start = time.monotonic()
    found = {finding.rule: finding for finding in check(folder, "peft")[0].findings}
    assert time.monotonic() - start < 30, "of one name alone, `re` takes years"
    assert (name in found["peft-target"].modules if found else False) == (field == "target_modules")


def test_an_expression_that_is_none_is_named(tmp_path: Path) -> None:
    folder = cases.peft(exclude_modules="(((")(tmp_path)
    (found,) = check(folder, "peft")[0].findings
    assert outcome(folder) == "no" and found.rule == "peft-damaged" and "exclude_modules: '((('" in found.text


@pytest.mark.parametrize("side", ["A", "B"])
def test_peft_leaves_an_orphan_s_partner_at_its_start(side: str, tmp_path: Path) -> None:
    lost = f"{cases.KEY}.lora_{side}.weight"
    folder = cases.peft(cases.remove(lost))(tmp_path)
    layer = layers(load(folder))[cases.FIRST]
    kept = load_file(folder / "adapter_model.safetensors")
    if side == "B":
        assert not layer.lora_B["default"].weight.any()
    else:  # something at random, which B makes an update of
        assert torch.equal(layer.lora_B["default"].weight, kept[f"{cases.KEY}.lora_B.weight"])
        assert layer.lora_A["default"].weight.any()


def test_peft_repeats_the_change_of_the_base_of_pissa_and_not_that_of_lora_ga(tmp_path: Path) -> None:
    weights = {}
    for init in ("true", "pissa", "lora_ga"):
        folder = cases.peft(init_lora_weights=init if init != "true" else True)(tmp_path / init)
        weights[init] = layers(load(folder))[cases.FIRST].get_base_layer().weight
    assert torch.equal(weights["lora_ga"], weights["true"])
    assert not torch.allclose(weights["pissa"], weights["true"], atol=1e-2)


def test_peft_drops_a_variant_that_it_does_not_know_with_a_warning(tmp_path: Path) -> None:
    folder = TRIGGERS["peft-variant"].build(tmp_path)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['use_something'\]"):
        PeftModel.from_pretrained(base(), str(folder))


def test_the_fields_that_peft_knows_are_listed() -> None:
    assert set(LoraConfig.__dataclass_fields__) == FIELDS


# --- vLLM -------------------------------------------------------------------------------------------------------------


def refusal(config: dict[str, Any], limit: int) -> bool:
    """Whether vLLM 0.32.0 refuses this configuration: PEFTHelper.from_dict and validate_legal."""
    if not {"r", "lora_alpha", "target_modules"} <= config.keys():
        return True
    init = config.get("init_lora_weights", True)
    largest = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return any((
        any(name not in ("classifier", "score") for name in config.get("modules_to_save") or []),
        isinstance(init, str) and init.lower() not in ("gaussian", "eva", "orthogonal", "mica", "lora_ga"),
        any(config.get(f) for f in (
            "use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora",
        )),
        config.get("bias", "none") != "none",
        largest > limit,
    ))  # fmt: skip


def scale(config: dict[str, Any], module: str) -> float:
    """PEFTHelper.get_rank_and_scaling of a module's name in the checkpoint."""
    for ending, name in ((".experts.base_layer", ".experts.gate_up_proj"), (".experts", ".experts.down_proj")):
        if module.endswith(ending):
            module = module.removesuffix(ending) + name
            break
    rank, alpha = (
        next((v for p, v in (config.get(f"{field}_pattern") or {}).items() if re.match(rf"(.*\.)?({p})$", module)), top)
        for field, top in (("rank", config["r"]), ("alpha", config["lora_alpha"]))
    )
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


@pytest.mark.parametrize("name", CASES)
def test_the_scales_of_vllm_are_those_of_its_rule(name: str, menagerie: Menagerie) -> None:
    source = menagerie.source(name)
    facts = read_facts(source.folder)
    assert scales(facts) == {pair.name: scale(source.config, pair.path) for pair in facts.pairs}
    wrong = {pair.name for pair in facts.pairs if not math.isclose(scale(source.config, pair.path), pair.scale)}
    told = [finding for finding in check(source.folder, "vllm")[0].findings if finding.rule == "vllm-scale"]
    assert {module for finding in told for module in finding.modules} == wrong


@pytest.mark.parametrize("name", CASES)
def test_what_the_configuration_makes_vllm_refuse_is_refused(name: str, menagerie: Menagerie) -> None:
    folder = menagerie.source(name).folder
    for limit in (1, 8, 16):
        found = check(folder, "vllm", max_rank=limit)[0]
        by_config = {f.rule for f in found.findings if f.severity == "refused" and "PEFTHelper" in f.source}
        assert bool(by_config) == refusal(menagerie.source(name).config, limit), found


@pytest.mark.parametrize("rule", sorted(rule for rule, trigger in TRIGGERS.items() if trigger.reader == "vllm"))
def test_the_configurations_of_the_cases_are_refused_as_by_vllm(rule: str, tmp_path: Path) -> None:
    folder = TRIGGERS[rule].build(tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    if refusal(config, 512):
        assert check(folder, "vllm")[0].answer == "no"


def test_the_patterns_of_experts_are_those_of_their_parameters(tmp_path: Path) -> None:
    paths = {f"{cases.EXPERTS}.base_layer": 3, cases.EXPERTS: 5}
    sizes = {f"{cases.EXPERTS}.base_layer": (24, 16), cases.EXPERTS: (16, 12)}  # (out, in): down maps back to 16
    folder = cases.peft(
        lambda _: {
            f"{PREFIX}{path}.lora_{side}.weight": torch.ones(shape)
            for path, (out, columns) in sizes.items()
            for side, shape in (("A", (3 * 8, columns)), ("B", (out, 3 * 8)))
        },
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        alpha_pattern={"experts.gate_up_proj": 3, "experts.down_proj": 5},
    )(tmp_path)
    facts = read_facts(folder)
    taken = scales(facts)
    assert {p.path: taken[p.name] for p in facts.pairs if p.kind == "experts"} == {k: a / 8 for k, a in paths.items()}
    assert all(taken[pair.name] == pair.scale for pair in facts.pairs)


def test_a_matrix_that_is_a_parameter_is_a_layer_like_others_to_vllm(menagerie: Menagerie) -> None:
    assert check(menagerie.source("matrix parameter").folder, "vllm")[0].read_as_meant


def test_older_versions_of_vllm_take_one_scale(tmp_path: Path) -> None:
    facts = read_facts(cases.peft(alpha_pattern={"v_proj": 3}, use_rslora=True)(tmp_path))
    assert set(global_scale(facts).values()) == {12 / math.sqrt(8)}


# --- cures ------------------------------------------------------------------------------------------------------------


def run(cure: str, folder: Path, output: Path) -> None:
    """The command of a cure, with the output that it leaves open."""
    words = cure.replace("OUT", str(output)).split()
    assert words[0] == "lora-squeeze" and words[1] in ("squeeze", "rank-up") and str(folder) in words
    done = command(folder.parent, *words[1:])
    assert done.code == 0, done.err


def meant(facts: Facts) -> dict[str, float]:
    return {pair.name: pair.scale for pair in facts.pairs}


CURED = (
    "peft-rank",
    "peft-prefix",
    "vllm-rank",
    "vllm-scale",
    "vllm-older",
    "sglang-scale",
    "sglang-rank",
    "tgi-mixed",
    "tgi-scale",
    "tensorrt-scale",
    "tensorrt-mixed",
)


@pytest.mark.parametrize("rule", CURED)
def test_after_the_cure_the_adapter_is_read_as_meant(rule: str, tmp_path: Path) -> None:
    trigger = TRIGGERS[rule]
    folder = trigger.build(tmp_path)
    (finding,) = (f for f in check(folder, trigger.reader, max_rank=trigger.max_rank)[0].findings if f.rule == rule)
    output = tmp_path / "cured"
    run(finding.cure.partition(",")[0], folder, output)
    cured = check(output, trigger.reader, max_rank=trigger.max_rank)[0]
    assert cured.read_as_meant and rule not in {f.rule for f in cured.findings}, cured


def test_the_cure_of_a_scale_keeps_the_update(tmp_path: Path) -> None:
    folder = TRIGGERS["sglang-scale"].build(tmp_path)
    run(check(folder, "sglang")[0].findings[0].cure, folder, tmp_path / "cured")
    before, after = layers(load(folder)), layers(load(tmp_path / "cured"))
    for name in cases.SHAPES:
        torch.testing.assert_close(
            after[name].get_delta_weight("default"), before[name].get_delta_weight("default"), rtol=1e-5, atol=1e-6
        )
    assert set(meant(read_facts(tmp_path / "cured")).values()) == {1.0}


@pytest.mark.parametrize("name", ["rslora and patterns", "experts", "towers", "convolutions"])
@pytest.mark.parametrize("way", ["keep", "mixed"])
def test_what_a_squeeze_writes_has_the_meant_scale_for_every_reader(name: str, way: str, menagerie: Menagerie) -> None:
    """TensorRT-LLM divides one alpha by each tensor's rank: for it, and with others, mixed ranks cannot be right."""
    folder = menagerie.squeezed(name, way).folder
    mixed = len({pair.rank for pair in read_facts(folder).pairs}) > 1
    wrong = {found.reader for found in check(folder) for f in found.findings if f.severity == "scale"}
    assert wrong == ({"tensorrt-llm"} if mixed else set())
