"""One job: a training run and everything that is measured on its adapter."""

from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.evidence import methods, tasks
from bench.evidence.data import Data
from bench.evidence.learners import learner
from bench.evidence.learners.base import Batch, Learner
from bench.evidence.loop import Spent, evaluate, order, train
from bench.evidence.rows import LOCAL, SETTING, Row
from bench.evidence.saved import configuration, saved
from lora_squeeze.methods.adapters.queryable_lora import fix_routes
from lora_squeeze.training.ask import calibrate

CALIBRATION_BATCHES = 8
EVALUATION_BATCH = 32
SCALE = 2  # lora_alpha / r, at every rank
PEFT = "peft:"
KEY = (*SETTING, *LOCAL, "task", "seed", "purpose", "options")  # with method, rank and rate: what a row is a row of


@dataclass(frozen=True)
class Job:
    """What a worker is given.

    Args:
        model, task, seed: see `learners` and `tasks`; the seed decides initial factors, head and order of the data.
        method, rank, rate: of the run that is trained, see `methods`; "base" trains nothing. "peft:NAME" trains another
            method of PEFT, whose settings are in `options`; its rank is 0 unless they have one.
        wanted: what is measured: (method, rank, rate) of the run itself and of what is squeezed from it.
        steps, batch: optimiser steps, and examples a step.
        source_rank: of squeezes and schedules.
        purpose: "final" measures on test data, "tune" on validation data.
        examples: how many of them.
        store: folder where the sources are kept, to go on from after a cut.
        weights: of the base model.
        precision, build: of the products, and of what is trained before; see `Asked`.
        options: settings of PEFT's configuration.
        packs: whether plain LoRA goes without padding, which takes less time and memory.
    """

    model: str
    task: str
    seed: int
    method: str
    rank: int
    rate: float
    wanted: tuple[tuple[str, int, float | None], ...]
    steps: int
    batch: int
    source_rank: int
    purpose: str
    examples: int
    store: str
    weights: str
    precision: str
    options: Mapping[str, Any]
    build: str | None = None
    packs: bool = False


def work(job: Job) -> list[Row]:
    """Train, squeeze, measure: one row for each of `wanted`."""
    return [{**row, "time": _now()} for row in _Work(job).rows()]


