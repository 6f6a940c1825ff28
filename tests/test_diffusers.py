"""diffusers files: what is read is what diffusers computes, and what is written it reads as meant, in all versions."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import dense, tail
from diffusers_cases import (
    FLUX,
    METADATA,
    MIXED,
    PLAIN,
    TEXT,
    UNET,
    diffusers_file,
    flux,
    loaded,
    output,
    pair,
    read_diffusers,
    stable_diffusion,
    trained,
    write_diffusers,
)
from peft.utils.other import get_pattern_key
from torch import Tensor

from lora_squeeze.adapter import Format, Source
from lora_squeeze.combine import merge, rank_up
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import diffusers

FILES: dict[str, tuple[Mapping[str, Any], bool]] = {
    "plain": (PLAIN, True),
    "mixed": (MIXED, True),
    "Flux with biases": (FLUX, True),
    "without settings": (PLAIN, False),
}
OLD = {  # today's end of a key -> the older ones
    "to_q.lora_A.weight": ("processor.to_q_lora.down.weight", "to_q.lora.down.weight"),
    "to_q.lora_B.weight": ("processor.to_q_lora.up.weight", "to_q.lora.up.weight"),
    "to_v.lora_A.weight": ("processor.to_v_lora.down.weight", "to_v.lora.down.weight"),
    "to_v.lora_B.weight": ("processor.to_v_lora.up.weight", "to_v.lora.up.weight"),
    "to_out.0.lora_A.weight": ("processor.to_out_lora.down.weight", "to_out.0.lora.down.weight"),
    "to_out.0.lora_B.weight": ("processor.to_out_lora.up.weight", "to_out.0.lora.up.weight"),
    "q_proj.lora_A.weight": ("to_q_lora.down.weight", "q_proj.lora_linear_layer.down.weight"),
    "q_proj.lora_B.weight": ("to_q_lora.up.weight", "q_proj.lora_linear_layer.up.weight"),
}


@pytest.fixture(scope="module", params=list(FILES))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings, metadata = FILES[request.param]
    return diffusers_file(tmp_path_factory.mktemp("source"), settings, metadata=metadata)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_file(tmp_path_factory.mktemp("mixed"), MIXED)


def exact(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def unet_pairs(**ranks: int) -> dict[str, Tensor]:
    """Factors of attention layers of the UNet: `to_q`, `to_v` at these ranks."""
    return {k: t for name, rank in ranks.items() for k, t in pair(f"{UNET}.{name}", rank).items()}


def before_settings(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Scale of every module in diffusers 0.22 to 0.33, which take the first rank of a component for all alphas."""
    scales: dict[str, float] = {}
    first: dict[str, int] = {}
    for key, tensor in sorted(tensors.items()):
        if key.endswith(".lora_B.weight"):
            alpha = first.setdefault(key.partition(".")[0], tensor.shape[1])
            scales[key.removesuffix(".lora_B.weight")] = alpha / tensor.shape[1]
    return scales


def test_every_module_is_read_as_diffusers_reads_it(source: Path) -> None:
    adapter = diffusers.load(source)
    wanted = loaded(source)
    assert diffusers.matches(source)
    assert adapter.modules.keys() == wanted.keys()
    for name, update in wanted.items():
        exact(dense(adapter, name), update)
    kinds = {module.kind for module in adapter.modules.values()}
    assert kinds == ({"linear"} if "transformer" in str(list(wanted)[:1]) else {"linear", "conv"})


def test_a_copy_has_the_same_bits_keys_and_settings(tmp_path: Path, source: Path) -> None:
    diffusers.load(source).save(tmp_path / "copy.safetensors")
    (before, strings), (after, copied) = read_diffusers(source), read_diffusers(tmp_path / "copy.safetensors")
    assert after.keys() == before.keys()
    assert all(after[key].dtype == before[key].dtype for key in before)
    assert all(torch.equal(bits(after[key]), bits(before[key])) for key in before)
    assert {key: value for key, value in copied.items() if key != "lora_squeeze"} == strings
    assert [step["step"] for step in diffusers.load(tmp_path / "copy.safetensors").history] == ["copy"]


