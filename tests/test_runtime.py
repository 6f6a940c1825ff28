"""Number formats by what a processor has."""

import pytest
import torch

from lora_squeeze.runtime import choose_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "has", "precision"),
    [
        ("Intel(R) Xeon(R) Processor", (), "float32"),
        ("Intel(R) Xeon(R) Processor", ("avx512_bf16",), "float32"),  # slower than float32 where there is no AMX
        ("Intel(R) Xeon(R) Processor", ("avx512_bf16", "amx_bf16"), "bfloat16"),
        ("AMD EPYC", (), "float32"),
        ("AMD EPYC", ("avx512_bf16",), "bfloat16"),
        ("Neoverse-V1", ("bf16",), "bfloat16"),
    ],
)
def test_the_precision_of_a_processor_is_the_faster_one(monkeypatch, name, has, precision):
    capabilities = {"cpu_name": name, **{one: one in has for one in ("avx512_bf16", "amx_bf16", "bf16")}}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(CPU) == precision


def test_without_a_list_of_capabilities_it_is_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert choose_precision(CPU) == "float32"
