"""A fleet of synthetic adapters: throughput, memory, scaling with workers: `python -m bench.fleet [--members 500]`.

Adapters of Llama-3.2-1B's shapes (q and v of 16 blocks) in bfloat16, of ranks 8, 16, 32 and 64 in turn, each with a
spectrum of its own (see bench/synthetic.py), squeezed for vLLM with slots for all of them in half of the memory that
rank 64 would take.

==================  ====================================================================================================
arm                 what runs
==================  ====================================================================================================
fleet, 1 worker     `lora-squeeze fleet`, one process that works
fleet, 2 workers    the same with two
fleet, Ray          the same on a local Ray cluster of two nodes with one CPU each
fleet, again        the same command once more: nothing is left to do
one after another   rival: `lora-squeeze squeeze` once per adapter, on some of the same adapters
==================  ====================================================================================================
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.machine import machine
from bench.synthetic import Model, write_adapter

RANKS = (8, 16, 32, 64)
SLOT_RANK = 32
_COMMAND = [sys.executable, "-c", "from lora_squeeze.cli import main; main()"]
_SECONDS = 0.2  # between two looks at the memory


def llama_1b() -> Model:
    """q and v of Llama-3.2-1B."""
    block = {"self_attn.q_proj": (2048, 2048), "self_attn.v_proj": (512, 2048)}
    return Model("Llama-3.2-1B", {f"model.layers.{i}.{k}": s for i in range(16) for k, s in block.items()})


def write_fleet(folder: Path, members: int) -> int:
    """The adapters; bytes of all of them."""
    for i in range(members):
        write_adapter(folder / f"tenant-{i:04d}", llama_1b(), RANKS[i % len(RANKS)], torch.bfloat16, seed=i)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def run(command: Sequence[str]) -> dict[str, Any]:
    """Seconds, and the largest resident memory of the first process and of all its descendants together."""
    begin, first, together = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile("w+") as out:
        with subprocess.Popen(command, stdout=out, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            while process.poll() is None:
                sizes = _resident(process.pid)
                first, together = max(first, sizes.get(process.pid, 0)), max(together, sum(sizes.values()))
                time.sleep(_SECONDS)
        if process.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} ended with {process.returncode}")
        out.seek(0)
        text = out.read()
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "driver_mb": first / 1e6, "all_mb": together / 1e6, "out": text}


def _resident(pid: int) -> dict[int, int]:
    """Private bytes of a process and its descendants: what they share is counted nowhere."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = dict[int, int](), [pid]
    while waiting:
        one = waiting.pop()
        waiting += children.get(one, [])
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        found[one] = sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
    return found


def measure(folder: Path, members: int, singles: int) -> list[dict[str, Any]]:
    """All arms."""
    source, out = folder / "tenants", folder / "out"
    size = write_fleet(source, members)
    per_slot = SLOT_RANK * 2 * sum(out + inp for out, inp in llama_1b().modules.values())
    # q and v bring slots for k with them, which is as large as v
    per_slot += SLOT_RANK * 2 * 16 * (512 + 2048)
    memory = str(per_slot * members)
    facts = {"members": members, "bytes": size, "memory": int(memory)}
    rows: list[dict[str, Any]] = []

    def fleet(arm: str, *options: str, fresh: bool = True) -> None:
        if fresh:
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(f"{out}-fleet", ignore_errors=True)
        command = [*_COMMAND, "fleet", str(source), "--memory", memory, "-o", str(out), "--json", *options]
        found = run(command)
        report = json.loads(found.pop("out"))
        states = [row["state"] for row in report["members"]]
        told = {name: report[name] for name in ("max_rank", "loss", "options")} | {"device_bytes": report["bytes"]}
        after = sum(row["bytes_after"] for row in report["members"])
        rows.append(
            {"arm": arm, **facts, **found, **told, "bytes_after": after, "written": states.count("written"),
             "there": states.count("already there"), "failed": states.count("failed")}
        )  # fmt: skip
        print(json.dumps(rows[-1]), flush=True)

    fleet("fleet, 1 worker", "--workers", "1")
    fleet("fleet, 2 workers", "--workers", "2")
    fleet("fleet, again", "--workers", "2", fresh=False)
    with _cluster() as address:
        fleet("fleet, Ray", "--ray", address)
    begin = time.perf_counter()
    chosen = range(3, members, max(1, members // singles) // 4 * 4 or 4)  # of rank 64: those that are squeezed
    for i in chosen:
        shutil.rmtree(out / "single", ignore_errors=True)
        run(
            [*_COMMAND, "squeeze", str(source / f"tenant-{i:04d}"), "-o", str(out / "single"), "--rank", "32", "--json"]
        )
    seconds = time.perf_counter() - begin
    rows.append({"arm": "one after another", **facts, "seconds": seconds, "squeezed": len(chosen)})
    print(json.dumps(rows[-1]), flush=True)
    return rows


class _cluster:
    """A local Ray cluster: a head without CPUs and two nodes with one each."""

    def __enter__(self) -> str:
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_DISABLE_IMPORT_WARNING="1")
        from ray.cluster_utils import Cluster

        options = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **options})
        for _ in range(2):
            self.cluster.add_node(num_cpus=1, **options)
        self.cluster.wait_for_nodes()
        return str(self.cluster.address)

    def __exit__(self, *error: object) -> None:
        self.cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=500)
    parser.add_argument("--singles", type=int, default=20, help="adapters of the rival")
    parser.add_argument(
        "--folder", type=Path, help="where the adapters are while it runs: 6 MB for each, and as much again"
    )
    parser.add_argument("--json", type=Path, help="file for the rows")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        rows = [{"arm": "machine", **machine()}, *measure(Path(folder), asked.members, asked.singles)]
    if asked.json:
        asked.json.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
