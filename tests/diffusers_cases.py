"""Small pipelines of diffusers, LoRA files that it writes, and the updates that it makes of a file."""

import json
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

METADATA = "lora_adapter_metadata"
FILE = "pytorch_lora_weights.safetensors"
ATTENTION = ["to_q", "to_v", "to_out.0"]
UNET = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn"
# Settings of the components in the files: linear layers and convolutions, mixed ranks and alphas, rsLoRA.
PLAIN: dict[str, dict[str, Any]] = {
    "unet": {"r": 4, "lora_alpha": 4, "target_modules": [*ATTENTION, "conv1", "proj_in"]},
    "text_encoder": {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "fc1"]},
}
MIXED: dict[str, dict[str, Any]] = {
    "unet": PLAIN["unet"]
    | {"r": 6, "lora_alpha": 3, "rank_pattern": {"to_v": 3, "conv1": 5}, "alpha_pattern": {"to_v": 7, "to_out.0": 1.5}},
    "text_encoder": PLAIN["text_encoder"]
    | {"r": 4, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {r"layers\.1\.mlp\.fc1": 2}},
}
FLUX: dict[str, dict[str, Any]] = {
    "transformer": {
        "r": 4,
        "lora_alpha": 2,
        "lora_bias": True,
        "target_modules": [*ATTENTION, "proj_out"],
        "rank_pattern": {"^proj_out": 2},
    }
}


@cache
def stable_diffusion() -> StableDiffusionPipeline:
    """A UNet and a CLIP text encoder with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=64, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, **sizes)
    )
    return StableDiffusionPipeline(
        vae=None,
        text_encoder=text,
        tokenizer=None,
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@cache
def flux() -> FluxPipeline:
    """A Flux transformer with random weights, without text encoders."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **nothing)


def trained(model: nn.Module, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Factors of an adapter with random B, as PEFT gives them, and its settings; the model stays as it was."""
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(init_lora_weights=False, **settings))
    try:
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.default.bias"):
                nn.init.normal_(parameter)
        config = next(iter(model.peft_config.values())).to_dict()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*have invalid shape", category=UserWarning)  # of biases
            factors = get_peft_model_state_dict(model)
        return {key: tensor.detach().clone() for key, tensor in factors.items()}, config
    finally:
        unload(model)


def unload(model: nn.Module) -> None:
    """Remove all adapters."""
    if isinstance(model, CLIPTextModel):
        model.delete_adapter(list(model.peft_config))
        from diffusers.loaders.lora_base import _remove_text_encoder_monkey_patch

        _remove_text_encoder_monkey_patch(model)
    else:
        model.unload_lora()


def diffusers_file(folder: Path, settings: Mapping[str, Mapping[str, Any]] = PLAIN, *, metadata: bool = True) -> Path:
    """A file that `save_lora_weights` writes, for the pipeline that has these components."""
    pipeline = flux() if "transformer" in settings else stable_diffusion()
    given: dict[str, Any] = {}
    for component, fields in settings.items():
        given[f"{component}_lora_layers"], config = trained(getattr(pipeline, component), **fields)
        if metadata:
            given[f"{component}_lora_adapter_metadata"] = config
    type(pipeline).save_lora_weights(folder, **given)
    return folder / FILE


def loaded(path: Path, probe: bool = False) -> dict[str, Tensor]:
    """dW in float64 of every module that diffusers adapts with this file: PEFT's get_delta_weight, by our names.

    Args:
        path: of the file.
        probe: give the output of the UNet or the transformer beside them, under the name "output".
    """
    with safetensors.safe_open(path, "pt") as file:
        is_flux = any(key.startswith("transformer.") for key in file.keys())  # noqa: SIM118
    pipeline: DiffusionPipeline = flux() if is_flux else stable_diffusion()
    found: dict[str, Tensor] = {}
    try:
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
        for component in pipeline._lora_loadable_modules:
            model = getattr(pipeline, component)
            if model is None:
                continue
            if probe and component in ("unet", "transformer"):
                found["output"] = output(model)
            model.double()
            for name, module in model.named_modules():
                if isinstance(module, LoraLayer) and "x" in module.lora_A:
                    clip = "text_model." if name.startswith("encoder.layers.") else ""
                    found[f"{component}.{clip}{name}"] = module.get_delta_weight("x").detach().flatten(1)
            model.float()
    finally:
        pipeline.unload_lora_weights()
    return found


def output(model: nn.Module) -> Tensor:
    """What the model makes of a fixed input."""
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        if isinstance(model, UNet2DConditionModel):
            result: Tensor = model(noise(1, 4, 8, 8), 3, noise(1, 5, 16)).sample
            return result
        result = model(
            hidden_states=noise(1, 6, 4),
            encoder_hidden_states=noise(1, 5, 16),
            pooled_projections=noise(1, 16),
            timestep=torch.ones(1),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(5, 3),
        ).sample
        return result


def read_diffusers(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata, read without the package."""
    with safetensors.safe_open(path, "pt") as file:
        return safetensors.torch.load_file(path), file.metadata() or {}


def write_diffusers(
    path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | str | None = None, **strings: str
) -> Path:
    """A file as the safetensors library writes it; `settings`: of the header, as they are if text."""
    if settings is not None:
        strings[METADATA] = settings if isinstance(settings, str) else json.dumps(settings)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, path, {"format": "pt", **strings})
    return path


def pair(
    name: str, rank: int = 4, out: int = 16, columns: int = 16, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random factors of one linear layer in today's spelling."""
    return {
        f"{name}.lora_A.weight": torch.randn(rank, columns).to(dtype),
        f"{name}.lora_B.weight": torch.randn(out, rank).to(dtype),
    }