@pytest.mark.parametrize("alpha", ["keep", "fold"])
def test_a_squeeze_is_the_best_approximation_and_read_by_diffusers_as_such(
    tmp_path: Path, source: Path, alpha: Any
) -> None:
    squeezed = diffusers.load(source).squeeze(energy=0.8, alpha=alpha)
    squeezed.save(tmp_path / "out.safetensors")
    before, after = loaded(source), loaded(tmp_path / "out.safetensors")
    ranks = {name: module.rank for name, module in squeezed.modules.items()}
    assert len(set(ranks.values())) > 1, "otherwise the test says nothing"
    assert after.keys() == before.keys()
    for name, update in after.items():
        exact(update, dense(squeezed, name))
        lost = float((before[name] - update).norm())
        assert lost == pytest.approx(tail(before[name], ranks[name]), rel=1e-3, abs=1e-6)


def test_a_model_computes_the_same_with_all_ranks_kept(tmp_path: Path, source: Path) -> None:
    diffusers.load(source).squeeze(rank=6).save(tmp_path / "out.safetensors")
    before, after = (loaded(path, probe=True)["output"] for path in (source, tmp_path / "out.safetensors"))
    model = flux().transformer if "transformer.proj_out" in diffusers.load(source).modules else stable_diffusion().unet
    assert float((before - output(model)).abs().max()) > 1e-3, "otherwise the test says nothing"
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


def test_what_is_written_is_the_product_of_its_factors_for_readers_of_tensors_alone(
    tmp_path: Path, mixed: Path
) -> None:
    squeezed = diffusers.load(mixed).squeeze(energy=0.8)
    squeezed.save(tmp_path / "out.safetensors")
    after, _ = read_diffusers(tmp_path / "out.safetensors")
    for name in squeezed.modules:
        A, B = (after[f"{name}.lora_{side}.weight"].double().flatten(1) for side in "AB")
        exact(B @ A, dense(squeezed, name))
    bare = write_diffusers(tmp_path / "bare.safetensors", after)
    for name, update in loaded(bare).items():
        exact(update, dense(squeezed, name))


def test_one_rank_is_read_alike_by_versions_that_do_not_know_of_settings(tmp_path: Path, mixed: Path) -> None:
    adapter = diffusers.load(mixed)
    for rank, alike in ((2, True), (4, False)):  # the source has modules of ranks 3 and 2
        out = tmp_path / f"{rank}.safetensors"
        adapter.squeeze(rank=rank).save(out)
        scales = before_settings(read_diffusers(out)[0])
        assert scales.keys() == adapter.modules.keys()
        assert (set(scales.values()) == {1.0}) is alike


def test_settings_are_written_for_mixed_ranks_and_where_there_were_some(tmp_path: Path) -> None:
    adapter = diffusers.load(diffusers_file(tmp_path / "source", PLAIN, metadata=False))
    adapter.squeeze(rank=2).save(tmp_path / "one.safetensors")
    assert METADATA not in read_diffusers(tmp_path / "one.safetensors")[1]
    adapter.squeeze(energy=0.8).save(tmp_path / "mixed.safetensors")
    settings = json.loads(read_diffusers(tmp_path / "mixed.safetensors")[1][METADATA])
    assert {key.partition(".")[0] for key in settings} == {"unet", "text_encoder"}
    told = diffusers.load(diffusers_file(tmp_path / "told", PLAIN))
    told.squeeze(rank=2).save(tmp_path / "told.safetensors")
    settings = json.loads(read_diffusers(tmp_path / "told.safetensors")[1][METADATA])
    assert settings["unet.r"] == settings["unet.lora_alpha"] == 2
    assert settings["unet.peft_type"] == "LORA", "fields that have nothing to do with the scale stay"
    assert None not in settings.values() and "unet.peft_version" not in settings
    asked_for = {f"{component}.{field}" for component in PLAIN for field in ("rank_pattern", "target_modules")}
    assert asked_for <= settings.keys(), "diffusers 0.34 to 0.39 do not load settings without them"


