"""Parameters exchanged under an optimiser: places, settings, the way back, a fresh start, and what is refused."""

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from optimizer_cases import (
    AFTER,
    BEFORE,
    CASES,
    COUNTED_BY_GROUP,
    IN,
    OUT,
    RANK,
    Case,
    Toy,
    each,
    rotation,
    same,
    signed_permutation,
    with_zero_tail,
)
from torch import nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.training.optimizer_state import STATE_POLICIES, check_optimizer, exchange, unwrapped

pytestmark = pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")


@each()
def test_the_new_parameters_stand_in_the_old_places_and_the_rest_is_untouched(case: Case) -> None:
    """Groups, their settings, other parameters and a scheduler attached before go on as without the exchange."""
    toys, others, schedulers = [], [], []
    for _ in range(2):
        toy, other = Toy.of(case), nn.Parameter(torch.ones(3, dtype=case.dtype))
        toy.optimizer.add_param_group({"params": [other], "lr": 0.005})
        if hasattr(toy.optimizer, "train"):
            toy.optimizer.train()
        other.grad = torch.ones_like(other)
        scheduler = torch.optim.lr_scheduler.LambdaLR(toy.optimizer, lambda epoch: 1 / (1 + epoch))
        toy.optimizer.step()
        scheduler.step()
        toys.append(toy)
        others.append(other)
        schedulers.append(scheduler)
    toy = toys[0]
    lists = [group["params"] for group in toy.optimizer.param_groups]
    toy.squeeze(*rotation(2))
    assert [[id(p) for p in row] for row in lists] == [[id(toy.B), id(toy.A)], [id(others[0])]]
    assert all(group["params"] is row for group, row in zip(toy.optimizer.param_groups, lists, strict=True))
    assert same(*([{**group, "params": 0} for group in one.optimizer.param_groups] for one in toys))
    assert same(*(one.optimizer.state.get(other, {}) for one, other in zip(toys, others, strict=True)))
    assert {id(p) for p in toy.optimizer.state} <= {id(p) for row in lists for p in row}
    for one, scheduler in zip(toys, schedulers, strict=True):
        one.train(1, 1)
        scheduler.step()
    assert schedulers[0].get_last_lr() == schedulers[1].get_last_lr() == pytest.approx([0.02 / 3, 0.005 / 3])
    assert torch.equal(*others)


@pytest.mark.parametrize("in_place", [False, True])
@each()
def test_taking_an_exchange_back_restores_everything(case: Case, in_place: bool) -> None:
    """Bit for bit, so that training goes on as if nothing had been."""
    toy, twin = Toy.of(case).train(0, BEFORE), Toy.of(case).train(0, BEFORE)
    before = copy.deepcopy(toy.optimizer.state_dict())
    entries = {id(p): id(entry) for p, entry in toy.optimizer.state.items()}
    values = toy.B.detach().clone(), toy.A.detach().clone()
    undo = toy.rotate(*rotation()) if in_place else toy.squeeze(*rotation(2))
    assert not toy.optimizer.state or not same(before["state"], toy.optimizer.state_dict()["state"])
    undo()
    for parameter, value in zip((toy.B, toy.A), values, strict=True):
        parameter.data.copy_(value)
    assert same(before, toy.optimizer.state_dict())
    assert {id(p): id(entry) for p, entry in toy.optimizer.state.items()} == entries
    assert toy.optimizer.param_groups[0]["params"][0] is toy.B
    for one in (toy, twin):
        one.train(BEFORE, AFTER)
    assert torch.equal(toy.B, twin.B) and torch.equal(toy.A, twin.A)


@each(
    [
        "Adam",
        "AdamW",
        "SGD, momentum",
        "Lion",
        "Adafactor of torch",
        "Adafactor",
        "Adafactor, momentum",
        "schedule-free AdamW",
        "schedule-free RAdam",
        "schedule-free SGD",
        "bitsandbytes AdamW",  # not in 8 bits: on the CPU, bitsandbytes 0.50 codes zero as 4e-5 of a block's largest
    ]
)
def test_a_tail_of_zeros_stays_zero(case: Case) -> None:
    """Column of B and row of A are zero, so both gradients are: with state that is zero too, nothing moves there."""
    k = 2
    toy = Toy.of(case).train(0, BEFORE)
    toy.rotate(*with_zero_tail(k))
    assert (toy.B[:, k:] == 0).all() and (toy.A[k:] == 0).all()
    before = toy.B.detach().clone()
    toy.train(BEFORE, AFTER)
    if hasattr(toy.optimizer, "eval"):
        toy.optimizer.eval()
    assert (toy.B[:, k:] == 0).all() and (toy.A[k:] == 0).all()
    assert toy.A.isfinite().all() and not torch.equal(toy.B[:, :k], before[:, :k])


