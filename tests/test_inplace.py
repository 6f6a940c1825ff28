"""Squeezing a live model in place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft_cases
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import CASES
from peft_models import Case, adapted, best, deltas, lost, outputs, reload, save
from torch import nn

import lora_squeeze
from lora_squeeze import LoraSqueezeError
from lora_squeeze.moments import Moments, predicted_increase
from lora_squeeze.post_squeeze import decomposed
from lora_squeeze.training import commit, inplace
from lora_squeeze.training.ask import calibrate
from lora_squeeze.training.commit import compact, make_room
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.live import live_modules

WAYS = ["replace", "mask"]


def trainable(name: str, **changes: Any) -> PeftModel:
    """A random adapter, ready to be trained."""
    return adapted(CASES[name], **changes).train()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    found = model(batch)
    loss = (found if isinstance(found, torch.Tensor) else found.logits).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_every_update_becomes_its_best_approximation(name: str, way: str) -> None:
    case = CASES[name]
    model = adapted(case)
    before = deltas(model)
    done = squeeze_(model, case.rank, in_place=way)
    for module, dW in deltas(model).items():
        rank = done.ranks[module] // next(m.step for m in live_modules(model, "default") if m.name == module)
        assert torch.allclose(dW.double(), best(before[module].double(), rank), atol=2e-5), module
    total = sum(float(dW.double().square().sum()) for dW in before.values())
    gone = sum(lost(before[m], done.ranks[m]) ** 2 for m in before if "conv" not in m)
    if name != "grouped convolution":
        assert done.energy == pytest.approx(1 - gone / total, abs=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_peft_saves_and_loads_the_result(name: str, tmp_path: Path) -> None:
    """The same outputs in float64, the same file as the squeeze of the saved adapter, no more numbers than promised."""
    case = CASES[name]
    model = adapted(case)
    done = squeeze_(model, case.rank)
    again = reload(case, save(model, tmp_path / "live"))
    assert torch.allclose(outputs(model.double(), case), outputs(again, case), atol=1e-6)
    opened = lora_squeeze.load(tmp_path / "live")
    assert {m.name: m.rank * m.step for m in opened.modules.values()} == done.ranks
    assert opened.parameters == done.parameters_after


@pytest.mark.parametrize("name", ["linear", "embedding", "convolutions", "experts", "lora bias", "attention module"])
def test_a_squeeze_to_the_present_rank_changes_nothing(name: str) -> None:
    case = CASES[name]
    model = adapted(case)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    done = squeeze_(model, int(case.config["r"]))
    assert done.energy == 1.0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["linear", "conv1d of gpt2", "embedding", "convolutions", "experts", "lora bias", "patterns", "rslora"]
)
def test_first_moments_are_those_of_the_gradient_in_the_new_coordinates(name: str, way: str) -> None:
    """After one Adam step the first moment is 0.1 times the gradient; the gradient at the truncated factors'
    coordinates, of the same dL/ddW, is computed by autograd from the full update.
    """
    case = CASES[name]
    model = trainable(name)
    modules = live_modules(model, "default")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-12, betas=(0.9, 0.999))
    step(model, optimizer, case.batch())
    old = {
        m.name: copy.deepcopy((m.update(), optimizer.state[m.B]["exp_avg"], optimizer.state[m.A]["exp_avg"]))
        for m in modules
    }
    done = squeeze_(model, case.rank, optimizer=optimizer, in_place=way)
    for module in live_modules(model, "default"):
        update, moment_B, moment_A = old[module.name]
        P, R = done.maps[module.path]
        k = module.rank()
        B, A = module.columns(module.B)[..., :k], module.rows(module.A)[..., :k, :]
        assert torch.allclose(B.double(), update.B.double() @ P[..., :k], atol=1e-6)
        assert torch.allclose(A.double(), R[..., :k, :] @ update.A.double(), atol=1e-6)
        found_B = module.columns(optimizer.state[module.B]["exp_avg"])[..., :k]
        found_A = module.rows(optimizer.state[module.A]["exp_avg"])[..., :k, :]
        expected_B = module.columns(moment_B).double() @ R.mT
        expected_A = P.mT @ module.rows(moment_A).double()
        largest = max(float(expected_B.abs().max()), float(expected_A.abs().max()))
        assert torch.allclose(found_B.double(), expected_B, atol=1e-5 * largest)
        assert torch.allclose(found_A.double(), expected_A, atol=1e-5 * largest)


def test_transported_gradients_are_those_of_autograd() -> None:
    """dL/dB' and dL/dA' from dL/dB and dL/dA, in float64, to 1e-10: at full rank the loss is the same function."""
    case = CASES["linear"]
    model = trainable("linear").double()
    batch = case.batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9)
    step(model, optimizer, batch)
    before = outputs(model, case)
    ranks = {m.name: m.width for m in live_modules(model, "default")}
    _rotate(model, optimizer)
    assert torch.allclose(outputs(model, case), before, atol=1e-12)
    carried = {id(p): optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters() if p.requires_grad}
    model.zero_grad()
    model(batch).logits.square().mean().backward()
    for module in live_modules(model, "default"):
        assert module.width == ranks[module.name]
        for p in (module.A, module.B):
            assert p.grad is not None
            assert torch.allclose(carried[id(p)], p.grad, atol=1e-10), module.name


def _rotate(model: PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """To the singular basis at the present rank: the whole machinery of a squeeze, with nothing cut off."""
    modules = live_modules(model, "default")
    updates = [m.update() for m in modules]
    found = decomposed([m.name for m in modules], updates)
    new = [inplace._truncated(m, u, f, u.rank, None) for m, u, f in zip(modules, updates, found, strict=True)]
    commit.commit(model, "default", modules, new, optimizer, "transport", True)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
])  # fmt: skip
def test_masked_training_is_the_same_as_with_small_parameters(make: Callable[..., torch.optim.Optimizer]) -> None:
    """Kept shapes with zeros in the unused directions: the same losses, step by step, and the same adapter at the end.

    For optimisers that work number by number; Adafactor scales an update by its mean square, zeros included.
    """
    case, runs = CASES["linear"], []
    for way in WAYS:
        model = trainable("linear").double()
        optimizer = make([p for p in model.parameters() if p.requires_grad])
        losses = [step(model, optimizer, case.batch()) for _ in range(3)]
        squeeze_(model, case.rank, optimizer=optimizer, in_place=way)
        losses += [step(model, optimizer, case.batch()) for _ in range(5)]
        for module in live_modules(model, "default"):
            assert not module.rows(module.A)[..., case.rank :, :].any()
            assert not module.columns(module.B)[..., case.rank :].any()
        compact(model, optimizer=optimizer)
        assert all(m.width == case.rank for m in live_modules(model, "default"))
        losses += [step(model, optimizer, case.batch()) for _ in range(2)]
        runs.append((losses, deltas(model)))
    (small, small_dW), (masked, masked_dW) = runs
    assert small == pytest.approx(masked, rel=1e-9)
    assert all(torch.allclose(small_dW[name], masked_dW[name], atol=1e-8) for name in small_dW)


def test_compact_keeps_the_update_bit_for_bit() -> None:
    model = trainable("experts")
    squeeze_(model, 2, in_place="mask")
    before = {m.name: m.update() for m in live_modules(model, "default")}
    assert model.peft_config["default"].r == 4
    assert compact(model)
    for module in live_modules(model, "default"):
        assert torch.equal(module.update().B, before[module.name].B)
        assert torch.equal(module.update().A, before[module.name].A)
        assert module.width == 2
    assert model.peft_config["default"].r == 2
    assert not compact(model), "a second time there is nothing to do"


def test_repeated_squeezes_equal_a_direct_one() -> None:
    case = CASES["linear"]
    direct, stepwise = adapted(case), adapted(case)
    squeeze_(direct, 2)
    for rank in (6, 4, 2):
        squeeze_(stepwise, rank)
    for name, dW in deltas(direct).items():
        assert torch.allclose(dW, deltas(stepwise)[name], atol=1e-5)


def test_directions_that_cannot_learn_are_revived() -> None:
    """With B = 0 at the first step, the squeezed adapter still learns."""
    case = CASES["linear"]
    model = get_peft_model(peft_cases.llama(), LoraConfig(**case.config))
    squeeze_(model, 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for module in live_modules(model, "default"):
        assert not module.B.any()
        assert bool(module.A.any(-1).all()), "each row of A must be there, or its direction has no gradient"
    step(model, optimizer, case.batch())
    assert all(bool(m.B.any()) for m in live_modules(model, "default"))


@pytest.mark.parametrize("way", WAYS)
def test_no_more_ranks_are_told_than_a_small_layer_has_directions(way: str) -> None:
    net = nn.ModuleDict({"wide": nn.Linear(32, 32), "narrow": nn.Linear(32, 4)})
    model = get_peft_model(net, LoraConfig(r=8, target_modules=["wide", "narrow"], init_lora_weights=False))
    done = squeeze_(model, 6, in_place=way)
    assert done.ranks == {m.name: m.rank() for m in live_modules(model, "default")} == {"wide": 6, "narrow": 4}
    assert done.parameters_after == 6 * (32 + 32) + 4 * (32 + 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_factors_stay_in_their_dtype(dtype: torch.dtype) -> None:
    case = CASES["linear"]
    model = adapted(case).to(dtype)
    before = deltas(model)
    squeeze_(model, 3)
    for name, dW in deltas(model).items():
        error = float((dW - best(before[name].double(), 3)).norm() / before[name].double().norm())
        assert error < 8 * torch.finfo(dtype).eps, f"{name}: {error}"
    assert {m.A.dtype for m in live_modules(model, "default")} == {dtype}


def test_tied_embedding_and_head_stay_tied() -> None:
    model = trainable("tied embedding and head")
    squeeze_(model, 3)
    by_name = {m.name: m for m in live_modules(model, "default")}
    embedding, head = by_name["model.embed_tokens"], by_name["lm_head"]
    assert torch.equal(head.A, embedding.B.mT)
    assert torch.equal(head.B, embedding.A.mT)
    assert head.B.data_ptr() == embedding.A.data_ptr(), "they share memory, as PEFT made them"


def test_ranks_can_differ(tmp_path: Path) -> None:
    case = CASES["linear"]
    model = adapted(case)
    names = [m.name for m in live_modules(model, "default")]
    wanted = {name: 1 + i % 7 for i, name in enumerate(names)}
    done = squeeze_(model, ranks=wanted)
    assert done.ranks == wanted
    again = reload(case, save(model, tmp_path / "a"))
    assert torch.allclose(outputs(model.double(), case), outputs(again, case), atol=1e-6)


@pytest.mark.parametrize("name", ["linear", "experts", "attention module", "grouped convolution"])
def test_budgets_are_kept_and_spent_where_they_count(name: str) -> None:
    case = CASES[name]
    uniform, spent = adapted(case), adapted(case)
    plain = squeeze_(uniform, case.rank)
    clever = squeeze_(spent, case.rank, allocate="global")
    assert clever.parameters_after <= plain.parameters_after
    assert clever.energy >= plain.energy - 1e-9
    again = squeeze_(adapted(case), params=plain.parameters_after)
    assert again.parameters_after <= plain.parameters_after


def test_energy_bound_is_met() -> None:
    model = adapted(CASES["linear"])
    done = squeeze_(model, energy=0.8, allocate="global")
    assert done.energy >= 0.8
    assert done.parameters_after < done.parameters


def test_other_adapters_are_left_alone() -> None:
    case = CASES["linear"]
    model = adapted(case)
    model.add_adapter("other", LoraConfig(**(case.config | {"r": 5})))
    before = {k: v.clone() for k, v in model.state_dict().items() if ".other" in k}
    squeeze_(model, 2, adapter="default")
    assert {m.width for m in live_modules(model, "default")} == {2}
    assert {m.width for m in live_modules(model, "other")} == {5}
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert model.peft_config["other"].r == 5


def test_the_optimiser_holds_exactly_the_new_parameters() -> None:
    case = CASES["bias all"]
    model = trainable("bias all")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([{"params": parameters[::2], "lr": 1e-3}, {"params": parameters[1::2]}], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
    step(model, optimizer, case.batch())
    squeeze_(model, case.rank, optimizer=optimizer)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert set(optimizer.state) == {p for p in model.parameters() if p.requires_grad}
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 5e-3]
    step(model, optimizer, case.batch())


@pytest.mark.parametrize(
    ("where", "way"),
    [("put", "replace"), ("write", "mask"), ("exchange", "replace"), ("exchange", "mask"), ("sync_config", "replace")],
)
def test_a_failure_half_way_is_rolled_back(where: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["linear"]
    model = trainable("linear")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    step(model, optimizer, case.batch())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), model.peft_config["default"].to_dict()))
    identities = [id(p) for p in model.parameters()]
    alphas = [dict(m.layer.lora_alpha) for m in live_modules(model, "default")]
    calls = 0
    home: Any = commit.LiveModule if where == "put" else commit
    original = getattr(home, where)

    def failing(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 or where in ("exchange", "sync_config"):
            monkeypatch.setattr(home, where, original)
            raise RuntimeError("out of memory")
        return original(*args, **kwargs)

    monkeypatch.setattr(home, where, failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        squeeze_(model, 3, optimizer=optimizer, in_place=way)
    after = (model.state_dict(), optimizer.state_dict(), model.peft_config["default"].to_dict())
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert [id(p) for p in model.parameters()] == identities
    assert before[2] == after[2]
    assert [dict(m.layer.lora_alpha) for m in live_modules(model, "default")] == alphas
    for key, entry in before[1]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(v), torch.as_tensor(after[1]["state"][key][k])) for k, v in entry.items()
        )
    step(model, optimizer, case.batch())


def test_random_state_is_not_touched() -> None:
    model = adapted(CASES["experts"])
    state = torch.get_rng_state()
    squeeze_(model, 1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("frozen", [False, True])
def test_room_is_made_for_other_ranks(frozen: bool) -> None:
    """Also in the optimiser for what is frozen for a while."""
    model = trainable("convolutions")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    for module in live_modules(model, "default"):
        module.A.requires_grad_(not frozen)
    names = [m.name for m in live_modules(model, "default")]
    scales = [m.scale for m in live_modules(model, "default")]
    make_room(model, {names[0]: 3, names[1]: 9}, optimizer=optimizer)
    assert [m.width for m in live_modules(model, "default")] == [3, 9, 4, 4]
    assert [m.scale for m in live_modules(model, "default")] == scales
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert held == [id(p) for m in live_modules(model, "default") for p in (m.A, m.B)]
    assert {m.A.requires_grad for m in live_modules(model, "default")} == {not frozen}


class Strange(torch.optim.Optimizer):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"give one of rank, energy, params or ranks, got none"),
        ({"rank": 2, "energy": 0.5}, r"give one of rank, energy, params or ranks, got rank, energy"),
        ({"rank": 9}, r"rank 9 is above the present rank 8; a squeeze only goes down"),
        ({"rank": 2, "optimizer_state": "guess"}, r"optimizer_state must be one of transport, reset, got 'guess'"),
        ({"rank": 2, "in_place": "maybe"}, r"in_place must be one of auto, replace, mask, got 'maybe'"),
        ({"ranks": {"nothing": 2}}, r"no module 'nothing' in the adapter; it has model.layers.0"),
        ({"ranks": {"model.layers.0.self_attn.q_proj": 9}}, r"rank 9 is impossible; it has 8 now"),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraSqueezeError, match=message):
        squeeze_(adapted(CASES["linear"]), **options)


def test_an_unknown_optimiser_is_refused_by_name() -> None:
    model = trainable("linear")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = Strange([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(LoraSqueezeError, match="Strange"):
        squeeze_(model, 2, optimizer=optimizer)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    squeeze_(model, 2, optimizer=optimizer, optimizer_state="reset")


def test_a_broken_factor_is_named() -> None:
    model = adapted(CASES["linear"])
    with torch.no_grad():
        live_modules(model, "default")[3].B[0, 0] = torch.nan
    with pytest.raises(LoraSqueezeError, match=r"layers.0.self_attn.o_proj: factor B holds NaN or infinity"):
        squeeze_(model, 2)


def test_common_ranks_are_kept_common() -> None:
    case = CASES["experts"]
    model = adapted(case)
    names = [m.name for m in live_modules(model, "default") if m.group]
    with pytest.raises(LoraSqueezeError, match=r"PEFT loads these with one rank, got \[1, 2\]"):
        squeeze_(model, ranks={names[0]: 1, names[1]: 2})


def test_the_users_configuration_is_not_changed() -> None:
    config = LoraConfig(r=8, target_modules=["q_proj"])
    model = get_peft_model(peft_cases.llama(), config)
    squeeze_(model, 2)
    assert (config.r, model.peft_config["default"].r) == (8, 2)


def _known(model: PeftModel, case: Case) -> dict[str, Moments]:
    """Statistics from a batch, with the batch's own tokens as labels."""
    return calibrate(model, [{"input_ids": case.batch(), "labels": case.batch()}])


