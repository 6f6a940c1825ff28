"""Layers of the text encoders: CLIP and T5 as transformers has them; kohya's trainer takes the same paths."""

from __future__ import annotations

from lora_squeeze.formats.kohya_maps.layer import Layer

_CLIP = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
_T5 = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)


def clip(blocks: int, *, projection: bool = False) -> tuple[Layer, ...]:
    """Layers of a CLIPTextModel of so many blocks, or of a CLIPTextModelWithProjection."""
    paths = [f"text_model.encoder.layers.{i}.{path}" for i in range(blocks) for path in _CLIP]
    return _same([*paths, "text_projection"] if projection else paths)


def t5(blocks: int) -> tuple[Layer, ...]:
    """Layers of a gated T5EncoderModel of so many blocks."""
    return _same([f"encoder.block.{i}.{path}" for i in range(blocks) for path in _T5])


def _same(paths: list[str]) -> tuple[Layer, ...]:
    return tuple(Layer(path, (path,)) for path in paths)
