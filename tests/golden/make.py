"""Makes the golden files: small adapters written by other programs' libraries, and the updates that they mean.

    python tests/golden/make.py FOLDER

The files in this folder stay as they are: they stand for what people have on disk. Numbers are small multiples of 1/8,
so that every product is exact in every dtype.
"""

import json
import sys
from pathlib import Path

import gguf
import safetensors.torch
import torch
from torch import Tensor

RANK, ALPHA = 4, 6.0  # a scale of 1.5
SHAPES = {"model.layers.0.self_attn.q_proj": (12, 8), "model.layers.0.mlp.down_proj": (8, 16)}


def factors(out: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """B and A."""
    generator = torch.Generator().manual_seed(seed)
    B = torch.randint(-8, 9, (out, RANK), generator=generator) / 8
    A = torch.randint(-8, 9, (RANK, columns), generator=generator) / 8
    return B, A


def main(folder: Path) -> None:
    """Write all of them."""
    pairs = {name: factors(*shape, seed) for seed, (name, shape) in enumerate(SHAPES.items())}
    expected = {name: ALPHA / RANK * B.double() @ A.double() for name, (B, A) in pairs.items()}
    unet = {"unet.mid_block.attentions.0.proj_in": "lora_unet_mid_block_attentions_0_proj_in"}
    B, A = factors(10, 6, 9)
    loha = [factors(10, 6, seed) for seed in (10, 11)]

    def save(name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(
            {key: t.clone().contiguous() for key, t in tensors.items()}, folder / name, metadata
        )

    keys = {name: f"base_model.model.{name}" for name in pairs}
    peft = {f"{keys[n]}.lora_A.weight": A for n, (_, A) in pairs.items()}
    save(
        "peft/adapter_model.safetensors",
        peft | {f"{keys[n]}.lora_B.weight": B for n, (B, _) in pairs.items()},
        {"format": "pt"},
    )
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"]}
    (folder / "peft/adapter_config.json").write_text(json.dumps(config))
    mlx = {f"{n}.lora_a": A.T for n, (_, A) in pairs.items()} | {f"{n}.lora_b": B.T for n, (B, _) in pairs.items()}
    save("mlx/adapters.safetensors", mlx)
    config = {
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": RANK, "scale": ALPHA / RANK, "dropout": 0.0},
    }
    (folder / "mlx/adapter_config.json").write_text(json.dumps(config))
    ((path, name),) = unet.items()
    settings = {"unet.r": RANK, "unet.lora_alpha": ALPHA, "unet.target_modules": ["mid_block.attentions.0.proj_in"]}
    save("diffusers.safetensors", {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B},
         {"format": "pt", "lora_adapter_metadata": json.dumps(settings)})  # fmt: skip
    alpha = {f"{name}.alpha": torch.tensor(ALPHA)}
    save("kohya.safetensors", {f"{name}.lora_down.weight": A.half(), f"{name}.lora_up.weight": B.half()} | alpha,
         {"ss_network_dim": f"{RANK}", "ss_network_alpha": "6.0", "ss_network_module": "networks.lora"})  # fmt: skip
    hada = {f"{name}.hada_w{i + 1}_{side}": t for i, p in enumerate(loha) for side, t in zip("ab", p, strict=True)}
    save("lycoris.safetensors", hada | alpha, {"ss_network_module": "lycoris.kohya"})
    writer = gguf.GGUFWriter(folder / "adapter.gguf", "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, ALPHA)
    tensors = dict(zip(("blk.0.attn_v", "blk.0.ffn_down"), pairs.values(), strict=True))
    for key, (up, down) in tensors.items():
        writer.add_tensor(f"{key}.weight.lora_a", down.numpy())
        writer.add_tensor(f"{key}.weight.lora_b", up.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (B1, A1), (B2, A2) = loha
    image = ALPHA / RANK * B.double() @ A.double()
    save("expected.safetensors", {
        **{f"{place}/{n}": dW for place in ("peft", "mlx") for n, dW in expected.items()},
        **{f"adapter.gguf/{n}": dW for n, dW in zip(tensors, expected.values(), strict=True)},
        f"diffusers.safetensors/{path}": image,
        f"kohya.safetensors/{name}": image,
        f"lycoris.safetensors/{name}": ALPHA / RANK * (B1.double() @ A1.double()) * (B2.double() @ A2.double()),
    })  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]))
