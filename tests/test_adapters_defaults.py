"""torch's default dtype, default device and inference mode while an adapter is made and first used: nothing changes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from adapters_cases import METHODS, Method, adapted, batch, net
from torch.nn import functional

DRAWN_IN_EACH_PASS = {
    "nola again": replace(METHODS["nola"], settings={"r": 3, "bases": 12, "keep_bases": False}),
    "projlora fastfood": replace(METHODS["projlora"], settings={"r": 3, "length": 48, "projection": "fastfood"}),
    "projlora gaussian": replace(METHODS["projlora"], settings={"r": 3, "length": 48, "projection": "gaussian"}),
    "loraxs random": replace(METHODS["loraxs"], settings={"r": 3, "basis": "random"}),
}
CASES = METHODS | DRAWN_IN_EACH_PASS
pytestmark = pytest.mark.parametrize("method", CASES.values(), ids=CASES)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_default_dtype_is_no_part_of_an_adapter(method: Method, dtype: torch.dtype) -> None:
    base, x = net(), batch()
    wanted = adapted(method, copy.deepcopy(base), init_weights=False)(x)
    with default_dtype(dtype):
        assert torch.equal(adapted(method, base, init_weights=False)(x), wanted)


def test_the_default_device_is_no_part_of_an_adapter(method: Method) -> None:
    base, x = net(), batch()
    wanted = adapted(method, copy.deepcopy(base), init_weights=False)(x)
    with torch.device("meta"):
        model = adapted(method, base, init_weights=False)
    assert torch.equal(model(x), wanted)


def test_it_can_be_trained_after_a_pass_in_inference_mode(method: Method) -> None:
    model = adapted(method, trained=True)
    with torch.inference_mode():
        model(batch())
    functional.mse_loss(model.train()(batch()), torch.ones(4, 8, 3)).backward()
    assert any(parameter.grad is not None for parameter in model.parameters())
