"""Layers of the UNets of Stable Diffusion 1, 2 and XL, under the names of diffusers and of the original (LDM) model.

The original counts the blocks of one side in one list: conv_in, then per level its resnets (each with its attention)
and its downsampler. diffusers counts the levels, and in them resnets, attentions and samplers apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lora_squeeze.formats.kohya_maps.layer import Layer

_ATTENTION = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]
_FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]
_RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3"}
_SHORTCUT = {"conv_shortcut": "skip_connection"}
_ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
_SIZES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}  # XL: sizes and crops
_KERNELS = {**dict.fromkeys(("conv_in", "conv_out", "conv1", "conv2", "conv"), (3, 3)), "conv_shortcut": (1, 1)}
_PROJECTIONS = ("proj_in", "proj_out")  # of attentions: linear layers, or convolutions of 1 x 1
_PER_LEVEL = 2  # resnets of a level on the way down; one more on the way up

Pairs = Iterator[tuple[str, str]]  # path in diffusers, path in the original


def unet_layers(
    channels: Sequence[int], depths: Sequence[int], middle: int, *, sizes: bool, linear: bool
) -> tuple[Layer, ...]:
    """All Linear and convolution layers.

    Args:
        channels: of the levels, from the outside in.
        depths: transformer blocks in each attention of a level; 0 for levels without attention.
        middle: the same of the middle block.
        sizes: whether there is an embedding of image sizes (XL).
        linear: whether the projections around the blocks of an attention are linear layers (2 and XL).
    """
    kernels = _KERNELS if linear else _KERNELS | dict.fromkeys(_PROJECTIONS, (1, 1))
    pairs = [*_ENDS.items(), *(_SIZES.items() if sizes else ()), *_down(channels, depths), *_middle(middle)]
    return tuple(
        Layer(original, (path,), kernel=kernels.get(path.rpartition(".")[2], ()))
        for path, original in (*pairs, *_up(depths))
    )


def _down(channels: Sequence[int], depths: Sequence[int]) -> Pairs:
    block = 1
    for level, depth in enumerate(depths):
        here = f"down_blocks.{level}"
        for i in range(_PER_LEVEL):
            widens = i == 0 and level > 0 and channels[level] != channels[level - 1]
            yield from _resnet(f"{here}.resnets.{i}", f"input_blocks.{block}.0", shortcut=widens)
            yield from _attention(f"{here}.attentions.{i}", f"input_blocks.{block}.1", depth)
            block += 1
        if level < len(depths) - 1:
            yield f"{here}.downsamplers.0.conv", f"input_blocks.{block}.0.op"
            block += 1


def _middle(depth: int) -> Pairs:
    yield from _resnet("mid_block.resnets.0", "middle_block.0", shortcut=False)
    yield from _attention("mid_block.attentions.0", "middle_block.1", depth)
    yield from _resnet("mid_block.resnets.1", "middle_block.2", shortcut=False)


def _up(depths: Sequence[int]) -> Pairs:
    block = 0
    for level, depth in enumerate(reversed(depths)):
        here = f"up_blocks.{level}"
        for i in range(_PER_LEVEL + 1):
            yield from _resnet(f"{here}.resnets.{i}", f"output_blocks.{block}.0", shortcut=True)
            yield from _attention(f"{here}.attentions.{i}", f"output_blocks.{block}.1", depth)
            block += 1
        if level < len(depths) - 1:
            yield f"{here}.upsamplers.0.conv", f"output_blocks.{block - 1}.{2 if depth else 1}.conv"


def _resnet(path: str, ldm: str, *, shortcut: bool) -> Pairs:
    for name, original in {**_RESNET, **(_SHORTCUT if shortcut else {})}.items():
        yield f"{path}.{name}", f"{ldm}.{original}"


def _attention(path: str, ldm: str, depth: int) -> Pairs:
    if not depth:
        return
    names = [f"transformer_blocks.{i}.{name}" for i in range(depth) for name in (*_ATTENTION, *_FEED_FORWARD)]
    for name in (*names, *_PROJECTIONS):
        yield f"{path}.{name}", f"{ldm}.{name}"