@pytest.mark.parametrize("spelling", [0, 1], ids=["processor", "layer"])
def test_older_spellings_are_read_as_diffusers_reads_them_and_written_in_todays(tmp_path: Path, spelling: int) -> None:
    tensors = unet_pairs(to_q=4, to_v=4) | pair(f"{UNET}.to_out.0") | pair(f"{TEXT}.q_proj")
    if spelling == 0:  # diffusers tells the oldest spelling of a text encoder by this layer
        tensors |= pair(f"{TEXT}.out_proj")
    old = {}
    for key, tensor in tensors.items():
        end = next((end for end in OLD if key.endswith(f".{end}")), None)
        name = key.removesuffix(end) + OLD[end][spelling] if end else key.replace("out_proj.lora_A", "to_out_lora.down")
        old[name.replace("out_proj.lora_B", "to_out_lora.up")] = tensor
    assert not old.keys() & tensors.keys()
    path = write_diffusers(tmp_path / "old.safetensors", old)
    adapter = diffusers.load(path)
    wanted = loaded(path)
    assert diffusers.matches(path) and adapter.modules.keys() == wanted.keys()
    for name in adapter.modules:
        exact(dense(adapter, name), wanted[name])
    adapter.save(tmp_path / "copy.safetensors")
    assert read_diffusers(tmp_path / "copy.safetensors")[0].keys() == old.keys()
    adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    assert read_diffusers(tmp_path / "out.safetensors")[0].keys() == tensors.keys()


def test_the_first_files_without_a_component_are_those_of_a_unet(tmp_path: Path) -> None:
    path = UNET.removeprefix("unet.")
    tensors = {f"{path}.processor.to_q_lora.{k}.weight": torch.randn(4, 4) for k in ("down", "up")}
    file = write_diffusers(tmp_path / "old.safetensors", tensors)
    assert diffusers.matches(file)
    assert list(diffusers.load(file).modules) == [f"{UNET}.to_q"]


