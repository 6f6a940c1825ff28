"""SNELLA: the update is the largest entries of a kernel, made anew in every pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net, shake
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lora_squeeze.methods.adapters import SnellaConfig

SNELLA = METHODS["snella"]
IN, OUT, R = 9, 13, 4


def one_layer(rows: int = OUT, columns: int = IN, *, trained: bool = True, **settings: Any) -> Any:
    """A SNELLA layer in float64, alone in a model."""
    with drawn_from(0):
        model = nn.ModuleDict({"only": nn.Linear(columns, rows)})
    config = SnellaConfig(**{"target_modules": ["only"], "r": R, **settings})
    adapted_model = get_peft_model(model, config)
    if trained:
        shake(adapted_model)
    return adapted_model.double().base_model.model["only"]


def delta_of(layer: Any) -> Any:
    return layer.deltas["default"]


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, IN, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()


def kernel_by_hand(delta: Any) -> Tensor:
    """D (in, out), entry by entry."""
    _, columns, _ = delta.u.shape
    _, rows, _ = delta.v.shape
    K = torch.empty(columns, rows, dtype=delta.u.dtype)
    for i in range(columns):
        for j in range(rows):
            first, second = ((delta.u[h, i] - delta.v[h, j]).square().sum().sqrt() for h in (0, 1))
            K[i, j] = 0.1 * (first - second)
    if delta.config.kernel == "snell":
        return K
    weights = (K / delta.g).exp()
    return K + delta.a * weights / weights.sum(1, keepdim=True) + delta.c


@pytest.mark.parametrize("kernel", ["snell", "snella"])
@pytest.mark.parametrize("size", [(OUT, IN), (40, 30)], ids=str)  # from 26 on, distances come from products
@torch.no_grad()
def test_the_kernel_is_that_of_the_paper(kernel: str, size: tuple[int, int]) -> None:
    delta = delta_of(one_layer(*size, kernel=kernel))
    torch.testing.assert_close(delta.kernel(), kernel_by_hand(delta).T, rtol=1e-9, atol=1e-9)


def test_the_kernel_of_few_numbers_has_full_rank() -> None:
    """As many numbers in a product of factors have rank r."""
    size = 32
    delta = delta_of(one_layer(size, size, kernel="snell", trained=False))
    assert sum(p.numel() for p in delta.parameters()) == R * (size + size)
    assert torch.linalg.matrix_rank(delta.weight()) == size
    delta.kept.fill_(size * size // 5)
    assert torch.linalg.matrix_rank(delta.weight()) > 4 * R  # a row may be empty
    product = sum(delta.v[h] @ delta.u[h].T for h in (0, 1))
    assert torch.linalg.matrix_rank(product) == R


@pytest.mark.parametrize("shrink", ["code", "paper"])
@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.93])
@torch.no_grad()
def test_the_largest_entries_remain_by_the_formula(sparsity: float, shrink: str) -> None:
    delta = delta_of(one_layer(sparsity=sparsity, shrink=shrink))
    D = kernel_by_hand(delta).T
    found = delta.weight()
    order = D.abs().flatten().argsort(descending=True)
    count = int((found != 0).sum())
    assert abs(count - (1 - sparsity) * D.numel()) <= 1
    largest = torch.zeros(D.numel(), dtype=torch.bool)
    largest[order[:count]] = True
    assert torch.equal(found != 0, largest.view_as(D))
    threshold = D.abs().flatten()[order[count]] if count < D.numel() else 0.0
    size = D.abs() if shrink == "code" else D.abs() - threshold
    torch.testing.assert_close(found, torch.where(largest.view_as(D), D * size, 0))


@torch.no_grad()
def test_nothing_may_remain() -> None:
    delta = delta_of(one_layer())
    delta.kept.zero_()
    assert not delta.weight().any()


@torch.no_grad()
def test_the_form_of_the_paper_is_continuous_where_an_entry_enters() -> None:
    """An entry that enters begins at 0, where that of the code begins at t^2."""
    delta = delta_of(one_layer(shrink="paper", sparsity=0.5))
    one = delta.weight()
    sizes = delta.kernel().abs().flatten().sort(descending=True).values
    kept = int(delta.kept)
    gap = sizes[kept] - sizes[kept + 1]
    delta.kept += 1
    change = (delta.weight() - one).abs().max()
    assert 0 < change <= sizes[0] * gap * (1 + 1e-9)
    assert change < sizes[kept] ** 2


@pytest.mark.parametrize("shrink", ["code", "paper"])
def test_the_factor_of_an_entry_has_no_gradient(shrink: str) -> None:
    """Against finite differences of D n with n held still; what is left out has no gradient at all."""
    delta = delta_of(one_layer(shrink=shrink, sparsity=0.5))
    upstream = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    held = (delta.weight() / delta.kernel()).detach()
    parameters = list(delta.parameters())
    found = torch.autograd.grad((delta.weight() * upstream).sum(), parameters)
    step = 1e-6
    for parameter, gradient in zip(parameters, found, strict=True):
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
        ends = []
        for sign in (1, -1):
            parameter.data += sign * step * direction
            ends.append((kernel_by_hand(delta).T * held * upstream).sum())
            parameter.data -= sign * step * direction
        wanted = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), wanted, rtol=1e-6, atol=1e-9)


def test_a_distance_of_zero_has_a_gradient() -> None:
    delta = delta_of(one_layer())
    delta.u.data[:, 2] = delta.v.data[:, 3]
    delta.weight().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in delta.parameters())


def test_in_half_precision_the_kernel_is_computed_in_float32() -> None:
    delta = delta_of(one_layer()).to(torch.bfloat16)
    found, weight = delta.kernel(), delta.weight()
    assert (found.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(found, delta.float().kernel())


def test_the_update_begins_near_zero() -> None:
    update = delta_of(one_layer(384, 384, r=8, trained=False)).weight()
    assert 0 < update.abs().max() <= 1e-4


def test_merging_is_exact() -> None:
    layer, x = one_layer(sparsity=0.5), inputs(2, 3)
    wanted = layer(x)
    layer.merge()
    torch.testing.assert_close(layer.get_base_layer()(x), wanted, rtol=0, atol=1e-12)


def saved_numbers(layer: Any, x: Tensor) -> int:
    """What a layer's forward pass keeps for its backward pass, beside parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(kept.values())


