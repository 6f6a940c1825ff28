"""Speed, accuracy, memory and start-up of lora_squeeze: `python -m bench.speed [--quick | --full]`.

Compared with what else there is (see bench/arms.py), in one run and in turns, one thread per process. `--quick` takes
about two minutes, the default less than fifteen, `--full` is what records/ holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import plan as plans
from bench import tables
from bench.accuracy import measure_accuracy
from bench.files import measure_files
from bench.machine import machine
from bench.modules import measure_modules
from bench.plan import Plan
from bench.processes import measure_memory, measure_start_up
from bench.targets import judge

SECTIONS = ("modules", "files", "accuracy", "memory", "start_up")


def main() -> None:
    """Measure, print the tables, keep them if asked."""
    arguments = _arguments()
    plan: Plan = plans.quick() if arguments.quick else plans.full() if arguments.full else plans.medium()
    torch.set_num_threads(1)
    log: list[str] = []

    def say(text: str) -> None:
        print(text, flush=True)
        log.append(text)

    with tempfile.TemporaryDirectory(prefix="lora-squeeze-bench-", dir=arguments.folder) as scratch:
        _check_space(plan, Path(scratch))
        result = _run(plan, arguments.only or SECTIONS, Path(scratch), say)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if arguments.record:
        _record(arguments.record, result, log)


def _run(plan: Plan, sections: Sequence[str], scratch: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """All figures of these sections and the verdicts, told as they come."""
    begun = time.perf_counter()

    def tell(what: str) -> None:
        say(f"[{time.perf_counter() - begun:6.0f} s] {what}")

    result: dict[str, Any] = {"plan": plan.name, "date": time.strftime("%Y-%m-%d"), "machine": machine()}
    say(
        f"# Speed ({plan.name})\n\n" + "\n".join(f"- {key}: {value}" for key, value in result["machine"].items()) + "\n"
    )
    for section in sections:
        tell(f"measuring {section}")
        result[section], text = _measure(section, plan, scratch, tell)
        say(f"\n## {section}\n\n{text}\n")
    targets = judge(result)
    result["targets"] = [target.to_json() for target in targets]
    result["seconds"] = time.perf_counter() - begun
    say(f"## targets\n\n{tables.targets_table(targets)}\n\n{result['seconds']:.0f} s in all")
    return result


def _record(folder: Path, result: dict[str, Any], log: Sequence[str]) -> None:
    """Keep figures, tables and the scripts as they were run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "log.txt").write_text("\n".join(log) + "\n")
    shutil.copytree(
        Path(__file__).parent, folder / "bench", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )


def _measure(section: str, plan: Plan, scratch: Path, tell: Callable[[str], None]) -> tuple[Any, str]:
    """Figures of one section, and its tables."""
    found: Any
    if section == "modules":
        found = measure_modules(plan)
        return found, tables.modules_tables(found)
    if section == "files":
        found = measure_files(plan, scratch, tell)
        return found, tables.files_tables(found)
    if section == "accuracy":
        found = measure_accuracy(plan)
        return found, tables.accuracy_table(found)
    if section == "memory":
        found = measure_memory(plan, scratch, tell)
        return found, tables.memory_table(found)
    found = measure_start_up(plan)
    return found, tables.start_table(found)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.speed", description=__doc__.splitlines()[0])
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="about two minutes: fewer cases, fewer repeats")
    effort.add_argument("--full", action="store_true", help="every case, many repeats: about half an hour")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="sections to measure; default all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples and verdicts")
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help="keep result.json, log.txt and these scripts there"
    )
    parser.add_argument("--folder", type=Path, help="where the adapters are made for the time of the run")
    return parser.parse_args()


def _check_space(plan: Plan, scratch: Path) -> None:
    """Stop before the disk is full: one source and one result are there at a time."""
    sizes = [file.model.parameters(file.rank) * file.dtype.itemsize for file in plan.files]
    sizes += [plan.large.parameters(256) * 4] if plan.large else []
    needed, free = 2 * max(sizes), shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(f"{scratch}: {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB needed; give another --folder")


if __name__ == "__main__":
    main()
