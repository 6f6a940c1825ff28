"""The same on a CUDA device; run with `-m gpu` on a machine that has one."""

import pytest
import torch
from factor_cases import factors

from lora_squeeze.lowrank import LowRank

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("method", ["gram", "qr", "rsvd", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cuda_update_is_truncated_there_as_on_the_cpu(method: str, dtype: torch.dtype) -> None:
    B, A = factors(300, 200, 16, "steps", seed=0)
    here = LowRank(B.to(dtype), A.to(dtype), 0.5)
    there = here.to("cuda")
    small = there.truncate(4, method)
    assert small.device.type == "cuda" and small.dtype == dtype
    expected = here.truncate(4, method, dtype=torch.float32)
    error = (small.to("cpu").to(torch.float32)).distance(expected) / expected.norm()
    assert error < 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(there.singular_values(method).cpu(), here.singular_values(method), rtol=1e-6, atol=0)
