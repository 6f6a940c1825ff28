"""Numbers that depend on a seed and labels alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_of(seed: int, *labels: object) -> int:
    """A seed of its own for labels, below 2^63.

    Labels of different kinds never meet: what is drawn for ("q", "A") and ("q", "B") is independent.
    """
    text = "\0".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def generator_of(number: int) -> torch.Generator:
    """A CPU generator, whose numbers are the same on every device and in every run."""
    return torch.Generator("cpu").manual_seed(number)


def seeded(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator whose numbers depend on the seed and the labels alone."""
    return generator_of(seed_of(seed, *labels))


@contextmanager
def usual_defaults() -> Iterator[None]:
    """What is made here is float32 on the CPU and may be saved for a backward pass, whatever the caller has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)