def test_alphas_of_a_flux_file_are_read_as_diffusers_reads_them_and_multiplied_in_by_a_squeeze(tmp_path: Path) -> None:
    names = [f"transformer.transformer_blocks.0.attn.{name}" for name in ("to_k", "to_q", "to_v")]
    tensors = {}
    for name, rank, alpha in zip(names, (4, 4, 2), (3.0, 4.0, 5.0), strict=True):
        tensors |= pair(name, rank) | {f"{name}.alpha": torch.tensor(alpha)}
    path = write_diffusers(tmp_path / "flux.safetensors", tensors)
    adapter, wanted = diffusers.load(path), loaded(path)
    assert [adapter.modules[name].scale for name in names] == [3 / 4, 1, 5 / 2]
    assert "few pipelines" in adapter.notes[0]
    adapter.save(tmp_path / "copy.safetensors")
    after, _ = read_diffusers(tmp_path / "copy.safetensors")
    assert all(torch.equal(after[key], tensors[key]) for key in tensors) and after.keys() == tensors.keys()
    whole = adapter.squeeze(rank=4)
    whole.save(tmp_path / "out.safetensors")
    assert not any(key.endswith("alpha") for key in read_diffusers(tmp_path / "out.safetensors")[0])
    again = loaded(tmp_path / "out.safetensors")
    for name in names:
        exact(dense(adapter, name), wanted[name])
        torch.testing.assert_close(again[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_a_file_of_one_model_has_no_component_before_and_after(tmp_path: Path) -> None:
    model = flux().transformer
    tensors, config = trained(model, **FLUX["transformer"])
    config = {k: sorted(v) if isinstance(v, set) else v for k, v in config.items()}
    path = write_diffusers(tmp_path / "one.safetensors", tensors, config)
    adapter = diffusers.load(path)
    assert diffusers.matches(path) and "proj_out" in adapter.modules
    adapter.squeeze(energy=0.8).save(tmp_path / "out.safetensors")
    after, strings = read_diffusers(tmp_path / "out.safetensors")
    assert after.keys() == tensors.keys() and "r" in json.loads(strings[METADATA])
    model.load_lora_adapter(
        tmp_path, weight_name="out.safetensors", prefix=None, adapter_name="x", use_safetensors=True
    )
    try:
        found = {n: m.get_delta_weight("x") for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    finally:
        model.unload_lora()
    squeezed = diffusers.load(tmp_path / "out.safetensors")
    assert found.keys() == squeezed.modules.keys()
    for name, update in found.items():
        torch.testing.assert_close(update.double(), dense(squeezed, name), rtol=1e-5, atol=1e-6)


def test_a_text_encoder_keeps_the_attention_that_diffusers_knows_it_by(tmp_path: Path) -> None:
    weak, strong = pair(f"{TEXT}.q_proj"), pair(TEXT.replace("self_attn", "mlp.fc1"), out=24)
    tensors = {key: tensor * 1e-6 for key, tensor in weak.items()} | strong | unet_pairs(to_q=4)
    alone = write_diffusers(tmp_path / "alone.safetensors", strong | unet_pairs(to_q=4))
    with pytest.raises(ValueError, match="Could not automatically infer state dict type"):
        loaded(alone)
    adapter = diffusers.load(write_diffusers(tmp_path / "source.safetensors", tensors))
    squeezed = adapter.squeeze(rank=2, allocate="global", min_rank=0)
    assert squeezed.modules[f"{TEXT}.q_proj"].rank == 1
    squeezed.save(tmp_path / "out.safetensors")
    assert loaded(tmp_path / "out.safetensors").keys() == squeezed.modules.keys()


def test_modules_that_leave_are_not_made_anew_by_the_settings(tmp_path: Path, mixed: Path) -> None:
    tensors, strings = read_diffusers(mixed)
    weak = f"{UNET}.to_q"
    tensors[f"{weak}.lora_B.weight"] *= 1e-6
    path = write_diffusers(tmp_path / "weak.safetensors", tensors, strings[METADATA])
    squeezed = diffusers.load(path).squeeze(rank=2, allocate="global", min_rank=0)
    assert weak in squeezed.dropped
    squeezed.save(tmp_path / "out.safetensors")
    assert loaded(tmp_path / "out.safetensors").keys() == squeezed.modules.keys()  # a surplus target is a warning


def test_text_encoders_of_either_layout_get_the_names_that_all_versions_load(tmp_path: Path, mixed: Path) -> None:
    tensors, _ = read_diffusers(mixed)
    assert any(key.startswith("text_encoder.encoder.") for key in tensors), "transformers 5 has no text_model"
    squeezed = diffusers.load(mixed).squeeze(energy=0.8)
    squeezed.save(tmp_path / "out.safetensors")
    after, strings = read_diffusers(tmp_path / "out.safetensors")
    text = [key for key in after if key.startswith("text_encoder.")]
    assert all(key.startswith("text_encoder.text_model.encoder.") for key in text)
    settings = json.loads(strings[METADATA])
    patterns = settings["text_encoder.rank_pattern"]
    for name, module in squeezed.modules.items():
        if name.startswith("text_encoder."):
            path = name.removeprefix("text_encoder.")
            for spelled in (path, path.removeprefix("text_model.")):
                key = get_pattern_key(patterns.keys(), spelled)
                assert patterns.get(key, settings["text_encoder.r"]) == module.rank
                assert re.fullmatch(settings["text_encoder.target_modules"], spelled)


def test_other_steps_give_files_that_diffusers_reads_as_meant(tmp_path: Path, mixed: Path) -> None:
    adapter = diffusers.load(mixed)
    other = diffusers.load(diffusers_file(tmp_path / "other", PLAIN, metadata=False))
    for name, made in {
        "rank-up": rank_up(adapter, 8),
        "merge": merge([adapter, other], [0.5, 2.0]),
        "merge, the other way": merge([other, adapter], rank=3),
    }.items():
        made.save(tmp_path / f"{name}.safetensors")
        for module, update in loaded(tmp_path / f"{name}.safetensors").items():
            torch.testing.assert_close(update, dense(made, module), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes_are_kept_also_where_the_two_factors_differ(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = pair(f"{UNET}.to_q", dtype=dtype) | pair(f"{UNET}.to_v", dtype=dtype)
    tensors[f"{UNET}.to_v.lora_A.weight"] = tensors[f"{UNET}.to_v.lora_A.weight"].float()
    adapter = diffusers.load(write_diffusers(tmp_path / "source.safetensors", tensors))
    adapter.save(tmp_path / "copy.safetensors")
    after, _ = read_diffusers(tmp_path / "copy.safetensors")
    assert all(
        torch.equal(bits(after[key]), bits(tensors[key])) and after[key].dtype == tensors[key].dtype for key in after
    )
    adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    after, _ = read_diffusers(tmp_path / "out.safetensors")
    assert {after[f"{UNET}.to_q.lora_{side}.weight"].dtype for side in "AB"} == {dtype}


@pytest.mark.parametrize("case", ["mixed", "without settings", "short names"])
def test_a_budget_of_bytes_holds_for_the_whole_file(tmp_path: Path, case: str) -> None:
    if case == "short names":
        tensors = {k: t for i in range(40) for k, t in pair(f"unet.x{i}", 9 if i else 2).items()}
        path = write_diffusers(tmp_path / "source.safetensors", tensors)
    else:
        path = diffusers_file(tmp_path / "source", *FILES[case][:1], metadata=FILES[case][1])
    adapter = diffusers.load(path)
    fixed = adapter.format.overhead_bytes(adapter) + adapter.extra_bytes
    for share in (0.3, 0.6, 0.9):
        budget = fixed + int(share * adapter.lora_bytes)
        out = tmp_path / f"{share}.safetensors"
        adapter.squeeze(size=budget).save(out)
        assert budget // 3 < out.stat().st_size <= budget


@pytest.mark.parametrize(
    ("keys", "ours"),
    [
        (["unet.x.lora_A.weight"], True),
        (["transformer.x.lora_B.weight", "transformer.x.alpha"], True),
        (["text_encoder_2.x.lora_linear_layer.up.weight"], True),
        (["unet.x.processor.to_q_lora.down.weight"], True),
        (["prior.x.lora.down.weight"], True),
        (["transformer.h.0.attn.c_attn.lora_A.weight"], False),
        (["diffusion_model.x.lora_A.weight"], False),
        (["lora_unet_x.lora_down.weight"], False),
        (["unet.x.lora_down.weight"], False),
        (["base_model.model.unet.x.lora_A.weight"], False),
        (["model.layers.0.q_proj.lora_A.weight"], False),
        (["unet.x.weight", "unet.x.alpha"], False),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_file_is_told_by_its_keys_or_by_its_header(tmp_path: Path, keys: list[str], ours: bool) -> None:
    tensors = {key: torch.ones(2, 2) for key in keys}
    assert diffusers.matches(write_diffusers(tmp_path / "x.safetensors", tensors)) is ours
    assert diffusers.matches(write_diffusers(tmp_path / "y.safetensors", tensors, {}))


def test_what_is_no_file_of_this_kind_is_told_without_an_error(tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("hello")
    assert not any(diffusers.matches(tmp_path / name) for name in ("text.safetensors", "none", "."))


Q = f"{UNET}.to_q"
REFUSED: dict[str, tuple[Callable[[], dict[str, Tensor]], Any, str]] = {
    "orphan A": (lambda: {f"{Q}.lora_A.weight": torch.ones(2, 3)}, None, f"orphan factor '{Q}.lora_A.weight'"),
    "orphan alpha": (
        lambda: unet_pairs(to_v=2) | {f"{Q}.alpha": torch.ones(())},
        None,
        f"orphan '{Q}.alpha': there are no factors|there is no alpha for",
    ),
    "shapes": (
        lambda: {f"{Q}.lora_A.weight": torch.ones(2, 3), f"{Q}.lora_B.weight": torch.ones(4, 5)},
        None,
        f"do not fit: '{Q}.lora_A.weight' is \\[2, 3\\]",
    ),
    "integers": (
        lambda: {f"{Q}.lora_{side}.weight": torch.ones(2, 2, dtype=torch.int8) for side in "AB"},
        None,
        "factors must be floating point",
    ),
    "old spelling in an error": (
        lambda: {f"{UNET}.processor.to_q_lora.down.weight": torch.ones(2, 3)},
        None,
        "orphan factor '.*processor.to_q_lora.down.weight'",
    ),
    "twice": (
        lambda: unet_pairs(to_q=4) | {f"{Q}.lora.down.weight": torch.ones(4, 16)},
        None,
        "are the same tensor; keep one",
    ),
    "DoRA": (
        lambda: unet_pairs(to_q=2) | {f"{Q}.lora_magnitude_vector": torch.ones(16)},
        None,
        "lora_magnitude_vector' belongs to DoRA",
    ),
    "DoRA of kohya": (lambda: unet_pairs(to_q=2) | {f"{Q}.dora_scale": torch.ones(16)}, None, "belongs to DoRA"),
    "unknown": (
        lambda: unet_pairs(to_q=2) | {f"{Q}.lora_C.weight": torch.ones(2)},
        None,
        "lora_C.weight' is no tensor of a plain LoRA",
    ),
    "embedding": (
        lambda: unet_pairs(to_q=2) | {"text_encoder.e.lora_embedding_A": torch.ones(2, 4)},
        None,
        "lora_embedding_A' is no tensor of a plain LoRA",
    ),
    "kohya's ending": (
        lambda: unet_pairs(to_q=2) | {"unet.x.lora_down.weight": torch.ones(2, 4)},
        None,
        "lora_down.weight' is no tensor of a plain LoRA of diffusers, or in a spelling",
    ),
    "no component": (lambda: pair("elsewhere.to_q"), {}, "'elsewhere.to_q.lora_A.weight' begins with no component"),
    "no factors": (lambda: {"unet.x.weight": torch.ones(2)}, {}, "no LoRA factors among 1 tensors"),
    "an alpha of two numbers": (
        lambda: unet_pairs(to_q=2) | {f"{Q}.alpha": torch.ones(2)},
        None,
        "alpha' is torch.float32 of shape \\[2\\], not one number",
    ),
    "an alpha of NaN": (lambda: unet_pairs(to_q=2) | {f"{Q}.alpha": torch.tensor(torch.nan)}, None, "alpha' is nan"),
    "alphas of some": (
        lambda: unet_pairs(to_q=2, to_v=2) | {f"{Q}.alpha": torch.ones(())},
        None,
        f"'{Q}.alpha' is there, but there is no alpha for '{UNET}.to_v",
    ),
    "alphas and settings": (
        lambda: unet_pairs(to_q=2) | {f"{Q}.alpha": torch.ones(())},
        {"unet.r": 2},
        "the header has scales too, and diffusers refuses such a file",
    ),
    "text for settings": (lambda: unet_pairs(to_q=2), "{oops", f"{METADATA} is not valid JSON"),
    "deep settings": (lambda: unet_pairs(to_q=2), "[" * 10**6, f"{METADATA} is not valid JSON"),
    "long settings": (lambda: unet_pairs(to_q=2), "9" * 10**7, f"{METADATA} is not valid JSON"),
    "longer settings": (lambda: unet_pairs(to_q=2), "9" * (10**7 + 1), "more than the settings of any adapter"),
    "deep fields": (
        lambda: unet_pairs(to_q=2),
        '{"unet.x": ' + "[" * 500 + "]" * 500 + "}",
        "nested more than 50 deep",
    ),
    "a list": (lambda: unet_pairs(to_q=2), [], f"{METADATA} must be an object, found list"),
    "r of text": (lambda: unet_pairs(to_q=2), {"unet.r": "4"}, "of 'unet': r must be a whole number from 1, found '4'"),
    "r of 0": (lambda: unet_pairs(to_q=2), {"unet.r": 0}, "r must be a whole number from 1"),
    "alpha of a list": (lambda: unet_pairs(to_q=2), {"unet.lora_alpha": [1]}, "lora_alpha must be a finite number"),
    "alpha of NaN": (lambda: unet_pairs(to_q=2), '{"unet.lora_alpha": NaN}', "lora_alpha must be a finite number"),
    "patterns of a list": (
        lambda: unet_pairs(to_q=2),
        {"unet.rank_pattern": [1]},
        "rank_pattern must be an object of pattern and number, found list",
    ),
    "a rank of text": (
        lambda: unet_pairs(to_q=2),
        {"unet.rank_pattern": {"to_q": "x" * 10**6}},
        r"rank_pattern\['to_q'\] must be a finite number",
    ),
    "half an expression": (lambda: unet_pairs(to_q=2), {"unet.alpha_pattern": {"(": 1}}, "is not a regular expression"),
    "many expressions": (
        lambda: unet_pairs(to_q=2),
        {"unet.alpha_pattern": {f"{i}|" + "x" * 60000: 1 for i in range(2)}},
        "alpha_pattern: more than 1000 expressions, or 100000 characters",
    ),
    "with and without": (lambda: unet_pairs(to_q=2), {"r": 2, "unet.r": 2}, "fields with and without a component"),
    "DoRA in settings": (lambda: unet_pairs(to_q=2), {"unet.use_dora": True}, "DoRA"),
    "another method": (lambda: unet_pairs(to_q=2), {"unet.peft_type": "x" * 10**6}, "only LORA adapters|peft_type is"),
    "PiSSA": (lambda: unet_pairs(to_q=2), {"unet.init_lora_weights": "pissa"}, "PiSSA subtracts"),
    "parameters": (lambda: unet_pairs(to_q=2), {"unet.target_parameters": ["x"]}, "target_parameters is set"),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_cannot_be_read_soundly_is_refused_by_name_in_one_short_line(tmp_path: Path, case: str) -> None:
    tensors, settings, text = REFUSED[case]
    path = write_diffusers(tmp_path / "x.safetensors", tensors(), settings)
    with pytest.raises(LoraSqueezeError, match=text) as error:
        diffusers.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 2000


def test_nan_is_found_when_the_module_is_read(tmp_path: Path) -> None:
    tensors = unet_pairs(to_q=2, to_v=2)
    tensors[f"{Q}.lora_B.weight"][0] = torch.nan
    adapter = diffusers.load(write_diffusers(tmp_path / "x.safetensors", tensors))
    names = sorted(os.listdir(tmp_path))
    with pytest.raises(LoraSqueezeError, match=f"{Q}: the factors hold NaN or infinity"):
        adapter.save(tmp_path / "new" / "out.safetensors")
    with pytest.raises(LoraSqueezeError, match=f"{Q}: factor B holds NaN"):
        adapter.squeeze(rank=1).save(tmp_path / "out.safetensors")
    assert sorted(os.listdir(tmp_path)) == names


def test_a_component_that_the_settings_leave_out_has_scale_1_and_diffusers_loads_it_after_a_squeeze(
    tmp_path: Path,
) -> None:
    tensors = unet_pairs(to_q=2) | pair(f"{TEXT}.q_proj", 8)
    told = {"unet.r": 2, "unet.lora_alpha": 3, "unet.target_modules": [Q.removeprefix("unet.")]}
    path = write_diffusers(tmp_path / "x.safetensors", tensors, told)
    with pytest.raises(ValueError, match="target_modules"):
        loaded(path)
    adapter = diffusers.load(path)
    assert {name: module.scale for name, module in adapter.modules.items()} == {Q: 1.5, f"{TEXT}.q_proj": 1.0}
    assert any("none for text_encoder" in note for note in adapter.notes)
    adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    assert loaded(tmp_path / "out.safetensors").keys() == adapter.modules.keys()


def test_an_alpha_in_the_header_counts_where_one_pipeline_would_use_it(tmp_path: Path) -> None:
    tensors = pair("transformer.blocks.0.attn.to_q", 4)
    with pytest.raises(LoraSqueezeError, match=r"header has alpha 2 and .*to_q has rank 4: MiniMax-H3"):
        diffusers.load(write_diffusers(tmp_path / "x.safetensors", tensors, alpha="2.0"))
    for alpha in ("4", "none"):
        adapter = diffusers.load(write_diffusers(tmp_path / "x.safetensors", tensors, alpha=alpha, note="kept"))
        adapter.squeeze(rank=2).save(tmp_path / "out.safetensors", force=True)
        strings = read_diffusers(tmp_path / "out.safetensors")[1]
        assert "alpha" not in strings and strings["note"] == "kept"


def test_the_first_pattern_that_matches_counts_as_in_peft(tmp_path: Path) -> None:
    path = Q.removeprefix("unet.")
    alphas = {r"(a|t)\w*_q": 3, f"^{path}": 5, "to_q": 6}  # PEFT warns of others
    told = {"unet.r": 4, "unet.target_modules": [path], "unet.alpha_pattern": alphas}
    file = write_diffusers(tmp_path / "x.safetensors", unet_pairs(to_q=4), told)
    adapter = diffusers.load(file)
    assert adapter.modules[Q].scale == 3 / 4
    exact(dense(adapter, Q), loaded(file)[Q])


def test_tensors_that_are_no_lora_are_carried_and_told_of(tmp_path: Path) -> None:
    name = "transformer.transformer_blocks.0.attn.norm_q.weight"
    tensors = pair("transformer.transformer_blocks.0.attn.to_q") | {name: torch.randn(8).half()}
    adapter = diffusers.load(write_diffusers(tmp_path / "x.safetensors", tensors))
    assert any("most pipelines of diffusers refuse it" in note for note in adapter.notes)
    adapter.squeeze(rank=2).save(tmp_path / "out.safetensors")
    assert torch.equal(read_diffusers(tmp_path / "out.safetensors")[0][name], tensors[name])


def test_the_history_names_every_step_and_its_input(tmp_path: Path, mixed: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    diffusers.load(mixed).squeeze(rank=4).save(first)
    diffusers.load(first).squeeze(rank=2).save(second)
    history = diffusers.load(second).history
    assert [step["step"] for step in history] == ["post-squeeze", "post-squeeze"]
    assert [step["source_sha256"] for step in history] == [diffusers.load(p).source.digest() for p in (mixed, first)]


def test_reading_is_lazy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_diffusers(tmp_path / "x.safetensors", unet_pairs(to_q=2) | {f"{Q}.alpha": torch.tensor(2.0)})
    read: list[str] = []
    original = diffusers.TensorFile.read

    def watched(self: diffusers.TensorFile, name: str) -> Tensor:
        read.append(name)
        return original(self, name)

    monkeypatch.setattr(diffusers.TensorFile, "read", watched)
    adapter = diffusers.load(path)
    assert read == [f"{Q}.alpha"]
    adapter.update(Q)
    assert sorted(read[1:]) == [f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"]


def test_the_source_is_never_written_and_other_files_only_when_forced(tmp_path: Path) -> None:
    source = write_diffusers(tmp_path / "x.safetensors", unet_pairs(to_q=2))
    adapter, before = diffusers.load(source), source.read_bytes()
    with pytest.raises(LoraSqueezeError, match="is the file that the adapter is read from; choose another output"):
        adapter.save(source, force=True)
    other = tmp_path / "other.safetensors"
    other.write_text("mine")
    with pytest.raises(LoraSqueezeError, match="exists already and nothing was written"):
        adapter.save(other)
    assert source.read_bytes() == before and other.read_text() == "mine"
    adapter.save(other, force=True)
    assert diffusers.load(other).rank == 2


def test_progress_ends_at_the_number_of_bytes_announced(tmp_path: Path, mixed: Path) -> None:
    seen: list[tuple[int, int]] = []
    diffusers.load(mixed).save(tmp_path / "out.safetensors", progress=lambda done, total: seen.append((done, total)))
    assert seen and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_the_parts_are_what_the_package_asks_of_a_format(mixed: Path) -> None:
    adapter = diffusers.load(mixed)
    assert isinstance(adapter.format, Format) and isinstance(adapter.source, Source)
    assert adapter.format.name == "diffusers"
