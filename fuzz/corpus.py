"""The corpus: small sound files of every reader, from which mutations start. `python -m fuzz.corpus FOLDER` writes it.

Sizes are a few numbers per tensor: what is fuzzed is structure, and small inputs run fast.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fuzz.targets import pack

_TOML = """format = 1
adapter = "a"
source_sha256 = "00"
dtype = "float32"
default_rank = 2
asked = { rank = 2 }
totals = { energy = 0.9, error = 1e-3 }

[modules]
"layers.0.q" = { rank = 1, source_rank = 2, error = 0.5, loss_increase = 0.1, reason = "r" }
b = 0
"""


def _numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same numbers each time, in every column another direction."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    return torch.arange(1, count + 1).double().sin().reshape(shape).to(dtype)


def _weights(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    return safetensors.torch.save(dict(tensors), dict(metadata) if metadata else None)


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def _peft_cases() -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Configuration and tensors of one adapter of every kind."""
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"]}
    q, v, wte = (f"base_model.model.layers.0.{name}" for name in ("q", "v", "wte"))
    plain = {f"{q}.lora_A.weight": _numbers(2, 3), f"{q}.lora_B.weight": _numbers(4, 2)}
    other = {f"{v}.lora_A.weight": _numbers(1, 3), f"{v}.lora_B.weight": _numbers(4, 1)}
    conv = {f"{q}.lora_A.weight": _numbers(4, 3, 2, 2), f"{q}.lora_B.weight": _numbers(4, 2, 1, 1)}
    experts = {f"{q}.lora_A.weight": _numbers(4, 3), f"{q}.lora_B.weight": _numbers(5, 4)}
    return {
        "plain": (base, plain),
        "half": (base, {key: tensor.half() for key, tensor in plain.items()}),
        "patterns": (
            base | {"rank_pattern": {"^layers\\.0\\.v": 1}, "alpha_pattern": {"v|k": 3}, "use_rslora": True},
            plain | other,
        ),
        "expression": (base | {"target_modules": "(?:.*\\.)?[qv]"}, plain | other),
        "embedding": (base, {f"{wte}.lora_embedding_A": _numbers(2, 5), f"{wte}.lora_embedding_B": _numbers(3, 2)}),
        "conv": (base, conv),
        "experts": (base | {"target_modules": [], "target_parameters": ["layers.0.q"]}, experts),
        "extras": (
            base | {"modules_to_save": ["head"], "bias": "all", "exclude_modules": ["x"]},
            plain | {f"{q}.lora_B.bias": _numbers(4), "base_model.model.head.weight": _numbers(2, 2)},
        ),
    }


def _kohya_cases() -> dict[str, dict[str, Tensor]]:
    q, n = "lora_unet_q", _numbers
    alpha = {f"{q}.alpha": torch.tensor(1.0)}
    wide = {f"{q}.hada_w1_a": n(4, 2), f"{q}.hada_w1_b": n(2, 3), f"{q}.hada_w2_a": n(4, 1), f"{q}.hada_w2_b": n(1, 3)}
    return {
        "plain": {f"{q}.lora_down.weight": n(2, 3), f"{q}.lora_up.weight": n(4, 2)} | alpha,
        "conv": {f"{q}.lora_down.weight": n(2, 3, 2, 2), f"{q}.lora_up.weight": n(4, 2, 1, 1)} | alpha,
        "tucker": {
            f"{q}.lora_down.weight": n(2, 3, 1, 1),
            f"{q}.lora_mid.weight": n(2, 2, 3, 3),
            f"{q}.lora_up.weight": n(4, 2, 1, 1),
        },
        "diffusers": {"unet.q.lora.down.weight": n(2, 3), "unet.q.lora.up.weight": n(4, 2)},
        "bare": {"transformer.q.lora_A.weight": n(2, 3), "transformer.q.lora_B.weight": n(4, 2)},
        "loha": wide,
        "lokr": {f"{q}.lokr_w1": n(2, 2), f"{q}.lokr_w2_a": n(3, 1), f"{q}.lokr_w2_b": n(1, 2)} | alpha,
        "full": {f"{q}.diff": n(3, 4), f"{q}.diff_b": n(3)},
    }


