"""Files in the repository, one of each format: what they mean and what is written of them stays the same."""

from collections import defaultdict
from pathlib import Path

import gguf
import pytest
import safetensors.torch
import torch
from adapter_cases import dense
from torch import Tensor

import lora_squeeze

GOLDEN = Path(__file__).parent / "golden"
EXPECTED: dict[str, dict[str, Tensor]] = defaultdict(dict)
for _key, _dW in safetensors.torch.load_file(GOLDEN / "expected.safetensors").items():
    EXPECTED[_key.split("/", 1)[0]][_key.split("/", 1)[1]] = _dW


def tensors(path: Path) -> dict[str, Tensor]:
    """All of a file or folder, read by other libraries."""
    if path.suffix == ".gguf":
        return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    return safetensors.torch.load_file(file)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_stored_file_means_what_it_meant(name: str) -> None:
    adapter = lora_squeeze.load(GOLDEN / name)
    assert adapter.modules.keys() == EXPECTED[name].keys()
    for module, dW in EXPECTED[name].items():
        torch.testing.assert_close(dense(adapter, module), dW, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(EXPECTED) - {"lycoris.safetensors"}))
def test_a_copy_has_the_same_tensors_bit_by_bit(name: str, tmp_path: Path) -> None:
    lora_squeeze.load(GOLDEN / name).save(tmp_path / name)
    before, after = tensors(GOLDEN / name), tensors(tmp_path / name)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], tensor) and after[key].dtype == tensor.dtype for key, tensor in before.items())


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_squeeze_is_the_best_approximation(name: str, tmp_path: Path) -> None:
    lora_squeeze.load(GOLDEN / name).squeeze(rank=2).save(tmp_path / name)
    found = lora_squeeze.load(tmp_path / name)
    for module, dW in EXPECTED[name].items():
        U, S, Vh = torch.linalg.svd(dW)
        best = U[:, :2] * S[:2] @ Vh[:2]
        rounded = found.modules[module].dtype == torch.float16
        assert float((dense(found, module) - best).norm() / best.norm()) < (2e-3 if rounded else 1e-6)
