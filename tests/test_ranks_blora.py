"""Bayesian-LoRA: gates and quantisers against their definition, one by one, and what a training makes of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, drawn_from, layers, net
from peft import LoraConfig, PeftModel, get_peft_model
from ranks_cases import cut_and_resumed, go_on, same, trained
from torch import Tensor, nn
from torch.nn import functional

import lora_squeeze
from lora_squeeze.formats.peft_methods import load
from lora_squeeze.methods.control import controller_for, parameter_groups
from lora_squeeze.methods.ranks import BloraConfig
from lora_squeeze.methods.ranks.blora import found
from lora_squeeze.methods.ranks.blora_gates import Quantizer, on_grid, open_probability, sampled, settled

BLORA = METHODS["blora"]
OPEN, CLOSED = 20.0, -20.0


def config(**more: Any) -> BloraConfig:
    return BloraConfig(**{"r": 4, "target_modules": ["wide", "tall"], **more})


def fast(model: nn.Module) -> torch.optim.Optimizer:
    """Gates that move far within the few steps of a test."""
    first, gates, ranges = parameter_groups(model, lr=2e-2)
    return torch.optim.AdamW([first, {**gates, "lr": 0.3}, ranges])


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def quantizer(reach: float, bits: list[float], ranks: list[float] | None = None, **more: Any) -> Quantizer:
    made = torch.tensor(ranks, dtype=torch.float64) if ranks is not None else None
    return Quantizer(torch.tensor(reach, dtype=torch.float64).log(), torch.tensor(bits).double(), made, **more)


@pytest.mark.parametrize("open_gates", [0, 1, 2, 3])
def test_open_gates_up_to_some_bits_are_the_plain_quantiser_of_these_bits(open_gates: int) -> None:
    t = tensor(500)
    reach = t.abs().max().item()
    got = quantizer(reach, [OPEN] * open_gates + [CLOSED] * (3 - open_gates))(t)
    bits = (2, 4, 8, 16)[open_gates]
    step = 2 * reach / (2**bits - 1)
    codes = got / step
    most = 2 ** (bits - 1) - 1
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-6)
    torch.testing.assert_close(codes.round(), (t / step).round().clamp(-most, most), rtol=0, atol=0)
    assert (got - t).abs().max() <= step / 2 * (1 + 1e-9)


def test_a_closed_gate_closes_all_behind_it() -> None:
    t = tensor(100)
    closed = quantizer(3.0, [CLOSED, OPEN, OPEN])
    torch.testing.assert_close(closed(t), on_grid(t, 2, torch.tensor(3.0).double()))
    assert closed.chosen_bits() == 2
    assert quantizer(3.0, [OPEN, CLOSED, OPEN]).chosen_bits() == 4


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_the_ends_of_the_range_are_rounded_to_its_inside(bits: int) -> None:
    most = 1 - 1 / (2**bits - 1)  # the outermost number of the grid, half a step inside
    found = on_grid(torch.tensor([-9.0, -1.0, 1.0, 9.0]), bits, torch.tensor(1.0))
    torch.testing.assert_close(found, torch.tensor([-most, -most, most, most]))


def test_the_sum_of_gated_residuals_is_the_definition() -> None:
    """By the paper's formula, with steps s_2b = s_b / (2^b + 1) and residuals of residuals."""
    t, u = tensor(200), torch.tensor([0.1, 0.05, 0.2]).double()
    phi, reach = [1.0, 0.5, 0.0], t.abs().max().item()
    got = quantizer(reach, phi, noise=u)(t)
    logits = [math.log(x / (1 - x)) + f for x, f in zip(u, phi, strict=True)]
    z = [min(1.0, max(0.0, 1.2 / (1 + math.exp(-1.5 * logit)) - 0.1)) for logit in logits]
    assert any(0 < one < 1 for one in z)
    s = 2 * reach / 3
    t = t.clamp(-reach * (1 - 1e-7), reach * (1 - 1e-7))
    parts = [s * (t / s).round()]
    for b in (2, 4, 8):
        s = s / (2**b + 1)
        parts.append(s * ((t - sum(parts)) / s).round())
    wanted = parts[0] + z[0] * (parts[1] + z[1] * (parts[2] + z[2] * parts[3]))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)


def test_rounding_lets_gradients_through_and_the_range_gets_those_of_what_it_clips() -> None:
    t = torch.tensor([0.3, -0.2, 5.0, -7.0], dtype=torch.float64, requires_grad=True)
    q = quantizer(1.0, [OPEN] * 3)
    reach = q.log_reach.requires_grad_()
    of_t, of_reach = torch.autograd.grad(q(t) @ tensor(4), [t, reach])
    torch.testing.assert_close(of_t, tensor(4) * torch.tensor([1.0, 1.0, 0.0, 0.0]), check_dtype=False)
    clipped = (tensor(4)[2] - tensor(4)[3]) * (2**16 - 2) / (2**16 - 1)  # the outermost numbers are half a step inside
    assert abs(of_reach - clipped) < 1e-3


