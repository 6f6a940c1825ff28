"""What the rank costs in vLLM: throughput and memory at a limit of 64 and of 8, with 1, 4 and 16 adapters.

    PYTHONPATH=. .venv/bin/python engines/measure.py FILE

One server for each setting, one after the other, in float32 with one thread. At limit 64 it serves the trained adapter
of rank 64 under several names, at limit 8 the same adapter squeezed to rank 8; `--max-loras` is the number of adapters,
so that all have a slot. The same requests go to each: SEQUENCES at once, spread evenly over the adapters, each for
TOKENS tokens. FILE gets one line of JSON for the machine and one for each server.
"""

import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import adapters
import psutil
from vllm_server import Server, serving, start_options
from worker import environment, run

import lora_squeeze
from bench.machine import machine
from lora_squeeze.adapter import Adapter
from lora_squeeze.demo.model import find_model
from lora_squeeze.demo.task import read_words, split_words

SEQUENCES, TOKENS, REPEATS = 16, 16, 6
# The order goes forth and back, so that a machine that slows down does not favour one limit.
SETTINGS = ((64, 1), (8, 1), (8, 4), (64, 4), (64, 16), (8, 16))


def main(target: Path) -> None:
    """Measure all settings, and write each when it is done."""
    source = lora_squeeze.load(str(adapters.source()))
    python, base = environment(), find_model().path
    _write(target, {"machine": machine()}, "w")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {64: adapters.source(), 8: Path(scratch, "rank-8")}
        source.squeeze(rank=8).save(folders[8])
        for limit, count in SETTINGS:
            names = {f"adapter-{i}": folders[limit] for i in range(count)}
            log = Path(scratch, "log.txt")
            with serving(python, base, names, log, start_options(source, limit, count)) as server:
                row = {"limit": limit, "adapters": count, **_measure(server, list(names))}
            row["slot_bytes_by_rule"] = slot_bytes(source, limit) * count
            _write(target, row, "a")


def slot_bytes(adapter: Adapter, rank: int) -> int:
    """Bytes of one slot in float32: what the fleet's memory rule says where every layer is a target."""
    return 4 * rank * sum(module.parameters_per_rank for module in adapter.modules.values())


def _measure(server: Server, names: list[str]) -> dict[str, Any]:
    words, _ = split_words(read_words(), seed=0)
    requests = [{"model": names[i % len(names)], "prompt": words[i].prompt} for i in range(SEQUENCES)]
    job = {"url": server.url, "requests": requests, "tokens": TOKENS}
    run(server.python, "openai_load", job)  # the first one fills the slots
    rows = []
    for _ in range(REPEATS):
        before = _processor_seconds(server)
        said = run(server.python, "openai_load", job, seconds=600)
        rows.append({**said, "processor_seconds": _processor_seconds(server) - before})
    return {"repeats": rows, "load": psutil.getloadavg()[0], "resident_bytes": _resident(server)}


def _processes(server: Server) -> list[psutil.Process]:
    first = psutil.Process(server.pid)
    return [first, *first.children(recursive=True)]


def _processor_seconds(server: Server) -> float:
    return sum(sum(process.cpu_times()[:2]) for process in _processes(server))


def _resident(server: Server) -> int:
    """Of all processes of the server, with pages that several share counted once."""
    return sum(process.memory_full_info().pss for process in _processes(server))


def _write(target: Path, row: dict[str, Any], mode: str) -> None:
    with target.open(mode) as file:
        file.write(json.dumps(row) + "\n")
    if "limit" in row:
        speed = [said["tokens"] / said["processor_seconds"] for said in row["repeats"]]
        print(row["limit"], row["adapters"], f"{statistics.median(speed):.1f} tokens per processor second", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