@each(["schedule-free AdamW", "schedule-free RAdam", "schedule-free SGD"])
def test_the_averaged_point_of_schedule_free_goes_over_as_well(case: Case) -> None:
    """x, which `eval` shows, is a point between p and z, whichever of the two modes the change happens in."""
    P, R = signed_permutation()
    for mode in ("train", "eval"):
        toy, moved = Toy.of(case).train(0, BEFORE), Toy.of(case).train(0, BEFORE)
        getattr(moved.optimizer, mode)()
        moved.squeeze(P, R)
        for one in (toy, moved):
            one.optimizer.eval()  # type: ignore[attr-defined]
        for found, expected in zip((moved.B, moved.A), toy.values(P, R), strict=True):
            assert torch.allclose(found, expected, rtol=1e-9)


@each(name for name in CASES if name not in COUNTED_BY_GROUP)
def test_reset_drops_the_state_and_the_optimiser_begins_anew(case: Case) -> None:
    P, R = rotation(2)
    toy = Toy.of(case).train(0, BEFORE)
    check_optimizer(toy.optimizer, [toy.B, toy.A], "reset")
    assert toy.states(P, R, "reset") == {toy.B: {}, toy.A: {}}
    toy.squeeze(P, R, "reset")
    assert toy.B not in toy.optimizer.state and len(toy.optimizer.state) == 0
    fresh = Toy(toy.B, toy.A, case.make([nn.Parameter(toy.B.detach().clone()), nn.Parameter(toy.A.detach().clone())]))
    fresh.B, fresh.A = fresh.optimizer.param_groups[0]["params"]
    for one in (toy, fresh):
        one.train(BEFORE, 1)
    if "schedulefree" not in case.module:  # its averaging weights count all steps
        assert torch.equal(toy.B, fresh.B) and torch.equal(toy.A, fresh.A)


@each()
def test_before_the_first_step_there_is_nothing_to_carry(case: Case) -> None:
    toy = Toy.of(case)
    check_optimizer(toy.optimizer, [toy.B, toy.A], "transport")
    assert toy.states(*rotation(2)) == {toy.B: {}, toy.A: {}}
    toy.squeeze(*rotation(2))
    assert len(toy.train(0, BEFORE).optimizer.param_groups[0]["params"]) == 2


def test_an_empty_momentum_buffer_stays_empty() -> None:
    toy = Toy.of(CASES["SGD, momentum"]).train(0, 1)
    toy.optimizer.state[toy.B]["momentum_buffer"] = None
    assert toy.states(*rotation(2))[toy.B] == {"momentum_buffer": None}


# --- refusals -------------------------------------------------------------------------------------------------------


class Watching(torch.optim.AdamW):
    """A user's AdamW that keeps something more."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["largest"] = p.abs().max()


class Quiet(torch.optim.AdamW):
    """A user's AdamW that keeps nothing more."""