@pytest.mark.parametrize("phi", [-3.0, -1.0, 0.0, 0.7, 3.0])
def test_a_gate_is_above_zero_with_its_probability(phi: float) -> None:
    n = 100_000
    u = torch.rand(n, generator=torch.Generator().manual_seed(1))
    z = sampled(torch.full((n,), phi), u)
    assert z.min() >= 0
    assert z.max() <= 1
    q = open_probability(torch.tensor(phi)).item()
    assert abs((z > 0).float().mean() - q) < 3 * math.sqrt(q * (1 - q) / n)


def test_the_deployed_gate_opens_once_as_its_logit_grows() -> None:
    phi = torch.linspace(-8, 8, 1001)
    gate = settled(phi)
    assert torch.equal(gate, settled(phi))
    assert set(gate.tolist()) == {0.0, 1.0}
    assert (gate.diff() >= 0).all()
    q = open_probability(phi)
    assert torch.equal(gate == 1, 1 - q < 0.34)


def test_rank_gates_leave_a_prefix_with_the_first_component() -> None:
    generator = torch.Generator().manual_seed(3)
    ranks = set()
    for _ in range(100):
        phi = 4 * torch.randn(5, generator=generator, dtype=torch.float64)
        for noise in (None, torch.rand(8, generator=generator, dtype=torch.float64)):
            _, kept = quantizer(1.0, [OPEN] * 3, phi.tolist(), noise=noise).values()
            assert kept[0] == 1
            assert (kept.diff() <= 0).all()
            assert set(kept.tolist()) <= {0.0, 1.0}
            ranks.add(int(kept.sum()))
    assert ranks == {1, 2, 3, 4, 5, 6}
    by_hand = 1 + next((i for i, gate in enumerate(settled(phi)) if gate == 0), 5)
    assert quantizer(1.0, [OPEN] * 3, phi.tolist()).chosen_rank() == by_hand


def test_closed_components_are_zero() -> None:
    t = tensor(4) + 3
    got = quantizer(5.0, [OPEN] * 3, [OPEN, CLOSED, OPEN])(t)
    assert torch.equal(got != 0, torch.tensor([True, True, False, False]))


def test_the_cost_is_that_of_gates_reached_and_grows_with_every_logit() -> None:
    prices = {2: 0.5, 4: 1.0, 8: 2.0, 16: 3.0}
    bits, ranks = [0.3, -0.4, 1.0], [0.1, 0.9]
    q4, q8, q16 = (1 / (1 + math.exp(-(f - 2 / 3 * math.log(0.1 / 1.1)))) for f in bits)
    q2 = sum(1 / (1 + math.exp(-(f - 2 / 3 * math.log(0.1 / 1.1)))) for f in ranks) / 2
    plain, ranked = quantizer(1.0, bits), quantizer(1.0, bits, ranks)
    assert plain.cost(prices).item() == pytest.approx(q4 + 2 * q4 * q8 + 3 * q4 * q8 * q16)
    assert ranked.cost(prices).item() == pytest.approx(q2 * (0.5 + q4 + 2 * q4 * q8 + 3 * q4 * q8 * q16))
    assert ranked.ranks is not None
    leaves = [ranked.bits.requires_grad_(), ranked.ranks.requires_grad_()]
    assert all((gradient > 0).all() for gradient in torch.autograd.grad(ranked.cost(prices), leaves))


def test_without_quantisers_it_is_a_lora() -> None:
    model = adapted(BLORA, trained=False)
    lora = get_peft_model(net(), LoraConfig(r=3, lora_alpha=6, target_modules=["wide", "tall"])).eval()
    for name, layer in layers(model).items():
        delta, twin = layer.deltas["default"], lora.get_submodule(name)
        delta.B.data = tensor(*delta.B.shape).float()
        twin.lora_A["default"].weight.data, twin.lora_B["default"].weight.data = delta.A.data, delta.B.data
    torch.testing.assert_close(model(batch()), lora(batch()))


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_what_is_exported_is_what_the_deployed_gates_compute(bits: int, tmp_path: Path) -> None:
    model, _ = trained(config(bits=bits, penalty=0.0), 12)
    ranks = {}
    for number, (name, layer) in enumerate(layers(model).items()):
        delta = layer.deltas["default"]
        delta.q_ranks.data[number:] = CLOSED
        delta.q_bits_A.data[-1] = CLOSED
        ranks[name.removeprefix("base_model.model.")] = min(4, number + 1)
    wanted = model(batch())
    assert {name: layer.rank for name, layer in found(model).items()} == ranks
    model.save_pretrained(tmp_path / "blora")
    adapter = load(tmp_path / "blora", base=net())
    assert {name: module.rank for name, module in adapter.modules.items()} == ranks
    lora_squeeze.convert(adapter, "peft").save(tmp_path / "lora")
    plain = PeftModel.from_pretrained(net(), tmp_path / "lora").eval()
    torch.testing.assert_close(plain(batch()), wanted, rtol=1e-5, atol=1e-5)
    again = PeftModel.from_pretrained(net(), tmp_path / "blora").eval()
    assert torch.equal(again(batch()), wanted)


