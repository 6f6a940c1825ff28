"""Learning rates that follow the stages of a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from training_cases import STEPS, adamw, batch, in_squeeze, model, train, trained_parameters

from lora_squeeze import LoraSqueezeError
from lora_squeeze.schedule import Schedule
from lora_squeeze.training.squeezer import Squeezer


def test_restarted_learning_rate_runs_the_whole_curve_per_stage() -> None:
    network = model()
    optimizer = adamw(network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    squeezer = Squeezer(
        network, optimizer, Schedule((8, 4, 2), (4, 4, 4)), learning_rate="restart", scheduler=scheduler
    )
    rates = []
    for step in range(12):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
        train(network, optimizer, squeezer, [step], scheduler)
    assert rates == pytest.approx([1, 0.75, 0.5, 0.25] * 3)


def test_a_rate_by_rank_rises_as_the_rank_falls() -> None:
    network = model()
    optimizer = adamw(network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    squeezer = Squeezer(network, optimizer, Schedule((8, 4, 2), (4, 4, 4)), learning_rate="rank", scheduler=scheduler)
    rates = []
    for step in range(12):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
        train(network, optimizer, squeezer, [step], scheduler)
    risen = [math.sqrt(8 / rank) for rank in (8, 4, 2) for _ in range(4)]
    assert rates == pytest.approx([(1 - step / 12) * factor for step, factor in enumerate(risen)])


def rates_of(pairs: list[tuple[Any, Any]], optimizer: Any, scheduler: Any, steps: Iterable[int]) -> list[float]:
    """The factors that the learning rate has in these steps; every network trains in each, and is squeezed."""
    rates = []
    for step in steps:
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
        for network, _ in pairs:
            network(**batch(step)).loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        for _, squeezer in pairs:
            squeezer.step()
    return rates


@pytest.mark.parametrize("policy", ["restart", "rank", "restart-rank"])
def test_a_scheduler_follows_the_stages_once(policy: str) -> None:
    """However many Squeezers share it, and after an interruption."""
    schedule, expected = Schedule((8, 4, 2), (4, 4, 4)), [1 - step / 12 for step in range(12)]
    if policy != "rank":
        expected = expected[::3] * 3
    if policy != "restart":
        expected = [
            rate * math.sqrt(8 / rank) for rate, rank in zip(expected, [8] * 4 + [4] * 4 + [2] * 4, strict=True)
        ]
    networks = [model(), model()]
    optimizer = torch.optim.AdamW([p for network in networks for p in trained_parameters(network)], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)

    def squeezer(network: Any, **state: Any) -> Squeezer:
        return Squeezer(network, optimizer, schedule, learning_rate=policy, scheduler=scheduler, **state)

    first = [(network, squeezer(network)) for network in networks]
    rates = rates_of(first, optimizer, scheduler, range(6))
    again = [(network, squeezer(network, state=before.state_dict())) for network, before in first]
    assert rates + rates_of(again, optimizer, scheduler, range(6, 12)) == pytest.approx(expected)
    with pytest.raises(
        LoraSqueezeError, match=r"the scheduler follows another schedule already, and .*'rank' needs it"
    ):
        Squeezer(networks[0], optimizer, Schedule((2, 1), (4, 8)), learning_rate="rank", scheduler=scheduler)


@pytest.mark.parametrize("policy", ["restart", "rank", "restart-rank"])
def test_accelerates_scheduler_steps_once_per_process(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    found = []
    for processes in (1, 2):
        network = model()
        optimizer = adamw(network)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, n=processes: 1 - step / (12 * n))
        prepared = Accelerator(cpu=True).prepare(network, optimizer, scheduler)
        with monkeypatch.context() as patch:
            for state in (PartialState, AcceleratorState):
                patch.setitem(state._shared_state, "num_processes", processes)
            squeezer = Squeezer(
                *prepared[:2], Schedule((8, 4, 2), (4, 4, 4)), learning_rate=policy, scheduler=prepared[2]
            )
            found.append(rates_of([(prepared[0], squeezer)], prepared[1], prepared[2], range(12)))
    assert found[0] == pytest.approx(found[1])
    assert found[0][4] > found[0][3]


def test_continued_learning_rate_is_not_touched() -> None:
    network = model()
    optimizer = adamw(network)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 12)
    squeezer = Squeezer(network, optimizer, in_squeeze(), scheduler=scheduler)
    rates = []
    for step in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"] / 1e-2)
        train(network, optimizer, squeezer, [step], scheduler)
    assert rates == pytest.approx([1 - step / 12 for step in range(12)])
