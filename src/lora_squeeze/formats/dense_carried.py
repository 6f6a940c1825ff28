"""Layers that an adapter carries whole, as modules: dW = W_carried - W_base."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter
from lora_squeeze.base_figures import Facts, Weights, base_key, by_reason, carried_keys, carried_name, some
from lora_squeeze.base_model import BaseModel
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.dense import DenseFormat, DenseSource, module_of, tied_modules, ties
from lora_squeeze.formats.dense_difference import compare
from lora_squeeze.formats.dense_keys import HEADS, WEIGHT, Layer, layers, path_of
from lora_squeeze.formats.dense_parts import Layout, Parts
from lora_squeeze.formats.extras import at_once, without
from lora_squeeze.merging import row_blocks

_TOKENS = ".trainable_tokens_delta"


@dataclass(frozen=True, eq=False)
class _CarriedWeights:
    """The carried tensors of an adapter, as the weights of a tuned model; trained rows among those of the base."""

    adapter: Adapter
    base: Weights
    rows: Mapping[str, tuple[str, list[int]]]  # of trained rows: the key in the base, and which rows they are
    name: str = "the adapter"

    @cached_property
    def facts(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        found = {name: (extra.dtype, extra.shape) for name, extra in self.adapter.extras.items()}
        for name, (key, _) in self.rows.items():
            dtype, shape = self.base.facts[key]
            found[name] = (torch.promote_types(dtype, found[name][0]), shape)
        return found

    def pieces(self, key: str) -> Iterator[Tensor]:
        if key not in self.rows:
            yield from self.adapter.pieces(key)
            return
        base_key, indices = self.rows[key]
        dtype, (_, columns) = self.facts[key]
        trained, rows, start = self.adapter.extra(key).to(dtype), torch.tensor(indices), 0
        for block in row_blocks(self.base.pieces(base_key), columns):
            here = (rows >= start) & (rows < start + len(block))
            whole = block.to(dtype, copy=True)
            whole[rows[here] - start] = trained[here]
            yield whole.flatten()
            start += len(block)


def split(adapter: Adapter, base: BaseModel, max_rank: int, *, seed: int = 0) -> tuple[Adapter, Adapter | None]:
    """Take out of the adapter the embeddings, heads and other layers that it carries whole, and trained rows of tokens.

    Args:
        adapter: which carries them.
        base: the base model. Its weights concerned are read once here, and once more when updates are asked for.
        max_rank: bound of the new modules' ranks; only so many directions are looked for.
        seed: of the sketches.

    Returns:
        The adapter without the tensors that are equal to the base's or that become modules; and these modules as a
        neutral adapter, None if there are none. What no LoRA holds stays: norms, biases, layers with new rows or that
        the base has not, and what shares a name in PEFT's modules_to_save with one of these. Notes tell it.

    Raises:
        LoraSqueezeError: no carried tensor is equal or becomes a module; NaN or infinity.
    """
    unmatched, layouts, equal = dict[str, str](), dict[str, Layout](), set[str]()
    keys = {name: key for name, key in carried_keys(adapter, base.facts, unmatched).items() if key}
    rows = dict(_token_rows(adapter, base.facts, unmatched))
    keys |= {name: key for name, (key, _) in rows.items()}
    tuned = _CarriedWeights(adapter, base, rows)
    shapes = {key: shape for key, (_, shape) in base.facts.items()}
    # By its own name too: a head that is tied has the key of the embedding.
    kinds = layers(shapes | {_name(name): shapes[key] for name, key in keys.items()})
    for name, key in keys.items():
        found = _layout(name, key, tuned, base, kinds[_name(name)])
        if isinstance(found, Layout):
            layouts[name] = found
        elif found:
            unmatched[name] = found
        else:
            equal.add(name)
    paths = Counter(path_of(_name(name)) for name in layouts)
    for name in [name for name in layouts if paths[path_of(_name(name))] > 1]:
        del layouts[name]
        unmatched[name] = "since the file has two changes of this layer"
    leaving = at_once(adapter, equal | layouts.keys())
    unmatched |= {
        name: "its name in modules_to_save stands for tensors that stay"
        for name in equal | layouts.keys()
        if name not in leaving
    }
    told = by_reason(unmatched)
    if not leaving:
        raise LoraSqueezeError(
            "nothing that the adapter carries whole becomes a module" + "".join(f"; {line}" for line in told)
        )
    notes = [f"stays whole, {line}" for line in told]
    if same := [name for name in leaving if name in equal]:
        notes.append(f"left out, since {base.name} has it: {some(same)}")
    changed = {path_of(_name(name)): layouts[name] for name in leaving if name in layouts}
    if not changed:
        return without(adapter, leaving, *notes), None
    notes.append(f"carried whole before, now modules: {some(list(changed))}")
    source = DenseSource(tuned, base, seed, False, Parts(changed))
    bounds = {name: min(max_rank, len(indices)) for name, (_, indices) in rows.items()}
    modules = {
        path: module_of(path, layout, tuned, bounds.get(layout.tuned, max_rank)) for path, layout in changed.items()
    }
    config: dict[str, Any] = {"base_model_name_or_path": base.name}
    if any(layout.layer.turned and layout.layer.kind == "linear" for layout in changed.values()):
        config["fan_in_fan_out"] = True
    # PEFT trains tokens in the tied head too.
    one = adapter.config.get("ensure_weight_tying") or any(layout.tuned in rows for layout in changed.values())
    if one and ties(base, base) and not HEADS & modules.keys():
        modules |= tied_modules(modules)
    return without(adapter, leaving, *notes), Adapter(
        modules=modules, source=source, format=DenseFormat(), config=config
    )


def _name(name: str) -> str:
    """What the model calls the weight that a carried tensor is, or whose rows it holds."""
    found = carried_name(name)
    return f"{found.removesuffix(_TOKENS)}{WEIGHT}" if found.endswith(_TOKENS) else found


def _token_rows(
    adapter: Adapter, facts: Facts, unmatched: dict[str, str]
) -> Iterator[tuple[str, tuple[str, list[int]]]]:
    """Trained rows -> the weight of the base, and the numbers of the rows."""
    asked = adapter.config.get("trainable_token_indices")
    for name, extra in adapter.extras.items():
        if extra.kind != "trainable tokens":
            continue
        path = path_of(_name(name))
        named = asked.items() if isinstance(asked, dict) else [("", asked)]
        lists = [rows for end, rows in named if path.endswith(end) and isinstance(rows, list)]
        key = base_key(name, _name(name), facts, unmatched)
        if key is None:
            continue
        rows, shape = lists[0] if len(lists) == 1 else [], facts[key][1]
        known = len(shape) == 2 and all(isinstance(row, int) and 0 <= row < shape[0] for row in rows)
        if known and extra.shape == (len(rows), shape[1]):
            yield name, (key, rows)
        else:
            unmatched[name] = "which rows of the base's these are is not known"


def _layout(name: str, key: str, tuned: Weights, base: Weights, layer: Layer | str) -> Layout | str | None:
    """The update of one layer; or why it is none, None where it is equal to the base's."""
    mine, theirs = tuned.facts[name][1], base.facts[key][1]
    if mine[1:] != theirs[1:] or len(mine) != len(theirs):
        return f"since its shape is {list(theirs)} in the base, here {list(mine)}"
    if mine != theirs:
        return f"since the base has {theirs[0]:,} rows, here there are {mine[0]:,}"
    difference = compare(tuned, name, base, key)
    if difference.same:
        return None
    if isinstance(layer, str):
        return f"since no LoRA holds {layer}"
    return "since it holds several matrices" if layer.copies > 1 else Layout(name, key, layer, difference)
