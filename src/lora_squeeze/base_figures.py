"""An adapter beside its base model: the size of every update, what a merge leaves of it, and copies of base tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Module, Progress
from lora_squeeze.intruders import TOP
from lora_squeeze.intruders import intruders as count_intruders
from lora_squeeze.lowrank import LowRank
from lora_squeeze.merging import merge, norm_of, row_blocks

LOST = 0.5  # share of unchanged entries above which an update counts as below the rounding of its base weight
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")
_WRAPPERS = (".token_adapter", ".base_layer", ".modules_to_save.default", ".modules_to_save", ".original_module")
Facts = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@runtime_checkable
class Weights(Protocol):
    """The weights of a base model, read one tensor at a time."""

    @property
    def name(self) -> str:
        """What reports call the model."""

    @property
    def facts(self) -> Facts:
        """Key -> dtype and shape of every tensor."""

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The numbers of one tensor in order, as flat tensors of bounded size."""


@dataclass(frozen=True)
class BaseFigures:
    """One module beside its base weight.

    Args:
        key: the tensor of the base model.
        base_norm: Frobenius norm of W.
        relative_norm: |dW|_F / |W|_F.
        unchanged, merge_error: what a merge in bfloat16 leaves of the update, see `lora_squeeze.merging`; None where
            the file does not tell which axis of W is which (square experts).
        intruders: number of intruder directions, see `lora_squeeze.intruders`; None where nobody asked, and of experts,
            convolutions and embeddings.
    """

    key: str
    base_norm: float
    relative_norm: float
    unchanged: float | None
    merge_error: float | None
    intruders: int | None = None


@dataclass(frozen=True)
class Carried:
    """A tensor that the adapter carries whole, beside the same tensor of the base model.

    Args:
        name, kind, size_bytes: the tensor in the adapter.
        key: the tensor of the base model.
        rows: rows in the adapter; of a vector, its numbers.
        changed_rows: rows that differ from the base's, rounded to the dtype in the adapter.
        added_rows: rows after the last one of the base.
    """

    name: str
    kind: str
    size_bytes: int
    key: str
    rows: int
    changed_rows: int
    added_rows: int

    @property
    def equal(self) -> bool:
        """Whether the base model has all of it already."""
        return self.changed_rows == self.added_rows == 0


@dataclass(frozen=True)
class BaseComparison:
    """An adapter beside its base model.

    Args:
        model: the base model.
        relative_norm: root of sum |dW|^2 over root of sum |W|^2, over the modules found; None where there is none.
        carried: the carried tensors that the base model has too.
        unmatched: module or carried tensor -> why it was not compared.
    """

    model: str
    relative_norm: float | None
    carried: list[Carried]
    unmatched: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        """The comparison as JSON-ready data."""
        return {**asdict(self), "carried": [{**asdict(tensor), "equal": tensor.equal} for tensor in self.carried]}

    def notes(self, figures: Mapping[str, BaseFigures]) -> list[str]:
        """What a person should know, one line each."""
        notes = []
        lost = [name for name, found in figures.items() if (found.unchanged or 0.0) > LOST]
        if lost:
            shares = [100 * (figures[name].unchanged or 0.0) for name in lost]
            span = f"{min(shares):.0f}" if len(lost) == 1 else f"{min(shares):.0f} to {max(shares):.0f}"
            notes.append(
                f"{some(lost)}: this update is below bf16 rounding of the base weight ({span} % of the entries stay "
                "as they are): merging into bf16 loses most of it; serve it unmerged, or merge in float32"
            )
        counted = {name: found.intruders for name, found in figures.items() if found.intruders is not None}
        if counted:
            intruded = [name for name, count in counted.items() if count]
            notes.append(
                f"{sum(counted.values())} intruder directions among the first {TOP} of {len(counted)} modules"
                + (f", in {len(intruded)} of them: {some(intruded)}" if intruded else "")
            )
        for tensor in self.carried:
            added = f", {tensor.added_rows:,} added" if tensor.added_rows else ""
            changed = f"{tensor.changed_rows:,} of {tensor.rows:,} rows changed{added}"
            found = "equal to the base: can be dropped" if tensor.equal else f"{changed}, the rest equals the base"
            notes.append(f"{tensor.name} ({tensor.size_bytes:,} bytes): {found}")
        return [*notes, *(f"not compared with the base, {line}" for line in by_reason(self.unmatched))]


