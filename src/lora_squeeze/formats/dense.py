"""A LoRA out of a full fine-tune: the difference of two checkpoints, matrix by matrix.

docs/extract.md is the specification of what becomes a module and what does not. The result is neutral: it can be
squeezed, merged and inspected, and is written once it has been converted to a format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Module, Progress
from lora_squeeze.base_figures import Weights
from lora_squeeze.base_model import BaseModel, open_base
from lora_squeeze.data_aware import TIED
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.dense_difference import matrices
from lora_squeeze.formats.dense_keys import HEADS, INPUTS, WEIGHT, path_of
from lora_squeeze.formats.dense_parts import Layout, Parts, Vocabulary, Wanted, sort
from lora_squeeze.formats.dense_svd import leading_factors
from lora_squeeze.formats.peft_config import read_json
from lora_squeeze.lowrank import LowRank

MAX_RANK = 128
_HEAD = "lm_head"  # of transformers' models that tie it to the embedding


def extract(
    tuned: str | os.PathLike[str] | BaseModel,
    base: str | os.PathLike[str] | BaseModel,
    *,
    max_rank: int | None = MAX_RANK,
    include: str | None = None,
    exclude: str | None = None,
    vocabulary: Vocabulary = "leave",
    carry: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Adapter:
    """The difference of two checkpoints of one model as a LoRA: dW = W_tuned - W_base of every layer that has changed.

    Args:
        tuned: the fine-tuned model: a folder with safetensors, a hub id, or what `open_base` gives.
        base: the model that it was tuned from, on which the adapter will stand.
        max_rank: bound of every rank: only so many directions are looked for (`dense_svd.leading_factors`). None keeps
            the whole matrix, as factors of rank min(out, in): exact, and slow to squeeze.
        include, exclude: regular expressions, searched in the paths of layers; the others stay as in the base.
        vocabulary: what becomes of changed embeddings and output heads: "leave" them as in the base (default), "lora"
            makes them modules, "carry" keeps the whole tensors.
        carry: keep what no LoRA holds, such as changed norms, biases and layers that only the tuned model has, as whole
            tensors beside the factors. Default: they are left as in the base, and a note names them.
        seed: of the sketches. A local generator: the global one is never touched.
        progress: called with (bytes compared, bytes in all).

    Returns:
        A lazy, neutral Adapter; the matrices are read and decomposed whenever updates are asked for.

    Raises:
        LoraSqueezeError: two models of different shapes, quantised weights, NaN, or nothing that differs.

    Notes:
        Both checkpoints are read once here, a piece of 16 MiB at a time, to find what differs. An update of a 4096 x
        4096 matrix then takes about a second on one thread. Memory: the working copies of one matrix.

    Example:
        >>> extract("my-tuned-model", "its-base").squeeze(rank=16)  # doctest: +SKIP
    """
    if max_rank is not None and max_rank < 1:
        raise LoraSqueezeError(f"max_rank must be at least 1, or None for whole matrices; got {max_rank}")
    wanted = Wanted(_pattern("include", include), _pattern("exclude", exclude), vocabulary, carry)
    mine, theirs = (model if isinstance(model, BaseModel) else open_base(model) for model in (tuned, base))
    parts = sort(mine, theirs, wanted, progress)
    if not parts.modules:
        raise LoraSqueezeError(
            f"nothing to extract: no layer that a LoRA could hold differs between {mine.name} and {theirs.name}"
            + "".join(f"; {note}" for note in parts.told())
        )
    modules = {path: module_of(path, layout, mine, max_rank) for path, layout in parts.modules.items()}
    config: dict[str, Any] = {"base_model_name_or_path": theirs.name}
    if any(layout.layer.turned and layout.layer.kind == "linear" for layout in parts.modules.values()):
        config["fan_in_fan_out"] = True
    if ties(mine, theirs):
        if tied := tied_modules(modules):
            modules |= tied
            config["ensure_weight_tying"] = True
        _carry_head(parts)
    for extra in parts.extras.values():
        if extra.module is not None:  # a bias of B needs its B
            modules[extra.module] = replace(modules[extra.module], floor=1)
    return Adapter(
        modules=modules,
        extras=parts.extras,
        source=DenseSource(mine, theirs, seed, max_rank is None, parts),
        format=DenseFormat(home=_folder(mine)),
        config=config,
        notes=parts.told(),
    )


def _pattern(option: str, text: str | None) -> re.Pattern[str] | None:
    try:
        return None if text is None else re.compile(text)
    except re.error as error:
        raise LoraSqueezeError(f"{option} {text!r} is no regular expression: {error}") from None


def module_of(path: str, layout: Layout, tuned: Weights, max_rank: int | None) -> Module:
    """The module that one layer's difference is."""
    layer = layout.layer
    whole = min(layer.out_features, layer.in_features)
    numbers = layer.out_features * layer.in_features
    return Module(
        name=path,
        rank=whole if max_rank is None else min(max_rank, whole),
        scale=1.0,
        dtype=tuned.facts[layout.tuned][0],
        out_features=layer.out_features,
        in_features=layer.in_features,
        copies=layer.copies,
        kind=layer.kind,
        kernel=layer.kernel,
        group=f"parameters of {path.rpartition('.')[0]}" if layer.kind == "experts" else None,
        floor=int(layer.kind == "experts"),
        layout=layout,
        total=None if max_rank is None else layout.difference.norm**2,
        source_bytes=16 * numbers,  # the difference, its scaled copy, a basis and its image
    )


