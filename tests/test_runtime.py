"""Number formats by what a processor has."""

import pytest
import torch

from lora_squeeze.runtime import choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has", "precision"),
    [
        ((), "float32"),
        (("avx512_bf16",), "float32"),  # slower than float32 where there is no AMX
        (("avx512_bf16", "amx_bf16"), "bfloat16"),
        (("bf16",), "bfloat16"),  # ARM
    ],
)
def test_the_precision_of_a_processor_is_the_faster_one(monkeypatch, has, precision):
    capabilities = {name: name in has for name in ("avx512_bf16", "amx_bf16", "bf16")}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(CPU) == precision


def test_without_a_list_of_capabilities_it_is_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision(CPU) == "float32"
