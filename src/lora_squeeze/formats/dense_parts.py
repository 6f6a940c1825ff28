"""What becomes of every tensor of a full fine-tune: a module, a carried tensor, or a note."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from lora_squeeze.adapter import Extra, Progress
from lora_squeeze.base_figures import some
from lora_squeeze.base_model import BaseModel
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.dense_difference import Difference, compare
from lora_squeeze.formats.dense_keys import (
    BIAS,
    WEIGHT,
    Layer,
    Pairing,
    is_vocabulary,
    layers,
    pair,
    path_of,
)
from lora_squeeze.formats.safetensors_header import quoted

Vocabulary = Literal["leave", "lora", "carry"]
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LEFT = {
    "vocabulary": "changed and left as in the base; the option vocabulary makes such layers modules (lora) or keeps "
    "them whole (carry)",
    "other": "changed and left as in the base, since no LoRA holds it; the option carry keeps such tensors whole",
    "alone": "only in the tuned model and left out; the option carry keeps such tensors whole",
}
_CAUSE = {
    "vocabulary": "vocabulary='carry': an embedding or a head that the tuning changed",
    "other": "carry=True: the tuning changed it, and no LoRA holds it",
    "alone": "carry=True: only the tuned model has it",
}


@dataclass(frozen=True)
class Layout:
    """Where the update of one module comes from.

    Args:
        tuned, base: keys of the tensors.
        layer: the matrix that they are.
        difference: what the comparison found.
    """

    tuned: str
    base: str
    layer: Layer
    difference: Difference


@dataclass(frozen=True)
class Wanted:
    """What the caller asks for; see `dense.extract`."""

    include: re.Pattern[str] | None
    exclude: re.Pattern[str] | None
    vocabulary: Vocabulary
    carry: bool

    def __contains__(self, path: str) -> bool:
        """Whether this layer is one to look at."""
        return (self.include is None or self.include.search(path) is not None) and (
            self.exclude is None or self.exclude.search(path) is None
        )


@dataclass
class Parts:
    """The parts of an adapter.

    Args:
        modules: path -> where its update comes from.
        extras: name -> carried tensor.
        origins: name of a carried tensor -> its keys in the tuned model and in the base, the latter for a difference.
        notes: reason -> names of what it is said of.
    """

    modules: dict[str, Layout] = field(default_factory=dict)
    extras: dict[str, Extra] = field(default_factory=dict)
    origins: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def told(self) -> tuple[str, ...]:
        """The notes, one line each."""
        return tuple(f"{some(names)}: {reason}" if names else reason for reason, names in self.notes.items())


def sort(tuned: BaseModel, base: BaseModel, wanted: Wanted, progress: Progress | None) -> Parts:
    """Compare all tensors that both have, and sort them; docs/extract.md has the rules.

    Raises:
        LoraSqueezeError: the models do not fit together, quantised weights, or NaN.
    """
    pairing = pair(*({key: shape for key, (_, shape) in model.facts.items()} for model in (tuned, base)))
    kinds = layers({name: base.facts[theirs][1] for name, (_, theirs) in pairing.pairs.items()})
    parts = Parts()
    left = {name: "alone" for name in pairing.only_tuned if path_of(name) in wanted}
    for name, difference in _differing(tuned, base, pairing, wanted, parts, progress):
        layer = kinds[name]
        if is_vocabulary(name) and wanted.vocabulary != "lora":
            left[name] = "vocabulary"
        elif isinstance(layer, str):
            left[name] = "other"
        elif difference.changed:
            parts.modules[path_of(name)] = Layout(*pairing.pairs[name], layer, difference)
            _remark(path_of(name), difference, parts)
        else:
            parts.notes["only has new rows, which no LoRA holds"].append(path_of(name))
    for name, why in left.items():
        if wanted.vocabulary == "carry" if why == "vocabulary" else wanted.carry:
            _carry(name, why, tuned, base, pairing, parts)
        else:
            parts.notes[_LEFT[why]].append(name)
    for old, new in pairing.changes:
        parts.notes[f"{quoted(old)} before names of the tuned model is {quoted(new)} in the base"] = []
    if alone := [name for name in pairing.only_base if path_of(name) in wanted]:
        parts.notes["only in the base; the adapter does not change it"] = alone
    return parts


def _differing(
    tuned: BaseModel, base: BaseModel, pairing: Pairing, wanted: Wanted, parts: Parts, progress: Progress | None
) -> Iterator[tuple[str, Difference]]:
    """The tensors that differ by more than rounding."""
    chosen = {name: keys for name, keys in pairing.pairs.items() if path_of(name) in wanted}
    for name, keys in chosen.items():
        _check(name, tuned, keys[0], base, keys[1])
    sizes = {name: base.files[theirs].entries[theirs].nbytes for name, (_, theirs) in chosen.items()}
    done, total = 0, sum(sizes.values())
    for name, (mine, theirs) in chosen.items():
        difference = compare(tuned, mine, base, theirs)
        done += sizes[name]
        if progress:
            progress(done, total)
        if not difference.same or difference.added_rows > 0:
            yield name, difference
        elif difference.changed:
            parts.notes["equal but for rounding to the dtype of one of the models; left as in the base"].append(name)


def _check(name: str, tuned: BaseModel, mine: str, base: BaseModel, theirs: str) -> None:
    """Refuse tensors that cannot be subtracted."""
    (my_dtype, my_shape), (their_dtype, their_shape) = tuned.facts[mine], base.facts[theirs]
    for model, dtype in ((tuned, my_dtype), (base, their_dtype)):
        if len(their_shape) > 1 and name.endswith(WEIGHT) and dtype not in _FLOATS:
            raise LoraSqueezeError(
                f"{quoted(name)} is stored as {str(dtype).removeprefix('torch.')} in {model.name} (quantised): a "
                "difference needs plain weights; give the model as it was before it was quantised"
            )
    if my_shape != their_shape and not (is_vocabulary(name) and my_shape[1:] == their_shape[1:]):
        raise LoraSqueezeError(
            f"{quoted(name)} has shape {list(my_shape)} in {tuned.name} and {list(their_shape)} in {base.name}: these "
            "are not two checkpoints of one model; if only this layer differs, leave it out with exclude"
        )


def _remark(path: str, difference: Difference, parts: Parts) -> None:
    """What a person should know of a module."""
    if difference.added_rows > 0:
        parts.notes[
            f"{difference.added_rows:,} rows at the end that only the tuned model has are left out; the option "
            "vocabulary keeps them with the whole tensor (carry)"
        ].append(path)
    if difference.faint:
        share = 100 * difference.changed / difference.numbers
        parts.notes[
            "the update is no larger than single rounding steps of its dtype: much of it may be rounding, of which a "
            "low rank keeps little"
        ].append(f"{path} ({share:.2g} % of the numbers differ)")


def _carry(name: str, why: str, tuned: BaseModel, base: BaseModel, pairing: Pairing, parts: Parts) -> None:
    """Take a tensor along as it is; as a bias of B where the layer has a module."""
    path = path_of(name)
    mine, theirs = pairing.pairs[name] if name in pairing.pairs else (pairing.only_tuned[name], None)
    if not name.endswith((WEIGHT, BIAS)) or (path in parts.modules and not (name.endswith(BIAS) and theirs)):
        parts.notes["changed and left out: it is no weight or bias of a layer, so no adapter can carry it"].append(name)
    elif theirs and path in parts.modules:  # the difference, over the rows of the base as the module's
        dtype, shape = tuned.facts[mine][0], base.facts[theirs][1]
        parts.extras[name] = Extra(name, dtype, shape, "lora bias", _CAUSE["other"], module=path)
        parts.origins[name] = (mine, theirs)
    else:  # all of the layer, since readers put it in place of the base's
        keys = {f"{path}{end}": (mine.removesuffix(WEIGHT).removesuffix(BIAS) + end) for end in (WEIGHT, BIAS)}
        for each, key in keys.items():
            if key in tuned.facts:
                parts.extras[each] = Extra(each, *tuned.facts[key], "module to save", _CAUSE[why])
                parts.origins[each] = (key, None)
