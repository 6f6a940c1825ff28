"""Conversions of what no base model is needed for: names, pipelines, pairs, sources."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from adapter_cases import WEIGHTS, dense, plain_tensors, write_folder
from conversion_cases import IMAGE, assert_same, base_model, updates, write_image_adapter
from folder_cases import tree
from peft_cases import CASES
from peft_models import adapted, randomise, reload, save, seeded

import lora_squeeze
from lora_squeeze.conversion import convert
from lora_squeeze.errors import LoraSqueezeError


def test_fused_experts_become_gate_and_up_with_the_same_a(tmp_path: Path) -> None:
    case = CASES["experts"]
    model = adapted(case)
    folder = save(model, tmp_path / "experts")
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    source = lora_squeeze.load(folder)
    convert(source, "gguf", base=tmp_path / "base").save(tmp_path / "a.gguf")
    found = lora_squeeze.load(tmp_path / "a.gguf")
    for name, module in source.modules.items():
        if module.kind == "experts":
            block, last = name.split(".")[2], name.rpartition(".")[2]
            parts = ("ffn_gate_exps", "ffn_up_exps") if last == "gate_up_proj" else ("ffn_down_exps",)
            joined = torch.cat([dense(found, f"blk.{block}.{part}") for part in parts], 1)
            torch.testing.assert_close(joined, dense(source, name), rtol=1e-6, atol=1e-8)
    for to in ("mlx", "peft"):
        with pytest.raises(LoraSqueezeError, match="experts"):
            convert(found if to == "peft" else source, to, base=tmp_path / "base")


def test_without_its_extras_a_peft_adapter_asks_for_none(tmp_path: Path) -> None:
    for name in ("modules to save", "lora bias", "trained tokens"):
        adapter = lora_squeeze.load(save(adapted(CASES[name]), tmp_path / name))
        convert(adapter, "peft", extras=False).save(tmp_path / f"bare {name}")
        found = lora_squeeze.load(tmp_path / f"bare {name}")
        assert not found.extras and not found.config["modules_to_save"] and not found.config["lora_bias"]
        assert not found.config["trainable_token_indices"]
        reload(CASES[name], tmp_path / f"bare {name}")


def test_no_source_of_a_difference_is_written_over(tmp_path: Path) -> None:
    write_folder(tmp_path / "trained", {key: 2 * tensor for key, tensor in plain_tensors().items()})
    write_folder(tmp_path / "initial")
    difference = lora_squeeze.subtract(*(lora_squeeze.load(tmp_path / name) for name in ("trained", "initial")))
    for found, path in (
        (convert(difference, "mlx", rank=2), tmp_path / "initial"),
        (convert(difference, "diffusers", component="unet", rank=2), tmp_path / "initial" / WEIGHTS),
    ):
        before = tree(tmp_path)
        with pytest.raises(LoraSqueezeError, match="that the adapter is read from"):
            found.save(path, force=True)
        assert tree(tmp_path) == before


def test_files_of_pipelines_go_to_each_other_and_to_one_model(tmp_path: Path) -> None:
    source = lora_squeeze.load(write_image_adapter(tmp_path / "style.safetensors"))
    expected = {name: dense(source, name) for name in IMAGE}
    convert(source, "diffusers").save(tmp_path / "pipeline.safetensors")
    pipeline = lora_squeeze.load(tmp_path / "pipeline.safetensors")
    assert pipeline.format.name == "diffusers"
    names = [
        "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
        "unet.mid_block.attentions.0.proj_in",
        "text_encoder.text_model.encoder.layers.3.self_attn.q_proj",
    ]
    assert_same(updates(pipeline), dict(zip(names, expected.values(), strict=True)))
    convert(pipeline, "kohya", architecture="sd1").save(tmp_path / "back.safetensors")
    assert_same(updates(lora_squeeze.load(tmp_path / "back.safetensors")), expected)
    for start in (source, pipeline):
        for to in ("peft", "mlx"):
            with pytest.raises(
                LoraSqueezeError,
                match=r"modules of (unet, text_encoder|text_encoder, unet), .*choose one with component=",
            ):
                convert(start, to)
        convert(start, "peft", component="unet").save(tmp_path / start.format.name)
        found = lora_squeeze.load(tmp_path / start.format.name)
        assert_same(
            updates(found),
            {name.removeprefix("unet."): dW for name, dW in zip(names[:2], expected.values(), strict=False)},
        )
        assert found.modules["mid_block.attentions.0.proj_in"].kernel == (1, 1)


def test_a_folder_inside_is_that_of_the_trained_adapter_of_a_pair(tmp_path: Path) -> None:
    from lora_squeeze.sources import open_source

    for seed, name in enumerate(("multi", "multi/style", "initial")):
        model = peft.get_peft_model(seeded(base_model), peft.LoraConfig(r=3, target_modules=["q_proj"]))
        randomise(model, 0.1 * (seed + 1))
        save(model, tmp_path / name)
    trained, initial = (updates(lora_squeeze.load(tmp_path / name)) for name in ("multi/style", "initial"))
    pair = open_source(tmp_path / "multi", initial=tmp_path / "initial", subfolder="style")
    assert_same(updates(pair), {name: dW - initial[name] for name, dW in trained.items()})
    with pytest.raises(LoraSqueezeError, match=r"nowhere: no adapter_config\.json"):
        open_source(tmp_path / "multi", initial=tmp_path / "initial", subfolder="nowhere")


def test_energy_is_of_the_whole_difference_where_layers_are_joined_and_split(tmp_path: Path) -> None:
    """Flux has q, k and v as one layer in kohya's names."""
    wide = {"transformer.transformer_blocks.0.attn." + name: (3072, 3072) for name in ("to_q", "to_k", "to_v")}
    tensors = {}
    for i, (name, (out, columns)) in enumerate(wide.items()):
        generator = torch.Generator().manual_seed(i)
        tensors[f"{name}.lora_A.weight"] = torch.randn(1, columns, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(out, 1, generator=generator)
    safetensors.torch.save_file(tensors, tmp_path / "parts.safetensors")
    adapter = lora_squeeze.load(tmp_path / "parts.safetensors")
    known = {name: 4 * float(dW.square().sum()) for name, dW in updates(adapter).items()}
    parts = {name: replace(module, total=known[name]) for name, module in adapter.modules.items()}
    joined = convert(replace(adapter, modules=parts), "kohya", architecture="flux")
    assert len(joined.modules) == 1 and joined.report.energy == pytest.approx(0.25)
