"""Adapters of other formats as files of diffusers: the same updates under a pipeline's names."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import dense, plain_config, plain_tensors, write_folder
from diffusers_cases import (
    FLUX,
    METADATA,
    MIXED,
    flux,
    loaded,
    pair,
    read_diffusers,
    stable_diffusion,
    unload,
    write_diffusers,
)
from kohya_cases import kohya_tensors, write_kohya
from peft import LoraConfig, get_peft_model
from torch import nn

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import diffusers, kohya, peft
from lora_squeeze.formats.to_diffusers import adopt


def peft_folder(folder: Path, model: nn.Module, **settings: Any) -> Path:
    """What PEFT saves of a model of a pipeline; the model stays as it was."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(init_lora_weights=False, **settings))
    wrapped.save_pretrained(folder)
    wrapped.unload()
    if hasattr(model, "peft_config"):
        unload(model)
    return folder


def renamed(adapter: Adapter, prefix: str) -> Adapter:
    """The facts of an adapter with something in front of its names, as far as `adopt` asks."""
    return replace(adapter, modules={prefix + n: replace(m, name=prefix + n) for n, m in adapter.modules.items()})


@pytest.mark.parametrize("component", ["unet", "transformer", "text_encoder"])
def test_a_peft_folder_of_one_model_becomes_a_file_that_its_pipeline_reads_as_the_same_updates(
    tmp_path: Path, component: str
) -> None:
    pipeline = flux() if component == "transformer" else stable_diffusion()
    settings = FLUX["transformer"] | {"lora_bias": False} if component == "transformer" else MIXED[component]
    adapter = peft.load(peft_folder(tmp_path / "peft", getattr(pipeline, component), **settings))
    adopted = adopt(adapter)
    assert adopted.format.name == "diffusers" and adopted.history == adapter.history
    assert adopted.default_scale == 1, "what a squeeze of it multiplies into the factors"
    adopted.save(tmp_path / "out.safetensors")
    found = loaded(tmp_path / "out.safetensors")
    clip = "text_model." if component == "text_encoder" else ""
    assert found.keys() == adopted.modules.keys() == {f"{component}.{clip}{name}" for name in adapter.modules}
    for name in adapter.modules:
        wanted = dense(adapter, name)
        torch.testing.assert_close(found[f"{component}.{clip}{name}"], wanted, rtol=1e-5, atol=1e-6)
    adopted.squeeze(rank=1).save(tmp_path / "squeezed.safetensors")
    assert METADATA not in read_diffusers(tmp_path / "squeezed.safetensors")[1]
    again = diffusers.load(tmp_path / "squeezed.safetensors")
    assert {m.rank for m in again.modules.values()} == {1} and again.modules.keys() == adopted.modules.keys()


def test_biases_of_b_come_along_with_the_scale_that_readers_multiply_them_with(tmp_path: Path) -> None:
    tensors = plain_tensors() | {"base_model.model.layers.0.q_proj.lora_B.bias": torch.randn(24)}
    adapter = peft.load(write_folder(tmp_path / "peft", tensors, plain_config(lora_bias=True)))
    for made in (adopt(adapter, "transformer"), adopt(adapter, "transformer").squeeze(rank=2)):
        made.save(tmp_path / "out.safetensors", force=True)
        after, _ = read_diffusers(tmp_path / "out.safetensors")
        scale = adapter.modules["layers.0.q_proj"].scale
        wanted = scale * tensors["base_model.model.layers.0.q_proj.lora_B.bias"]
        torch.testing.assert_close(after["transformer.layers.0.q_proj.lora_B.bias"], wanted)
        assert made.modules["transformer.layers.0.q_proj"].floor == 1


def test_names_with_components_stay_and_a_diffusers_adapter_is_returned_as_it_is(tmp_path: Path) -> None:
    neutral = kohya.load(write_kohya(tmp_path / "x.safetensors", kohya_tensors()))
    neutral = renamed(neutral, "unet.")
    adopted = adopt(neutral)
    assert adopted.modules.keys() == neutral.modules.keys() == adopt(neutral, "unet").modules.keys()
    own = diffusers.load(write_diffusers(tmp_path / "own.safetensors", pair("unet.to_q")))
    assert adopt(own) is own


def test_convolutions_of_other_formats_keep_their_shape(tmp_path: Path) -> None:
    tensors = kohya_tensors()
    parent = kohya.load(write_kohya(tmp_path / "x.safetensors", tensors))
    adopt(parent, "unet").save(tmp_path / "out.safetensors")
    after, _ = read_diffusers(tmp_path / "out.safetensors")
    for name in parent.modules:
        for side, end in (("A", "lora_down"), ("B", "lora_up")):
            assert after[f"unet.{name}.lora_{side}.weight"].shape == tensors[f"{name}.{end}.weight"].shape


def test_a_component_is_asked_for_where_nothing_tells_it(tmp_path: Path) -> None:
    adapter = peft.load(write_folder(tmp_path / "peft"))
    with pytest.raises(LoraSqueezeError, match=r"layers.0.down_proj|layers.0.q_proj: the name does not say which comp"):
        adopt(adapter)
    for name in ("CLIPTextModelWithProjection", "T5EncoderModel", "LlamaForCausalLM"):  # other places by pipeline
        noted = {"auto_mapping": {"base_model_class": name, "parent_library": "transformers.models.x"}}
        with pytest.raises(LoraSqueezeError, match=r"name it with component= \(--component\), such as unet"):
            adopt(replace(adapter, config={**adapter.config, **noted}))
    assert all(name.startswith("text_encoder_2.") for name in adopt(adapter, "text_encoder_2").modules)


def test_a_language_model_with_a_transformer_in_its_names_is_no_pipeline(tmp_path: Path) -> None:
    adapter = renamed(peft.load(write_folder(tmp_path / "peft")), "transformer.h.0.")
    with pytest.raises(LoraSqueezeError, match="the name does not say which component"):
        adopt(adapter)


def test_what_has_no_place_is_refused_with_the_way_out(tmp_path: Path) -> None:
    adapter = peft.load(write_folder(tmp_path / "peft"))
    with pytest.raises(LoraSqueezeError, match="unknown component 'vae': choose one of unet, transformer"):
        adopt(adapter, "vae")
    with pytest.raises(LoraSqueezeError, match="this module is of the component unet, asked for was transformer"):
        adopt(renamed(adapter, "unet."), "transformer")
    name = "layers.0.q_proj"
    for kind in ("embedding", "experts"):
        other: Any = kind
        changed = {**adapter.modules, name: replace(adapter.modules[name], kind=other)}
        with pytest.raises(LoraSqueezeError, match=rf"{name}: {kind} has no place .*exclude= \(--exclude\)"):
            adopt(replace(adapter, modules=changed), "unet")
    carried = peft.load(
        write_folder(tmp_path / "head", plain_tensors() | {"base_model.model.head.weight": torch.ones(2, 2)})
    )
    with pytest.raises(LoraSqueezeError, match=r"head.weight: diffusers has no place .*extras=False"):
        adopt(carried, "unet")
