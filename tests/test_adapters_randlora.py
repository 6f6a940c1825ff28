"""RandLoRA: PEFT's layer is the paper's formula, the paper's scale, and variants of lower rank."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import PeftModel, RandLoraConfig, get_peft_model
from torch import nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.randlora_paper import fold_scale, set_paper_scale

RANKS = METHODS["randloraranks"]
TARGETS = ["wide", "tall"]


def randlora(r: int = 5, trained: bool = True, base: nn.Module | None = None, **options: Any) -> Any:
    config = RandLoraConfig(r=r, target_modules=TARGETS, **options)
    model = get_peft_model(net() if base is None else base, config).eval()
    generator = torch.Generator().manual_seed(4)
    for layer in layers(model).values() if trained else []:
        for numbers in (layer.randlora_lambda["default"], layer.randlora_gamma["default"]):
            numbers.data = torch.randn(numbers.shape, generator=generator) / 10
    return model


def by_hand(layer: Any, scale: float) -> torch.Tensor:
    """The sum over the bases, in PEFT's order of columns."""
    lambda_, gamma = layer.randlora_lambda["default"], layer.randlora_gamma["default"]
    r, n = lambda_.shape
    small, large = sorted((layer.in_features, layer.out_features))
    A, B = layer.randlora_A["default"][:, 0, :small], layer.randlora_B["default"][:large, :n]
    update = torch.zeros(large, small)
    for q in range(r * n):
        row = lambda_[q // n, q % n] * A[q // n] * gamma[q % n]
        update += B[:, q // r, q % r, None] * row[None]
    return scale * (update if layer.out_features >= layer.in_features else update.T)


@pytest.mark.parametrize("r", [4, 5], ids=["divides", "does-not"])
def test_the_layer_is_the_formula_with_the_papers_scale(r: int) -> None:
    model = randlora(r)
    peft = {name: by_hand(layer, layer.scaling["default"]) for name, layer in layers(model).items()}
    scales = set_paper_scale(model)
    for name, layer in layers(model).items():
        n = math.ceil(min(layer.in_features, layer.out_features) / r)
        assert math.isclose(scales[name], 2 / math.sqrt(n))
        found = layer.get_delta_weight("default")
        assert torch.allclose(found, by_hand(layer, 2 / math.sqrt(n)), atol=1e-5)
        assert torch.allclose(found, peft[name], atol=1e-5), "another scale is no other update"
        assert torch.linalg.matrix_rank(found) == min(found.shape)


def test_before_training_the_scale_is_the_papers_and_the_function_the_bases() -> None:
    model = randlora(trained=False)
    set_paper_scale(model, alpha=1.0)
    assert torch.equal(model(batch()), net()(batch()))
    for layer in layers(model).values():
        n = math.ceil(12 / 5)
        assert math.isclose(layer.scaling["default"], 1 / 5 / math.sqrt(n))
        layer.randlora_lambda["default"].data.fill_(1)
        assert torch.allclose(layer.get_delta_weight("default"), by_hand(layer, 1 / 5 / math.sqrt(n)), atol=1e-5)


def test_the_count_falls_with_the_rank_and_the_bases_are_shared_and_frozen() -> None:
    counts = {}
    for r in (3, 6):
        model = randlora(r, trained=False)
        counts[r] = model.get_nb_trainable_parameters()[0]
        assert counts[r] == 4 * math.ceil(12 / r) * (r + 12)
        first, *others = layers(model).values()
        assert all(layer.randlora_B is first.randlora_B and layer.randlora_A is first.randlora_A for layer in others)
        assert not any(p.requires_grad for p in (*first.randlora_A.values(), *first.randlora_B.values()))
    assert 1.5 < counts[3] / counts[6] < 2.5


def test_ternary_bases_have_two_thirds_of_zeros() -> None:
    bases = randlora(6, base=nn.ModuleDict({"wide": nn.Linear(96, 64)}), sparse=True, trained=False)
    B = bases.base_model.model["wide"].randlora_B["default"]
    assert len(B.unique()) == 3
    assert abs(float((B == 0).float().mean()) - 2 / 3) < 0.02


def test_a_folded_adapter_is_read_by_peft_as_it_was_trained(tmp_path: Path) -> None:
    model = randlora(trained=False)
    set_paper_scale(model)
    generator = torch.Generator().manual_seed(4)
    for layer in layers(model).values():
        layer.randlora_lambda["default"].data = torch.randn(layer.randlora_lambda["default"].shape, generator=generator)
    wanted = model(batch())
    fold_scale(model)
    assert torch.allclose(model(batch()), wanted, atol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.allclose(again(batch()), wanted, atol=1e-5)
    set_paper_scale(again)
    assert torch.allclose(again(batch()), wanted, atol=1e-5)


@pytest.mark.parametrize(("together", "groups"), [(None, 1), (2, 2), (1, 4), (3, 2), (99, 1)])
def test_variants_have_the_same_size_and_the_rank_of_their_groups(together: int | None, groups: int) -> None:
    model = adapted(RANKS, trained=True, together=together)
    assert model.get_nb_trainable_parameters()[0] == 4 * 4 * (3 + 12)
    for layer in layers(model).values():
        delta = layer.deltas["default"]
        update = torch.zeros(20, 12)
        B, A = delta._basis("B", 20), delta._basis("A", 12)
        size = min(together or 4, 4)
        for start in range(0, 4, size):
            group = range(start, min(start + size, 4))
            left = sum(B[j] @ torch.diag(delta.lambda_[j]) for j in group)
            right = sum(A[j].T @ torch.diag(delta.gamma[j]) for j in group)
            update = update + 2 / math.sqrt(4) * left @ right
        found = layer.get_delta_weight("default")
        assert torch.allclose(found, update if layer.out_features == 20 else update.T, atol=1e-4)
        assert torch.linalg.matrix_rank(found.double(), rtol=1e-6) == min(12, 3 * groups)


def test_bases_are_the_same_objects_in_layers_of_one_shape_and_have_unit_deviation() -> None:
    deltas = [layer.deltas["default"] for layer in layers(adapted(RANKS)).values()]
    for side, size in (("A", 12), ("B", 20)):
        bases = [delta._basis(side, size) for delta in deltas]
        assert all(basis is bases[0] for basis in bases)
        assert abs(float(bases[0].std()) - 1) < 1e-5
    other = next(iter(layers(adapted(RANKS, seed=1)).values())).deltas["default"]
    assert not torch.equal(other._basis("A", 12), deltas[0]._basis("A", 12))


def test_a_layer_of_one_number_has_an_update_too() -> None:
    base = nn.Sequential(nn.Linear(1, 1))
    (layer,) = layers(adapted(RANKS, base, trained=True, target_modules=["0"], r=1)).values()
    assert layer.get_delta_weight("default").isfinite().all()
    assert layer.get_delta_weight("default").any()


def test_the_default_dtype_changes_no_basis() -> None:
    wanted = next(iter(layers(adapted(RANKS)).values())).deltas["default"]._basis("A", 12)
    torch.set_default_dtype(torch.float64)
    try:
        delta = next(iter(layers(adapted(RANKS)).values())).deltas["default"]
        assert torch.equal(delta._basis("A", 12).float(), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


def fitted(target: torch.Tensor, config: Any, most: int, steps: int = 400) -> float:
    """Share of the target's energy that is left after a fit by Adam with so many numbers at most."""
    n = len(target)
    model: Any = get_peft_model(nn.Sequential(nn.Linear(n, n, bias=False)), config)
    assert model.get_nb_trainable_parameters()[0] <= most
    set_paper_scale(model)
    layer = model.base_model.model[0]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    error = torch.zeros(())
    for _ in range(steps):
        error = (layer.get_delta_weight("default") - target).square().sum() / target.square().sum()
        error.backward()
        optimizer.step()
        optimizer.zero_grad()
    return float(error.detach())


def test_it_beats_lora_on_a_flat_spectrum_and_loses_on_a_falling_one_at_equal_size() -> None:
    n, rank = 32, 4
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    spectra = {"flat": torch.ones(n), "falling": 1 / torch.arange(1, n + 1) ** 2}
    left = {}
    for name, S in spectra.items():
        lora = float((S[rank:] ** 2).sum() / (S**2).sum())  # the best there is at this rank
        config = RandLoraConfig(r=6, target_modules=["0"], projection_prng_key=0)
        left[name] = fitted((U * S) @ V.T, config, most=2 * n * rank), lora
    assert left["flat"][0] < left["flat"][1]
    assert left["falling"][0] > left["falling"][1]


def test_what_is_refused() -> None:
    with pytest.raises(LoraSqueezeError, match=r"no layer has a RandLoRA adapter 'default'; make one"):
        set_paper_scale(net())
    model = randlora()
    with pytest.raises(LoraSqueezeError, match=r"alpha must be above 0, got 0"):
        set_paper_scale(model, alpha=0)
    model.merge_adapter()
    with pytest.raises(LoraSqueezeError, match=r"blocks.0.wide: an adapter is merged, so its scale cannot change"):
        fold_scale(model)
    with pytest.raises(ValueError, match=r"together must be a whole number from 1, got 0"):
        RANKS.config(together=0)
