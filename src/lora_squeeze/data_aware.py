"""Data-aware squeezes of whole adapters: statistics by module name, and spectra in units of the loss.

With the moments C and F of a module (`lora_squeeze.moments`), the singular values S of s F^1/2 C^1/2 take the place of
those of the update: half their squares after the k-th one are what a truncation to rank k is predicted to add to the
loss. So every rule of `lora_squeeze.ranks` works on them as it is, and a budget goes where the loss feels it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import torch

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.dials import Spectra
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank
from lora_squeeze.moments import Moments, Truncation, predicted_curve

TIED = "tied embeddings"  # the group of an embedding and the head that shares its factors
# What wrappers put into the names of modules: DDP, torch.compile, FSDP, activation checkpointing; and PEFT itself.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def base_name(path: str) -> str:
    """The path of a live layer in the base model: without PEFT's prefixes and those of wrappers."""
    return _WRAPPERS.sub("", path).removeprefix("base_model.model.").replace(".base_layer", "")


def moments_of(adapter: Adapter, moments: Mapping[str, Moments]) -> dict[str, Moments]:
    """The moments by module name.

    Args:
        adapter: what they were collected for.
        moments: by module name, or by name of the layer in a live PEFT model as `calibrate` gives them.

    Returns:
        Module -> moments. Left out are an embedding and a head with the same factors: these can be cut in one way only.

    Raises:
        LoraSqueezeError: a name that the adapter does not have, matrices of another rank, nothing at all.
    """
    found = {}
    for path, item in moments.items():
        name = path if path in adapter.modules else base_name(path)
        if name not in adapter.modules:
            raise LoraSqueezeError(
                f"statistics for {path!r}, which the adapter has not; it has {next(iter(adapter.modules))!r}, ..."
            )
        module = adapter.modules[name]
        expected = ((module.copies,) if module.copies > 1 else ()) + (module.rank, module.rank)
        if tuple(item.C.shape) != expected:
            raise LoraSqueezeError(
                f"{name}: statistics of shape {tuple(item.C.shape)} meet an update of rank {module.rank}; expected "
                f"{expected}: collect them again with this adapter"
            )
        if module.group != TIED:
            found[name] = item
    if not found:
        raise LoraSqueezeError("the statistics say nothing about any module of the adapter; calibrate with more data")
    return found


def loss_spectra(adapter: Adapter, moments: Mapping[str, Moments], plain: Spectra) -> dict[str, list[list[float]]]:
    """Module -> for each copy the values whose squares are the predicted increase of the loss per direction.

    A module without moments gets its plain singular values, scaled like those of the others on average: its energy
    counts as much as theirs.

    Args:
        adapter: the source.
        moments: module -> moments, from `moments_of`.
        plain: module -> singular values of each copy.

    Raises:
        LoraSqueezeError: the statistics are zero everywhere.
    """
    seen = {name: _values(adapter.modules[name], item) for name, item in moments.items()}
    loss = math.fsum(s * s for rows in seen.values() for row in rows for s in row)
    energy = math.fsum(s * s for name in seen for row in plain[name] for s in row)
    if not loss > 0 < energy:
        raise LoraSqueezeError("the statistics are zero everywhere: the loss does not depend on this adapter")
    rate = math.sqrt(loss / energy)
    return {
        name: seen[name] if name in seen else [[s * rate for s in row] for row in plain[name]]
        for name in adapter.modules
    }


def loss_without(module: Module, moments: Moments) -> float:
    """Predicted change of the loss if the module leaves the adapter."""
    straight = 0.0 if moments.slope is None else -float(moments.slope.diagonal(dim1=-2, dim2=-1).sum())
    return straight + math.fsum(s * s for row in _values(module, moments) for s in row)


def _values(module: Module, moments: Moments) -> list[list[float]]:
    curve = predicted_curve(moments, module.scale)
    rows: list[list[float]] = (curve[..., :-1] - curve[..., 1:]).sqrt().reshape(-1, module.rank).tolist()
    return rows


def apply(update: LowRank, cut: Truncation, scale: float) -> LowRank:
    """The truncated update with another scale s' > 0, balanced: B' = s/s' B P and A' = R A, each with half of s/s'.

    In float64.
    """
    ratio = update.scale / scale
    root = math.sqrt(abs(ratio))
    B = update.B.to(torch.float64) @ cut.P * math.copysign(root, ratio)
    return LowRank(B, cut.R @ update.A.to(torch.float64) * root, scale)
