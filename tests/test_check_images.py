"""What `check` says of readers of image adapters: compared with diffusers itself, and with the rules of others."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import check_cases as cases
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from kohya_cases import SHAPES, comfyui, kohya_tensors, sd_scripts, write_kohya
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import lora_squeeze
from lora_squeeze.conversion import convert
from lora_squeeze.readers import check
from lora_squeeze.readers.images import comfy_scales, diffusers_scales
from lora_squeeze.readers.read import read_facts

RANK = 4
SETTINGS: dict[str, Any] = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=8, attention_head_dim=4,
)  # fmt: skip
TEXT: dict[str, Any] = dict(
    vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
    max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**SETTINGS)


def text_encoder() -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(**TEXT))


@cache
def shapes() -> dict[str, tuple[int, ...]]:
    """Some layers of both models under the names of diffusers: attention, feed-forward and a convolution."""
    found = {
        f"unet.{name}": tuple(module.weight.shape)
        for name, module in unet().named_modules()
        if (isinstance(module, nn.Linear) and "down_blocks.1.attentions.0" in name)
        or name.endswith("0.resnets.0.conv1")
    }
    return found | {
        f"text_encoder.{name}": tuple(module.weight.shape)
        for name, module in text_encoder().named_modules()
        if isinstance(module, nn.Linear)
    }


def kohya_name(name: str) -> str:
    component, _, path = name.partition(".")
    prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
    return prefix + path.removeprefix("text_model.").replace(".", "_")


def factors(shape: tuple[int, ...], rank: int) -> tuple[Tensor, Tensor]:
    return torch.ones(rank, *shape[1:]), torch.ones(shape[0], rank, *(1 for _ in shape[2:]))


def kohya_file(path: Path, alphas: list[float | None], ranks: list[int]) -> Path:
    """A file of kohya whose modules have these alphas and ranks by turns."""
    tensors: dict[str, Tensor] = {}
    for i, (name, shape) in enumerate(shapes().items()):
        key, rank, alpha = kohya_name(name), ranks[i % len(ranks)], alphas[i % len(alphas)]
        tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"] = factors(shape, rank)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(float(alpha))
    return write_kohya(path, tensors)


def diffusers_file(path: Path, settings: Mapping[str, Any] | None = None, **changes: Tensor | None) -> Path:
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes().items():
        if name.startswith("unet"):
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = factors(shape, RANK)
    tensors = cases.changed(tensors, lambda _: changes)
    return write_kohya(path, tensors, {} if settings is None else {cases.HEADER: json.dumps(settings)})


def loaded(path: Path) -> dict[str, float]:
    """The scales of the layers of a pipeline that has loaded the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline(
            vae=None, text_encoder=text_encoder(), tokenizer=None, unet=unet(), scheduler=None, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        pipe.load_lora_weights(str(path), adapter_name="x")
    return {
        f"{component}.{name}": module.scaling["x"]
        for component in ("unet", "text_encoder")
        for name, module in getattr(pipe, component).named_modules()
        if isinstance(module, LoraLayer)
    }


@pytest.mark.parametrize(("alphas", "ranks"), [
    ([2.0], [4]), ([4.0], [2, 3, 4]), ([None], [4]), ([None], [2, 3, 4]), ([1.0, 2.0, 4.0], [4]),
    ([3.0, 2.0], [2, 3, 4]), ([2.0, 3.0, 4.0], [2, 3, 4]), ([2.0, None], [4]), ([0.0], [4]), ([0.0, 4.0, 4.0], [4]),
], ids=str)  # fmt: skip
def test_the_scales_of_a_kohya_file_are_those_of_diffusers(
    alphas: list[float | None], ranks: list[int], tmp_path: Path
) -> None:
    file = kohya_file(tmp_path / "a.safetensors", alphas, ranks)
    facts, taken = read_facts(file), loaded(file)
    assert taken.keys() == shapes().keys()
    assert diffusers_scales(facts) == pytest.approx({kohya_name(name): scale for name, scale in taken.items()})
    meant = {pair.name: pair.scale for pair in facts.pairs}
    wrong = {kohya_name(name) for name, scale in taken.items() if scale != pytest.approx(meant[kohya_name(name)])}
    found = {f.rule: f for f in check(file, "diffusers")[0].findings}
    assert set(found["diffusers-scale"].modules if "diffusers-scale" in found else ()) == wrong


@pytest.mark.parametrize("changes", [
    {}, {"use_rslora": True}, {"rank_pattern": {"0.resnets.0.conv1": 4}, "alpha_pattern": {"ff.net.2": 1}},
], ids=str)  # fmt: skip
def test_the_meant_scales_of_a_file_with_settings_are_those_of_diffusers(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    names = [name.removeprefix("unet.") for name in shapes() if name.startswith("unet")]
    settings = {"r": RANK, "lora_alpha": 8, "target_modules": names} | changes
    file = diffusers_file(tmp_path / "a.safetensors", {f"unet.{key}": value for key, value in settings.items()})
    assert {pair.name: pair.scale for pair in read_facts(file).pairs} == pytest.approx(loaded(file))
    assert check(file, "diffusers")[0].read_as_meant


TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
UNET_SETTINGS = {"unet.r": RANK, "unet.lora_alpha": 8, "unet.target_modules": ["to_q"]}


@pytest.mark.parametrize(("settings", "changes"), [
    ({"text_encoder.r": 4}, {}),
    (UNET_SETTINGS | {"unet.something": 1}, {}),
    (UNET_SETTINGS | {"unet.r": 8}, {}),
    (None, {f"{TO_Q}.alpha": torch.tensor(2.0)}),
    (None, {f"{TO_Q}.scalar": torch.tensor(2.0)}),
], ids=["component", "field", "rank", "alpha", "key"])  # fmt: skip
def test_what_stops_diffusers_is_refused(
    settings: dict[str, Any] | None, changes: dict[str, Tensor], tmp_path: Path
) -> None:
    file = diffusers_file(tmp_path / "a.safetensors", settings, **changes)
    with pytest.raises((KeyError, TypeError, RuntimeError, ValueError)):
        loaded(file)
    assert check(file, "diffusers")[0].answer == "no"


@pytest.mark.parametrize(("change", "answer"), [
    ({"lora_up.weight": None}, "no"), ({"lora_down.weight": None}, "no"), ({"diff_b": torch.ones(16)}, "no"),
    ({"lora_mid.weight": torch.ones(4, 4, 1, 1)}, "no"), ({"dora_scale": torch.ones(1, 16)}, "in part"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else value)  # fmt: skip
def test_what_diffusers_does_with_other_tensors_of_kohya(
    change: dict[str, Tensor | None], answer: str, tmp_path: Path
) -> None:
    file = kohya_file(tmp_path / "a.safetensors", [4.0], [4])
    key = kohya_name(TO_Q)
    tensors = cases.changed(load_file(file), lambda _: {f"{key}.{name}": t for name, t in change.items()})
    file = write_kohya(tmp_path / "b.safetensors", tensors)
    assert check(file, "diffusers")[0].answer == answer
    if answer == "no":
        with pytest.raises((KeyError, ValueError)):
            loaded(file)
    else:
        assert loaded(file).keys() == shapes().keys()


def test_one_name_of_no_component_keeps_diffusers_from_all_others(tmp_path: Path) -> None:
    tensors = load_file(kohya_file(tmp_path / "a.safetensors", [4.0], [4]))
    tensors |= {"x.lora_down.weight": torch.ones(2, 2), "x.lora_up.weight": torch.ones(2, 2)}
    file = write_kohya(tmp_path / "b.safetensors", tensors)
    (found,) = (f for f in check(file, "diffusers")[0].findings if f.rule == "diffusers-names")
    assert loaded(file) == {} and {kohya_name(name) for name in shapes()} < set(found.modules)


def test_an_orphan_of_diffusers_is_left_at_its_start(tmp_path: Path) -> None:
    file = diffusers_file(tmp_path / "a.safetensors", None, **{f"{TO_Q}.lora_B.weight": None})
    assert check(file, "diffusers")[0].answer == "in part" and TO_Q in loaded(file)


def test_after_the_conversion_that_is_the_cure_diffusers_reads_it_as_meant(tmp_path: Path) -> None:
    file = kohya_file(tmp_path / "a.safetensors", [3.0, 2.0], [2, 3, 4])
    (found,) = check(file, "diffusers")[0].findings
    assert found.cure == f"lora-squeeze convert {file} -o OUT --to diffusers"
    output = tmp_path / "b.safetensors"
    convert(lora_squeeze.load(file), "diffusers").save(output)
    assert check(output, "diffusers")[0].read_as_meant
    told = {
        pair.name.replace(".text_model", ""): pair.scale for pair in read_facts(output).pairs
    }  # as in transformers 5
    assert told == pytest.approx(loaded(output)) and told.keys() == shapes().keys()


# --- ComfyUI and sd-scripts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [3.0, 0.0, None, {name: i / 2 for i, name in enumerate(SHAPES)}], ids=str)
def test_the_scales_of_comfyui_and_sd_scripts_are_those_of_their_rules(
    alpha: float | dict[str, float] | None, tmp_path: Path
) -> None:
    tensors = kohya_tensors(ranks={name: 3 + i for i, name in enumerate(SHAPES)}, alpha=alpha)
    file = write_kohya(tmp_path / "a.safetensors", tensors)
    facts = read_facts(file)
    taken = comfy_scales(facts)
    for pair in facts.pairs:
        A, B = (tensors[f"{pair.name}.lora_{side}.weight"].double().flatten(1) for side in ("down", "up"))
        torch.testing.assert_close(taken[pair.name] * (B @ A), comfyui(tensors, pair.name))
        torch.testing.assert_close(pair.scale * (B @ A), sd_scripts(tensors, pair.name))
    zero = [pair.name for pair in facts.pairs if pair.alpha == 0]
    found = {f.rule: f for f in check(file, "comfyui")[0].findings}
    assert sorted(found["comfyui-scale"].modules if zero else ()) == sorted(zero)
    assert check(file, "sd-scripts")[0].read_as_meant


def test_comfyui_does_not_read_the_header_of_diffusers(tmp_path: Path) -> None:
    file = cases.diffusers(settings=cases.unet_settings())(tmp_path)
    found = check(file, "comfyui")[0]
    assert found.answer == "other scale: x 0.5"  # 1 for alpha / r = 8 / 4
    assert check(cases.diffusers(settings=cases.unet_settings(lora_alpha=4))(tmp_path), "comfyui")[0].read_as_meant
