"""Squeezes above quantised base weights: the base is never touched, the layer goes on working."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import lora_squeeze
from lora_squeeze.schedule import make_schedule
from lora_squeeze.training.live import live_modules
from lora_squeeze.training.squeezer import Squeezer

bnb = pytest.importorskip("bitsandbytes")
SIZE = 64


def quantised(bits: int) -> nn.Module:
    """Two linear layers, quantised by bitsandbytes on the CPU."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(2):
        plain = nn.Linear(SIZE, SIZE)
        if bits == 8:
            layer: Any = bnb.nn.Linear8bitLt(SIZE, SIZE, has_fp16_weights=False)
            layer.weight = bnb.nn.Int8Params(plain.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            layer = bnb.nn.Linear4bit(SIZE, SIZE, compute_dtype=torch.float32, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=layer)
        layer.bias = plain.bias
        layers.append(layer.to("cpu"))
    model = nn.Sequential(*layers)
    setattr(model, f"is_loaded_in_{bits}bit", True)  # what transformers says and PEFT asks for
    return model


def batch(step: int) -> Tensor:
    return torch.randn(8, SIZE, generator=torch.Generator().manual_seed(step))


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
@pytest.mark.parametrize("way", ["replace", "mask"])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_goes_on_above_a_quantised_base(bits: int, way: str, tmp_path: Path) -> None:
    base = quantised(bits)
    model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=["0", "1"]))
    kinds = {type(m.layer).__name__ for m in live_modules(model, "default")}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = {k: copy.deepcopy(v) for k, v in model.state_dict().items() if "base_layer" in k}
    squeezer = Squeezer(model, optimizer, make_schedule(16, 4, 40), in_place=way, data_aware=True)
    target, losses = batch(99) @ torch.full((SIZE, SIZE), 0.02), []
    for _ in range(40):
        loss = (model(batch(99)) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
        losses.append(loss.item())
    squeezer.finish()
    assert {m.width for m in live_modules(model, "default")} == {4}
    assert losses[-1] < losses[0] / 2
    for key, value in model.state_dict().items():
        if key in before and isinstance(value, Tensor):
            assert torch.equal(value, before[key]), key
    model.save_pretrained(str(tmp_path / "small"))
    assert lora_squeeze.load(tmp_path / "small").rank == 4
    again = PeftModel.from_pretrained(quantised(bits), str(tmp_path / "small")).eval()
    with torch.no_grad():
        assert torch.allclose(again(batch(5)), model.eval()(batch(5)), atol=1e-4)
