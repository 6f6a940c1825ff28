"""TIES and DARE: merges of updates entry by entry, on the matrices themselves.

With dW_i the weighted updates of one module, d the density and n_ab the number of adapters that take part in entry ab:

=========  ==========================================================================================================
method     definition
=========  ==========================================================================================================
ties       trim: of each dW_i keep the share d of its entries that is largest in magnitude, the rest is zero;
           elect: the sign of sum_i dW_i, entry by entry (plus where that is zero);
           merge: the mean of the entries that are not zero and have that sign, 0 where there is none
dare       drop each entry of each dW_i with probability 1 - d, divide the others by d, and add
dare-ties  drop and divide as in dare, then elect and merge as in ties
=========  ==========================================================================================================

Sources: TIES-Merging (arXiv 2306.01708), section 4.1; DARE (arXiv 2311.03099), section 3. Both trim or drop a whole
task vector; here, as in PEFT, each module is one, so that one module is in memory at a time. The weights are part of
dW_i: an adapter with a negative weight votes for the opposite sign, one with a small weight has a small vote. PEFT
elects before it weighs, which is the same where all weights are equal and positive.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

METHODS = ("ties", "dare", "dare-ties")


def combine_dense(deltas: Sequence[Tensor], method: str, density: float, seeds: Sequence[int]) -> Tensor:
    """One matrix out of the weighted updates of one module.

    Args:
        deltas: the updates times their weights, of one shape.
        method: one of METHODS.
        density: share of the entries kept, in (0, 1].
        seeds: of the entries dropped, one per update; local generators, the global one is never touched.

    Returns:
        A tensor of the same shape.

    Notes:
        Holds all updates at once: len(deltas) * out * in numbers.
    """
    if method == "ties":
        kept = torch.stack([trim(delta, density) for delta in deltas])
    else:
        kept = torch.stack([drop(delta, density, seed) for delta, seed in zip(deltas, seeds, strict=True)])
    return kept.sum(0) if method == "dare" else elected_mean(kept)


def trim(delta: Tensor, density: float) -> Tensor:
    """The entries of largest magnitude, a share `density` of all but at least one; zero elsewhere."""
    flat = delta.flatten()
    largest = flat.abs().topk(max(1, int(density * flat.numel()))).indices
    return torch.zeros_like(flat).index_copy_(0, largest, flat[largest]).view_as(delta)


def drop(delta: Tensor, density: float, seed: int) -> Tensor:
    """Each entry stays with probability `density`, divided by it: the expectation is the update itself."""
    kept = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) < density
    return torch.where(kept.to(delta.device), delta / density, 0)


def elected_mean(deltas: Tensor) -> Tensor:
    """The mean over the first dimension of the entries that have the sign of their sum."""
    sign = torch.where(deltas.sum(0) >= 0, 1, -1)
    agree = deltas.sign() == sign
    return (deltas * agree).sum(0) / agree.sum(0).clamp_min(1)


def seed_of(seed: int, name: str, position: int) -> int:
    """A seed of its own for one module of one adapter, whatever the order in which modules are read."""
    digest = hashlib.sha256(f"{seed} {position} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
