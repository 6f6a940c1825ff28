"""Reads one file after another, each in a fork with bounds: `python hostile_reader.py`, driven by test_hostile.py.

A process of its own, since the checks of types in the test suite take a multiple of the time that is to be measured. A
request is a line of JSON with reader, path and a folder for output; the answer is a line of JSON.
"""

import json
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lora_squeeze
from lora_squeeze.base_model import open_base
from lora_squeeze.calibration_file import Calibration
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.plan import Plan


def read_adapter(path: Path, out: Path) -> list[str]:
    """Load, read every update, squeeze, write. Names and notes, which are shown to people."""
    adapter = lora_squeeze.load(path)
    for name in adapter.modules:
        adapter.update(name)
    adapter.squeeze(rank=1).save(out)
    return [*adapter.modules, *adapter.notes]


def read_base(path: Path, _: Path) -> list[str]:
    model = open_base(path)
    for key in model.facts:
        list(model.pieces(key))
    return list(model.facts)


def read_plan(path: Path, out: Path) -> list[str]:
    plan = Plan.load(path)
    plan.save(out)
    return list(plan.modules)


READERS: dict[str, Callable[[Path, Path], list[str]]] = {
    "adapter": read_adapter,
    "base": read_base,
    "plan": read_plan,
    "calibration": lambda path, _: list(Calibration.load(path).moments),
}


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def loop() -> float:
    """Seconds of processor time that this machine now takes for a plain loop of 100 000 steps."""
    start = time.process_time()
    total = 0
    for i in range(100_000):
        total += i
    return time.process_time() - start


def measure(reader: str, path: str, out: str) -> dict[str, Any]:
    """Outcome, processor time in loops, and megabytes above those of the start."""
    before, start = peak(), time.process_time()
    found: dict[str, Any] = {}
    try:
        found["read"] = READERS[reader](Path(path), Path(out))
    except LoraSqueezeError as error:
        found["refused"] = str(error)
    except BaseException:
        found["other"] = traceback.format_exc()
    seconds, megabytes = time.process_time() - start, peak() - before
    return found | {"loops": seconds / loop(), "megabytes": megabytes}


def confined(request: list[str]) -> dict[str, Any]:
    """`measure` in a fork that may take at most 4 GB and 20 s."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        signal.alarm(20)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**32, used + 2**32))
        with os.fdopen(write, "w") as pipe:
            json.dump(measure(*request), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        answer = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    found: dict[str, Any] = json.loads(answer) if code == 0 else {"other": f"it hangs, or fills the memory ({code})"}
    return found


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    with_one = lora_squeeze.load(sys.argv[1])  # all that is imported on the way is imported before the first fork
    with_one.squeeze(rank=1).save(sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(confined(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
