"""How much is measured: quick, medium (default), full."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.synthetic import Model, Shape, flux, llama_8b

TARGET_RANK = {64: 16, 256: 64}
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class File:
    """One adapter whose squeeze is timed as a whole.

    Args:
        model: its modules.
        rank: source rank; TARGET_RANK has the target.
        dtype: of the stored factors.
        repeats: of ours and the floor.
        qr_repeats: of the slower QR.
    """

    model: Model
    rank: int
    dtype: torch.dtype
    repeats: int
    qr_repeats: int


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often."""

    name: str
    ranks: tuple[int, ...]
    module_dtypes: tuple[torch.dtype, ...]
    module_repeats: int
    slow_repeats: int
    peft_cases: tuple[tuple[Shape, int, torch.dtype], ...]  # shape, rank, dtype
    peft_repeats: int
    files: tuple[File, ...]
    accuracy_seeds: int
    large: Model | None  # rank 256, float32: the file of several GB
    start_ups: int


def dtype_name(dtype: torch.dtype) -> str:
    """bfloat16, float32, ..."""
    return str(dtype).removeprefix("torch.")


def quick() -> Plan:
    """About two minutes."""
    return Plan(
        name="quick",
        ranks=(64, 256),
        module_dtypes=(BF16,),
        module_repeats=3,
        slow_repeats=1,
        peft_cases=(((1024, 4096), 64, BF16),),
        peft_repeats=1,
        files=(File(llama_8b(), 64, BF16, 3, 1),),
        accuracy_seeds=1,
        large=None,
        start_ups=5,
    )


def medium() -> Plan:
    """Under a quarter of an hour."""
    llama = llama_8b()
    return Plan(
        name="medium",
        ranks=(64, 256),
        module_dtypes=(BF16, FP32),
        module_repeats=7,
        slow_repeats=2,
        peft_cases=(((4096, 4096), 64, BF16), ((1024, 4096), 64, BF16)),
        peft_repeats=1,
        files=(
            File(llama, 64, BF16, 5, 2),
            File(llama, 64, FP32, 5, 2),
            File(flux(), 64, BF16, 3, 1),
            File(llama, 256, BF16, 2, 1),
        ),
        accuracy_seeds=3,
        large=llama_8b(layers=52),
        start_ups=10,
    )


def full() -> Plan:
    """What records/ holds: everything, more often."""
    llama = llama_8b()
    return Plan(
        name="full",
        ranks=(64, 256),
        module_dtypes=(BF16, FP32),
        module_repeats=15,
        slow_repeats=3,
        peft_cases=(((4096, 4096), 64, BF16), ((4096, 4096), 256, FP32), ((1024, 4096), 64, BF16)),
        peft_repeats=2,
        files=(
            File(llama, 64, BF16, 9, 3),
            File(llama, 64, FP32, 9, 3),
            File(llama, 256, BF16, 5, 2),
            File(llama, 256, FP32, 5, 2),
            File(flux(), 64, BF16, 7, 3),
            File(flux(), 64, FP32, 5, 2),
            File(flux(), 256, BF16, 3, 1),
        ),
        accuracy_seeds=5,
        large=llama_8b(layers=52),
        start_ups=10,
    )