def by_reason(unmatched: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the names of the modules and tensors."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unmatched.items():
        reasons.setdefault(reason, []).append(name)
    return [f"{reason}: {some(names)}" for reason, names in reasons.items()]


def some(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def compare(
    adapter: Adapter,
    norms: Mapping[str, float],
    base: Weights,
    progress: Progress | None = None,
    *,
    intruders: bool = False,
) -> tuple[dict[str, BaseFigures], BaseComparison]:
    """The figures of every module that the base model has, and of the tensors that the adapter carries along.

    Args:
        adapter: whose updates to compare.
        norms: module -> Frobenius norm of its update.
        base: the base model's weights.
        progress: called with (bytes of base weights done, bytes in all).
        intruders: count the intruder directions of linear layers too, which takes much longer.

    Notes:
        Reads every base weight concerned once, piece by piece. See `lora_squeeze.merging` for the cost.
    """
    facts, unmatched = base.facts, dict[str, str]()
    keys = {name: _key(name, _spellings(name), facts, unmatched) for name in adapter.modules}
    carried = carried_keys(adapter, facts, unmatched)
    step = _steps([key for key in (*keys.values(), *carried.values()) if key], facts, progress)
    figures: dict[str, BaseFigures] = {}
    for batch in adapter.batches():
        batch = [module for module in batch if keys[module.name]]
        for module, update in zip(batch, adapter.source.updates(batch), strict=True):
            key = keys[module.name] or ""
            found = _figures(adapter, module, update, norms[module.name], key, base)
            if intruders and module.kind == "linear" and not isinstance(found, str):
                found = replace(found, intruders=_intruders(adapter, module, update, key, base))
            step(key)
            if isinstance(found, str):
                unmatched[module.name] = found
            else:
                figures[module.name] = found
    tensors = _all_carried(adapter, carried, base, unmatched, step)
    W = math.hypot(*(found.base_norm for found in figures.values()))
    dW = math.hypot(*(norms[name] for name in figures))
    return figures, BaseComparison(base.name, dW / W if W else None, tensors, unmatched)


def compare_carried(adapter: Adapter, base: Weights) -> tuple[list[Carried], dict[str, str]]:
    """The tensors that the adapter carries along beside the base model's, and why others were not compared."""
    unmatched = dict[str, str]()
    keys = carried_keys(adapter, base.facts, unmatched)
    return _all_carried(adapter, keys, base, unmatched, lambda _: None), unmatched


def carried_keys(adapter: Adapter, facts: Facts, unmatched: dict[str, str]) -> dict[str, str | None]:
    """Carried tensor -> its key in the base model, None where it has none of that meaning; the reason is noted."""
    return {
        name: base_key(name, name, facts, unmatched)
        for name, extra in adapter.extras.items()
        if extra.kind not in ("lora bias", "trainable tokens")  # no tensor of the base has their meaning
    }


def base_key(tensor: str, name: str, facts: Facts, unmatched: dict[str, str]) -> str | None:
    """The key in the base model of a tensor that the model calls `name`; None where there is none, with the reason."""
    return _key(tensor, _carried_spellings(name, facts), facts, unmatched)


def _all_carried(
    adapter: Adapter,
    keys: Mapping[str, str | None],
    base: Weights,
    unmatched: dict[str, str],
    step: Callable[[str], None],
) -> list[Carried]:
    found = []
    for name, key in keys.items():
        if key:
            tensor = _carried(adapter, adapter.extras[name], key, base)
            step(key)
            if isinstance(tensor, str):
                unmatched[name] = tensor
            else:
                found.append(tensor)
    return found


def _steps(keys: Sequence[str], facts: Facts, progress: Progress | None) -> Callable[[str], None]:
    """A function to call after each tensor that was read."""
    sizes = {key: math.prod(facts[key][1]) * facts[key][0].itemsize for key in keys}
    done, total = 0, sum(sizes[key] for key in keys)

    def step(key: str) -> None:
        nonlocal done
        done += sizes[key]
        if progress:
            progress(done, total)

    return step


def _key(name: str, spellings: Sequence[str], facts: Facts, unmatched: dict[str, str]) -> str | None:
    """The first spelling that the base model has, if its numbers are plain ones; else the reason is noted."""
    key = next((spelling for spelling in spellings if spelling in facts), None)
    if key is None:
        unmatched[name] = "no tensor of that name in it"
    elif facts[key][0] not in _FLOATS:
        unmatched[name] = f"stored as {str(facts[key][0]).removeprefix('torch.')} in it (quantised)"
        return None
    return key


def _spellings(name: str) -> list[str]:
    """Keys under which base models keep the weight of a module; "model." comes and goes with the head around it."""
    paths = (name, name.removeprefix("model."), f"model.{name}")
    return [f"{path}{end}" for path in paths for end in (".weight", ".in_proj_weight", "")]


def carried_name(name: str) -> str:
    """What the model calls a carried tensor, without PEFT's prefix and wrappers."""
    name = name.removeprefix("base_model.model.")
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _carried_spellings(name: str, facts: Facts) -> list[str]:
    path = carried_name(name)
    found = [path, path.removeprefix("model."), f"model.{path}"]
    if path.endswith(_HEADS):  # files of a model leave out a head that is tied to the embedding
        tied = [key for key in facts if key.endswith(_EMBEDDINGS)]
        found += tied if len(tied) == 1 else []
    return found


def _figures(
    adapter: Adapter, module: Module, update: LowRank, norm: float, key: str, base: Weights
) -> BaseFigures | str:
    """The figures of one module, or why there are none."""
    shape = base.facts[key][1]
    turned = _turned(module, shape, bool(adapter.config.get("fan_in_fan_out")))
    if isinstance(turned, str):
        return turned
    B, A = (t if t.dim() == 3 else t[None] for t in (update.B.float() * update.scale, update.A.float()))
    if turned is None:
        base_norm, unchanged, error = norm_of(base.pieces(key)), None, None
    else:
        found = merge(*((A.mT, B.mT) if turned else (B, A)), base.pieces(key))
        base_norm, unchanged, error = found.base_norm, found.unchanged, found.merge_error
    if not math.isfinite(base_norm):
        return "NaN or infinity in it"
    if not base_norm:
        return "all zeros in it"
    return BaseFigures(key, base_norm, norm / base_norm, unchanged, error)


def _intruders(adapter: Adapter, module: Module, update: LowRank, key: str, base: Weights) -> int:
    shape = base.facts[key][1]
    W = torch.cat(list(base.pieces(key))).reshape(shape)
    turned = _turned(module, shape, bool(adapter.config.get("fan_in_fan_out")))
    return count_intruders(W.mT if turned else W, update.dense())


def _turned(module: Module, shape: tuple[int, ...], fan_in_fan_out: bool) -> bool | str | None:
    """Whether the weight is stored as the transpose of dW; None: the shape does not tell; text: it does not fit."""
    out, inp, copies = module.out_features, module.in_features, module.copies
    stack = (copies,) if module.kind == "experts" else ()
    if module.kind == "conv":
        plain, turned = len(shape) > 2 and (shape[0], math.prod(shape[1:])) == (out * copies, inp), False
    elif module.kind == "embedding":
        plain, turned = False, shape == (inp, out)
    else:
        plain, turned = shape == (*stack, out, inp), shape == (*stack, inp, out)
    if plain and turned:
        return None if module.kind == "experts" else fan_in_fan_out
    if not plain and not turned:
        here = [copies, out, inp] if copies > 1 else [out, inp]
        return f"its shape is {list(shape)} in it, the update's {here}"
    return turned


def _carried(adapter: Adapter, extra: Extra, key: str, base: Weights) -> Carried | str:
    """A carried tensor beside the base's, or why it cannot be compared."""
    shape = base.facts[key][1]
    if shape[1:] != extra.shape[1:] or len(shape) != len(extra.shape):
        return f"its shape is {list(shape)} in it, the adapter's {list(extra.shape)}"
    rows, theirs = (s[0] if s else 1 for s in (extra.shape, shape))
    columns = math.prod(extra.shape[1:])
    changed = 0
    blocks = (row_blocks(adapter.pieces(extra.name), columns), row_blocks(base.pieces(key), columns))
    for mine, other in zip(*blocks, strict=False):
        n = min(len(mine), len(other))
        changed += int((mine[:n].float() != other[:n].to(extra.dtype).float()).any(-1).sum())
    return Carried(extra.name, extra.kind, extra.size_bytes, key, rows, changed, max(0, rows - theirs))
