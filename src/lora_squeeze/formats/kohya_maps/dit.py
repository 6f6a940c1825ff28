"""Layers of the transformers of Flux.1 and Stable Diffusion 3, under their original names and those of diffusers.

The originals have q, k and v in one layer, Flux the first layer of the MLP of its single blocks too. The layers in
front of the last norms give shift and scale there, scale and shift in diffusers.
"""

from __future__ import annotations

from lora_squeeze.formats.kohya_maps.layer import Layer

_IMAGE, _TEXT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
_THIRDS = (1, 1, 1)


def flux(double: int, single: int) -> tuple[Layer, ...]:
    """Layers of a Flux transformer with so many blocks of the two kinds."""
    layers = [
        Layer("img_in", ("x_embedder",)),
        Layer("txt_in", ("context_embedder",)),
        *_embedder("time_in.in_layer", "time_in.out_layer", "timestep_embedder"),
        *_embedder("vector_in.in_layer", "vector_in.out_layer", "text_embedder"),
        *_embedder("guidance_in.in_layer", "guidance_in.out_layer", "guidance_embedder"),
    ]
    for i in range(double):
        here, there = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for side, end, names, out in (("img", "", _IMAGE, "to_out.0"), ("txt", "_context", _TEXT, "to_add_out")):
            layers += [
                Layer(f"{here}.{side}_mod.lin", (f"{there}.norm1{end}.linear",)),
                _fused(f"{here}.{side}_attn.qkv", f"{there}.attn", names),
                Layer(f"{here}.{side}_attn.proj", (f"{there}.attn.{out}",)),
                Layer(f"{here}.{side}_mlp.0", (f"{there}.ff{end}.net.0.proj",)),
                Layer(f"{here}.{side}_mlp.2", (f"{there}.ff{end}.net.2",)),
            ]
    for i in range(single):
        here, there = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        targets = (*(f"{there}.attn.{name}" for name in _IMAGE), f"{there}.proj_mlp")
        layers += [
            Layer(f"{here}.modulation.lin", (f"{there}.norm.linear",)),
            Layer(f"{here}.linear1", targets, (*_THIRDS, 4)),
            Layer(f"{here}.linear2", (f"{there}.proj_out",)),
        ]
    return (*layers, *_FINAL)


def sd3(blocks: int, dual: int) -> tuple[Layer, ...]:
    """Layers of an MMDiT with so many blocks, of which the first `dual` have a second attention of the image.

    The last block has no more than `qkv` and `adaLN_modulation` for the text, and the rows of the latter are shift and
    scale only; which block that is differs between the models, and the number of rows tells.
    """
    layers = [
        Layer("x_embedder.proj", ("pos_embed.proj",), kernel=(2, 2)),
        Layer("context_embedder", ("context_embedder",)),
        *_embedder("t_embedder.mlp.0", "t_embedder.mlp.2", "timestep_embedder"),
        *_embedder("y_embedder.mlp.0", "y_embedder.mlp.2", "text_embedder"),
    ]
    for i in range(blocks):
        here, there = f"joint_blocks.{i}", f"transformer_blocks.{i}"
        for side, end, names, out in (("x", "", _IMAGE, "to_out.0"), ("context", "_context", _TEXT, "to_add_out")):
            block = f"{here}.{side}_block"
            layers += [
                Layer(f"{block}.adaLN_modulation.1", (f"{there}.norm1{end}.linear",), halves=None if end else False),
                _fused(f"{block}.attn.qkv", f"{there}.attn", names),
                Layer(f"{block}.attn.proj", (f"{there}.attn.{out}",)),
                Layer(f"{block}.mlp.fc1", (f"{there}.ff{end}.net.0.proj",)),
                Layer(f"{block}.mlp.fc2", (f"{there}.ff{end}.net.2",)),
            ]
        if i < dual:
            layers += [
                _fused(f"{here}.x_block.attn2.qkv", f"{there}.attn2", _IMAGE),
                Layer(f"{here}.x_block.attn2.proj", (f"{there}.attn2.to_out.0",)),
            ]
    return (*layers, *_FINAL)


_FINAL = (
    Layer("final_layer.adaLN_modulation.1", ("norm_out.linear",), halves=True),
    Layer("final_layer.linear", ("proj_out",)),
)


def _embedder(first: str, second: str, name: str) -> tuple[Layer, Layer]:
    there = f"time_text_embed.{name}"
    return Layer(first, (f"{there}.linear_1",)), Layer(second, (f"{there}.linear_2",))


def _fused(name: str, attention: str, names: tuple[str, ...]) -> Layer:
    return Layer(name, tuple(f"{attention}.{each}" for each in names), _THIRDS)
