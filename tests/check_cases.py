"""For every rule of `lora_squeeze.readers`, a file that is a case of it: a plain file that one thing was done to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from adapter_cases import PREFIX, plain_config, plain_tensors, write_folder
from gguf_cases import gguf_tensors, write_gguf
from kohya_cases import CONV, Q, kohya_tensors, write_kohya
from kohya_cases import SHAPES as KOHYA
from mlx_cases import mlx_config, mlx_tensors, write_mlx
from torch import Tensor

from lora_squeeze.readers.servers import VARIANTS

Build = Callable[[Path], Path]
Change = Callable[[dict[str, Tensor]], Mapping[str, Tensor | None]]

# The two layers of a language model, all types of modules in both.
SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": size
    for layer in range(2)
    for name, size in {"q_proj": (24, 20), "v_proj": (8, 20)}.items()
}
TARGETS = ["q_proj", "v_proj"]
FIRST = next(iter(SHAPES))
KEY = f"{PREFIX}{FIRST}"
EXPERTS = "model.layers.0.mlp.experts"
HEADER = "lora_adapter_metadata"
UNET = {  # as diffusers calls some modules of a UNet: (out, in)
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (16, 12),
    "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2": (12, 16),
}
TO_Q = next(iter(UNET))


def peft(change: Change = lambda tensors: {}, drop: tuple[str, ...] = (), rank: int = 8, **settings: Any) -> Build:
    """A PEFT folder; None removes a tensor, `drop` fields of the configuration."""

    def build(folder: Path) -> Path:
        tensors = changed(plain_tensors(SHAPES, rank), change)
        config = {"target_modules": TARGETS, "r": rank} | settings
        config = {name: value for name, value in plain_config(**config).items() if name not in drop}
        return write_folder(folder / "peft", tensors, config)

    return build


def changed(tensors: dict[str, Tensor], change: Change) -> dict[str, Tensor]:
    found = {**tensors, **change(tensors)}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def renamed(rename: Callable[[str], str]) -> Change:
    return lambda tensors: {name: None for name in tensors} | {rename(name): t for name, t in tensors.items()}


def put(key: str, *shape: int) -> Change:
    return lambda _: {key: torch.ones(shape)}


def remove(key: str) -> Change:
    return lambda _: {key: None}


def shorter(key: str, rank: int) -> Change:
    """Both factors of one module, cut to a rank."""
    return lambda t: {
        f"{key}.lora_A.weight": t[f"{key}.lora_A.weight"][:rank],
        f"{key}.lora_B.weight": t[f"{key}.lora_B.weight"][:, :rank],
    }


def experts(*paths: str, number: int = 3, rank: int = 8) -> Change:
    """Experts in one parameter, of these wrappers."""
    return lambda _: {
        f"{PREFIX}{path}.lora_{side}.weight": torch.ones(shape)
        for path in paths
        for side, shape in (("A", (number * rank, 12)), ("B", (16, number * rank)))
    }


def conv(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    return {
        f"{PREFIX}conv.lora_A.weight": torch.ones(8, 4, 3, 3),
        f"{PREFIX}conv.lora_B.weight": torch.ones(6, 8, 1, 1),
    }


def embedding(tensors: dict[str, Tensor]) -> Mapping[str, Tensor]:
    path = f"{PREFIX}model.embed_tokens"
    return {f"{path}.lora_embedding_A": torch.ones(8, 40), f"{path}.lora_embedding_B": torch.ones(20, 8)}


def beside(name: str) -> Build:
    """A PEFT folder with another file in it."""

    def build(folder: Path) -> Path:
        path = peft()(folder)
        (path / name).write_text("{}")
        return path

    return build


def kohya(change: Change = lambda tensors: {}, **options: Any) -> Build:
    return lambda folder: write_kohya(folder / "kohya.safetensors", changed(kohya_tensors(**options), change))


def diffusers_tensors(rank: int = 4, prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}{name}.lora_{side}.weight": torch.full(shape, 0.1 * (i + 1))
        for i, (name, (out, columns)) in enumerate(UNET.items())
        for side, shape in (("A", (rank, columns)), ("B", (out, rank)))
    }


def diffusers(
    change: Change = lambda tensors: {}, settings: Mapping[str, Any] | None = None, prefix: str = ""
) -> Build:
    header = {} if settings is None else {HEADER: json.dumps(settings)}
    return lambda folder: write_kohya(
        folder / "pytorch_lora_weights.safetensors", changed(diffusers_tensors(prefix=prefix), change), header
    )


def unet_settings(**changes: Any) -> dict[str, Any]:
    names = [name.removeprefix("unet.") for name in UNET]
    return {
        f"unet.{key}": value for key, value in ({"r": 4, "lora_alpha": 8, "target_modules": names} | changes).items()
    }


def gguf(change: Change = lambda tensors: {}, **options: Any) -> Build:
    plain = {name: tensor for name, tensor in gguf_tensors().items() if "token_embd" not in name}
    return lambda folder: write_gguf(folder / "adapter.gguf", changed(plain, change), **options)


def other_gguf(key: str, value: str) -> Build:
    """A GGUF adapter in which a text of one field is another one of the same length."""

    def build(folder: Path) -> Path:
        path = gguf()(folder)
        old = {"general.type": b"adapter", "adapter.type": b"lora"}[key]
        data, at = path.read_bytes(), path.read_bytes().index(key.encode())
        start = data.index(old, at + len(key))
        path.write_bytes(data[:start] + value.encode() + data[start + len(old) :])
        return path

    return build


def mlx(change: Change = lambda tensors: {}, drop: tuple[str, ...] = (), **settings: Any) -> Build:
    config = {name: value for name, value in mlx_config(**settings).items() if name not in drop}
    return lambda folder: write_mlx(folder / "mlx", changed(mlx_tensors(), change), config)


@dataclass(frozen=True)
class Trigger:
    """A case of a rule.

    Args:
        reader: whose rule it is.
        build: writes the file.
        plain: writes its sibling, which is no case of it.
        max_rank: asked for with both.
    """

    reader: str
    build: Build
    plain: Build
    max_rank: int | None = None


def _of(reader: str, plain: Build, cases: Mapping[str, Build], **options: Any) -> dict[str, Trigger]:
    return {rule: Trigger(reader, build, plain, **options) for rule, build in cases.items()}


_DORA = peft(put(f"{KEY}.lora_magnitude_vector", 24), use_dora=True)
_ORPHAN = peft(remove(f"{KEY}.lora_B.weight"))
_GA = peft(init_lora_weights="lora_ga")
_FLAT = peft(put(f"{KEY}.lora_A.weight", 0))
_PATTERNS = peft(alpha_pattern={"v_proj": 3})
_TOKENS = peft(
    put(f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", 3, 20), trainable_token_indices=[1]
)
_HALF = peft(experts(EXPERTS), target_parameters=["experts.down_proj"])
_BOTH = peft(experts(EXPERTS, f"{EXPERTS}.base_layer"), target_parameters=["experts.gate_up_proj", "experts.down_proj"])
_SAVED = peft(put(f"{PREFIX}lm_head.weight", 40, 20), modules_to_save=["lm_head"])
_LORA_BIAS = peft(put(f"{KEY}.lora_B.bias", 24), lora_bias=True)
_MIXED = peft(  # one scale for all, as a squeeze writes it
    shorter(KEY, 4),
    rank_pattern={r"layers\.0\.self_attn\.q_proj": 4},
    alpha_pattern={r"layers\.0\.self_attn\.q_proj": 6},
)
_FULL = kohya(lambda t: {f"{Q}.lora_up.weight": None, f"{Q}.lora_down.weight": None, f"{Q}.diff": torch.ones(24, 16)})
_DOTTED = kohya(renamed(lambda key: f"diffusion_model.{key}"))
_DORA_SCALE = kohya(put(f"{Q}.dora_scale", 1, 16))


def _set(name: str) -> Build:
    return peft(**{name: {"x": 1} if name.endswith("_config") else [[0, 2]] if "tokens" not in name else [7]})


TRIGGERS: dict[str, Trigger] = {
    **_of("peft", peft(), {
        "peft-type": peft(drop=("peft_type",)),
        "peft-damaged": _FLAT,
        "peft-rank": peft(rank_pattern={"v_proj": 4}),
        "peft-init": peft(init_lora_weights="unheard-of"),
        "peft-corda": peft(init_lora_weights="corda"),
        "peft-orphan": _ORPHAN,
        "peft-names": peft(renamed(lambda key: key.replace(".weight", ".one.weight"))),
        "peft-prefix": peft(renamed(lambda key: key.removeprefix(PREFIX))),
        "peft-target": peft(target_modules=["q_proj"]),
        "peft-magnitude": peft(put(f"{KEY}.lora_magnitude_vector", 24)),
        "peft-variant": peft(use_something=True),
        "peft-lora-ga": _GA,
        "peft-repeated-init": peft(init_lora_weights="pissa"),
        "peft-fields": peft(written_by="me"),
    }),
    **_of("vllm", peft(), {
        "vllm-kind": peft(renamed(lambda key: key.replace("lora_A.weight", "hada_w1_a")), peft_type="LOHA"),
        "vllm-damaged": _FLAT,
        "vllm-required": peft(drop=("lora_alpha",)),
        "vllm-dora": _DORA,
        "vllm-init": peft(init_lora_weights="olora"),
        "vllm-bias": peft(put(f"{KEY}.base_layer.bias", 24), bias="lora_only"),
        "vllm-lora-bias": _LORA_BIAS,
        "vllm-saved": _SAVED,
        "vllm-alora": _set("alora_invocation_tokens"),
        "vllm-replication": _set("layer_replication"),
        "vllm-bdlora": _set("use_bdlora"),
        "vllm-qalora": _set("use_qalora"),
        "vllm-rank": peft(rank=513),
        "vllm-rank-option": peft(rank=17),
        "vllm-tokens": _TOKENS,
        "vllm-keys": peft(put(f"{PREFIX}model.norm.weight", 20)),
        "vllm-orphan": _ORPHAN,
        "vllm-layer": peft(conv, target_modules=[*TARGETS, "conv"]),
        "vllm-half-experts": _HALF,
        "vllm-scale": peft(r=4),
        "vllm-whole-embedding": peft(put(f"{PREFIX}model.embed_tokens.base_layer.weight", 40, 20)),
        "vllm-lora-ga": _GA,
        "vllm-experts": _BOTH,
        "vllm-embedding": peft(embedding, target_modules=[*TARGETS, "embed_tokens"]),
        "vllm-head": peft(put(f"{PREFIX}score.weight", 3, 20), modules_to_save=["classifier", "score"]),
        "vllm-older": _PATTERNS,
    } | {f"vllm-{f}": _set(f) for f in ("arrow_config", "kasa_config", "monteclora_config", "velora_config")}),
    **_of("sglang", peft(), {
        "sglang-kind": peft(peft_type="LOHA"),
        "sglang-damaged": _FLAT,
        "sglang-required": peft(drop=("r",)),
        "sglang-dora": _DORA,
        "sglang-layer": peft(conv, target_modules=[*TARGETS, "conv"]),
        "sglang-orphan": _ORPHAN,
        "sglang-scale": peft(use_rslora=True),
        "sglang-init": peft(init_lora_weights="pissa_niter_4"),
        "sglang-beside": _SAVED,
        "sglang-lora-ga": _GA,
        "sglang-experts": _BOTH,
        "sglang-tokens": beside("added_tokens.json"),
    } | {f"sglang-{field}": _set(field) for field in ("lora_bias", *VARIANTS)}),
    **_of("sglang", peft(), {"sglang-rank": peft(rank=12)}, max_rank=8),
    **_of("tgi", peft(), {
        "tgi-kind": peft(peft_type="LOHA"),
        "tgi-damaged": _FLAT,
        "tgi-mixed": peft(shorter(KEY, 24), rank=40, rank_pattern={r"layers\.0\.self_attn\.q_proj": 24}),
        "tgi-scale": _PATTERNS,
        "tgi-dora": _DORA,
        "tgi-keys": peft(renamed(lambda key: key.replace(".weight", ".default.weight"))),
        "tgi-partial": peft(lambda t: {f"{KEY}.lora_A.weight": None, f"{KEY}.lora_B.weight": None}),
        "tgi-orphan": _ORPHAN,
        "tgi-init": peft(init_lora_weights="pissa"),
        "tgi-beside": _SAVED,
        "tgi-lora-ga": _GA,
        "tgi-filled": peft(rank=6),
    } | {f"tgi-{field}": _set(field) for field in ("lora_bias", *VARIANTS)}),
    **_of("tensorrt-llm", peft(), {
        "tensorrt-damaged": _FLAT,
        "tensorrt-required": peft(drop=("lora_alpha",)),
        "tensorrt-modules": _BOTH,
        "tensorrt-keys": peft(put(f"{KEY}.base_layer.bias", 24), bias="lora_only"),
        "tensorrt-orphan": _ORPHAN,
        "tensorrt-scale": _PATTERNS,
        "tensorrt-mixed": _MIXED,
        "tensorrt-vocabulary": peft(embedding, target_modules=[*TARGETS, "embed_tokens"]),
        "tensorrt-init": peft(init_lora_weights="loftq"),
        "tensorrt-lora-ga": _GA,
        "tensorrt-saved": _SAVED,
        "tensorrt-dora": _DORA,
    } | {f"tensorrt-{field}": _set(field) for field in VARIANTS}),
    **_of("tensorrt-llm", peft(), {"tensorrt-rank": peft(rank=12)}, max_rank=8),
    **_of("llama.cpp", gguf(), {
        "llama.cpp-damaged": gguf(lambda t: {**dict.fromkeys(t), "blk.0.attn_norm.weight": torch.ones(32)}),
        "llama.cpp-general-type": other_gguf("general.type", "another"),
        "llama.cpp-adapter-type": other_gguf("adapter.type", "dora"),
        "llama.cpp-suffix": gguf(put("blk.0.attn_q.bias", 24)),
        "llama.cpp-orphan": gguf(remove("blk.0.attn_q.weight.lora_a")),
        "llama.cpp-norm": gguf(put("blk.0.attn_norm.weight", 32)),
        "llama.cpp-embedding": lambda folder: write_gguf(folder / "adapter.gguf"),
    }),
    **_of("llama.cpp", peft(), {"llama.cpp-converter": peft(use_rslora=True)}),
    **_of("mlx-lm", mlx(), {
        "mlx-lm-damaged": mlx(lambda t: {**dict.fromkeys(t), "model.norm.weight": torch.ones(16)}),
        "mlx-lm-parameters": mlx(lora_parameters={"rank": 6, "scale": 2.5}),
        "mlx-lm-layers": mlx(drop=("num_layers",)),
        "mlx-lm-rank": mlx(lambda t: {k: t[k].T for k in ("lm_head.lora_a", "lm_head.lora_b")}),
        "mlx-lm-orphan": mlx(remove("lm_head.lora_a")),
        "mlx-lm-keys": mlx(put("model.norm.weight", 16)),
        "mlx-lm-alpha": mlx(lora_parameters={"rank": 6, "scale": 2.5, "dropout": 0.0, "alpha": 12}),
    }),
    **_of("diffusers", kohya(), {
        "diffusers-damaged": kohya(put(f"{Q}.lora_up.weight", 24, 5)),
        "diffusers-form": _FULL,
        "diffusers-keys": kohya(put(f"{Q}.diff_b", 24)),
        "diffusers-half": kohya(remove(f"{Q}.lora_up.weight")),
        "diffusers-names": _DOTTED,
        "diffusers-scale": kohya(alpha={name: i + 1.0 for i, name in enumerate(KOHYA)}),
        "diffusers-dora-scale": _DORA_SCALE,
        "diffusers-older": kohya(ranks={name: i + 2 for i, name in enumerate(KOHYA)}, alpha=None),
        "diffusers-other": kohya(renamed(lambda key: key.replace("lora_unet_", "lora_unet_double_blocks_0_"))),
    }),
    **_of("diffusers", diffusers(settings=unet_settings()), {
        "diffusers-component": diffusers(settings={"text_encoder.r": 4}),
        "diffusers-fields": diffusers(settings=unet_settings(something=1)),
        "diffusers-rank": diffusers(settings=unet_settings(r=8)),
        "diffusers-orphan": diffusers(remove(f"{TO_Q}.lora_B.weight"), unet_settings()),
        "diffusers-alpha": diffusers(put(f"{TO_Q}.alpha")),
    }),
    **_of("comfyui", kohya(), {
        "comfyui-damaged": kohya(put(f"{Q}.lora_up.weight", 24, 5)),
        "comfyui-half": kohya(remove(f"{Q}.lora_down.weight")),
        "comfyui-scale": kohya(alpha=0.0),
        "comfyui-dora": kohya(put(f"{Q}.dora_scale", 24, 1)),
        "comfyui-keys": kohya(put(f"{Q}.something", 3)),
    }),
    **_of("comfyui", diffusers(), {"comfyui-magnitude": diffusers(put(f"{TO_Q}.lora_magnitude_vector", 16))}),
    **_of("sd-scripts", kohya(), {
        "sd-scripts-damaged": kohya(put(f"{Q}.lora_up.weight", 24, 5)),
        "sd-scripts-tucker": kohya(lambda t: {
            f"{CONV}.lora_down.weight": torch.ones(6, 4, 1, 1), f"{CONV}.lora_mid.weight": torch.ones(6, 6, 3, 3)
        }),
        "sd-scripts-names": _DOTTED,
        "sd-scripts-form": _FULL,
        "sd-scripts-dora": _DORA_SCALE,
        "sd-scripts-orphan": kohya(remove(f"{Q}.lora_up.weight")),
        "sd-scripts-beside": kohya(put(f"{Q}.diff_b", 24)),
    }),
}  # fmt: skip
