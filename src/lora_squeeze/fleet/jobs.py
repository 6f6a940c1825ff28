"""What is done with one member: measure it, squeeze it. Both run in other processes, perhaps on other machines.

Both are harmless to do twice. `squeeze_member` writes nothing where its result is there already; that is known from the
header of the file there, which names the digest of the source and what was done to it.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft import WEIGHTS_NAME
from lora_squeeze.hub import load
from lora_squeeze.post_squeeze import measure

_ADDED = ("source_sha256", "lora_squeeze")  # what writing adds to the last step of a history
# What writing sets in a configuration; all of it is in the modules' ranks and scales.
_SET = {
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", "eva_config",
    "corda_config", "lora_ga_config", "loftq_config",
}  # fmt: skip


def measure_member(path: str) -> dict[str, Any]:
    """What a rank costs one adapter.

    Args:
        path: its folder.

    Returns:
        `losses`: share of its energy that is lost at rank 1, 2, ..., its own rank, all modules together; zeros for an
        adapter that changes nothing. `sha256`: digest of its weights file.

    Raises:
        LoraSqueezeError: what reading and decomposing refuse.
    """
    adapter = load(path)
    ranks = torch.arange(1, adapter.rank + 1)
    lost, total = torch.zeros(adapter.rank, dtype=torch.float64), 0.0
    for name, found in measure(adapter).items():
        module = adapter.modules[name]
        energies = torch.tensor(found.values, dtype=torch.float64).square().sum(0)
        tails = torch.zeros(len(energies) + 1, dtype=torch.float64)  # entry k: what is beyond rank k
        tails[:-1] = energies.flip(0).cumsum(0).flip(0)
        lost += tails[(ranks // module.step).clamp(1, len(energies))]
        total += float(tails[0])
    return {"losses": (lost / total if total else lost).tolist(), "sha256": adapter.source.digest()}


def squeeze_member(
    path: str, target: str, rank: int, dtype: str | None, sha256: str, device: str | None, force: bool
) -> dict[str, Any]:
    """Squeeze one adapter, unless that is done already. One with no more rank than asked for is copied as it is.

    Args:
        path, target, rank, dtype, sha256: as `look` takes them.
        device: where to compute; None: the CPU.
        force: replace what is at the target.

    Returns:
        `state`: "written" or "already there"; `rank` and `bytes` of the weights file there.

    Raises:
        LoraSqueezeError: what squeezing and saving refuse.
    """
    found = look(path, target, rank, dtype, sha256)
    if found["state"] == "already there":
        return found
    wanted = _wanted(load(path), rank, dtype, device)
    wanted.save(target, force=force)
    return _result("written", wanted, Path(target))


def look(path: str, target: str, rank: int, dtype: str | None, sha256: str) -> dict[str, Any]:
    """What is at the place of a squeezed adapter.

    Args:
        path: folder of the source.
        target: folder to write.
        rank: the largest rank of any module.
        dtype: name of the dtype of the factors written; None: as stored.
        sha256: digest of the weights when they were measured.

    Returns:
        `state`: "free", "already there" (then as `squeeze_member`) or "other".
    """
    if _is_free(Path(target)):
        return {"state": "free"}
    wanted = _wanted(load(path), rank, dtype, None)
    if _is_done(wanted, Path(target), sha256):
        return _result("already there", wanted, Path(target))
    return {"state": "other"}


def _result(state: str, adapter: Adapter, target: Path) -> dict[str, Any]:
    return {"state": state, "rank": adapter.rank, "bytes": (target / WEIGHTS_NAME).stat().st_size}


def may_be_ours(target: Path) -> bool:
    """Whether a place is free, or holds an adapter that some squeeze or copy has written: seen from its header."""
    if _is_free(target):
        return True
    try:
        return any("source_sha256" in step for step in load(target).history[-1:])
    except LoraSqueezeError:
        return False


def _is_free(target: Path) -> bool:
    try:
        return not os.listdir(target)
    except FileNotFoundError:
        return True
    except OSError:  # not a folder, or not ours to look into
        return False


def _is_done(wanted: Adapter, target: Path, sha256: str) -> bool:
    """Whether the adapter there was made of the file with this digest in the way that `wanted` is made."""
    if not (target / WEIGHTS_NAME).exists():
        return False
    try:
        found = load(target)
    except LoraSqueezeError:
        return False
    steps = [dict(step) for step in found.history]
    if not steps or steps[-1].get("source_sha256") != sha256:
        return False
    expected = [dict(step) for step in wanted.history] or [{"step": "copy"}]
    for last in (steps[-1], expected[-1]):
        for key in _ADDED:
            last.pop(key, None)
    return steps == expected and _same(found, wanted)


def _wanted(source: Adapter, rank: int, dtype: str | None, device: str | None) -> Adapter:
    """The adapter to be written."""
    kind: torch.dtype | None = None if dtype is None else getattr(torch, dtype)
    if source.rank <= rank and all(kind in (None, module.dtype) for module in source.modules.values()):
        return source
    return source.squeeze(rank=min(rank, source.rank), dtype=kind, device=device)


def _same(found: Adapter, wanted: Adapter) -> bool:
    """Whether headers and configurations say the same."""
    scale = wanted.default_scale if wanted.default_scale > 0 else 1.0
    if found.modules.keys() != wanted.modules.keys() or _settings(found.config) != _settings(wanted.config):
        return False
    for name, module in found.modules.items():
        other = wanted.modules[name]
        facts = [(m.rank, m.dtype, m.out_features, m.in_features, m.copies, m.kind) for m in (module, other)]
        if facts[0] != facts[1] or not math.isclose(module.scale, scale, rel_tol=1e-9):
            return False
    carried = [Counter((e.dtype, e.shape) for e in adapter.extras.values()) for adapter in (found, wanted)]
    return carried[0] == carried[1]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in _SET}
