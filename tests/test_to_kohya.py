"""To kohya files: names as sd-scripts has them, layers joined exactly, and the same dW in every reader."""

from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import dense
from kohya_cases import comfyui, read_kohya
from kohya_names_cases import (
    Shape,
    flux_pipeline,
    in_memory,
    kohya_file,
    layers,
    load,
    loaded_by_diffusers,
    models,
    random_update,
    sd_pipeline,
    without_text_model,
    xl_pipeline,
)
from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Format, Source
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import kohya
from lora_squeeze.formats.kohya_names import neutral
from lora_squeeze.formats.to_kohya import adopt
from lora_squeeze.lowrank import LowRank

WIDTH = 4
IMAGE = "transformer.transformer_blocks.0.attn"
SINGLE = "transformer.single_transformer_blocks.3"
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_3_linear1"
PARTS = {f"{SINGLE}.attn.to_q": 1, f"{SINGLE}.attn.to_k": 1, f"{SINGLE}.attn.to_v": 1, f"{SINGLE}.proj_mlp": 4}
TEXT = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
T5 = "text_encoder_3.encoder.block.1.layer.1.DenseReluDense.wo"
UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


def parts_of_linear1(ranks: list[int], scales: list[float], dtype: torch.dtype = torch.float32) -> dict[str, LowRank]:
    return {
        name: random_update((rows * WIDTH, WIDTH), rank, scale, dtype)
        for (name, rows), rank, scale in zip(PARTS.items(), ranks, scales, strict=True)
    }


def saved(adapter: Adapter, path: Path) -> dict[str, Tensor]:
    adapter.save(path)
    return read_kohya(path)[0]


def alphas(tensors: dict[str, Tensor]) -> set[float]:
    return {tensor.item() for key, tensor in tensors.items() if key.endswith(".alpha")}


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


def pipeline_updates(
    pipeline: Any, ranks: list[int], scales: list[float]
) -> tuple[dict[str, LowRank], dict[str, Shape]]:
    """Updates for every layer of a pipeline, ranks and scales in turn, and the kernels of its convolutions."""
    shapes = {f"{c}.{path}": shape for c, model in models(pipeline).items() for path, shape in layers(model).items()}
    given = {
        name: random_update(shape, ranks[i % len(ranks)], scales[i % len(scales)])
        for i, (name, shape) in enumerate(shapes.items())
    }
    return given, {name: shape[2:] for name, shape in shapes.items() if shape[2:]}


def same_in_diffusers(adapter: Adapter, written: Adapter, path: Path, pipeline: Any) -> None:
    written.save(path)
    theirs = loaded_by_diffusers(pipeline, path)
    assert len(theirs) == len(adapter.modules)
    for name in adapter.modules:
        close(theirs[without_text_model(name)], dense(adapter, name))