def test_no_dense_update_is_kept_for_the_backward_pass() -> None:
    layer = one_layer(60, 50, sparsity=0.5)
    x = torch.ones(4, 50, dtype=torch.float64)
    assert saved_numbers(layer, x) <= x.numel()
    delta = delta_of(layer)
    delta.forward = lambda x, base_output: functional.linear(x, delta.weight())
    assert saved_numbers(layer, x) >= 60 * 50


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    layer, x, y = one_layer(sparsity=0.5), inputs(2, 3), inputs(2, 3)
    parameters = list(delta_of(layer).parameters())
    layer(x).tanh().sum().backward()
    wanted = [p.grad.clone() for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    checkpoint(lambda x: layer(x).tanh(), y, use_reentrant=reentrant).sum().backward()
    assert all(torch.equal(p.grad, other) for p, other in zip(parameters, wanted, strict=True))
    assert torch.equal(x.grad, y.grad)


def test_dropout_leaves_out_whole_samples() -> None:
    layer, x = one_layer(dropout=0.5).train(), inputs(40, 3).detach()
    update = functional.linear(x, delta_of(layer).weight())
    with drawn_from(1):
        found = layer(x) - layer.get_base_layer()(x)
    dropped = (found.abs().amax((1, 2)) < 1e-12).view(-1, 1, 1)
    assert 0 < dropped.sum() < 40
    torch.testing.assert_close(found, torch.where(dropped, 0, 2 * update))


def test_a_single_vector_is_one_sample() -> None:
    layer = one_layer(dropout=0.5).train()
    x = inputs().detach()
    base, update = layer.get_base_layer()(x), functional.linear(x, delta_of(layer).weight())
    for seed in range(4):
        with drawn_from(seed):
            found = layer(x) - base
        assert torch.allclose(found, torch.zeros(()).double(), atol=1e-12) or torch.allclose(found, 2 * update)


def test_what_a_budget_gave_is_stored(tmp_path: Path) -> None:
    model = adapted(SNELLA, trained=True)
    for number, layer in enumerate(layers(model).values()):
        delta_of(layer).kept.fill_(50 + number)
    wanted = model(batch())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(again(batch()), wanted)
    assert [int(delta_of(layer).kept) for layer in layers(again).values()] == [50, 51, 52, 53]


def test_a_sparse_target_is_met_better_than_by_the_best_product_of_as_many_numbers() -> None:
    """The paper's case for a kernel, on 5 % of normal entries: an error of at most 0.8 times the best one at rank r."""
    size, r = 48, 8
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(size, size, generator=generator) * (torch.rand(size, size, generator=generator) < 0.05)
    delta = delta_of(one_layer(size, size, r=r, kernel="snell", trained=False)).float()
    for factor in (delta.u, delta.v):
        factor.data *= 14  # to the size of the target: about 1
    optimizer = torch.optim.Adam(delta.parameters(), lr=0.3)
    for _ in range(400):
        error = (delta.kernel() - target).norm() / target.norm()
        optimizer.zero_grad()
        error.square().backward()
        optimizer.step()
    S = torch.linalg.svdvals(target)
    assert error <= 0.8 * S[r:].norm() / S.norm()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 5}, "r must be even, since each of the two distances has half of it, got 5"),
        ({"alpha": 8}, "SNELLA has no scale, so alpha must be None, got 8"),
        ({"sparsity": 1.0}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"kernel": "linear"}, "kernel must be one of snella, snell, got 'linear'"),
        ({"shrink": "soft"}, "shrink must be one of code, paper, got 'soft'"),
    ],
    ids=["r", "alpha", "sparsity", "kernel", "shrink"],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SnellaConfig(**settings)