def _method() -> dict[str, bytes]:
    """Other methods of PEFT that need no base model."""
    n, q = _numbers, "base_model.model.layers.0.q"
    hada = {f"{q}.hada_w{i}_a": n(4, 2) for i in (1, 2)} | {f"{q}.hada_w{i}_b": n(2, 3) for i in (1, 2)}
    cases: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
        "loha": ({"peft_type": "LOHA", "r": 2, "alpha": 4}, hada),
        "lokr": (
            {"peft_type": "LOKR", "r": 1, "alpha": 2},
            {f"{q}.lokr_w1": n(2, 2), f"{q}.lokr_w2_a": n(3, 1), f"{q}.lokr_w2_b": n(1, 2)},
        ),
        "adalora": (
            {"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 4},
            {f"{q}.lora_A": n(2, 3), f"{q}.lora_B": n(4, 2), f"{q}.lora_E": n(2, 1)},
        ),
        "qalora": (
            {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_qalora": True, "qalora_group_size": 3},
            {f"{q}.lora_A.weight": n(2, 2), f"{q}.lora_B.weight": n(4, 2)},
        ),
    }
    return {name: pack([_json(target_modules=["q"], **c), _weights(t)]) for name, (c, t) in cases.items()}


def _single_file() -> dict[str, bytes]:
    found = {name: _weights(tensors, {"ss_network_dim": "2"}) for name, tensors in _kohya_cases().items()}
    settings = {"unet.r": 2, "unet.lora_alpha": 4, "unet.rank_pattern": {"^q$": 2}, "unet.alpha_pattern": {"q": 3}}
    pair = {"unet.q.lora_A.weight": _numbers(2, 3), "unet.q.lora_B.weight": _numbers(4, 2)}
    return found | {"settings": _weights(pair, {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})}


def _gguf_base() -> dict[str, bytes]:
    import gguf

    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder, "a.gguf"), "llama")
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_tensor("blk.0.attn_q.weight", _numbers(4, 4).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"plain": Path(folder, "a.gguf").read_bytes()}


def _peft() -> dict[str, bytes]:
    return {name: pack([_json(**config), _weights(t)]) for name, (config, t) in _peft_cases().items()}


def _peft_bin() -> dict[str, bytes]:
    found = {}
    for name, (config, tensors) in _peft_cases().items():
        for kind, zipped in (("zip", True), ("old", False)):
            file = io.BytesIO()
            torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
            found[f"{name}_{kind}"] = pack([_json(**config), file.getvalue()])
    return found


def _mlx() -> dict[str, bytes]:
    n, q = _numbers, "model.layers.0.q"
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0}}
    cases = {
        "plain": {f"{q}.lora_a": n(3, 2), f"{q}.lora_b": n(2, 4)},
        "embedding": {"model.embed_tokens.lora_a": n(5, 2), "model.embed_tokens.lora_b": n(2, 4)},
        "experts": {f"{q}.lora_a": n(2, 2, 3), f"{q}.lora_b": n(2, 4, 2)},
        "extras": {f"{q}.lora_a": n(3, 2), f"{q}.lora_b": n(2, 4), "model.norm.bias": n(3)},
    }
    return {name: pack([_json(**config), _weights(tensors)]) for name, tensors in cases.items()}


def _gguf() -> dict[str, bytes]:
    import gguf

    n, found = _numbers, {}
    q, e = "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"
    cases = {
        "plain": {f"{q}.lora_a": n(2, 3), f"{q}.lora_b": n(4, 2)},
        "experts": {f"{e}.lora_a": n(2, 2, 3), f"{e}.lora_b": n(2, 4, 2), "blk.0.attn_norm.weight": n(3)},
        "embedding": {"token_embd.weight.lora_a": n(5, 2), "token_embd.weight.lora_b": n(3, 2)},
    }
    for name, tensors in cases.items():
        with tempfile.TemporaryDirectory() as folder:
            writer = gguf.GGUFWriter(Path(folder, "a.gguf"), "llama")
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 4.0)
            writer.add_file_type(0)
            writer.add_array("general.tags", ["one", ""])
            if name == "experts":
                writer.add_custom_alignment(8)
            for key, tensor in tensors.items():
                writer.add_tensor(key, tensor.numpy())
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            found[name] = Path(folder, "a.gguf").read_bytes()
    return found


def _base_model() -> dict[str, bytes]:
    n = _numbers
    index = _json(metadata={}, weight_map={"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return {
        "single": pack([b"", _weights({"a": n(2, 3), "b": n(4, dtype=torch.bfloat16)})]),
        "shards": pack([index, _weights({"a": n(2, 3)}), _weights({"b": n(2)})]),
    }


def _calibration() -> dict[str, bytes]:
    facts = {"format": 1, "loss": 1.0, "examples": 3, "data": "d", "base": "b", "source_sha256": None}
    header = {"calibration": json.dumps({**facts, "rows": {"q": 5}})}
    return {"plain": _weights({f"q.{name}": torch.eye(2) for name in "CFK"}, header)}


def _plan_json() -> dict[str, bytes]:
    modules = {"q": {"rank": 1, "source_rank": 2, "error": 0.5, "reason": "r"}, "b": 0}
    return {"plain": _json(format=1, adapter="a", asked={"rank": 2}, totals={"energy": 0.9}, modules=modules)}


def seeds() -> dict[str, dict[str, bytes]]:
    """Target -> name -> input."""
    return {
        "peft": _peft(),
        "peft_bin": _peft_bin(),
        "mlx": _mlx(),
        "gguf": _gguf(),
        "peft_method": _method(),
        "single_file": _single_file(),
        "check_folder": _peft() | _method(),
        "check_file": _single_file(),
        "gguf_base": _gguf_base(),
        "base_model": _base_model(),
        "plan_toml": {"plain": _TOML.encode()},
        "plan_json": _plan_json(),
        "calibration": _calibration(),
    }


def write(folder: Path) -> None:
    """One folder per target, one file per input."""
    for target, inputs in seeds().items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (folder / target / name).write_bytes(data)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
