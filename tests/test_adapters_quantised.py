"""Every parameterisation on a base whose weights are stored in 4 or 8 bits, as QLoRA's are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, Method, adapted, drawn_from, layers
from peft import PeftModel
from torch import Tensor, nn

from lora_squeeze.training.inplace import squeeze_

bitsandbytes = pytest.importorskip("bitsandbytes")
pytestmark = [
    pytest.mark.filterwarnings("ignore:Merge .* module to .-bit linear may get different generations"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast"),
]
ALL = list(METHODS.values())
STATIC = [method for method in ALL if method.static]
IN, HIDDEN = 64, 128  # 4-bit kernels want multiples of 32
TOLERANCE = 2e-2  # 8-bit layers round their inputs too, 4-bit ones compute in bfloat16


class Quantised(nn.Module):
    """A layer of each shape in few bits, with a nonlinearity between."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.is_loaded_in_4bit, self.is_loaded_in_8bit = bits == 4, bits == 8  # as transformers tells PEFT
        self.wide, self.tall = nn.Linear(IN, HIDDEN), nn.Linear(HIDDEN, IN, bias=False)
        for name in ("wide", "tall"):
            layer = getattr(self, name)
            made: Any = (
                bitsandbytes.nn.Linear4bit(*_sizes(layer), compute_dtype=torch.float32, quant_type="nf4")
                if bits == 4
                else bitsandbytes.nn.Linear8bitLt(*_sizes(layer), has_fp16_weights=False, threshold=6.0)
            )
            made.load_state_dict(layer.state_dict())
            setattr(self, name, made.to("cpu"))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, IN) -> the same."""
        found: Tensor = self.tall(torch.tanh(self.wide(x)))
        return found


def _sizes(layer: nn.Linear) -> tuple[int, int, bool]:
    return layer.in_features, layer.out_features, layer.bias is not None


def base(bits: int) -> nn.Module:
    with drawn_from(0):
        return Quantised(bits).eval()


def batch(features: int = IN) -> Tensor:
    return torch.randn(4, 8, features, generator=torch.Generator().manual_seed(1))


def close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", ALL, ids=[method.name for method in ALL])
def test_it_is_trained_saved_and_loaded(method: Method, bits: int, tmp_path: Path) -> None:
    live = adapted(method, base(bits), trained=True)
    live.train()(batch()).square().mean().backward()
    for name, parameter in live.named_parameters():
        if parameter.requires_grad and not (method.waits and method.waits in name):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
    with torch.no_grad():
        wanted = live.eval()(batch())
        live.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(base(bits), tmp_path).eval()
        close(again(batch()), wanted, 1e-5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", STATIC, ids=[method.name for method in STATIC])
@torch.no_grad()
def test_the_update_is_added_to_the_weight_that_the_bits_stand_for(method: Method, bits: int) -> None:
    live = adapted(method, base(bits), trained=True)
    for layer in layers(live).values():
        x, delta = batch(layer.in_features), layer.deltas["default"]
        bias = delta.bias()
        wanted = layer.base_layer(x) + x @ delta.weight().T + (0 if bias is None else bias)
        close(layer(x), wanted, TOLERANCE)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", STATIC, ids=[method.name for method in STATIC])
@torch.no_grad()
def test_merged_it_is_rounded_to_the_same_bits_and_comes_out_again(method: Method, bits: int) -> None:
    live = adapted(method, base(bits), trained=True)
    wanted, plain = live(batch()), base(bits)(batch())
    live.merge_adapter()
    rounding = 0.35 if bits == 4 else 0.05  # twice, and through two layers
    close(live(batch()), wanted, rounding)
    live.unmerge_adapter()
    with live.disable_adapter():
        close(live(batch()), plain, rounding)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("method", STATIC, ids=[method.name for method in STATIC])
@torch.no_grad()
def test_it_becomes_a_lora_on_the_same_bits(method: Method, bits: int) -> None:
    live = adapted(method, base(bits), trained=True)
    wanted = live(batch())
    squeeze_(live, energy=1.0)
    kinds = {type(layer).__module__ for layer in layers(live).values()}
    assert kinds == {"peft.tuners.lora.bnb"}
    close(live(batch()), wanted, TOLERANCE)
