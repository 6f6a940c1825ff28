"""What squeezes while training cost and bring: `python -m bench.training EXPERIMENT TASK ...`.

Every run is one line of rows.jsonl; a run that has its line is not done again, so a sweep can be cut at any moment.

==========  ============================================================================================================
experiment  rows
==========  ============================================================================================================
state       In-Squeeze 64 -> 8 in three squeezes: moments carried over, begun anew, begun anew with a restarted learning
            rate; and training at rank 8 and at rank 64 all along. Equal steps.
truncation  a source of rank 64, squeezed to low ranks: plainly, by inputs, by inputs and gradients ("both"), and that
            in turn: six groups of blocks, each calibrated on the squeezed ones before it; with the parameters of the
            rank spent globally: by energy and plainly, and by predicted loss in the metric of both
cost        seconds of a step and bytes of optimiser state by rank, seconds of the squeezes, cost of the statistics
==========  ============================================================================================================
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.machine import machine
from bench.training_tasks import TASKS, Batch, Task, evaluate
from lora_squeeze.moments import Moments
from lora_squeeze.schedule import Schedule, make_schedule
from lora_squeeze.training.ask import calibrate
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.live import live_modules
from lora_squeeze.training.squeezer import Squeezer
from lora_squeeze.training.statistics import Statistics

SOURCE, TARGET = 64, 8
LOW_RANKS = (8, 4, 2, 1)
CALIBRATION_BATCHES = 8
IN_TURN_RANKS, IN_TURN_GROUPS = (4, 1), 6  # calibrating anew for each group of blocks takes a while
ARMS: dict[str, dict[str, Any]] = {
    "transport": {},
    "reset": {"optimizer_state": "reset"},
    "restart": {"optimizer_state": "reset", "learning_rate": "restart"},
}


class Rows:
    """Finished runs, one JSON object a line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def like(self, **key: Any) -> list[dict[str, Any]]:
        """The runs with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in key.items())]

    def has(self, **key: Any) -> bool:
        """Whether a run with these values is there."""
        return bool(self.like(**key))

    def add(self, **row: Any) -> None:
        """Write one."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        shown = {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items() if not isinstance(v, list)}
        print(json.dumps(shown), flush=True)


def train(
    task: Task,
    rank: int,
    steps: int,
    rate: float,
    seed: int,
    schedule: Schedule | None = None,
    **options: Any,
) -> tuple[Any, list[float], list[dict[str, Any]]]:
    """One run: AdamW, a line up in the first tenth of the steps, then half a cosine to zero, gradients clipped at 1."""
    model = task.model(rank, seed).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    rise = max(1, steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: (
            (n + 1) / rise
            if n < rise
            else 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (n - rise) / max(1, steps - rise))).item())
        ),
    )
    losses: list[float] = []
    data = task.train_batches(steps, seed)
    squeezer = None
    if schedule is not None:
        probe = task.held_out()[0]
        squeezer = Squeezer(
            model, optimizer, schedule, scheduler=scheduler, loss=lambda: task.loss(model, probe), **options
        )
    for batch in data:
        loss = task.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if squeezer is not None:
            squeezer.step()
    if squeezer is not None:
        squeezer.finish()
    return model, losses, squeezer.history if squeezer is not None else []


def state(task: Task, rows: Rows, steps: int, rates: list[float], seeds: list[int], arms: list[str]) -> None:
    """Each arm at every rate with the first seed, then at its best rate with the others."""
    held_out = task.held_out()

    def run(arm: str, rate: float, seed: int) -> None:
        key = dict(experiment="state", task=task.name, arm=arm, rate=rate, seed=seed, steps=steps)
        if rows.has(**key):
            return
        start = time.perf_counter()
        if arm in ARMS:
            schedule = make_schedule(SOURCE, TARGET, steps, steps="equal")
            model, losses, history = train(task, SOURCE, steps, rate, seed, schedule, **ARMS[arm])
        else:
            model, losses, history = train(task, int(arm.removeprefix("direct ")), steps, rate, seed)
        seconds = time.perf_counter() - start
        rows.add(**key, **evaluate(task, model, held_out), seconds=seconds, history=history, losses=losses)

    for arm in arms:
        for rate in rates:
            run(arm, rate, seeds[0])
        tried = rows.like(experiment="state", task=task.name, arm=arm, seed=seeds[0], steps=steps)
        best = min(tried, key=lambda row: float(row["loss"]))["rate"]
        for seed in seeds[1:]:
            run(arm, best, seed)