def test_the_layer_multiplies_quantised_numbers() -> None:
    _, controller = trained(config(alpha=6, penalty=0.0), 6)
    delta = next(iter(controller.deltas.values()))
    delta.q_bits_B.data[1:] = CLOSED
    delta.q_ranks.data[-1] = CLOSED
    A, B = (on_grid(t, b, t.new_tensor(0) + r.exp()) for t, b, r in
            ((delta.A, 16, delta.q_range_A[0]), (delta.B, 4, delta.q_range_B[0])))  # fmt: skip
    E = on_grid(delta.E, 16, delta.q_range_E[0].exp()) * torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(delta.weight(), 6 / 4 * B @ torch.diag(E) @ A)
    assert not torch.allclose(delta.weight(), 6 / 4 * delta.B @ torch.diag(delta.E) @ delta.A, atol=1e-4)


def test_quantised_activations_are_no_part_of_the_weight() -> None:
    _, controller = trained(config(activations=True, bits=4, penalty=0.0), 10)
    delta = next(iter(controller.deltas.values()))
    x = batch()
    A, E, B = delta.parts()
    hidden = on_grid(functional.linear(x, A), 4, delta.q_range_A_out[0].exp())
    hidden = on_grid(E * hidden, 4, delta.q_range_E_out[0].exp())
    wanted = on_grid(functional.linear(hidden, B), 4, delta.q_range_B_out[0].exp())
    torch.testing.assert_close(delta(x, x), wanted)
    assert not torch.allclose(delta(x, x), functional.linear(x, delta.weight()), atol=1e-3)


def test_the_warmup_is_a_lora_and_sees_the_ranges() -> None:
    steps = 10
    model = get_peft_model(net(), config(activations=True, warmup=0.3))
    controller = controller_for(model, steps)
    optimizer = fast(model)
    seen: dict[str, list[Tensor]] = {name: [] for name in controller.deltas}
    for name, delta in controller.deltas.items():
        delta.register_forward_pre_hook(
            lambda module, given, name=name: seen[name].append(functional.linear(given[0], module.A).abs().max())
        )
    go_on(model, controller, optimizer, 2)
    assert not any(delta.quantised for delta in controller.deltas.values())
    go_on(model, controller, optimizer, 1)
    assert model.peft_config["default"].quantised
    for name, delta in controller.deltas.items():
        assert delta.quantised
        for factor, reach in (
            (delta.A, delta.q_range_A[0]),
            (delta.B, delta.q_range_B[0]),
            (delta.E, delta.q_range_E[0]),
        ):
            torch.testing.assert_close(reach.exp(), factor.abs().max())
        torch.testing.assert_close(delta.q_range_A_out[0].exp(), torch.stack(seen[name]).max())


def test_without_a_penalty_gates_stay_open_and_with_a_large_one_they_close() -> None:
    model, _ = trained(config(penalty=0.0), 20, fast)
    assert all(layer.rank == 4 and set(layer.bits.values()) == {16} for layer in found(model).values())
    for price in ("const", "bit-operations"):
        model, _ = trained(config(penalty=12.0, price=price, gates=2.0), 30, fast)
        assert all(layer.rank == 1 and set(layer.bits.values()) == {2} for layer in found(model).values())


def test_bit_operations_are_those_of_the_three_products() -> None:
    model, _ = trained(config(activations=True, penalty=0.0), 6)
    delta = model.base_model.model.blocks[0].wide.deltas["default"]  # (20, 12)
    assert found(model)["blocks.0.wide"].bit_operations == 4 * (12 * 16 * 32 + 16 * 16 + 20 * 16 * 16)
    delta.q_ranks.data[1:] = CLOSED
    delta.q_bits_B.data[:] = CLOSED
    delta.q_bits_E_out.data[1:] = CLOSED
    layer = found(model)["blocks.0.wide"]
    assert layer.bits == {"A": 16, "E": 16, "B": 2, "A_out": 16, "E_out": 4, "B_out": 16}
    assert layer.bit_operations == 2 * (12 * 16 * 32 + 16 * 16 + 20 * 2 * 4)
    assert layer.of_lora == 4 * (12 + 20) * 32 * 32
    assert found(adapted(BLORA))["blocks.0.wide"].bit_operations == 3 * (12 + 1 + 20) * 32 * 32


