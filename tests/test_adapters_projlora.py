"""Projections of one vector to all factors: isometries where they say so, and the same numbers in every process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import PeftModel, UniLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.unilora_projections import PROJECTIONS, OneHot, Projection

PROJ = METHODS["projlora"]
SIZES = [96, 64, 96, 33]
TOTAL = sum(SIZES)
ISOMETRIC = ["onehot", "layerwise", "nonuniform"]


def dense(projection: Projection) -> torch.Tensor:
    """P, column by column."""
    eye = torch.eye(projection.length, dtype=torch.float64)
    return torch.stack([projection.apply(column, 0, projection.total) for column in eye], dim=1)


def thetas(model: nn.Module) -> list[nn.Parameter]:
    return [layer.deltas["default"].vector for layer in layers(model).values()]


@pytest.mark.parametrize("length", [24, 50, TOTAL])
@pytest.mark.parametrize("name", ISOMETRIC)
def test_one_number_in_each_row_and_lengths_are_kept(name: str, length: int) -> None:
    P = dense(PROJECTIONS[name](SIZES, length, 0))
    assert ((P != 0).sum(1) == 1).all()
    assert (P.T @ P - torch.eye(length)).abs().max() < 1e-6
    a, b = torch.randn(2, length, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert abs((P @ a - P @ b).norm() - (a - b).norm()) < 1e-6


@pytest.mark.parametrize("length", [24, 50, TOTAL])
def test_groups_are_balanced_or_as_uneven_as_they_say(length: int) -> None:
    counts = {name: (dense(PROJECTIONS[name](SIZES, length, 0)) != 0).sum(0) for name in ISOMETRIC}
    assert counts["onehot"].max() - counts["onehot"].min() <= 1
    often, seldom = counts["nonuniform"][: length - length // 2], counts["nonuniform"][length - length // 2 :]
    assert seldom.sum() == max(TOTAL // 10, length // 2)
    assert often.float().mean() >= seldom.float().mean()


def test_layers_share_numbers_or_do_not() -> None:
    for name in ("onehot", "layerwise"):
        projection = PROJECTIONS[name](SIZES, 24, 0)
        used = [set(part.tolist()) for part in projection.group.split(SIZES)]  # type: ignore[attr-defined]
        shared = [bool(used[i] & used[j]) for i in range(4) for j in range(i)]
        assert all(shared) if name == "onehot" else not any(shared)
        if name == "layerwise":
            assert [len(part) for part in used] == [round(24 * s / TOTAL) for s in SIZES]


def test_without_the_scale_it_is_no_isometry() -> None:
    projection = PROJECTIONS["nonisometric"](SIZES, 24, 0)
    P = dense(projection)
    assert torch.equal(P.T @ P, torch.diag((P != 0).sum(0).double()))
    assert ((P.T @ P).diagonal() > 2).all()


@pytest.mark.parametrize("name", ["gaussian", "fastfood"])
def test_dense_projections_are_isometries_in_the_mean(name: str) -> None:
    drawn = [dense(PROJECTIONS[name]([256, 128], 20, seed)) for seed in range(8)]
    assert all(P.count_nonzero() == P.numel() for P in drawn)
    error = sum(P.T @ P for P in drawn) / 8 - torch.eye(20)
    assert error.abs().max() < 5 * (2 / (8 * 384)) ** 0.5  # five standard deviations of a diagonal entry


def test_fastfood_blocks_are_products_of_hadamard_matrices() -> None:
    projection = PROJECTIONS["fastfood"]([32, 32], 16, 3)
    H = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        H = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), H)
    for block in dense(projection).split(16):
        # The block is H G Q H B up to a factor, so this is G Q H B: rows +-1, orthogonal, times normal numbers.
        core = H.T @ (block * (64 * 16) ** 0.5) / 16
        rows = core.square().sum(1)
        products = core @ core.T
        assert (products - torch.diag(rows)).abs().max() < 1e-9 * rows.max()
        rounded = core / (rows / 16).sqrt()[:, None]
        assert torch.allclose(rounded.abs(), torch.ones(16, 16, dtype=torch.float64))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_part_is_a_part_of_the_whole(name: str) -> None:
    projection = PROJECTIONS[name](SIZES, 24, 0)
    theta = torch.randn(24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = projection.apply(theta, 0, TOTAL)
    for start, count in ((0, 96), (96, 64), (256, 33), (31, 2)):
        assert torch.allclose(projection.apply(theta, start, count), whole[start : start + count], atol=1e-12)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_gradient_is_that_of_the_dense_matrix(name: str) -> None:
    model = adapted(PROJ, trained=True, projection=name).double()
    theta = thetas(model)[0]
    (found,) = torch.autograd.grad(model(batch(torch.float64)).square().sum(), theta)
    P = dense(next(iter(layers(model).values())).deltas["default"].layout.projection)
    entries = (P @ theta.detach()).requires_grad_()
    by_hand, start = net(torch.float64), 0
    state = {}
    for layer_name, layer in layers(model).items():
        A, B = entries[start:].split([3 * layer.in_features, 3 * layer.out_features, len(entries) - start - 96])[:2]
        key = layer_name.removeprefix("base_model.model.") + ".weight"
        state[key] = by_hand.get_parameter(key).detach() + B.view(-1, 3) @ A.view(3, -1)
        start += 96
    output = torch.func.functional_call(by_hand, state, (batch(torch.float64),))
    (wanted,) = torch.autograd.grad(output.square().sum(), entries)
    assert torch.allclose(found, P.T @ wanted, rtol=1e-9)


@pytest.mark.parametrize(("r", "targets"), [(3, ["wide", "tall"]), (5, ["wide"]), (4, "all-linear")], ids=str)
def test_the_count_is_the_length_whatever_is_adapted(r: int, targets: Any, tmp_path: Path) -> None:
    model = adapted(PROJ, r=r, target_modules=targets)
    assert model.get_nb_trainable_parameters()[0] == 48
    assert all(theta is thetas(model)[0] for theta in thetas(model))
    model.save_pretrained(tmp_path)
    assert [t.shape for t in load_file(tmp_path / "adapter_model.safetensors").values()] == [(48,)]


def test_with_as_many_numbers_as_factors_it_is_a_plain_lora() -> None:
    model = adapted(PROJ, length=4 * 96, trained=True)
    factors = [t for layer in layers(model).values() for t in layer.deltas["default"].factors()]
    everything = torch.cat([t.flatten() for t in factors])
    assert torch.equal(everything.sort().values, thetas(model)[0].sort().values), "each number once"


@pytest.mark.slow
def test_another_process_has_the_same_projections() -> None:
    code = (
        "import torch; from lora_squeeze.methods.adapters.unilora_projections import PROJECTIONS; torch.manual_seed(9);"
        f"print([P({SIZES}, 24, 5).apply(torch.arange(24.0), 0, {TOTAL}).tolist() for P in PROJECTIONS.values()])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    here = [P(SIZES, 24, 5).apply(torch.arange(24.0), 0, TOTAL).tolist() for P in PROJECTIONS.values()]
    assert done.stdout.split("\n")[-2] == str(here)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_another_seed_is_another_projection(name: str) -> None:
    one, again, other = (dense(PROJECTIONS[name](SIZES, 24, seed)) for seed in (5, 5, 6))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_with_the_groups_of_pefts_uni_lora_it_is_pefts_uni_lora() -> None:
    peft = get_peft_model(net(), UniLoraConfig(r=3, theta_d_length=48, target_modules=["wide", "tall"])).eval()
    theirs = list(layers(peft).values())
    model = adapted(PROJ, trained=True)
    model(batch())
    projection: OneHot = next(iter(layers(model).values())).deltas["default"].layout.projection
    projection.group = torch.cat(
        [t.flatten() for m in theirs for t in (m.unilora_indices_A["default"], m.unilora_indices_B["default"])]
    )
    projection.scale = torch.bincount(projection.group).double().rsqrt()
    theirs[0].unilora_theta_d["default"].data.copy_(thetas(model)[0].data)
    assert torch.allclose(model(batch()), peft(batch()), atol=1e-6)
    assert not torch.allclose(model(batch()), net()(batch()), atol=1e-3)


def test_a_fresh_one_is_next_to_the_base_and_zero_is_a_dead_start() -> None:
    model = adapted(PROJ)
    assert 0 < (model(batch()) - net()(batch())).abs().max() < 1e-2
    assert thetas(model)[0].abs().max() <= 0.02
    thetas(model)[0].data.zero_()
    assert torch.equal(model(batch()), net()(batch()))
    functional.mse_loss(model(batch()), torch.zeros(4, 8, 3)).backward()
    assert not thetas(model)[0].grad.any()  # type: ignore[union-attr]


def test_an_adapter_made_anew_under_an_old_name_begins_anew(tmp_path: Path) -> None:
    model = adapted(PROJ, trained=True)
    model.add_adapter("other", PROJ.config(length=40))
    model.delete_adapter("other")
    model.add_adapter("other", PROJ.config(length=60, seed=3))
    assert all(len(layer.deltas["other"].vector) == 60 for layer in layers(model).values())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(net(), tmp_path / "other").eval()
    model.set_adapter("other")
    assert torch.equal(again(batch()), model(batch()))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match=r"projection must be one of onehot, .*, fastfood, got 'fourier'"):
        PROJ.config(projection="fourier")
    with pytest.raises(ValueError, match=r"length must be a whole number from 2, got 1"):
        PROJ.config(length=1)
    with pytest.raises(ValueError, match=r"bound must be above 0, since nothing moves from zero; got 0"):
        PROJ.config(bound=0)
    with pytest.raises(LoraSqueezeError, match=r"length = 400 is more than the 384 numbers of all factors; lower it"):
        adapted(PROJ, length=400)(batch())
    with pytest.raises(LoraSqueezeError, match=r"length = 3 has no number for each of 4 layers; raise it"):
        adapted(PROJ, length=3, projection="layerwise")(batch())
    with pytest.raises(LoraSqueezeError, match=r"length = 4 leaves the smallest layer without a number; raise it"):
        PROJECTIONS["layerwise"]([100, 100, 100, 5], 4, 0)
