"""Modules left out on the way from PEFT to PEFT: PEFT loads all that stays, and nothing in place of what went."""

import copy
import re
from pathlib import Path

import pytest
import torch
from adapter_cases import PREFIX, plain_config, write_folder
from peft_models import Menagerie, layers, outputs, read_config, reload

import lora_squeeze
from lora_squeeze.conversion import convert
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.readers import check


@pytest.mark.parametrize(
    ("name", "exclude"),
    [
        ("linear", r".*\.v_proj"),
        ("lora bias", r".*\.v_proj"),
        ("bias lora_only", r".*\.[kv]_proj"),
        ("bias all", r".*layers\.0\.self_attn\.q_proj"),
        ("embedding and head", r".*embed_tokens"),
        ("attention module with biases", r"attention(\.out_proj)?"),
        ("experts", r".*layers\.0\.mlp\.experts\.gate_up_proj"),
        ("transposed experts", r".*experts\.down_proj"),
        ("experts by bare names", r".*layers\.1\.mlp\.experts\..*"),
        ("experts beside an expression", r".*experts\.down_proj"),
        ("router and experts", r".*(gate\.weight|layers\.1\.mlp\.experts\.down_proj)"),
        ("handmade experts", r"proj"),
    ],
)
def test_all_that_stays_is_loaded_and_nothing_else(
    menagerie: Menagerie, tmp_path: Path, name: str, exclude: str
) -> None:
    source = menagerie.source(name)
    convert(source.adapter, "peft", exclude=exclude).save(tmp_path / "out")
    found, expected = reload(source.case, tmp_path / "out"), copy.deepcopy(source.model)
    with torch.no_grad():
        for layer, module in layers(expected).items():
            if re.fullmatch(exclude, layer):
                factors = module.lora_B if "default" in module.lora_B else module.lora_embedding_B
                for factor in (
                    [factors["default"]] if isinstance(factors, torch.nn.ParameterDict) else factors.parameters()
                ):
                    factor.zero_()
    kept = {layer for layer in layers(source.model) if not re.fullmatch(exclude, layer)}
    assert layers(found).keys() == kept
    torch.testing.assert_close(outputs(found, source.case), outputs(expected, source.case), rtol=1e-4, atol=1e-5)
    assert lora_squeeze.load(tmp_path / "out").modules.keys() == kept
    assert check(tmp_path / "out", "peft")[0].findings == ()


def test_without_its_parameters_an_adapter_asks_for_none(menagerie: Menagerie, tmp_path: Path) -> None:
    convert(menagerie.source("experts").adapter, "peft", exclude=r".*experts.*").save(tmp_path / "out")
    config = read_config(tmp_path / "out")
    assert not config["target_parameters"] and not config.get("exclude_modules")


@pytest.mark.parametrize(
    ("exclude", "other"), [("attention", "attention.out_proj"), ("attention.out_proj", "attention")]
)
def test_an_attention_module_goes_as_a_whole(menagerie: Menagerie, exclude: str, other: str) -> None:
    adapter = menagerie.source("attention module").adapter
    with pytest.raises(LoraSqueezeError, match=f"{re.escape(exclude)} goes and {re.escape(other)} stays.*exclude both"):
        convert(adapter, "peft", exclude=re.escape(exclude))


def test_parameters_that_the_file_does_not_name_go_together(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}{path}.lora_{side}.weight": torch.ones(shape)
        for path in ("q_proj", "experts.base_layer", "experts")
        for side, shape in (("A", (4, 8)), ("B", (8, 4)))
    }
    config = plain_config(r=2, target_modules=["q_proj"], target_parameters=["experts.one", "experts.two"])
    adapter = lora_squeeze.load(write_folder(tmp_path / "source", tensors, config))
    assert {"experts", "experts.base_layer"} < adapter.modules.keys()
    with pytest.raises(LoraSqueezeError, match="does not say which parameter of experts"):
        convert(adapter, "peft", exclude="experts")
    convert(adapter, "peft", exclude=r"experts.*").save(tmp_path / "bare")
    assert not read_config(tmp_path / "bare")["target_parameters"]
    convert(adapter, "peft", exclude="q_proj").save(tmp_path / "experts")
    assert check(tmp_path / "experts", "peft")[0].findings == ()
