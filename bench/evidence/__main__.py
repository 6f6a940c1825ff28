"""`python -m bench.evidence tune|run --model NAME --tasks NAME ... --rows FILE`; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from bench.evidence import methods, tasks
from bench.evidence.learners import NAMES, learner
from bench.evidence.plan import Asked, final_jobs, tuning_jobs
from bench.evidence.rows import Row, append, read_rows
from bench.evidence.tune import GUESS
from bench.evidence.work import PEFT, Job, work
from bench.machine import commit, machine
from lora_squeeze.demo.model import user_cache
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.pool import run_jobs
from lora_squeeze.runtime import choose_precision

BUDGETS = {"smollm2": (100, 8), "vlm": (60, 8), "minilm": (200, 16), "tiny": (20, 4), "tiny-vlm": (20, 4)}


def main(arguments: list[str] | None = None) -> None:
    """Do what is missing of what is asked, and write each result as soon as it is there."""
    given = _parser().parse_args(arguments)
    asked = _asked(given)
    rows = read_rows([given.rows, *given.rates])
    head = commit()
    command = shlex.join(["python", "-m", "bench.evidence", *(arguments or sys.argv[1:])])
    start = {"kind": "machine", "command": command, "commit": head, **machine()}
    failures = 0
    begun: set[tuple[Any, ...]] = set()  # jobs that failed are not tried again in this run
    while True:
        jobs = (tuning_jobs if given.action == "tune" else final_jobs)(asked, rows)
        jobs = {name: job for name, job in jobs.items() if (name, job.wanted) not in begun}
        if not jobs:
            break
        if not begun:
            append(given.rows, [start])
        begun |= {(name, job.wanted) for name, job in jobs.items()}
        failures += _do(jobs, given, rows, head)
    if failures:
        raise SystemExit(f"{failures} jobs failed; the same command tries them again")


def _do(jobs: dict[str, Job], given: Any, rows: list[Row], head: str) -> int:
    failures = 0
    begun = time.perf_counter()
    calls = {name: (job,) for name, job in jobs.items()}
    for done, (name, outcome) in enumerate(run_jobs(work, calls, workers=given.workers, ray=given.ray), 1):
        spent = time.perf_counter() - begun
        if isinstance(outcome, LoraSqueezeError):
            failures += 1
            print(f"{done}/{len(jobs)} {name}: {outcome}", flush=True)
            continue
        found = [{**row, "commit": head} for row in outcome]
        append(given.rows, found)
        rows += found
        for row in found:
            print(
                f"{done}/{len(jobs)} {spent:.0f} s  {row['task']} {row['method']} {row['rank']} seed {row['seed']}: "
                f"loss {row['loss']:.4f} accuracy {row['accuracy']:.3f} ({row['seconds']:.0f} s, rate {row['rate']})",
                flush=True,
            )
    return failures


def _asked(given: Any) -> Asked:
    steps, batch = BUDGETS[given.model]
    foreign = {}
    for text in given.peft:
        name, brace, options = text.partition("{")
        foreign[f"{PEFT}{name}"] = json.loads(brace + options) if brace else {}
    base = learner(given.model)
    return Asked(
        model=given.model, tasks=given.tasks, seeds=given.seeds, methods=given.methods, ranks=given.ranks,
        source_rank=given.source_rank, steps=given.steps or steps, batch=given.batch or batch,
        examples=given.examples, store=str(given.store), foreign=foreign, rate=given.rate,
        guess=given.guess, weights=base.weights, precision=choose_precision(base.device),
        build=base.build,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__)
    parser.add_argument("action", choices=["tune", "run"])
    parser.add_argument("--model", choices=NAMES, required=True)
    parser.add_argument("--tasks", nargs="+", required=True, help=f"of {', '.join(tasks.names())}; or your own")
    parser.add_argument("--rows", type=Path, required=True, help="results: read, and added to")
    parser.add_argument("--rates", type=Path, nargs="*", default=[], help="other results, to take learning rates from")
    parser.add_argument("--methods", nargs="*", choices=methods.METHODS, default=list(methods.DEFAULT_METHODS))
    parser.add_argument(
        "--peft",
        nargs="+",
        default=[],
        metavar="NAME{...}",
        help="methods of PEFT or of lora_squeeze.methods, such as 'VERA{\"r\": 256}'; 'VERA b{\"r\": 64}' is another",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 8, 4, 2, 1])
    parser.add_argument("--source-rank", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help=f"default {BUDGETS} (steps, examples a step)")
    parser.add_argument("--batch", type=int, help="examples a step")
    parser.add_argument("--examples", type=int, default=256, help="measured on")
    parser.add_argument("--rate", type=float, help="learning rate of all methods, in place of the tuned ones")
    parser.add_argument("--guess", type=float, default=GUESS, help="where the search for a learning rate begins")
    parser.add_argument("--workers", type=int, help="processes; default one for each core")
    parser.add_argument("--ray", help="address of a Ray cluster, in place of this machine")
    parser.add_argument("--store", type=Path, default=user_cache() / "evidence", help="folder for trained sources")
    return parser


if __name__ == "__main__":
    main()
