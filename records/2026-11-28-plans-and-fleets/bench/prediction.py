"""What data-aware plans of finished adapters predict and bring: `python -m bench.prediction TASK ...`.

An adapter of rank 64 is trained, written and read again. 64 of its training examples are asked, as `lora-squeeze
calibrate` does it; losses are measured on these and on held-out ones.

==========  ============================================================================================================
experiment  rows
==========  ============================================================================================================
budget      the adapter at the parameters of low uniform ranks: one rank for all or the best rank per module, by energy
            or by predicted loss, cut plainly or in the metric of the data
prediction  cut to low uniform ranks, and modules cut alone (about 35 of them), first seed: measured change of the loss
            beside the two parts of the prediction, the slope ("straight") and the curvature ("curved")
==========  ============================================================================================================
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.machine import machine
from bench.training import Rows, train
from bench.training_tasks import TASKS, Batch, Task, evaluate
from lora_squeeze.adapter import Adapter
from lora_squeeze.data_aware import moments_of
from lora_squeeze.hub import load
from lora_squeeze.moments import Moments
from lora_squeeze.plan import Plan, PlanRow
from lora_squeeze.post_squeeze import Squeezed
from lora_squeeze.training.ask import calibrate
from lora_squeeze.training.calibration import factors_of

SOURCE = 64
RANKS = (8, 4, 2, 1)
ALONE = (4, 1)  # ranks of modules that are cut alone
EXAMPLES = 64
# arm -> options of a squeeze beside the rank, and whether it is in the metric of the data
ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "uniform": ({}, False),
    "energy": ({"allocate": "global"}, False),
    "energy, all stay": ({"allocate": "global", "min_rank": 1}, False),
    "uniform, data": ({}, True),
    "loss, data": ({"allocate": "global"}, True),
    "loss, data, all stay": ({"allocate": "global", "min_rank": 1}, True),
    "loss, data, by type": ({"allocate": "global", "min_rank": 1, "same_rank_per": "type"}, True),
}


def experiment(
    task: Task, rows: Rows, steps: int, rate: float, seeds: list[int], arms: list[str], only_prediction: bool
) -> None:
    """All rows of one task that are not there yet."""
    held_out = task.held_out()
    for seed in seeds:
        if rows.has(experiment="done", task=task.name, seed=seed, steps=steps, rate=rate):
            continue
        key = dict(task=task.name, seed=seed, steps=steps, rate=rate)
        model, losses, _ = train(task, SOURCE, steps, rate, seed)
        asked = _asked(task, seed)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            adapter = load(Path(folder))
            begin = time.perf_counter()
            moments = moments_of(adapter, calibrate(model, asked, loss=task.loss))
            seconds = time.perf_counter() - begin
            source = _losses(task, model, asked, held_out)
            rows.add(experiment="source", **key, **source, seconds=seconds, last=sum(losses[-10:]) / 10)
            if only_prediction:
                _prediction(task, rows, key, model, adapter, moments, asked, source["asked"])
                continue
            _budgets(task, rows, key, model, adapter, moments, asked, held_out, arms)
        rows.add(experiment="done", **key)


def _asked(task: Task, seed: int) -> list[Batch]:
    found: list[Batch] = []
    for batch in task.train_batches(1000, seed):
        found.append(batch)
        if sum(len(next(iter(batch.values()))) for batch in found) >= EXAMPLES:
            return found
    return found


def _budgets(
    task: Task, rows: Rows, key: dict[str, Any], model: nn.Module, adapter: Adapter, moments: dict[str, Moments],
    asked: list[Batch], held_out: list[Batch], arms: list[str],
) -> None:  # fmt: skip
    bent = {name: replace(item, slope=None) for name, item in moments.items()}
    for rank in RANKS:
        for arm in arms:
            options, aware = ARMS[arm]
            if rows.has(experiment="budget", **key, arm=arm, rank=rank):
                continue
            small = adapter.squeeze(rank=rank, moments=bent if aware else None, **options)
            with factors_of(model, small):
                found = _losses(task, model, asked, held_out)
            report = small.report
            rows.add(
                experiment="budget", **key, arm=arm, rank=rank, **found, parameters=small.parameters,
                energy=report.energy, curved=report.loss_increase, left=len(small.dropped), largest=small.rank,
            )  # fmt: skip


def _prediction(
    task: Task, rows: Rows, key: dict[str, Any], model: nn.Module, adapter: Adapter, moments: dict[str, Moments],
    asked: list[Batch], source: float,
) -> None:  # fmt: skip
    bent = {name: replace(item, slope=None) for name, item in moments.items()}

    def told(small: Adapter, curved: Adapter, **more: Any) -> None:
        with factors_of(model, small):
            measured = _mean(task, model, asked) - source
        found, second = (_told(item) for item in (small, curved))
        rows.add(experiment="prediction", **key, measured=measured, straight=found - second, curved=second, **more)

    for rank in (16, *RANKS):
        told(*(adapter.squeeze(rank=rank, moments=item) for item in (moments, bent)), rank=rank)
    for rank in ALONE:
        pairs = zip(_alone(adapter, rank, moments), _alone(adapter, rank, bent), strict=True)
        for (name, small), (_, curved) in pairs:
            small.update(name)  # what is lost is known once it is cut
            told(small, curved, rank=rank, module=name, lost=_squeezed(small).measured[name].discarded(rank) ** 2)


def _told(small: Adapter) -> float:
    """The prediction of what is cut; it is known once the factors are computed."""
    for batch in small.batches():
        small.source.updates(batch)
    return sum(found.loss_increase or 0.0 for found in _squeezed(small).measured.values())


def _squeezed(small: Adapter) -> Squeezed:
    assert isinstance(small.source, Squeezed)
    return small.source


def _alone(adapter: Adapter, rank: int, moments: dict[str, Moments]) -> Iterator[tuple[str, Adapter]]:
    """Modules at this rank, one at a time, all others as they are."""
    for name in list(adapter.modules)[:: max(1, len(adapter.modules) // 35)]:
        plan = Plan(
            {other: PlanRow(rank if other == name else module.rank) for other, module in adapter.modules.items()}
        )
        yield name, adapter.squeeze(plan=plan, moments=moments)


@torch.no_grad()
def _mean(task: Task, model: nn.Module, batches: list[Batch]) -> float:
    model.eval()
    return sum(task.loss(model, batch).item() for batch in batches) / len(batches)


def _losses(task: Task, model: nn.Module, asked: list[Batch], held_out: list[Batch]) -> dict[str, float]:
    return {"asked": _mean(task, model, asked), **evaluate(task, model, held_out)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--held", type=int, default=512, help="held-out examples")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--prediction", action="store_true", help="the experiment prediction instead of budget")
    parser.add_argument("--rows", type=Path, default=Path("rows.jsonl"))
    asked = parser.parse_args()
    rows = Rows(asked.rows)
    rows.add(experiment="machine", **machine())
    experiment(
        TASKS[asked.task](held=asked.held), rows, asked.steps, asked.rate, asked.seeds, asked.arms, asked.prediction
    )


if __name__ == "__main__":
    main()
