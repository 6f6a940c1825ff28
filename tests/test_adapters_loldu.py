"""LoLDU: the decomposition, what its diagonal does to W, and the LoRA that it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_squeeze
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.adapters import LolduConfig
from lora_squeeze.methods.adapters.loldu import LolduDelta, ldu

LOLDU = METHODS["loldu"]
SHAPES = [(20, 12), (12, 20), (16, 16)]


def matrix(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def deltas(model: nn.Module) -> list[LolduDelta]:
    return [layer.deltas["default"] for layer in layers(model).values()]


def weight(delta: LolduDelta) -> Tensor:
    return delta.site.base_weight().detach()


def eliminated(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P L, the pivots and U by elimination, the largest number of a column first."""
    upper, q, rows = W.clone(), min(W.shape), list(range(len(W)))
    L = torch.zeros(len(W), q, dtype=W.dtype)
    for k in range(q):
        best = k + int(upper[k:, k].abs().argmax())
        for moved in (upper, L):
            moved[[k, best]] = moved[[best, k]]
        rows[k], rows[best] = rows[best], rows[k]
        L[k:, k] = upper[k:, k] / upper[k, k]
        upper[k + 1 :] -= L[k + 1 :, k, None] * upper[k]
    PL = torch.empty_like(L)
    PL[rows] = L
    pivots = upper.diagonal()
    return PL, pivots, upper[:q] / pivots[:, None]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_factors_are_those_of_elimination_with_pivots(shape: tuple[int, int]) -> None:
    W = matrix(shape)
    PL, pivots, U = ldu(W)
    for found, wanted in zip((PL, pivots, U), eliminated(W), strict=True):
        assert torch.allclose(found, wanted, atol=1e-10)
    assert ((PL * pivots) @ U - W).abs().max() < 1e-12
    assert PL.abs().max() == 1
    assert torch.equal(U[:, : len(U)].triu(), U[:, : len(U)])
    assert torch.equal(U.diagonal(), torch.ones(len(U), dtype=W.dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_all_of_the_diagonal_w_is_scaled_and_erased(shape: tuple[int, int]) -> None:
    base = nn.Sequential(nn.Linear(shape[1], shape[0]))
    (delta,) = deltas(adapted(LOLDU, base, target_modules=["0"], r=None, alpha=float(min(shape))))
    W = weight(delta)
    for factor in (0.0, 1.0, -2.5):
        delta.change.data = (factor - 1) * delta.z0
        assert torch.allclose(delta.diagonal(), factor * delta.z0)
        assert (W + delta.weight() - factor * W).abs().max() < 1e-5 * W.abs().max()


@pytest.mark.parametrize("alpha", [None, 0.5, 40.0], ids=str)
@pytest.mark.parametrize("r", [1, 7, 12, None, 99], ids=str)
def test_rank_and_scale(r: int | None, alpha: float | None) -> None:
    wanted = net()(batch())
    model = adapted(LOLDU, r=r, alpha=alpha)
    assert torch.equal(model(batch()), wanted)
    for delta in deltas(model.double()):
        count = 12 if r is None else min(r, 12)
        assert delta.change.numel() == delta.rank == count
        delta.change.data = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        sigma = (1 if alpha is None else alpha) / (r or 12)
        PL, _, U = ldu(weight(delta))
        dW = sigma * (PL[:, :count] * delta.change) @ U[:count]
        assert torch.allclose(delta.weight(), dW, rtol=1e-5, atol=1e-6)
        assert torch.linalg.matrix_rank(delta.weight(), rtol=1e-6) == count


def test_the_gradient_of_each_number_is_that_of_its_direction() -> None:
    for delta in deltas(adapted(LOLDU, trained=True).double()):
        G = matrix((delta.site.out_features, delta.site.in_features))  # of a loss by the weight
        (delta.weight() * G).sum().backward()
        for i in range(5):
            wanted = delta.scale * delta.B[:, i].double() @ G @ delta.A[i].double()
            assert delta.change.grad is not None
            assert torch.allclose(delta.change.grad[i], wanted)


def test_the_file_has_the_trained_numbers_and_fingerprints_alone(tmp_path: Path) -> None:
    model = adapted(LOLDU, trained=True, r=None)
    model.save_pretrained(tmp_path)
    state = {key.rpartition(".")[2]: value for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert {name: len(value) for name, value in state.items()} == {
        "change": 12,
        "fingerprint": 5,
        "fingerprint_of_factors": 4,
    }
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), model(batch()))


def test_all_of_the_diagonal_is_a_lora_too(tmp_path: Path) -> None:
    model = adapted(LOLDU, trained=True, r=None, alpha=12.0)
    model.save_pretrained(tmp_path / "loldu")
    lora_squeeze.convert(load(tmp_path / "loldu", base=net()), "peft", rank=12).save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    wanted = model(batch())
    assert (plain(batch()) - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_the_largest_changes_are_not_the_best_directions() -> None:
    (delta, *_) = deltas(adapted(LOLDU, trained=True, r=None))
    dW = delta.weight().detach().double()
    keep = delta.change.abs().topk(4).indices
    kept = (delta.B[:, keep] * delta.core()[keep]) @ delta.A[keep]
    best = torch.linalg.svdvals(dW)[4:].norm()
    assert (dW - kept).norm() > 1.05 * best


def test_a_pivot_next_to_zero_is_left_alone() -> None:
    W = matrix((20, 12))
    W[:, 3] = W[:, 1]  # the fourth pivot is zero but for rounding
    base = nn.Sequential(nn.Linear(12, 20))
    base[0].weight.data = W.float()
    (delta,) = deltas(adapted(LOLDU, base, target_modules=["0"], r=None))
    assert not delta.A[3].any()
    assert delta.A.isfinite().all()
    assert delta.A.abs().max() < 1e3
    delta.weight().sum().backward()
    assert (delta.change.grad == 0).nonzero().flatten().tolist() == [3]  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [1, 10, 40])
@pytest.mark.parametrize("shape", [(200, 200), (120, 300), (300, 120)], ids=str)
def test_pivots_that_rounding_makes_are_left_alone(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    W = torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)
    PL, pivots, U = ldu(W)
    assert int(U.any(1).sum()) == rank
    assert ((PL * pivots) @ U - W).abs().max() < 1e-4 * W.abs().max()
    _, _, full = ldu(torch.randn(shape, generator=generator))
    assert full.any(1).all()


def test_a_weight_of_zeros_stays_as_it_is() -> None:
    base = nn.Sequential(nn.Linear(12, 20))
    base[0].weight.data.zero_()
    (delta,) = deltas(adapted(LOLDU, base, target_modules=["0"], init_weights=False))
    assert not delta.weight().any()


def test_the_scale_can_be_trained(tmp_path: Path) -> None:
    model: Any = adapted(LOLDU, train_scale=True)
    assert torch.equal(model(batch()), net()(batch()))
    assert model.get_nb_trainable_parameters()[0] == 4 * (5 + 1)
    for delta in deltas(model):
        delta.change.data += 0.3 * matrix((1, 5))[0].float()
        delta.sigma.data *= 1.7
        z, z0 = delta.diagonal(), delta.z0
        wanted = (delta.B * (1.7 * delta.scale * z - delta.scale * z0)) @ delta.A
        assert torch.allclose(delta.weight(), wanted, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), model(batch()))


def test_the_default_trains_all_of_the_diagonal_at_one_over_the_width() -> None:
    assert LolduConfig().r is None
    for delta in deltas(adapted(LOLDU, r=None, alpha=None)):
        assert (delta.change.numel(), delta.scale) == (12, 1 / 12)
