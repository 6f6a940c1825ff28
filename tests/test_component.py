"""From a pipeline's file, or a file of one model, to an adapter of one model: names as that model has them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import dense
from peft_models import Case, layers, reload
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import lora_squeeze
from lora_squeeze.conversion import convert
from lora_squeeze.errors import LoraSqueezeError

CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


def clip(build: Callable[[CLIPTextConfig], nn.Module]) -> Case:
    sizes: dict[str, Any] = dict(vocab_size=20, hidden_size=8, intermediate_size=12, projection_dim=8)
    config = CLIPTextConfig(**sizes, num_hidden_layers=1, num_attention_heads=2, bos_token_id=1, eos_token_id=2)
    return Case(lambda: build(config), {}, lambda: torch.zeros(1))


def write(path: Path, *names: str, settings: dict[str, Any] | None = None, **others: Tensor) -> Path:
    """A diffusers file with these modules, 8 x 8."""
    pairs = {
        f"{name}.lora_{side}.weight": torch.randn(shape)
        for name in names
        for side, shape in (("A", (2, 8)), ("B", (8, 2)))
    }
    header = {} if settings is None else {"lora_adapter_metadata": json.dumps(settings)}
    save_file({**pairs, **others}, path, header)
    return path


@pytest.mark.parametrize("names", [["transformer_blocks.0.attn.to_q"], ["transformer_blocks.0.attn.to_q", "proj_out"]])
@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_a_file_of_one_model_keeps_its_names(tmp_path: Path, names: list[str], to: str) -> None:
    source = lora_squeeze.load(write(tmp_path / "a.safetensors", *names, settings={"r": 2, "lora_alpha": 6}))
    convert(source, to).save(tmp_path / "out")
    found = lora_squeeze.load(tmp_path / "out")
    assert found.modules.keys() == set(names)
    for name in names:
        torch.testing.assert_close(dense(found, name), dense(source, name))
    with pytest.raises(LoraSqueezeError, match="of one model and its names begin with no component: leave component="):
        convert(source, to, component="transformer_blocks")


def test_the_bias_of_a_b_stays_with_its_module(tmp_path: Path) -> None:
    biases = {f"{name}.lora_B.bias": torch.randn(8) for name in ("unet.to_q", "transformer.to_k")}
    path = write(tmp_path / "a.safetensors", "unet.to_q", "transformer.to_k", **biases)
    convert(lora_squeeze.load(path), "peft", component="unet").save(tmp_path / "out")
    found = lora_squeeze.load(tmp_path / "out")
    assert [extra.module for extra in found.extras.values()] == ["to_q"]
    torch.testing.assert_close(found.extra(next(iter(found.extras))), biases["unet.to_q.lora_B.bias"])


@pytest.mark.parametrize("to", ["peft", "mlx"])
def test_a_tensor_of_no_known_module_is_refused(tmp_path: Path, to: str) -> None:
    name = "lora_unet_double_blocks_0_img_attn_proj"
    factors = {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    save_file({**factors, f"{name}.diff_b": torch.randn(8)}, tmp_path / "a.safetensors")
    source = lora_squeeze.load(tmp_path / "a.safetensors")
    with pytest.raises(LoraSqueezeError, match=r"diff_b: of which module this tensor is.*--without-extras"):
        convert(source, to)
    assert not convert(source, to, extras=False).extras


@pytest.mark.parametrize(
    ("build", "component", "others"),
    [
        (CLIPTextModel, "text_encoder", ["unet.to_q"]),
        (CLIPTextModel, "text_encoder", ["unet.to_q", f"text_encoder_2.{CLIP}"]),
        (CLIPTextModel, "text_encoder", ["transformer.to_q"]),
        (CLIPTextModelWithProjection, "text_encoder_2", ["unet.to_q", f"text_encoder.{CLIP}"]),
        (CLIPTextModelWithProjection, "text_encoder", ["transformer.to_q", f"text_encoder_2.{CLIP}"]),
        (CLIPTextModelWithProjection, "text_encoder", ["text_encoder.text_projection"]),
    ],
    ids=["sd1", "sdxl", "flux", "sdxl's second", "sd3", "a projection"],
)
def test_peft_loads_a_text_encoder(
    tmp_path: Path, build: Callable[[CLIPTextConfig], nn.Module], component: str, others: list[str]
) -> None:
    source = lora_squeeze.load(write(tmp_path / "a.safetensors", f"{component}.{CLIP}", *others))
    result = convert(source, "peft", component=component)
    result.save(tmp_path / "out")
    name = CLIP.removeprefix("text_model.") if build is CLIPTextModel else CLIP
    dW = layers(reload(clip(build), tmp_path / "out"))[name].get_delta_weight("default")
    torch.testing.assert_close(dW, dense(source, f"{component}.{CLIP}"))
    assert any("without text_model" in note for note in result.notes) == (build is CLIPTextModel)
    back = convert(lora_squeeze.load(tmp_path / "out"), "diffusers", component=component)
    assert f"{component}.{CLIP}" in back.modules


@pytest.mark.parametrize("inside", ["", "text_encoder"], ids=["its folder", "its pipeline"])
@pytest.mark.parametrize("build", [CLIPTextModel, CLIPTextModelWithProjection])
def test_the_configuration_of_a_text_encoder_says_its_class(
    tmp_path: Path, build: Callable[[CLIPTextConfig], nn.Module], inside: str
) -> None:
    base = tmp_path / "base" / inside
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps({"architectures": [build.__name__]}))
    source = lora_squeeze.load(write(tmp_path / "a.safetensors", f"text_encoder.{CLIP}"))
    result = convert(source, "peft", base=tmp_path / "base")
    assert [name.startswith("text_model.") for name in result.modules] == [build is CLIPTextModelWithProjection]
    assert not any("without text_model" in note for note in result.notes)