class _Work:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.learner: Learner = learner(job.model)
        self.learner.packs = job.packs
        self.data: Data = tasks.load(job.task)
        part = {"tune": "validation", "final": "test"}[job.purpose]
        measured = self.learner.usable(self.data, getattr(self.data, part))[: job.examples]
        answers = Counter(example.answer for example in measured)
        self.commonest = max(answers.values()) / len(measured)  # accuracy of the answer that is right most often
        self.measured = self.learner.batches(self.data, measured, EVALUATION_BATCH)
        more = methods.more_steps(job.steps)
        # The source is trained on the first batches, cont goes on with the next ones; the statistics are those of
        # batches that the source has seen.
        count = (job.steps + more) * job.batch
        seen = order(self.learner.usable(self.data, self.data.train), count, job.seed)
        self.batches: list[Batch] = self.learner.batches(self.data, seen, job.batch)

    def rows(self) -> Iterator[Row]:
        job = self.job
        if job.method == "base":
            model = self.learner.attach(self._lora(1), self.data, job.seed)
            with model.disable_adapter():
                yield self._row("base", 0, None, model, Spent(), None, empty=True)
            return
        if job.method.startswith(PEFT):
            yield from self._foreign()
            return
        model, spent = self._source() if job.method == methods.SOURCE else self._scheduled()
        for method, rank, _ in job.wanted:
            if method == job.method and rank == job.rank:
                energy = _product(entry["energy"] for entry in spent.history) if spent.history else None
                yield self._row(method, rank, job.rate, model, spent, energy)
        derived = [want for want in job.wanted if methods.from_source(want[0])]
        if derived:
            yield from self._squeezed(model, spent, derived)

    def _scheduled(self) -> tuple[Any, Spent]:
        job = self.job
        schedule = methods.SCHEDULES[job.method](job.source_rank, job.rank, job.steps)
        model = self.learner.attach(self._lora(job.source_rank), self.data, job.seed)
        self.learner.narrow(model)
        policy = methods.LEARNING_RATES.get(job.method, "continue")
        return model, self._train(model, self.batches[: job.steps], job.rate, schedule=schedule, learning_rate=policy)

    def _train(self, model: Any, batches: list[Batch], rate: float, **options: Any) -> Spent:
        """Dropout depends on the seed, not on what this process has done before."""
        device = self.learner.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(self.job.seed)
            return train(self.learner, model, batches, rate, **options)

    def _source(self) -> tuple[Any, Spent]:
        """Direct training; the source of squeezes is kept on disk, since much is derived from it."""
        job = self.job
        model = self.learner.attach(self._lora(job.rank), self.data, job.seed)
        self.learner.narrow(model)
        kept = self._kept() if any(methods.from_source(want[0]) for want in job.wanted) else None
        if kept is not None and kept.exists():
            return model, _restore(model, kept)
        spent = self._train(model, self.batches[: job.steps], job.rate)
        if kept is not None:
            _keep(model, spent, kept)
        return model, spent

    def _squeezed(self, model: Any, source: Spent, wanted: list[tuple[str, int, float | None]]) -> Iterator[Row]:
        job = self.job
        moments = None
        if any(methods.how(method)["data"] for method, _, _ in wanted):
            moments = calibrate(model, islice(self.batches, CALIBRATION_BATCHES), loss=self.learner.loss)
        with saved(self.learner, self.data, model, job.seed) as folder:
            for method, rank, rate in wanted:
                how = methods.how(method)
                start = time.perf_counter()
                energy, small = folder.squeezed(rank, how["allocate"], moments if how["data"] else None)
                took = time.perf_counter() - start
                spent = Spent(source.seconds + took, source.parameter_steps, source.peak_mib)
                if method in methods.CONTINUED:
                    assert rate is not None
                    more = self._train(small, self.batches[job.steps :], rate)
                    spent.seconds += more.seconds
                    spent.parameter_steps += more.parameter_steps
                    spent.losses = more.losses
                yield self._row(method, rank, rate, small, spent, energy)

    def _foreign(self) -> Iterator[Row]:
        job = self.job
        config = configuration(job.method.removeprefix(PEFT), job.options, self.learner)
        model = self.learner.attach(config, self.data, job.seed)
        spent = self._train(model, self.batches[: job.steps], job.rate)
        ranks = [rank for method, rank, _ in job.wanted if method != job.method]
        if len(ranks) < len(job.wanted):
            yield self._row(job.method, 0, job.rate, model, spent, None)
        if ranks:
            if not getattr(config, "static", True):
                fix_routes(model, map(self.learner.inputs, self.batches[:CALIBRATION_BATCHES]))
            with saved(self.learner, self.data, model, job.seed) as folder:
                for rank, (energy, small) in folder.converted(ranks):
                    yield self._row(f"{job.method} squeezed", rank, job.rate, small, spent, energy)

    def _lora(self, rank: int) -> Any:
        from peft import LoraConfig

        targets, kind = self.learner.targets, self.learner.task_type
        return LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=targets, task_type=kind)

    def _row(
        self, method: str, rank: int, rate: float | None, model: Any, spent: Spent, energy: float | None,
        empty: bool = False,
    ) -> Row:  # fmt: skip
        job = self.job
        tensors = [] if empty else list(_trained(model).values())
        return {
            "kind": "result",
            **{name: getattr(job, name) for name in KEY},
            "data": self.data.source,
            "method": method,
            "rank": rank,
            "rate": rate,
            "source_rate": job.rate if methods.from_source(method) else None,
            "part": {"tune": "validation", "final": "test"}[job.purpose],
            **evaluate(self.learner, model, self.measured),
            "commonest": self.commonest,
            "parameters": sum(t.numel() for t in tensors),
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
            "seconds": round(spent.seconds, 2),
            "peak_mib": spent.peak_mib,
            "parameter_steps": spent.parameter_steps,
            "energy": energy,
            "train_loss": _mean(spent.losses[-10:]),
            "squeezes": [[entry["step"], entry["energy"]] for entry in spent.history],
        }

    def _kept(self) -> Path:
        job = self.job
        about = (
            job.weights,
            job.precision,
            job.build,
            job.packs,
            job.task,
            job.seed,
            f"{job.steps}x{job.batch}",
            job.rank,
            job.rate,
        )
        name = "-".join(map(str, about))
        safe = "".join(c if c.isalnum() or c in "-." else "_" for c in name)
        return Path(job.store) / f"{safe}.safetensors"


def _trained(model: Any) -> dict[str, torch.Tensor]:
    """What is trained and stored: factors, and a head where there is one."""
    from peft import get_peft_model_state_dict

    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def _set(model: Any, state: Mapping[str, torch.Tensor]) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, dict(state))


def _keep(model: Any, spent: Spent, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous().cpu() for name, tensor in _trained(model).items()}
    new = path.with_suffix(".new")
    save_file(state, new, {"spent": json.dumps(asdict(spent))})
    new.replace(path)


def _restore(model: Any, path: Path) -> Spent:
    with safe_open(path, "pt") as file:
        spent = Spent(**json.loads(file.metadata()["spent"]))
        _set(model, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (no mapping)
    return spent


def _product(numbers: Any) -> float:
    result = 1.0
    for number in numbers:
        result *= number
    return result


def _mean(numbers: list[float]) -> float | None:
    return round(sum(numbers) / len(numbers), 5) if numbers else None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
