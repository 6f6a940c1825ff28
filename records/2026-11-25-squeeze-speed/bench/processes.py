"""Peak memory of the command, and the time that it takes to say what it can do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.clock import Samples
from bench.plan import Plan, dtype_name
from bench.synthetic import Model, llama_8b, write_adapter

# The peak of a new process is at least what its parent held when it was started, so a small process stands between.
_LAUNCHER = """
import os, sys
null = os.open(os.devnull, os.O_WRONLY)
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
_, status, usage = os.wait4(pid, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""
RULES = (("--rank", "16"), ("--rank", "1"), ("--energy", "0.9"))  # rank 1: much is read for little that is written
_COMMAND = [sys.executable, "-c", "from lora_squeeze.cli import main; main()"]


def measure_memory(plan: Plan, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """Peak resident memory of `lora-squeeze squeeze`, above an interpreter that has imported torch."""
    base = _peak_mb([sys.executable, "-c", "import torch"])
    cases: list[tuple[Model, int, torch.dtype]] = [(llama_8b(), 64, torch.bfloat16)]
    if plan.large is not None:
        cases.append((plan.large, 256, torch.float32))
    rows = []
    for model, rank, dtype in cases:
        tell(f"{model.name}, rank {rank}, {dtype_name(dtype)}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            source = write_adapter(Path(scratch, "source"), model, rank, dtype)
            size = Path(source, "adapter_model.safetensors").stat().st_size
            for rule, value in RULES:
                out = Path(scratch, "out")
                peak = _peak_mb([*_COMMAND, "squeeze", str(source), "-o", str(out), rule, value])
                shutil.rmtree(out)
                rows.append(
                    {
                        "model": model.name,
                        "rank": rank,
                        "dtype": dtype_name(dtype),
                        "bytes": size,
                        "rule": f"{rule} {value}",
                        "peak_mb": peak,
                        "above_torch_mb": peak - base,
                    }
                )
    return {"import_torch_mb": base, "rows": rows}


def _peak_mb(command: Sequence[str]) -> float:
    """Largest resident memory of a command, in MB (10^6 bytes)."""
    done = subprocess.run([sys.executable, "-c", _LAUNCHER, *command], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()}")
    unit = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout) * unit / 1e6


def measure_start_up(plan: Plan) -> dict[str, Any]:
    """Seconds of `lora-squeeze --help`, and of an interpreter that does nothing."""
    script = Path(sys.executable).with_name("lora-squeeze")
    help_command = [str(script), "--help"] if script.exists() else [*_COMMAND, "--help"]
    commands = {"lora-squeeze --help": help_command, "python -c pass": [sys.executable, "-c", "pass"]}
    found = {name: Samples() for name in commands}
    for turn in range(plan.start_ups + 1):
        for name, command in commands.items():
            start, cpu = time.perf_counter(), _children_cpu()
            subprocess.run(command, capture_output=True, check=True)
            if turn:  # the first reads from disk
                found[name].wall.append(time.perf_counter() - start)
                found[name].cpu.append(_children_cpu() - cpu)
    return {name: samples.to_json() for name, samples in found.items()}


def _children_cpu() -> float:
    """Seconds of processor time of all ended child processes."""
    times = os.times()
    return times.children_user + times.children_system
