"""Seconds to truncate one update in memory, for the shapes of Llama-3-8B."""

from __future__ import annotations

from typing import Any

import torch

from bench import arms
from bench.clock import Arm, in_turns
from bench.plan import TARGET_RANK, Plan, dtype_name
from bench.synthetic import Shape, factors
from lora_squeeze.lowrank import LowRank

SHAPES: tuple[Shape, ...] = ((4096, 4096), (14336, 4096), (1024, 4096))


def measure_modules(plan: Plan) -> list[dict[str, Any]]:
    """One row per shape, rank and dtype: samples of every arm, and the distance of its result from the exact one."""
    return [_case(plan, shape, rank, dtype) for rank in plan.ranks for dtype in plan.module_dtypes for shape in SHAPES]


def _case(plan: Plan, shape: Shape, rank: int, dtype: torch.dtype) -> dict[str, Any]:
    k = TARGET_RANK[rank]
    B, A = factors(shape, rank, dtype, torch.Generator().manual_seed(rank))
    update, P = LowRank(B, A), torch.randn(rank, k, generator=torch.Generator().manual_seed(1))
    compared = {
        "ours": Arm(lambda: update.truncate(k), plan.module_repeats),
        "floor float64": Arm(lambda: arms.floor(B, A, P, torch.float64), plan.module_repeats),
        "floor float64 syrk": Arm(lambda: arms.floor_syrk(B, A, P), plan.module_repeats),
        "floor float32": Arm(lambda: arms.floor(B, A, P, torch.float32), plan.module_repeats),
        "qr float64": Arm(lambda: arms.qr(B, A, k, torch.float64), plan.module_repeats),
        "qr float32": Arm(lambda: arms.qr(B, A, k, torch.float32), plan.module_repeats),
        "svd_lowrank": Arm(lambda: arms.svd_lowrank(B, A, k), plan.slow_repeats, warm_up=False),
    }
    if (shape, rank, dtype) in plan.peft_cases:
        compared["peft"] = Arm(arms.peft(B, A, k), plan.peft_repeats, warm_up=False)
    samples = in_turns(compared)
    exact = LowRank(*arms.qr(B.double(), A.double(), k, torch.float64))
    distances = {}
    for name, arm in compared.items():
        if not name.startswith(("floor", "peft")):
            found: Any = arm.run()
            result = found if isinstance(found, LowRank) else LowRank(*found)
            distances[name] = float(result.to(torch.float64).distance(exact) / exact.norm())
    return {
        "shape": list(shape),
        "rank": rank,
        "target_rank": k,
        "dtype": dtype_name(dtype),
        "arms": {name: sample.to_json() for name, sample in samples.items()},
        "distance_from_exact": distances,
    }
