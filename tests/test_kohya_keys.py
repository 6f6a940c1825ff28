"""Keys of kohya files: what is told from them, and every file that is refused, with the words of the refusal."""

import os
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from adapter_cases import plain_tensors
from factor_cases import quick
from hypothesis import given
from hypothesis import strategies as st
from kohya_cases import CONV, SPELLINGS, Q, V, kohya_tensors, write_kohya
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import kohya, lycoris
from lora_squeeze.formats.kohya_keys import role_of

DOWN, UP = (f"{Q}.lora_{side}.weight" for side in ("down", "up"))
ones = torch.ones


def without(*keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in kohya_tensors().items() if key not in keys}


@quick
@given(st.text("ab._", min_size=1, max_size=8), st.sampled_from([s for pair in SPELLINGS.values() for s in pair]))
def test_a_name_stays_as_it_is_whatever_the_spelling(name: str, suffix: str) -> None:
    side = "down" if suffix in [down for down, _ in SPELLINGS.values()] else "up"
    assert role_of(name + suffix) == (name, side)


@pytest.mark.parametrize("role", [*sorted(lycoris.ROLES - {"up", "down", "mid"}), "alpha"])
def test_tensors_of_lycoris_are_told_by_the_last_part_of_the_key(role: str) -> None:
    assert role_of(f"lora_unet_a.b.{role}") == ("lora_unet_a.b", role)
    assert role_of(role) is None and role_of(f"lora_unet_{role}") is None


# tensors beside (or in place of) those of the plain file -> what is said
MALFORMED: dict[str, tuple[dict[str, Tensor], str]] = {
    "no partner": (without(UP), f"module '{Q}' has '{Q}.alpha', '{DOWN}': orphans, or parts of several updates"),
    "alpha alone": (without(UP, DOWN), f"module '{Q}' has '{Q}.alpha': orphans"),
    "half a loha": (
        {"x.hada_w1_a": ones(4, 2), "x.hada_w1_b": ones(2, 4)},
        "module 'x' has 'x.hada_w1_a', 'x.hada_w1_b': orphans",
    ),
    "two updates": (
        kohya_tensors() | {f"{Q}.diff": ones(24, 16)},
        "parts of several updates; the file is incomplete or mixed",
    ),
    "twice": (
        kohya_tensors() | {f"{Q}.lora_A.weight": ones(6, 16)},
        f"'{DOWN}' and '{Q}.lora_A.weight' are the same tensor; keep one",
    ),
    "two spellings": (
        without(UP) | {f"{Q}.lora_B.weight": ones(24, 6)},
        f"'{Q}.lora_B.weight', '{DOWN}' are spelled in two ways, and readers do not take them for parts of one update",
    ),
    "mid of another spelling": (
        {
            "x.lora_A.weight": ones(2, 4, 1, 1),
            "x.lora_B.weight": ones(4, 2, 1, 1),
            "x.lora_mid.weight": ones(2, 2, 3, 3),
        },
        "are spelled in two ways",
    ),
    "ranks": (
        without(UP) | {UP: ones(24, 5)},
        f"tensors of '{Q}' do not fit as those of a LoRA: '{DOWN}' is [6, 16], '{UP}' is [24, 5]",
    ),
    "kernel of up": (
        without(f"{CONV}.lora_up.weight") | {f"{CONV}.lora_up.weight": ones(10, 6, 3, 3)},
        "do not fit as those of a LoRA",
    ),
    "flat": (without(UP) | {UP: ones(24)}, "do not fit as those of a LoRA"),
    "mid": (
        {
            "x.lora_down.weight": ones(2, 4, 1, 1),
            "x.lora_up.weight": ones(4, 2, 1, 1),
            "x.lora_mid.weight": ones(2, 3, 3, 3),
        },
        "do not fit as those of a Tucker LoCon",
    ),
    "down beside mid": (
        {
            "x.lora_down.weight": ones(2, 4, 3, 3),
            "x.lora_up.weight": ones(4, 2, 1, 1),
            "x.lora_mid.weight": ones(2, 2, 3, 3),
        },
        "do not fit as those of a Tucker LoCon",
    ),
    "loha sizes": (
        {"x.hada_w1_a": ones(4, 2), "x.hada_w1_b": ones(2, 5), "x.hada_w2_a": ones(4, 2), "x.hada_w2_b": ones(2, 6)},
        "do not fit as those of a LoHa",
    ),
    "loha rank": (
        {"x.hada_w1_a": ones(4, 2), "x.hada_w1_b": ones(3, 5), "x.hada_w2_a": ones(4, 2), "x.hada_w2_b": ones(2, 5)},
        "do not fit as those of a LoHa",
    ),
    "loha kernel": (
        {
            "x.hada_w1_a": ones(4, 2),
            "x.hada_w1_b": ones(2, 5, 3),
            "x.hada_w2_a": ones(4, 2),
            "x.hada_w2_b": ones(2, 5, 3),
        },
        "do not fit as those of a LoHa",
    ),
    "loha core": (
        {f"x.hada_{k}": ones(2, 4) for k in ("w1_a", "w1_b", "w2_a", "w2_b")}
        | {"x.hada_t1": ones(2, 2, 3), "x.hada_t2": ones(2, 3, 3)},
        "do not fit as those of a LoHa",
    ),
    "lokr rank": (
        {"x.lokr_w1": ones(2, 2), "x.lokr_w2_a": ones(4, 2), "x.lokr_w2_b": ones(3, 5)},
        "do not fit as those of a LoKr: 'x.lokr_w1' is [2, 2], 'x.lokr_w2_a' is [4, 2], 'x.lokr_w2_b' is [3, 5]",
    ),
    "lokr kernel of the first": (
        {"x.lokr_w1": ones(2, 2, 1, 1), "x.lokr_w2": ones(4, 4, 3, 3)},
        "do not fit as those of a LoKr",
    ),
    "lokr core": (
        {"x.lokr_w1": ones(2, 2), "x.lokr_w2_a": ones(2, 4), "x.lokr_w2_b": ones(2, 5), "x.lokr_t2": ones(3, 3, 3)},
        "do not fit as those of a LoKr",
    ),
    "integers": (
        without(UP) | {UP: ones(24, 6).to(torch.int8)},
        f"'{UP}' has dtype torch.int8; quantised factors are not read",
    ),
    "empty": (
        without(UP, DOWN) | {UP: ones(24, 0), DOWN: ones(0, 16)},
        "has shape [0, 16]: it is empty; save the adapter again",
    ),
    "alpha of NaN": (
        kohya_tensors() | {f"{Q}.alpha": torch.tensor(torch.nan)},
        f"'{Q}.alpha' is nan; alpha must be a finite number: use an earlier checkpoint",
    ),
    "alpha of two numbers": (
        kohya_tensors() | {f"{Q}.alpha": ones(2)},
        f"'{Q}.alpha' is torch.float32 of shape [2], not one number; save the adapter again",
    ),
    "unknown": (
        kohya_tensors() | {f"{Q}.lora_C.weight": ones(2)},
        "lora_C.weight' is no tensor that is known of a LoRA or of LyCORIS",
    ),
    "old core": (kohya_tensors() | {"x.lokr_t1": ones(2)}, "'x.lokr_t1' is no tensor that is known"),
    "no factors": (
        {"x.w_norm": ones(4)},
        "no LoRA factors among 1 tensors (the first is 'x.w_norm'); expected keys such as 'lora_",
    ),
}
REFUSED = {
    ".dora_scale": "DoRA rescales base weight and update together, and the change of the weight depends on the",
    ".lora_magnitude_vector": "DoRA rescales base weight and update together",
    ".lora_magnitude_vector.weight": "DoRA rescales base weight and update together",
    ".a1.weight": "GLoRA: the change of the weight depends on the base weight: merge it into the base model",
    ".oft_blocks": "OFT and BOFT rotate the base weight",
    ".oft_diag": "OFT and BOFT rotate the base weight",
    ".on_input": "IA3 scales rows or columns of the base weight",
    ".lambda_layer": "T-LoRA stores its start beside the factors",
    ".scalar": "a trained factor in front of the update, whose place differs between versions: save it with",
    ".lora_down.0.weight": "factors of a layer that sd-scripts splits while it trains: save the adapter with",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, case: str) -> None:
    tensors, said = MALFORMED[case]
    path = write_kohya(tmp_path / "source.safetensors", tensors)
    with pytest.raises(LoraSqueezeError, match=f"^'{re.escape(str(path))}': .*{re.escape(said)}") as error:
        kohya.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", REFUSED)