def test_only_gates_feel_the_cost_and_the_price_is_the_share_of_bit_operations() -> None:
    model = get_peft_model(net(), config(penalty=2.0, price="bit-operations", quantised=True))
    controller = controller_for(model, 10)
    controller.before_forward()
    controller.before_step()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert all(".q_bits" in name or ".q_ranks" in name for name in moved)
    delta = controller.deltas["blocks.0.wide"]
    bits = delta.q_bits_A.detach().clone().requires_grad_()
    q = open_probability(bits)
    share = 12 / 20  # A has 4 * 12 multiplications, the largest product of the model 4 * 20
    cost = share * (4 * q[0] + 8 * q[0] * q[1] + 16 * q[0] * q[1] * q[2])
    torch.testing.assert_close(delta.q_bits_A.grad, torch.autograd.grad(2 * cost, bits)[0])


def test_gates_are_drawn_anew_for_each_step_and_never_in_eval_mode() -> None:
    model = get_peft_model(net(), config(gates=0.0, quantised=True, init_weights=False))
    controller = controller_for(model, 10)
    controller.before_forward()
    x = batch()
    one = model.train()(x)
    assert torch.equal(model(x), one)
    deployed = model.eval()(x)
    assert torch.equal(model(x), deployed)
    controller.after_step()
    controller.before_forward()
    assert not torch.equal(model.train()(x), one)
    assert torch.equal(model.eval()(x), deployed)
    controller.finish()
    assert torch.equal(model.train()(x), deployed)


def test_in_the_last_steps_gates_stand_still() -> None:
    model = get_peft_model(net(), config(settle=0.4))
    optimizer, controller = fast(model), controller_for(model, 10)
    go_on(model, controller, optimizer, 6)
    before = {name: p.clone() for name, p in model.named_parameters() if ".q_bits" in name or ".q_ranks" in name}
    go_on(model, controller, optimizer, 4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


def test_groups_hold_every_trained_number_once() -> None:
    model = adapted(BLORA, modules_to_save=["head"], gates_lr=0.1, ranges_lr=0.2)
    groups = parameter_groups(model, lr=1e-4, weight_decay=0.3)
    held = [id(p) for group in groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {id(p) for p in model.parameters() if p.requires_grad}
    assert [group["lr"] for group in groups] == [1e-4, 0.1, 0.2]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0, 0.0]
    assert [sum(p.numel() for p in group["params"]) for group in groups[1:]] == [4 * (3 * 3 + 2), 4 * 3]


@pytest.mark.parametrize("cut", [2, 7])
def test_a_resumed_training_is_the_uncut_one(cut: int) -> None:
    asked: dict[str, Any] = {"warmup": 0.4, "penalty": 0.3, "gates": 0.5, "activations": True, "dropout": 0.0}
    whole, one = trained(config(**asked), 10, fast)
    again, other = cut_and_resumed(config(**asked), 10, cut, fast)
    same(whole, again)
    assert one.state_dict() == other.state_dict()


def test_further_training_goes_on_with_the_trained_ranges(tmp_path: Path) -> None:
    first, _ = trained(config(), 20, fast)
    first.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    go_on(model, controller_for(model, 10, optimizer), optimizer, 4)
    same(first, model)


@pytest.mark.parametrize("activations", [False, True])
def test_an_adapter_is_loaded_without_memory_for_its_start(activations: bool, tmp_path: Path) -> None:
    model, _ = trained(config(activations=activations), 6)
    model.save_pretrained(tmp_path)
    same(model, PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True))


def test_rank_one_has_no_rank_gates() -> None:
    model, _ = trained(config(r=1), 8)
    assert {layer.rank for layer in found(model).values()} == {1}
    assert not any("q_ranks" in name for name, _ in model.named_parameters())


def test_half_precision_is_quantised_in_single() -> None:
    with drawn_from(0):
        model = get_peft_model(net(torch.bfloat16), config(quantised=True), autocast_adapter_dtype=False)
    delta = next(iter(layers(model).values())).deltas["default"]
    A = delta.eval().parts()[0]
    assert A.dtype == torch.bfloat16
    assert torch.equal(A, on_grid(delta.A.float(), 16, delta.q_range_A[0].float().exp()).bfloat16())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty": -1.0}, "penalty must be 0 or more, got -1.0"),
        ({"price": "bops"}, "price must be const or bit-operations, got 'bops'"),
        ({"bits": 32}, "bits must be 4, 8 or 16, got 32"),
        ({"warmup": 0.7, "settle": 0.4}, "together at most 1, got 0.7 and 0.4"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