def _predicted(model: PeftModel, moments: dict[str, Moments], maps: Any) -> dict[str, float]:
    scales = {m.path: m.scale for m in live_modules(model, "default")}
    return {path: float(predicted_increase(moments[path], scales[path], P, R).sum()) for path, (P, R) in maps.items()}


@pytest.mark.parametrize("name", ["linear", "conv1d of gpt2", "patterns", "embedding and head"])
def test_with_moments_the_predicted_loss_is_lower_for_every_module(name: str) -> None:
    case = CASES[name]
    plain, aware = adapted(case), adapted(case)
    moments = _known(plain, case)
    one = squeeze_(plain, case.rank)
    two = squeeze_(aware, case.rank, moments=moments)
    expected, found = _predicted(plain, moments, one.maps), _predicted(aware, moments, two.maps)
    assert found.keys() == expected.keys()
    # A hundredth of the metric is the plain one.
    assert all(found[path] <= expected[path] * 1.02 for path in found)
    assert sum(found.values()) < sum(expected.values())
    assert two.energy < one.energy, "the plain truncation keeps the most energy"


def test_with_moments_a_global_budget_follows_the_predicted_loss() -> None:
    case = CASES["linear"]
    model, other = adapted(case), adapted(case)
    moments = _known(model, case)
    clever = squeeze_(model, 3, allocate="global", moments=moments)
    ranks = squeeze_(adapted(case), 3, allocate="global").ranks
    by_energy = squeeze_(other, ranks=ranks, moments=moments)
    assert clever.ranks != ranks
    assert clever.parameters_after <= by_energy.parameters_after
    lost = [sum(_predicted(m, moments, done.maps).values()) for m, done in ((model, clever), (other, by_energy))]
    assert lost[0] < lost[1]


def test_modules_without_moments_are_squeezed_plainly() -> None:
    case = CASES["linear"]
    model, plain = adapted(case), adapted(case)
    moments = dict(list(_known(model, case).items())[:3])
    squeeze_(model, 3, moments=moments, allocate="global")
    squeeze_(plain, 3, allocate="global")
    for mine, theirs in zip(live_modules(model, "default"), live_modules(plain, "default"), strict=True):
        same = torch.allclose(mine.update().dense(), theirs.update().dense(), atol=1e-6)
        assert same == (mine.path not in moments)