def test_an_update_that_depends_on_the_base_is_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = write_kohya(tmp_path / "source.safetensors", kohya_tensors() | {Q + suffix: ones(24, 1)})
    with pytest.raises(LoraSqueezeError, match=re.escape(f"'{Q}{suffix}': {REFUSED[suffix]}")):
        kohya.load(path)
    alone = write_kohya(tmp_path / "alone.safetensors", {Q + suffix: ones(24, 1)})
    assert kohya.matches(alone) or suffix == ".lora_down.0.weight", "so that the reason is said, not that nothing fits"


def test_a_file_whose_header_has_the_scales_is_left_to_diffusers(tmp_path: Path) -> None:
    tensors = kohya_tensors(alpha=None, spelling="PEFT")
    path = write_kohya(tmp_path / "source.safetensors", tensors, {kohya.DIFFUSERS_KEY: "{}"})
    assert not kohya.matches(path)
    with pytest.raises(LoraSqueezeError, match="lora_adapter_metadata: diffusers takes the scales from there"):
        kohya.load(path)


def test_other_files_do_not_match_and_raise_nothing(tmp_path: Path) -> None:
    peft = tmp_path / "adapter_model.safetensors"
    safetensors.torch.save_file({key: tensor.contiguous() for key, tensor in plain_tensors().items()}, peft)
    model = write_kohya(tmp_path / "model.safetensors", {"model.layers.0.weight": ones(2, 2), "act.alpha": ones(2)})
    text, pipe = tmp_path / "text.safetensors", tmp_path / "pipe.safetensors"
    text.write_text("{}")
    os.mkfifo(pipe)
    for path in (peft, model, text, pipe, tmp_path, tmp_path / "missing", Path("nul\0")):
        assert not kohya.matches(path)


def test_a_module_named_like_a_part_keeps_its_name(tmp_path: Path) -> None:
    tensors = {f"my_lora.x{s}": ones(3, 3) for s in SPELLINGS["kohya"]} | {
        f"{V}_lora{s}": ones(3, 3) for s in SPELLINGS["PEFT"]
    }
    assert set(kohya.load(write_kohya(tmp_path / "source.safetensors", tensors)).modules) == {"my_lora.x", f"{V}_lora"}
