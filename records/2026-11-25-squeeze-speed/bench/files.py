"""Seconds to squeeze a whole adapter, from a folder on disk to a folder on disk.

All arms read every tensor once, with the file in the page cache, and make the weights that they write durable (fsync)
before the clock stops. `ours` also writes config, model card and header history, syncs these and the folders, and takes
the sha256 of the source file in a second thread; the CPU column counts that thread.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import lora_squeeze
from bench import arms
from bench.clock import Arm, Samples, in_turns
from bench.plan import TARGET_RANK, File, Plan, dtype_name
from bench.synthetic import factors, read_modules, write_adapter

WEIGHTS = "adapter_model.safetensors"


def measure_files(plan: Plan, folder: Path, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row per file of the plan: samples of every arm, the randomised SVD extrapolated from one module per shape."""
    rows = []
    for file in plan.files:
        tell(f"{file.model.name}, rank {file.rank}, {dtype_name(file.dtype)}")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            rows.append(_case(plan, file, Path(scratch)))
    return rows


def _case(plan: Plan, file: File, scratch: Path) -> dict[str, Any]:
    k = TARGET_RANK[file.rank]
    source = write_adapter(scratch / "source", file.model, file.rank, file.dtype)
    warm(source / WEIGHTS)
    P = torch.randn(file.rank, k, generator=torch.Generator().manual_seed(1))
    out = scratch / "out"

    def clean() -> None:
        shutil.rmtree(out, ignore_errors=True)

    def ours() -> None:
        lora_squeeze.load(str(source)).squeeze(rank=k).save(out)

    def floor() -> None:
        squeeze_file(source, out, lambda B, A: arms.floor(B, A, P, torch.float64)[2])

    def qr() -> None:
        squeeze_file(source, out, lambda B, A: arms.qr(B, A, k, torch.float64))

    samples = in_turns(
        {
            "ours": Arm(ours, file.repeats, clean, warm_up=False),
            "floor float64": Arm(floor, file.repeats, clean, warm_up=False),
            "qr float64": Arm(qr, file.qr_repeats, clean, warm_up=False),
        }
    )
    sampled = _svd_lowrank_per_shape(plan, file, k)
    counts = file.model.shapes()
    return {
        "model": file.model.name,
        "modules": len(file.model.modules),
        "rank": file.rank,
        "target_rank": k,
        "dtype": dtype_name(file.dtype),
        "bytes": (source / WEIGHTS).stat().st_size,
        "arms": {name: sample.to_json() for name, sample in samples.items()},
        "svd_lowrank_extrapolated_seconds": sum(sampled[shape].seconds * n for shape, n in counts.items()),
        "svd_lowrank_sample": [
            {"shape": list(shape), "modules": n, **sampled[shape].to_json()} for shape, n in counts.items()
        ],
    }


def _svd_lowrank_per_shape(plan: Plan, file: File, k: int) -> dict[tuple[int, int], Samples]:
    """The randomised SVD timed on one module of every shape, without reading or writing."""
    pairs = {
        shape: factors(shape, file.rank, file.dtype, torch.Generator().manual_seed(2)) for shape in file.model.shapes()
    }
    named = {
        str(shape): Arm(partial(arms.svd_lowrank, *pair, k), plan.slow_repeats, warm_up=False)
        for shape, pair in pairs.items()
    }
    samples = in_turns(named)
    return {shape: samples[str(shape)] for shape in pairs}


def squeeze_file(source: Path, out: Path, truncate: Callable[[Tensor, Tensor], arms.Factors]) -> None:
    """Read with the safetensors library, truncate module by module, write with the safetensors library, fsync."""
    result: dict[str, Tensor] = {}
    with safe_open(source / WEIGHTS, framework="pt") as file:
        for name in read_modules(iter(file.keys())):
            a_key, b_key = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
            new_B, new_A = truncate(file.get_tensor(b_key), file.get_tensor(a_key))
            result[a_key], result[b_key] = new_A.contiguous(), new_B.contiguous()
    out.mkdir()
    save_file(result, out / WEIGHTS, metadata={"format": "pt"})
    fd = os.open(out / WEIGHTS, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def warm(path: Path) -> None:
    """Read a file once, so that it is in the page cache for everybody."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