def ties(tuned: BaseModel, base: BaseModel) -> bool:
    """Whether the head is the embedding: the model generates, the files have no head, no configuration unties it."""
    heads = [key for model in (tuned, base) for key in model.facts if HEADS & set(key.split("."))]
    settings = _settings(base) or _settings(tuned)
    generates = any("LM" in str(name) or "Generation" in str(name) for name in settings.get("architectures") or [])
    return not heads and generates and settings.get("tie_word_embeddings") is not False


def tied_modules(modules: Mapping[str, Module]) -> dict[str, Module]:
    """The embedding and the head that is tied to it, where the embedding is a module.

    The files have one tensor for both, the adapter needs two modules: they share their factors, and keep one rank.
    """
    inputs = [name for name, m in modules.items() if m.kind == "embedding" and name.rpartition(".")[2] in INPUTS]
    if len(inputs) != 1:
        return {}
    embedding = replace(modules[inputs[0]], group=TIED, floor=1)
    head = replace(
        embedding,
        name=_HEAD,
        kind="linear",
        out_features=embedding.in_features,
        in_features=embedding.out_features,
    )
    return {embedding.name: embedding, _HEAD: head}


def _carry_head(parts: Parts) -> None:
    """Where a carried embedding is the head too, carry it as both: PEFT puts a copy in place of the embedding alone."""
    inputs = [key for key in parts.extras if path_of(key).rpartition(".")[2] in INPUTS]
    if len(inputs) == 1:
        key = f"{_HEAD}{WEIGHT}"
        parts.extras[key], parts.origins[key] = replace(parts.extras[inputs[0]], name=key), parts.origins[inputs[0]]
        parts.notes["tied to the embedding, and carried beside it: PEFT makes them two tensors"].append(key)


def _settings(model: BaseModel) -> Mapping[str, Any]:
    """config.json beside the weights; nothing where it cannot be read."""
    try:
        found = read_json(_folder(model) / "config.json")
    except LoraSqueezeError:
        return {}
    return found if isinstance(found, dict) else {}


def _folder(model: BaseModel) -> Path:
    return next(iter(model.files.values())).path.parent.resolve()


@dataclass(frozen=True, eq=False)
class DenseSource:
    """Reads two checkpoints and gives their difference.

    Args:
        tuned, base: the checkpoints.
        seed: of the sketches.
        whole: the updates are the matrices themselves, else their leading directions.
        parts: what was found in them.
    """

    tuned: Weights
    base: Weights
    seed: int
    whole: bool
    parts: Parts

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules in float32 at least, so that a squeeze rounds once."""
        return [self._update(module) for module in modules]

    def _update(self, module: Module) -> LowRank:
        layout: Layout = module.layout
        if module.kind == "linear" and layout.layer.kind == "embedding":  # a tied head
            update = self._update(replace(module, kind="embedding"))
            return LowRank(update.A.mT, update.B.mT)
        pairs = [
            self._factors(matrix.mT if layout.layer.turned else matrix, module.rank)
            for matrix in matrices(self.tuned, layout.tuned, self.base, layout.base, module.copies)
        ]
        B, A = (torch.stack(sides) if module.kind == "experts" else sides[0] for sides in zip(*pairs, strict=True))
        return LowRank(B, A)

    def _factors(self, matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        if not self.whole:
            return leading_factors(matrix, rank, self.seed)
        eye = torch.eye(rank, dtype=matrix.dtype)
        return (eye, matrix) if matrix.shape[0] <= matrix.shape[1] else (matrix, eye)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor of the tuned model; of a bias of B, the difference."""
        key, base_key = self.parts.origins[name]
        if base_key is None:
            yield from self.tuned.pieces(key)
            return
        dtype = self.tuned.facts[key][0]
        for matrix in matrices(self.tuned, key, self.base, base_key):
            yield matrix.flatten().to(dtype)

    def digest(self) -> str | None:
        """None: it does not come from one file."""
        return None


@dataclass(frozen=True)
class DenseFormat:
    """What an extracted adapter is read from; it cannot be written as such.

    Args:
        home: the folder of the tuned model.
    """

    name: str = "full fine-tune"
    home: Path | None = None

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse every target."""
        raise self._refusal()

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Refuse."""
        raise self._refusal()

    def overhead_bytes(self, adapter: Adapter) -> int:
        """Refuse: how many bytes a file has depends on its format."""
        raise self._refusal()

    def _refusal(self) -> LoraSqueezeError:
        return LoraSqueezeError(
            "an extracted adapter has no file format yet: convert it to one first, such as peft (--to peft)"
        )
