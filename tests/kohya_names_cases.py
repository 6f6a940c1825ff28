"""Small pipelines of diffusers, kohya files for their layers, and the updates that diffusers makes of them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kohya_cases import write_kohya
from torch import Tensor, nn

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.formats import kohya
from lora_squeeze.formats.kohya_names import NamedFormat
from lora_squeeze.lowrank import LowRank

Shape = tuple[int, ...]  # out, in, *kernel
SD_BLOCKS: dict[str, Any] = {"cross_attention_dim": 8, "attention_head_dim": 2, "norm_num_groups": 2}
XL_BLOCKS: dict[str, Any] = SD_BLOCKS | {
    "block_out_channels": (4, 8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 12,
    "use_linear_projection": True,
}
SD3_BLOCKS: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": 4, "caption_projection_dim": 4}
DIT_HEADS: dict[str, Any] = {"num_attention_heads": 1, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}


def sd_unet() -> nn.Module:
    """The UNet of Stable Diffusion 1 with few channels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(block_out_channels=(4, 8, 16, 16), **SD_BLOCKS)


def xl_unet() -> nn.Module:
    """The UNet of Stable Diffusion XL with few channels."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**XL_BLOCKS)


def flux(double: int = 19, single: int = 38) -> nn.Module:
    """A Flux transformer with one small head."""
    from diffusers import FluxTransformer2DModel

    sizes = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 8, "pooled_projection_dim": 8}
    return FluxTransformer2DModel(
        num_layers=double, num_single_layers=single, guidance_embeds=True, **sizes, **DIT_HEADS
    )


def sd3(blocks: int, dual: int = 0) -> nn.Module:
    """A Stable Diffusion 3 transformer with one small head."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(num_layers=blocks, dual_attention_layers=tuple(range(dual)), **SD3_BLOCKS)


def clip(layers: int, *, projection: bool = False) -> nn.Module:
    """A CLIP text model of transformers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 16, "projection_dim": 8}
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "max_position_embeddings": 8}
    config = CLIPTextConfig(num_hidden_layers=layers, num_attention_heads=2, **sizes, **tokens)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


def t5(layers: int) -> nn.Module:
    """The encoder of a gated T5 of transformers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(num_layers=layers, d_model=8, d_kv=4, d_ff=8, feed_forward_proj="gated-gelu"))


def _scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(steps_offset=1, clip_sample=False)


def sd_pipeline(text_layers: int = 2) -> Any:
    """A Stable Diffusion 1 pipeline of the models that adapters are for."""
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=None,
        text_encoder=clip(text_layers),
        tokenizer=None,
        unet=sd_unet(),
        scheduler=_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def xl_pipeline() -> Any:
    """A Stable Diffusion XL pipeline with the UNet alone."""
    from diffusers import StableDiffusionXLPipeline

    rest = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(unet=xl_unet(), scheduler=_scheduler(), **rest)


def flux_pipeline() -> Any:
    """A Flux pipeline of few blocks with the transformer and CLIP."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    rest = dict.fromkeys(("vae", "tokenizer", "text_encoder_2", "tokenizer_2"))
    scheduler = FlowMatchEulerDiscreteScheduler()
    return FluxPipeline(scheduler=scheduler, text_encoder=clip(1), transformer=flux(2, 2), **rest)


def layers(model: nn.Module) -> dict[str, Shape]:
    """Path -> shape of the weight, of every Linear and convolution layer."""
    kinds = (nn.Linear, nn.Conv2d)
    return {name: tuple(each.weight.shape) for name, each in model.named_modules() if isinstance(each, kinds)}


def models(pipeline: Any) -> dict[str, nn.Module]:
    """The models of a pipeline by component."""
    return {name: each for name, each in pipeline.components.items() if isinstance(each, nn.Module)}


def kohya_file(
    path: Path, shapes: Mapping[str, Shape], ranks: Sequence[int] = (2,), alphas: Sequence[float] = (1.0,)
) -> Path:
    """A file with random factors for layers of these names; ranks and alphas in turn."""
    tensors: dict[str, Tensor] = {}
    for i, (name, (out, columns, *kernel)) in enumerate(shapes.items()):
        rank = ranks[i % len(ranks)]
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, columns, *kernel)
        tensors[f"{name}.lora_up.weight"] = torch.randn(out, rank, *(1 for _ in kernel))
        tensors[f"{name}.alpha"] = torch.tensor(alphas[i % len(alphas)])
    return write_kohya(path, tensors, {})


def loaded_by_diffusers(pipeline: Any, path: Path) -> dict[str, Tensor]:
    """dW of every module that diffusers gives an update when it loads the file, by component and path."""
    pipeline.load_lora_weights(str(path), adapter_name="it")
    found = {
        f"{component}.{name}": layer.get_delta_weight("it").detach().flatten(1)
        for component, model in models(pipeline).items()
        for name, layer in model.named_modules()
        if "it" in getattr(layer, "lora_A", {})
    }
    pipeline.unload_lora_weights()
    return found


def without_text_model(name: str) -> str:
    """The name of a layer in transformers 5, which has no `text_model.` in a CLIPTextModel."""
    return name.replace(".text_model.", ".")


@dataclass(frozen=True, eq=False)
class Memory:
    """A source of updates that are there."""

    given: Mapping[str, LowRank]

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules."""
        return [self.given[module.name] for module in modules]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """None are carried."""
        raise KeyError(name)

    def digest(self) -> str | None:
        """It is not from a file."""
        return None


def in_memory(given: Mapping[str, LowRank], kernels: Mapping[str, Shape] | None = None) -> Adapter:
    """An adapter with these updates under neutral names."""
    modules = {
        name: Module(
            name,
            update.rank,
            update.scale,
            update.dtype,
            *update.shape,
            kind="conv" if kernels and name in kernels else "linear",
            kernel=(kernels or {}).get(name, ()),
        )
        for name, update in given.items()
    }
    scales = {update.scale for update in given.values()}
    return Adapter(
        modules=modules,
        source=Memory(given),
        format=NamedFormat("memory"),
        default_scale=scales.pop() if len(scales) == 1 else 1.0,
    )


def random_update(shape: Shape, rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRank:
    """Random factors for a layer with a weight of this shape."""
    out, *columns = shape
    return LowRank(torch.randn(out, rank).to(dtype), torch.randn(rank, math.prod(columns)).to(dtype), scale)


def load(path: Path, tensors: Mapping[str, Tensor] | None = None) -> Adapter:
    """The adapter in a kohya file; of these tensors, which are written to it first."""
    return kohya.load(path if tensors is None else write_kohya(path, tensors, {}))