def test_a_unet_of_mixed_ranks_and_scales_is_read_by_diffusers_as_meant(tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    given, kernels = pipeline_updates(pipeline, [4, 2, 3], [0.5, 2.0])
    adapter = in_memory(given, kernels)
    written = adopt(adapter, "sd1")
    same_in_diffusers(adapter, written, tmp_path / "whole.safetensors", pipeline)
    assert len(alphas(read_kohya(tmp_path / "whole.safetensors")[0])) == 1
    squeezed = written.squeeze(energy=0.8)
    assert len({module.rank for module in squeezed.modules.values()}) > 1
    squeezed.save(tmp_path / "squeezed.safetensors")
    assert len(alphas(read_kohya(tmp_path / "squeezed.safetensors")[0])) == 1
    again = neutral(kohya.load(tmp_path / "squeezed.safetensors"))
    theirs = loaded_by_diffusers(pipeline, tmp_path / "squeezed.safetensors")
    for name in again.modules:
        close(theirs[without_text_model(name)], dense(again, name))


def test_diffusers_misreads_alphas_that_differ(tmp_path: Path) -> None:
    """Why one alpha is written; can go, with what it is the reason for, when diffusers reads them."""
    pipeline = sd_pipeline()
    names = {f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{x}": (16, 16) for x in "qkv"}
    path = kohya_file(tmp_path / "file.safetensors", names, alphas=(1.0, 1.0, 4.0))
    adapter = neutral(load(path))
    with pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match any targeted module"):
        theirs = loaded_by_diffusers(pipeline, path)
    wrong = [n for n in adapter.modules if not torch.allclose(theirs[n].double(), dense(adapter, n), rtol=1e-3)]
    assert len(wrong) == 1


def test_xl_is_written_under_original_names_and_read_by_diffusers_as_meant(tmp_path: Path) -> None:
    pipeline = xl_pipeline()
    given, kernels = pipeline_updates(pipeline, [2, 3], [1.0])
    # One block of the two and ten of a level stands for all: the rest has the same names but for a number.
    few = {name: each for name, each in given.items() if not any(f"_blocks.{i}." in name[25:] for i in range(1, 10))}
    adapter = in_memory(few, kernels)
    written = adopt(adapter)
    assert all(name.removeprefix("lora_unet_").startswith(("input", "middle", "output", "time", "label", "out"))
               for name in written.modules)  # fmt: skip
    same_in_diffusers(adapter, written, tmp_path / "file.safetensors", pipeline)


def test_blocks_of_flux_are_read_by_diffusers_as_meant_and_the_rest_is_told(tmp_path: Path) -> None:
    pipeline = flux_pipeline()
    given, _ = pipeline_updates(pipeline, [4, 2, 3], [0.5, 2.0])
    # diffusers takes apart linear1 of the released width only.
    given = {n: u for n, u in given.items() if "proj_mlp" not in n and "single_transformer_blocks.0.attn" not in n
             and "single_transformer_blocks.1.attn" not in n}  # fmt: skip
    written = adopt(in_memory(given), "flux")
    written.save(tmp_path / "file.safetensors")
    theirs = loaded_by_diffusers(pipeline, tmp_path / "file.safetensors")
    passed = [name for name in given if without_text_model(name) not in theirs]
    assert all("blocks." not in name and "layers." not in name for name in passed)
    assert any(f"passes over {len(passed)} modules of this file" in note for note in written.notes)
    for name in given.keys() - set(passed):
        close(theirs[without_text_model(name)], given[name].dense())


def test_what_diffusers_passes_over_is_told_of_sd3_as_a_whole_and_not_of_unets() -> None:
    update = random_update((WIDTH, WIDTH), 1)
    joint = "transformer.transformer_blocks.0.attn2.to_out.0"
    assert any("passes over 2 modules" in note for note in adopt(in_memory({joint: update, TEXT: update})).notes)
    assert not adopt(in_memory({UNET: update, TEXT: update}), "sdxl").notes


@pytest.mark.parametrize("scales", [[0.5] * 4, [0.5, 2.0, 1.0, -3.0]], ids=["one scale", "scales"])
def test_joined_layers_have_the_parts_in_their_rows_and_the_sum_of_ranks(tmp_path: Path, scales: list[float]) -> None:
    given = parts_of_linear1([2, 3, 1, 4], scales)
    adapter = adopt(in_memory(given))
    assert {name: module.rank for name, module in adapter.modules.items()} == {LINEAR1: 10}
    tensors = saved(adapter, tmp_path / "file.safetensors")
    whole = torch.cat([scale * (u.B.double() @ u.A.double()) for u, scale in zip(given.values(), scales, strict=True)])
    close(comfyui(tensors, LINEAR1), whole)
    again = neutral(load(tmp_path / "file.safetensors"))
    assert [again.modules[name].rank for name in PARTS] == [2, 3, 1, 4]


def test_the_order_of_the_parts_makes_no_difference() -> None:
    given = parts_of_linear1([2, 3, 1, 4], [0.5] * 4)
    one, other = adopt(in_memory(given)), adopt(in_memory(dict(reversed(given.items()))))
    assert torch.equal(one.update(LINEAR1).A, other.update(LINEAR1).A)
    assert torch.equal(one.update(LINEAR1).B, other.update(LINEAR1).B)


def test_a_missing_part_is_zero_rows(tmp_path: Path) -> None:
    given = {f"{IMAGE}.to_{x}": random_update((WIDTH, WIDTH), 2) for x in "vq"}
    adapter = adopt(in_memory(given), "flux")
    assert {name: (m.rank, m.out_features) for name, m in adapter.modules.items()} == {QKV: (4, 3 * WIDTH)}
    found = comfyui(saved(adapter, tmp_path / "file.safetensors"), QKV)
    zero = torch.zeros(WIDTH, WIDTH)
    close(found, torch.cat([given[f"{IMAGE}.to_q"].dense(), zero, given[f"{IMAGE}.to_v"].dense()]))
    only = adopt(in_memory({PART: random_update((4 * WIDTH, WIDTH), 2) for PART in [f"{SINGLE}.proj_mlp"]}))
    assert torch.equal(dense(only, LINEAR1)[: 3 * WIDTH], torch.zeros(3 * WIDTH, WIDTH, dtype=torch.float64))


def test_rows_of_a_that_parts_share_are_there_once() -> None:
    A, own = torch.randn(3, WIDTH), torch.randn(2, WIDTH)
    factors = {"q": A, "k": A[[2, 0]], "v": torch.cat([own, A[:1], A[:1]])}
    given = {f"{IMAGE}.to_{x}": LowRank(torch.randn(WIDTH, len(each)), each) for x, each in factors.items()}
    adapter = adopt(in_memory(given), "flux")
    assert adapter.modules[QKV].rank == len(A) + len(own) + 1  # the row that v has twice stands there twice
    close(dense(adapter, QKV), torch.cat([update.dense() for update in given.values()]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_taken_apart_and_joined_again_is_the_same_file(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    sizes = [WIDTH] * 3 + [4 * WIDTH]
    B, A = torch.block_diag(*(torch.randn(rows, 2) for rows in sizes)), torch.randn(8, WIDTH)
    B = torch.randn(B.shape) if kind == "dense" else B
    last = "lora_unet_final_layer_adaLN_modulation_1"
    before = {
        f"{LINEAR1}.lora_down.weight": A.to(dtype),
        f"{LINEAR1}.lora_up.weight": B.to(dtype),
        f"{LINEAR1}.alpha": torch.tensor(3.0),
        f"{last}.lora_down.weight": A[:2].to(dtype).clone(),
        f"{last}.lora_up.weight": torch.randn(2 * WIDTH, 2).to(dtype),
        f"{last}.alpha": torch.tensor(2.0),
    }
    adapter = adopt(neutral(load(tmp_path / "before.safetensors", before)))
    after = saved(adapter, tmp_path / "after.safetensors")
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) and after[key].dtype == before[key].dtype for key in before)


def test_one_alpha_rounds_nothing_where_ranks_differ_by_powers_of_two(tmp_path: Path) -> None:
    given = {
        UNET: random_update((8, 8), 8, 0.5, torch.float16),
        UNET.replace("to_q", "to_k"): random_update((8, 8), 2, 0.5, torch.float16),
    }
    tensors = saved(adopt(in_memory(given), "sd1"), tmp_path / "file.safetensors")
    assert alphas(tensors) == {4.0}
    for name, update in given.items():
        key = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        assert torch.equal(comfyui(tensors, key), update.scale * (update.B.double() @ update.A.double()))


def test_one_alpha_that_is_there_stays_with_the_factors_as_they_are(tmp_path: Path) -> None:
    ranks = {"to_q": 49, "to_k": 3, "to_v": 7}
    assert len({1 / rank * rank for rank in ranks.values()}) == 2  # not the same number in floating point
    given = {UNET.replace("to_q", x): random_update((8, 8), rank, 1 / rank) for x, rank in ranks.items()}
    tensors = saved(adopt(in_memory(given), "sd1"), tmp_path / "file.safetensors")
    assert alphas(tensors) == {1.0}
    for name, update in given.items():
        key = "lora_unet_" + name.removeprefix("unet.").replace(".", "_")
        assert torch.equal(tensors[f"{key}.lora_up.weight"], update.B)
        assert torch.equal(tensors[f"{key}.lora_down.weight"], update.A)


def test_the_last_layers_of_a_transformer_have_a_scale_of_one_and_the_others_their_own(tmp_path: Path) -> None:
    given = {
        "transformer.proj_out": random_update((4, 4), 2, 0.25),
        f"{SINGLE}.proj_out": random_update((4, 20), 2, 0.25),
    }
    adapter = adopt(in_memory(given))
    for each, name in ((adapter, "whole"), (adapter.squeeze(rank=1), "squeezed")):
        tensors = saved(each, tmp_path / f"{name}.safetensors")
        rank = each.rank
        assert tensors["lora_unet_final_layer_linear.alpha"].item() == rank
        assert tensors["lora_unet_single_blocks_3_linear2.alpha"].item() == 0.25 * rank
        close(comfyui(tensors, "lora_unet_final_layer_linear"), dense(each, "lora_unet_final_layer_linear"))


def test_shift_and_scale_change_places(tmp_path: Path) -> None:
    update = random_update((2 * WIDTH, WIDTH), 2)
    given = {"transformer.norm_out.linear": update, "transformer.transformer_blocks.23.norm1_context.linear": update}
    adapter = adopt(in_memory(given), "sd3")
    swapped = torch.cat([update.dense()[WIDTH:], update.dense()[:WIDTH]])
    for name in (
        "lora_unet_final_layer_adaLN_modulation_1",
        "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1",
    ):
        close(dense(adapter, name), swapped)
    longer = {"transformer.transformer_blocks.23.norm1_context.linear": random_update((6 * WIDTH, WIDTH), 2)}
    (name,) = longer
    close(dense(adopt(in_memory(longer), "sd3"), "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1"),
          longer[name].dense())  # fmt: skip


@pytest.mark.parametrize(
    ("name", "architecture", "written"),
    [
        (UNET, "sd1", "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"),
        (UNET, "sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        (UNET.removeprefix("unet."), "sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("unet.down_blocks.0.attentions.0.proj_in", None, "lora_unet_down_blocks_0_attentions_0_proj_in"),
        (TEXT, "sd2", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
        (TEXT, "flux", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        (without_text_model(TEXT), "sdxl", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        (TEXT.replace("encoder.", "encoder_2.", 1), None, "lora_te2_text_model_encoder_layers_0_mlp_fc1"),
        (T5, None, "lora_te3_encoder_block_1_layer_1_DenseReluDense_wo"),
    ],
)  # fmt: skip
def test_names_are_those_of_sd_scripts(name: str, architecture: str | None, written: str) -> None:
    adapter = adopt(in_memory({name: random_update((WIDTH, WIDTH), 1)}), architecture)
    assert (
        list(adapter.modules) == [written] and adapter.modules[written].layout.down_key == f"{written}.lora_down.weight"
    )


def test_names_that_do_not_tell_the_architecture_ask_for_it() -> None:
    for name, others in ((UNET, "sd1 and of sdxl"), (TEXT, "sd1 and of sdxl"), (f"{IMAGE}.to_q", "sd3 and of flux")):
        with pytest.raises(
            LoraSqueezeError, match=f"is a layer of {others}, with another meaning; say which .*architecture="
        ):
            adopt(in_memory({name: random_update((WIDTH, WIDTH), 1)}))


def test_names_of_other_models_and_layers_of_other_shapes_are_refused() -> None:
    def one(name: str, shape: Shape) -> Adapter:
        return in_memory({name: random_update(shape, 1)})

    with pytest.raises(
        LoraSqueezeError, match=r"'model.layers.0.mlp.up_proj' is no layer of sd1 or sd2 or sdxl or sd3 or"
    ):
        adopt(one("model.layers.0.mlp.up_proj", (4, 4)))
    with pytest.raises(LoraSqueezeError, match=rf"to_q is 8 x 4; as a part of {QKV} it has to be 4 x 4"):
        adopt(one(f"{IMAGE}.to_q", (8, 4)), "flux")
    with pytest.raises(LoraSqueezeError, match="are two names of one layer; leave one out"):
        both = (TEXT, without_text_model(TEXT))
        adopt(in_memory({name: random_update((4, 4), 1) for name in both}), "sd1")


def test_what_a_kohya_file_does_not_hold_is_refused_by_name() -> None:
    import dataclasses

    plain = in_memory({UNET: random_update((4, 4), 1)})
    extra = Extra("unet.norm.weight", torch.float32, (4,), "module to save", "trained")
    with pytest.raises(LoraSqueezeError, match=r"unet.norm.weight: sd-scripts takes no tensors .*extras=False"):
        adopt(dataclasses.replace(plain, extras={extra.name: extra}), "sd1")
    experts = dataclasses.replace(plain.modules[UNET], kind="experts", copies=2)
    with pytest.raises(LoraSqueezeError, match=r"is an update of kind experts with 2 copies; .*leave the module out"):
        adopt(dataclasses.replace(plain, modules={UNET: experts}), "sd1")


def test_the_header_has_rank_and_alpha_and_not_the_settings_of_diffusers(tmp_path: Path) -> None:
    import dataclasses

    plain = in_memory({UNET: random_update((4, 4), 2, 0.5)})
    metadata = {"lora_adapter_metadata": "{}", "ss_training_comment": "kept"}
    adapter = adopt(dataclasses.replace(plain, metadata=metadata), "sd1")
    adapter.save(tmp_path / "file.safetensors")
    strings = read_kohya(tmp_path / "file.safetensors")[1]
    assert "lora_adapter_metadata" not in strings and strings["ss_training_comment"] == "kept"
    assert (strings["ss_network_dim"], strings["ss_network_alpha"]) == ("2", "1")
    assert kohya.matches(tmp_path / "file.safetensors")


def test_a_convolution_is_written_in_its_shape(tmp_path: Path) -> None:
    update = random_update((8, 4, 3, 3), 2)
    tensors = saved(
        adopt(in_memory({"unet.conv_in": update}, {"unet.conv_in": (3, 3)}), "sd1"), tmp_path / "f.safetensors"
    )
    down, up = (tensors[f"lora_unet_conv_in.lora_{side}.weight"] for side in ("down", "up"))
    assert (down.shape, up.shape) == ((2, 4, 3, 3), (8, 2, 1, 1))
    close(torch.einsum("or,r...->o...", up.flatten(1), down).flatten(1), update.dense())


def test_a_budget_of_bytes_holds_for_the_whole_file(tmp_path: Path) -> None:
    adapter = adopt(in_memory(parts_of_linear1([8, 8, 8, 8], [1.0] * 4, torch.float16)))
    budget = adapter.format.overhead_bytes(adapter) + adapter.lora_bytes // 2
    adapter.squeeze(size=budget).save(tmp_path / "file.safetensors")
    assert (tmp_path / "file.safetensors").stat().st_size <= budget


def test_the_parts_are_what_the_package_asks_of_a_format() -> None:
    adapter = adopt(in_memory({UNET: random_update((4, 4), 2)}), "sd1")
    assert isinstance(adapter.format, Format) and isinstance(adapter.source, Source) and adapter.format.name == "kohya"
    assert adopt(adapter) is adapter
