"""Readers that scale differently compute the same update from one squeezed file: PEFT, vLLM's rule, diffusers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft_models import deltas, randomise, read_config, save, seeded, tensors
from torch import Tensor, nn

import lora_squeeze

PREFIX = "base_model.model."


def transformer() -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer's adapter with two scales, so that the alpha policies differ."""
    config = LoraConfig(r=8, lora_alpha=20, target_modules=["to_q", "to_k", "proj_out"], alpha_pattern={"to_k": 4})
    model = get_peft_model(seeded(transformer), config)
    randomise(model)
    return save(model, tmp_path_factory.mktemp("readers"))


def by_diffusers(folder: Path, settings: dict[str, Any] | None) -> dict[str, Tensor]:
    """Updates as diffusers makes them of the tensors, with or without the settings beside them."""
    state = {key.removeprefix(PREFIX): tensor for key, tensor in tensors(folder).items()}
    model: Any = seeded(transformer)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # diffusers and transformers on each other's age
        model.load_lora_adapter(state, prefix=None, metadata=settings)
    return {name: module.get_delta_weight("default_0") for name, module in model.named_modules() if is_lora(module)}


def is_lora(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight") and "default_0" in module.lora_A


def by_vllm_rule(folder: Path) -> dict[str, Tensor]:
    """vLLM takes one number for all modules, lora_alpha / r, and reads neither pattern."""
    config, state = read_config(folder), tensors(folder)
    scale = config["lora_alpha"] / config["r"]
    names = {key.removeprefix(PREFIX).removesuffix(".lora_A.weight") for key in state if ".lora_A." in key}
    return {n: scale * state[f"{PREFIX}{n}.lora_B.weight"] @ state[f"{PREFIX}{n}.lora_A.weight"] for n in names}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(
            one[name].double(), other[name].squeeze(0), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("rule", [{"rank": 3}, {"energy": 0.7}], ids=["uniform", "mixed"])
@pytest.mark.parametrize("alpha", ["keep", "fold"])
def test_three_readers_agree(source: Path, tmp_path: Path, alpha: Any, rule: dict[str, Any]) -> None:
    """diffusers is given the settings; with alpha folded it needs none."""
    from peft import PeftModel

    lora_squeeze.load(source).squeeze(alpha=alpha, **rule).save(tmp_path / "out")
    with torch.random.fork_rng():
        expected = deltas(PeftModel.from_pretrained(seeded(transformer), str(tmp_path / "out")))
    config = read_config(tmp_path / "out")
    fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "use_rslora")
    same(by_vllm_rule(tmp_path / "out"), expected)
    same(by_diffusers(tmp_path / "out", {field: config[field] for field in fields}), expected)
    if alpha == "fold":
        same(by_diffusers(tmp_path / "out", None), expected)


def test_the_source_itself_is_read_differently(source: Path) -> None:
    """The test above would be empty if these readers agreed on any file."""
    ours = {name: update.dense() for name, update in _updates(source).items()}
    for reading in (by_vllm_rule(source), by_diffusers(source, None)):
        assert any(not torch.allclose(reading[name], ours[name], rtol=0.1) for name in ours)


def _updates(folder: Path) -> dict[str, Any]:
    adapter = lora_squeeze.load(folder)
    return {name: adapter.update(name) for name in adapter.modules}