class Elsewhere(torch.optim.SGD):
    """Keeps state under a name."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.state["all"]["number"] = 1  # type: ignore[index]


def refused(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], policy: str, text: str) -> None:
    """Refused with this text, and nothing is changed."""
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(LoraSqueezeError, match=text):
        check_optimizer(optimizer, list(parameters), policy)
    assert same(before, optimizer.state_dict())


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize(
    ("module", "name"), [("torch.optim", "Adamax"), ("torch.optim", "RMSprop"), ("bitsandbytes.optim", "AdEMAMix")]
)
def test_transport_refuses_an_optimiser_it_does_not_know(module: str, name: str, steps: int) -> None:
    """Also before its first step. Its state can still be reset."""
    toy = Toy.of(Case(module, name, {}, dtype=torch.float32)).train(0, steps)
    refused(
        toy.optimizer,
        [toy.B, toy.A],
        "transport",
        rf"does not know the optimiser .*\.{name}: use optimizer_state='reset', or .* torch.AdamW, .*, Lion \(those of",
    )
    check_optimizer(toy.optimizer, [toy.B, toy.A], "reset")
    toy.squeeze(*rotation(2), "reset")
    toy.train(steps, 2)


def test_a_subclass_of_a_known_optimiser_is_known_unless_it_keeps_more() -> None:
    plain = Toy.of(CASES["Lion"])
    for kind in (Quiet, Watching):
        optimizer = kind([plain.B, plain.A])
        check_optimizer(optimizer, [plain.B, plain.A], "transport")
        Toy(plain.B, plain.A, optimizer).train(0, 1)
    text = r"does not know the state 'largest' of the optimiser \S+Watching: use optimizer_state='reset'"
    refused(optimizer, [plain.B, plain.A], "transport", text)
    with pytest.raises(LoraSqueezeError, match=text):
        Toy(plain.B, plain.A, optimizer).states(*rotation(2))
    check_optimizer(optimizer, [plain.B, plain.A], "reset")


@each(COUNTED_BY_GROUP)
def test_reset_refuses_second_moments_whose_age_is_counted_by_the_group(case: Case) -> None:
    toy = Toy.of(case).train(0, 2)
    refused(toy.optimizer, [toy.B, toy.A], "reset", r"counts steps per group \('k'\).* use optimizer_state='transport'")


@pytest.mark.parametrize("policy", STATE_POLICIES)
def test_optimisers_that_keep_parameters_or_state_elsewhere_are_refused(policy: str) -> None:
    from peft.optimizers import create_riemannian_optimizer
    from peft.optimizers.lorafa import LoraFAOptimizer

    toy = Toy.of(Case("torch.optim", "LBFGS", {}))
    both = [toy.B, toy.A]
    refused(toy.optimizer, both, policy, r"LBFGS cannot be used while ranks change: it keeps one history.*; use one of")
    refused(LoraFAOptimizer(both), both, policy, "LoraFAOptimizer cannot .* it keeps its state by the names of the mod")
    model = nn.ModuleDict({"lora_A": nn.Linear(IN, RANK, bias=False), "lora_B": nn.Linear(RANK, OUT, bias=False)})
    whole = nn.ModuleDict({"layer": model})
    riemannian = create_riemannian_optimizer(whole, torch.optim.AdamW, lr=0.1)  # type: ignore[arg-type]
    refused(riemannian, whole.parameters(), policy, "it refers to the old factors outside its groups")
    elsewhere = Toy(toy.B, toy.A, Elsewhere(both)).train(0, 1).optimizer
    refused(elsewhere, both, policy, r"it keeps state under keys that are not its parameters \(str\)")
    odd = torch.optim.SGD(both)
    odd.state[toy.A] = [1]  # type: ignore[assignment]
    with pytest.raises(LoraSqueezeError, match=r"its state of a parameter is no dict but builtins.list"):
        check_optimizer(odd, both, policy)


@pytest.mark.parametrize("policy", STATE_POLICIES)
def test_an_optimiser_that_does_not_hold_the_parameters_is_refused(policy: str) -> None:
    toy = Toy.of(CASES["AdamW"])
    only_B = torch.optim.AdamW([toy.B])
    text = r"AdamW does not hold 1 of 2 parameters to exchange, the first of shape \(4, 5\); pass the one that trains"
    refused(only_B, [toy.B, toy.A], policy, text)
    with pytest.raises(LoraSqueezeError, match=text):
        exchange(only_B, {toy.B: nn.Parameter(toy.B[:, :2]), toy.A: toy.A}, {})
    assert only_B.param_groups[0]["params"][0] is toy.B


def test_an_unknown_policy_is_refused() -> None:
    toy = Toy.of(CASES["AdamW"])
    refused(toy.optimizer, [toy.B], "keep", "optimizer_state must be one of transport, reset, got 'keep'")


# --- wrappers -------------------------------------------------------------------------------------------------------


def test_the_optimiser_inside_accelerate_is_found() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    toy = Toy.of(CASES["AdamW"])
    prepared = Accelerator(cpu=True).prepare(toy.optimizer)
    AcceleratorState._reset_state(True)
    assert prepared is not toy.optimizer
    assert unwrapped(prepared) is unwrapped(toy.optimizer) is toy.optimizer


def test_what_is_no_optimiser_or_keeps_state_around_one_is_refused() -> None:
    class Slow:
        def __init__(self, optimizer: Any) -> None:
            self.optimizer, self.state = optimizer, {"slow": 1}

    with pytest.raises(LoraSqueezeError, match=r"Slow keeps state of its own beside that of \S+SGD; use the inner one"):
        unwrapped(Slow(Toy.of(CASES["SGD"]).optimizer))
    with pytest.raises(LoraSqueezeError, match=r"builtins.int is not a torch.optim.Optimizer; pass the optimiser"):
        unwrapped(1)
