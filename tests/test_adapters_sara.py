"""SaRA: which entries it trains, the penalty and its gradient, and the second choice at the half of the training."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_cases import METHODS, adapted, batch, layers, net
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.nn import functional
from trainer_cases import Regression, train

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.sara import SaraController, SaraDelta, sara_learning_rate
from lora_squeeze.methods.callback import ControllerCallback
from lora_squeeze.methods.control import deltas_of

SARA = METHODS["sara"]
TARGET = torch.randn(4, 8, 3, generator=torch.Generator().manual_seed(3))


def saras(model: nn.Module) -> dict[str, SaraDelta]:
    return {f"base_model.model.{name}": delta for name, delta in deltas_of(model).items()}


def adamw(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.1)


def step(model: Any, optimizer: torch.optim.Optimizer, controller: SaraController | None = None) -> None:
    loss = functional.mse_loss(model(batch()), TARGET)
    loss.backward()
    if controller is not None:
        controller.before_step()
    optimizer.step()
    if controller is not None:
        controller.after_step()
    optimizer.zero_grad()


def weight(delta: SaraDelta) -> torch.Tensor:
    """W + dW, flat."""
    return (delta.site.base_weight() + delta.weight()).detach().flatten()


def test_entries_below_the_threshold_are_trained() -> None:
    for delta in saras(adapted(SARA, fraction=None, theta=0.05)).values():
        wanted = (delta.site.base_weight().abs() < 0.05).flatten()
        assert torch.equal(delta.index.long(), wanted.nonzero().flatten())
    for delta in saras(adapted(SARA)).values():
        size = delta.site.base_weight().abs().flatten()
        assert set(delta.index.tolist()) == set((-size).topk(len(size) // 4).indices.tolist())


def test_a_larger_budget_has_all_entries_of_a_smaller_one() -> None:
    for name, grid in {"theta": (0.01, 0.05, 0.2, 1.0), "fraction": (0.1, 0.3, 0.9, 1.0)}.items():
        models = [adapted(SARA, **{"fraction": None, name: value}) for value in grid]
        for smaller, larger in pairwise(models):
            for one, other in zip(saras(smaller).values(), saras(larger).values(), strict=True):
                assert set(one.index.tolist()) < set(other.index.tolist())


def test_equal_entries_are_chosen_in_their_order() -> None:
    base = net()
    for parameter in base.parameters():
        parameter.data.fill_(0.5)
    for delta in saras(adapted(SARA, base)).values():
        assert delta.index.tolist() == list(range(delta.site.in_features * delta.site.out_features // 4))


def test_without_penalty_it_is_adamw_with_gradient_and_decay_masked() -> None:
    model, dense = adapted(SARA, nuclear=0.0), net()
    masks = {}
    for name, delta in saras(model).items():
        layer = dense.get_submodule(name.removeprefix("base_model.model."))
        masks[layer.weight] = (
            torch.zeros(layer.weight.numel()).index_fill(0, delta.index.long(), 1).view_as(layer.weight)
        )
    optimizer = adamw(model)
    controller = SaraController(model, 100, optimizer)
    reference = torch.optim.AdamW(masks, lr=1e-2, weight_decay=0.0)
    for _ in range(20):
        step(model, optimizer, controller)
        functional.mse_loss(dense(batch()), TARGET).backward()
        for parameter, mask in masks.items():
            parameter.grad *= mask
            parameter.data *= 1 - 1e-2 * 0.1 * mask
        reference.step()
        dense.zero_grad()
    for delta, (wanted, mask) in zip(saras(model).values(), masks.items(), strict=True):
        found = weight(delta).view_as(wanted)
        assert (found - wanted).abs().max() < 1e-6
        assert torch.equal(found[mask == 0], delta.site.base_weight()[mask == 0])


def test_gradient_and_moments_have_a_number_per_entry() -> None:
    model = adapted(SARA)
    optimizer = adamw(model)
    functional.mse_loss(model(batch()), TARGET).backward()
    optimizer.step()
    entries = sum(len(delta.index) for delta in saras(model).values())
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert sum(g.numel() for g in gradients) == entries
    assert sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim()) == 2 * entries
    assert all(layer.get_base_layer().weight.grad is None for layer in layers(model).values())


def test_the_penalty_is_the_nuclear_norm_of_the_chosen_entries_and_its_gradient() -> None:
    model = adapted(SARA, fraction=0.6).double()
    for delta in saras(model).values():
        matrix = delta.penalised().detach()
        chosen = torch.zeros(matrix.numel()).index_fill(0, delta.index.long(), 1).view_as(matrix)
        assert torch.equal(matrix, delta.site.base_weight() * chosen)
        delta.penalise(0.5)
        gradient, delta.values.grad = delta.values.grad, None
        assert gradient is not None
        for place in range(0, len(delta.values), 17):
            norms = []
            for sign in (1, -1):
                moved = matrix.flatten().clone()
                moved[delta.index.long()[place]] += sign * 1e-5
                norms.append(torch.linalg.svdvals(moved.view_as(matrix)).sum())
            assert abs(gradient[place] - 0.5 * (norms[0] - norms[1]) / 2e-5) < 1e-6


def test_the_penalty_is_added_to_the_gradient_of_the_task() -> None:
    model = adapted(SARA)
    delta = next(iter(saras(model).values()))
    delta.penalise(0.5)
    penalty, delta.values.grad = delta.values.grad, None
    functional.mse_loss(model(batch()), TARGET).backward()
    assert penalty is not None
    assert delta.values.grad is not None
    task = delta.values.grad.clone()
    delta.penalise(0.5)
    assert torch.allclose(delta.values.grad, task + penalty, atol=1e-7)
    assert task.any()
    assert penalty.any()


def test_the_gradient_of_a_matrix_of_low_rank_is_that_of_its_own_directions() -> None:
    base = net()
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 2, generator=generator)).Q for n in (20, 12))
    base.blocks[0].wide.weight.data = U @ torch.diag(torch.tensor([3.0, 1.0])) @ V.T
    delta = next(iter(saras(adapted(SARA, base, fraction=1.0)).values()))
    delta.penalise(1.0)
    assert delta.values.grad is not None
    assert (delta.values.grad.view(20, 12) - U @ V.T).abs().max() < 1e-5


def test_the_penalty_alone_lowers_the_norm_step_by_step() -> None:
    model = adapted(SARA, nuclear=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    controller = SaraController(model, 1000, optimizer)

    def norms() -> list[float]:
        return [float(torch.linalg.svdvals(delta.penalised().detach()).sum()) for delta in saras(model).values()]

    first = before = norms()
    for _ in range(40):
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        after = norms()
        fallen = [a < b for a, b in zip(after, before, strict=True)]
        assert fallen.count(True) == 1, "one layer in each step"
        assert sum(after) < sum(before)
        before = after
    assert all(a < b for a, b in zip(before, first, strict=True)), "in time every layer has its turn"


@pytest.mark.parametrize("settings", [{"fraction": 0.25}, {"fraction": None, "theta": 0.1}], ids=["fraction", "theta"])
def test_at_the_half_the_entries_that_have_grown_are_frozen(settings: dict[str, Any]) -> None:
    model = adapted(SARA, **settings)
    optimizer = adamw(model, 2e-2)
    controller = SaraController(model, 12, optimizer)
    for _ in range(6):
        step(model, optimizer, controller)
    thresholds, old = {}, {}
    for name, delta in saras(model).items():
        size = delta.site.base_weight().abs().flatten()
        thresholds[name] = 0.1 if "theta" in settings else float(size.sort().values[len(size) // 4])
        moments = {key: value.clone() for key, value in optimizer.state[delta.values].items()}
        old[name] = delta.index.tolist(), weight(delta), moments
    loss = functional.mse_loss(model(batch()), TARGET)  # alive when the parameters are replaced
    loss.backward()
    gradients = {name: delta.values.grad for name, delta in saras(model).items()}
    controller.before_step()
    fewer = 0
    for name, delta in saras(model).items():
        index, before, moments = old[name]
        small = [place for place in index if abs(before[place]) < thresholds[name]]
        assert delta.index.tolist() == small
        assert torch.allclose(weight(delta), before, atol=1e-7), "freezing changes no weight"
        rows = [index.index(place) for place in small]
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[delta.values][moment], moments[moment][rows])
        assert delta.values.grad is not None
        assert (delta.values.grad - gradients[name][rows]).abs().max() < 1e-3  # the penalty has been added
        fewer += len(index) - len(small)
    assert fewer
    assert sum(p.numel() for g in optimizer.param_groups for p in g["params"]) == sum(
        len(delta.index) for delta in saras(model).values()
    )
    frozen = {n: [p for p in old[n][0] if p not in set(d.index.tolist())] for n, d in saras(model).items()}
    for _ in range(4):
        before = {name: weight(delta) for name, delta in saras(model).items()}
        step(model, optimizer, controller)
        for name, delta in saras(model).items():
            assert torch.equal(weight(delta)[frozen[name]], before[name][frozen[name]])
            assert not torch.equal(weight(delta), before[name])


def test_after_the_half_it_is_saved_and_loaded_without_loss(tmp_path: Path) -> None:
    model = adapted(SARA)
    optimizer = adamw(model, 2e-2)
    controller = SaraController(model, 6, optimizer)
    for _ in range(6):
        step(model, optimizer, controller)
    assert any(len(delta.kept) for delta in saras(model).values())
    model.save_pretrained(tmp_path)
    for options in ({}, {"is_trainable": True}, {"low_cpu_mem_usage": True}):
        again: Any = PeftModel.from_pretrained(net(), tmp_path, **options).eval()
        assert torch.equal(again(batch()), model(batch()))


def test_numbers_loaded_beside_a_merged_adapter_leave_it_alone() -> None:
    model = adapted(SARA, trained=True)
    model.add_adapter("other", SARA.config())
    wanted = model(batch())
    state = get_peft_model_state_dict(model, adapter_name="other")
    model.merge_adapter()
    set_peft_model_state_dict(model, state, "other")
    model.unmerge_adapter()
    assert torch.equal(model(batch()), wanted)


def test_the_trainers_callback_penalises_and_narrows_at_the_half() -> None:
    ends = {}
    for nuclear in (0.0, 1.0):
        model = get_peft_model(Regression(), SARA.config(nuclear=nuclear))
        first = {name: len(delta.index) for name, delta in saras(model).items()}
        callback = ControllerCallback()
        train(model, callback, steps=4)
        controller = callback.controller
        assert isinstance(controller, SaraController)
        assert (controller.steps_done, controller.half) == (4, 2)
        assert {name: len(delta.index) for name, delta in saras(model).items()} != first
        ends[nuclear] = [weight(delta) for delta in saras(model).values()]
    assert not all(torch.equal(a, b) for a, b in zip(ends[0.0], ends[1.0], strict=True)), "before the optimiser's step"


def test_the_authors_learning_rate() -> None:
    assert math.isclose(sara_learning_rate(2e-3), 5.0e-4, rel_tol=0.01)
    assert sara_learning_rate(1e-3) > sara_learning_rate(2e-3)


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match=r"give theta or fraction, not both; got 0.1 and 0.2"):
        SARA.config(theta=0.1, fraction=0.2)
    with pytest.raises(ValueError, match=r"theta must be above 0, got 0"):
        SARA.config(theta=0, fraction=None)
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 1.5"):
        SARA.config(fraction=1.5)
    with pytest.raises(ValueError, match=r"nuclear must be 0 or more, got -1"):
        SARA.config(nuclear=-1)
    with pytest.raises(ValueError, match=r"SaRA trains entries of W as they are and has no alpha, got 8"):
        SARA.config(alpha=8)
    model = adapted(SARA, fraction=None, theta=1e-9)
    with pytest.raises(LoraSqueezeError, match=r"no entry of the adapted weights is below theta; raise theta or give"):
        SaraController(model, 10, adamw(model))
    with pytest.raises(LoraSqueezeError, match=r"SaRA exchanges parameters while it trains; give the optimizer"):
        SaraController(adapted(SARA), 10)
