"""Numbers that depend on a seed and labels alone."""

from __future__ import annotations

import hashlib

import torch


def seeded(seed: int, *labels: object) -> torch.Generator:
    """A CPU generator whose numbers depend on the seed and the labels alone: the same on every device and in every run.

    Labels of different kinds never meet: the numbers of ("q", "A") and ("q", "B") are independent.
    """
    text = "\0".join([str(seed), *map(str, labels)])
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1
    return torch.Generator().manual_seed(number)