def truncation(task: Task, rows: Rows, steps: int, rates: list[float], seeds: list[int], arms: list[str]) -> None:
    """Loss after squeezing one source in several metrics, without any further step."""
    held_out = task.held_out()
    for seed in seeds:
        key = dict(experiment="truncation", task=task.name, seed=seed, steps=steps)
        wanted = [(rank, arm) for rank in LOW_RANKS for arm in arms if arm != "in turn" or rank in IN_TURN_RANKS]
        if all(rows.has(**key, arm=arm, rank=rank) for rank, arm in wanted):
            continue
        model, _, _ = train(task, SOURCE, steps, rates[0], seed)
        if not rows.has(**key, arm="source"):
            rows.add(**key, arm="source", rank=SOURCE, rate=rates[0], **evaluate(task, model, held_out))
        data = task.train_batches(CALIBRATION_BATCHES + steps, seed)[-CALIBRATION_BATCHES:]
        moments = calibrate(model, data, loss=task.loss)
        for rank, arm in wanted:
            if not rows.has(**key, arm=arm, rank=rank):
                small = copy.deepcopy(model)
                energy = _squeezed(task, small, rank, arm, moments, data)
                rows.add(**key, arm=arm, rank=rank, energy=energy, **evaluate(task, small, held_out))


def _squeezed(
    task: Task, model: Any, rank: int, arm: str, moments: dict[str, Moments], data: list[Batch]
) -> float | None:
    if arm.startswith(("plain", "both")):
        allocate = "global" if arm.endswith("global") else "uniform"
        return squeeze_(model, rank, allocate=allocate, moments=moments if arm.startswith("both") else None).energy
    if arm == "inputs":
        flat = {path: Moments(m.C, _plain_gradients(model, path), m.rows) for path, m in moments.items()}
        return squeeze_(model, rank, moments=flat).energy
    for group in _groups_of_blocks(model):
        found = calibrate(model, data, loss=task.loss)
        squeeze_(model, ranks={name: rank for name in group}, moments=found)
    return None


def _plain_gradients(model: Any, path: str) -> torch.Tensor:
    """B^T B: gradients alike in all directions, which leaves the inputs alone to decide."""
    B = next(m for m in live_modules(model, "default") if m.path == path).update().B.double()
    return B.mT @ B


def _groups_of_blocks(model: Any) -> Iterator[list[str]]:
    """Names of the modules of neighbouring blocks, from the input on."""
    names: dict[int, list[str]] = {}
    for module in live_modules(model, "default"):
        number = next(int(part) for part in module.name.split(".") if part.isdigit())
        names.setdefault(number, []).append(module.name)
    size = -(-len(names) // IN_TURN_GROUPS)
    for first in range(0, len(names), size):
        yield [name for number in sorted(names)[first : first + size] for name in names[number]]


def cost(task: Task, rows: Rows, steps: int, rates: list[float], seeds: list[int], arms: list[str]) -> None:
    """Median seconds per step by rank, bytes of state, and what squeezes and statistics take."""
    batch = task.train_batches(1, 0)[0]
    for rank in (64, 32, 16, 8):
        if rows.has(experiment="cost", task=task.name, arm="step", rank=rank):
            continue
        model = task.model(rank, 0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rates[0])
        step = _stepper(task, model, optimizer, batch)
        plain = _median(step, steps)
        statistics = Statistics(model, "default")
        watched = _median(_then(step, statistics.step), steps)
        statistics.close()
        held = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        factors = [p for m in live_modules(model, "default") for p in (m.A, m.B)]
        rows.add(
            experiment="cost", task=task.name, arm="step", rank=rank, seconds=plain, with_statistics=watched,
            state_bytes=sum(t.numel() * t.element_size() for t in held),
            factor_bytes=sum(p.numel() * p.element_size() for p in factors),
        )  # fmt: skip
    if not rows.has(experiment="cost", task=task.name, arm="squeezes"):
        model = task.model(64, 0).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rates[0])
        _stepper(task, model, optimizer, batch)()
        taken = {rank: squeeze_(model, rank, optimizer=optimizer).seconds for rank in (32, 16, 8)}
        rows.add(
            experiment="cost", task=task.name, arm="squeezes", seconds=sum(taken.values()), each=list(taken.values())
        )


def _stepper(task: Task, model: Any, optimizer: Any, batch: Batch) -> Callable[[], None]:
    def step() -> None:
        task.loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _then(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    def both() -> None:
        first()
        second()

    return both


def _median(call: Callable[[], object], count: int) -> float:
    call()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


EXPERIMENTS = {
    "state": (state, [*ARMS, f"direct {TARGET}", f"direct {SOURCE}"]),
    "truncation": (truncation, ["plain", "inputs", "both", "in turn", "plain, global", "both, global"]),
    "cost": (cost, []),
}


def main() -> None:
    """Run one experiment on one task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--rates", type=float, nargs="+", required=True, help="learning rates to try")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", help="some of the arms; default all")
    parser.add_argument("--rows", type=Path, required=True, help="file of finished runs")
    given = parser.parse_args()
    given.rows.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(given.rows)
    rows.add(experiment="machine", command=vars(given) | {"rows": str(given.rows)}, **machine())
    run, arms = EXPERIMENTS[given.experiment]
    run(TASKS[given.task](), rows, given.steps, given.rates, given.seeds, given.arms or arms)


if __name__ == "__main__":
    main()
