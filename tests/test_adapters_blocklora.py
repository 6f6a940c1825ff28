"""Block-LoRA: what sharing one down-projection comes to, in both readings of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, net, shake
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters import BlockLoraConfig

BLOCK = METHODS["blocklora"]
IN, OUT, R, ALPHA = 12, 20, 8, 6
MODES = ("shared", "input_blocks")
every_mode = pytest.mark.parametrize("mode", MODES)


def linear() -> nn.Module:
    with drawn_from(0):
        return nn.ModuleDict({"only": nn.Linear(IN, OUT, bias=False)}).double()


def one_layer(mode: str, blocks: int = 4, *, trained: bool = True, r: int = R) -> Any:
    """A layer in float64, alone in a model."""
    config = BlockLoraConfig(r=r, alpha=ALPHA, blocks=blocks, mode=mode, target_modules=["only"])
    model = get_peft_model(linear(), config)
    if trained:
        shake(model)
    return model.base_model.model["only"].double()


def lora(r: int, alpha: float) -> Any:
    """PEFT's LoRA on the same linear layer."""
    model = get_peft_model(linear(), LoraConfig(r=r, lora_alpha=alpha, target_modules=["only"]))
    return model.base_model.model["only"].double()


def delta_of(layer: Any) -> Any:
    return layer.deltas["default"]


def numbers(*shape: int, seed: int = 4) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@every_mode
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_count_and_rank(mode: str, blocks: int) -> None:
    layer = one_layer(mode, blocks)
    assert sum(p.numel() for p in delta_of(layer).parameters()) == R * IN // blocks + R * OUT
    rank = R // blocks if mode == "shared" else min(R, IN // blocks)
    assert delta_of(layer).rank == int(torch.linalg.matrix_rank(layer.get_delta_weight("default"))) == rank


@every_mode
def test_with_one_block_it_is_lora(mode: str) -> None:
    layer, plain = one_layer(mode, 1), lora(R, ALPHA)
    plain.lora_A["default"].weight.data = delta_of(layer).A.detach()
    plain.lora_B["default"].weight.data = delta_of(layer).B[0].detach()
    torch.testing.assert_close(layer(numbers(3, 5, IN)), plain(numbers(3, 5, IN)))


@every_mode
def test_the_blocks_written_out(mode: str) -> None:
    layer, x = one_layer(mode), numbers(3, 5, IN)
    A, B = delta_of(layer).A, delta_of(layer).B
    if mode == "shared":
        wanted = sum(x @ A.T @ one.T for one in B)
    else:
        wanted = sum(part @ A.T for part in x.split(IN // 4, -1)) @ B[0].T
    wanted = ALPHA / R * wanted
    torch.testing.assert_close(layer(x) - layer.get_base_layer()(x), wanted)
    torch.testing.assert_close(x @ layer.get_delta_weight("default").T, wanted)


@every_mode
def test_the_gradient_of_a_is_the_sum_over_the_tied_blocks_of_a_lora(mode: str) -> None:
    layer, x, upstream = one_layer(mode), numbers(7, IN), numbers(7, OUT, seed=5)
    A, B = delta_of(layer).A, delta_of(layer).B
    copies = [A.detach().clone().requires_grad_() for _ in range(4)]
    if mode == "shared":
        untied, tall = torch.cat(copies), torch.cat(list(B.detach()), 1)
    else:
        untied, tall = torch.cat(copies, 1), B[0].detach()
    (ALPHA / R * (x @ untied.T @ tall.T) * upstream).sum().backward()
    (layer(x) * upstream).sum().backward()
    torch.testing.assert_close(A.grad, sum(one.grad for one in copies if one.grad is not None))


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_the_arms_stay_equal_bit_by_bit(kind: str) -> None:
    layer, x, y = one_layer("shared", trained=False), numbers(16, IN), numbers(16, OUT, seed=5)
    parameters = list(delta_of(layer).parameters())
    optimizer: Any = torch.optim.Adam(parameters, 1e-2) if kind == "adam" else torch.optim.SGD(parameters, 1e-1)
    for _ in range(5):
        functional.mse_loss(layer(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    B = delta_of(layer).B
    assert B.abs().max() > 0
    assert all(torch.equal(one, B[0]) for one in B)


@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["zeros", "random-arms-of-sum-zero"])
def test_shared_trains_as_a_lora_of_its_rank_whose_b_moves_n_times_as_fast(spread: float) -> None:
    layer, x, y = one_layer("shared", trained=False), numbers(16, IN), numbers(16, OUT, seed=5)
    delta, rate = delta_of(layer), 1e-1
    arms = spread * numbers(*delta.B.shape)
    delta.B.data = arms - arms.mean(0)
    plain = lora(R // 4, ALPHA / 4)  # the same scale
    plain.lora_A["default"].weight.data = delta.A.detach().clone()
    A, B = (plain.get_submodule(f"lora_{side}.default").weight for side in "AB")
    mine = torch.optim.SGD(delta.parameters(), rate)
    other = torch.optim.SGD([{"params": [A], "lr": rate}, {"params": [B], "lr": 4 * rate}])
    for _ in range(20):
        for one, optimizer in ((layer, mine), (plain, other)):
            functional.mse_loss(one(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert B.abs().max() > 1e-2
    torch.testing.assert_close(delta.A, A)
    torch.testing.assert_close(delta.B.sum(0), B)
    torch.testing.assert_close(layer(x), plain(x))


def test_input_blocks_reach_the_rank_that_shared_cannot() -> None:
    """Where in / n is no less than r, at the same number of trained numbers."""
    ranks = {mode: int(torch.linalg.matrix_rank(one_layer(mode, 2, r=4).get_delta_weight("default"))) for mode in MODES}
    assert ranks == {"shared": 2, "input_blocks": 4}


@every_mode
def test_the_update_begins_at_zero_and_as_wide_as_loras(mode: str) -> None:
    model = adapted(BLOCK, mode=mode)
    assert torch.equal(model(batch()), net()(batch()))
    A = delta_of(one_layer(mode, 4, trained=False, r=400)).A
    assert A.abs().max() <= 1 / math.sqrt(IN)
    assert A.abs().max() > 0.95 / math.sqrt(IN)


@every_mode
def test_merged_it_is_the_same_function(mode: str) -> None:
    model = adapted(BLOCK, trained=True, mode=mode)
    wanted = model(batch())
    torch.testing.assert_close(model.merge_and_unload()(batch()), wanted, rtol=1e-4, atol=1e-5)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"mode must be one of shared, input_blocks, got 'both'"):
        BLOCK.config(mode="both")
    with pytest.raises(ValueError, match=r"blocks must be a whole number from 1, got 0"):
        BLOCK.config(blocks=0)
    with pytest.raises(ValueError, match=r"blocks must divide r in mode 'shared', got 3 and 4"):
        BLOCK.config(blocks=3)
    with pytest.raises(ValueError, match=r"wide: blocks is 5, which does not divide its 12 inputs; choose another"):
        adapted(BLOCK, mode="input_blocks", blocks=5)
