"""Variants of PEFT's LoRA whose tensors are A and B with something done to them.

=============  ==========================================================================  ============
variant        plain form                                                                  rank
=============  ==========================================================================  ============
QALoRA         each column of A for a whole group of inputs, times in / group^2            r
BD-LoRA        the blocks of A or of B on a diagonal                                       r
VeLoRA         A and B as they are; what it saves beside them serves training alone        r
MonteCLoRA     the same                                                                    r
DoRA           dW = diag(m / |V|) V - W with V = W + s B A, |V| the lengths of V's rows:   min(out, in)
               that matrix and an identity, made from one base weight at a time
=============  ==========================================================================  ============
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.kohya_keys import inner_dtype
from lora_squeeze.formats.peft import PeftSource, Tensors
from lora_squeeze.formats.peft_config import check_kind, check_numbers
from lora_squeeze.formats.peft_keys import PREFIX, Shapes, parse
from lora_squeeze.formats.peft_methods.base_weights import Base, oriented, weight
from lora_squeeze.formats.peft_methods.identities import full
from lora_squeeze.formats.peft_methods.parts import Parts
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.lowrank import LowRank

FIELDS = ("use_dora", "use_qalora", "use_bdlora", "velora_config", "monteclora_config")
_TRAINING = (".lora_velora_", ".lora_monteclora_")
_FACTOR = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
_MAGNITUDE = re.compile(r"^(?P<path>.+)\.lora_magnitude_vector(?:\.[^.]+)*$")


@dataclass
class Expanded:
    """A weights file with A and B as those of a plain LoRA.

    Args:
        file: as it is.
        config: adapter_config.json.
        metadata: strings of the file's header.
    """

    file: Tensors
    config: Mapping[str, Any]
    metadata: dict[str, str]

    def read(self, name: str) -> Tensor:
        """One tensor, a factor in its plain form."""
        tensor = self.file.read(name)
        way = _way(name, self.config)
        if way == "group":
            grouped: Tensor = tensor.repeat_interleave(self.times(way), 1)
            return grouped * (tensor.shape[1] / self.times(way))
        return torch.block_diag(*tensor.chunk(self.times(way))) if way == "blocks" else tensor

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of what `read` gives."""
        way = _way(name, self.config)
        return (shape[0], shape[1] * self.times(way)) if way and len(shape) == 2 else shape

    def times(self, way: str) -> int:
        """How many times as many columns the plain form has."""
        name, given = (
            ("qalora_group_size", self.config.get("qalora_group_size", 16))
            if way == "group"
            else ("nblocks", self.config["use_bdlora"]["nblocks"])
        )
        if not isinstance(given, int) or given < 1:
            raise LoraSqueezeError(f"{name} must be a whole number from 1, found {given!r:.80}")
        return given

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The numbers of a carried tensor."""
        return self.file.pieces(name)

    def sha256(self) -> str:
        """Digest of the file."""
        return self.file.sha256()


def _way(key: str, config: Mapping[str, Any]) -> str | None:
    """What has to be done to the tensor with this key."""
    match = _FACTOR.match(key)
    if match is None:
        return None
    if config.get("use_qalora"):
        return "group" if match["side"] == "A" else None
    if blocks := config.get("use_bdlora"):
        name = match["path"].rpartition(".")[2]
        patterns = blocks.get(f"target_modules_bd_{match['side'].lower()}") or ()
        return "blocks" if any(pattern in name for pattern in patterns) else None
    return None


def read(file: Tensors, shapes: Shapes, config: Mapping[str, Any], base: Base | None) -> Parts:
    """The modules and carried tensors of a variant.

    Args:
        file: its tensors.
        shapes: key -> dtype and shape of them.
        config: adapter_config.json.
        base: needed for a DoRA, not looked at otherwise.

    Raises:
        LoraSqueezeError: as reading a plain LoRA; a magnitude without its module or of another length; a base weight
            that is not there or has another shape.
    """
    expanded = Expanded(file, config, file.metadata)
    magnitudes = {m["path"].removeprefix(PREFIX): key for key in shapes if (m := _MAGNITUDE.match(key))}
    plain = {
        key: (dtype, expanded.shape(key, shape))
        for key, (dtype, shape) in shapes.items()
        if key not in magnitudes.values() and not any(mark in key for mark in _TRAINING)
    }
    settings = {key: value for key, value in config.items() if key not in (*FIELDS, "qalora_group_size")}
    check_kind(settings)
    check_numbers(settings)
    modules, extras, notes = parse(plain, settings)
    plain_source = PeftSource(expanded)
    source: PeftSource | Dora = plain_source
    if config.get("use_dora") and base is not None:
        by_path = {module.layout.path: name for name, module in modules.items()}
        if odd := next(
            (path for path in {**magnitudes, **by_path} if path not in magnitudes or path not in by_path), ""
        ):
            raise LoraSqueezeError(
                f"{quoted(odd)}: a DoRA has A, B and a magnitude for every module, here one is missing; the file is "
                "incomplete: get it again"
            )
        parsed = dict(modules)
        keys = {by_path[path]: key for path, key in magnitudes.items()}
        source = Dora(plain_source, parsed, keys, base, bool(config.get("fan_in_fan_out")))
        modules = {name: _whole(m) if name in keys else m for name, m in modules.items()}
        for name in keys:
            source.check(parsed[name], shapes[keys[name]][1])
    return Parts(modules, source, extras, settings, tuple(notes))


def _whole(module: Module) -> Module:
    rank = min(module.out_features, module.in_features)
    numbers = module.out_features * module.in_features
    return replace(module, rank=rank, scale=1.0, source_bytes=8 * (3 * numbers + rank * module.parameters_per_rank))


@dataclass(frozen=True, eq=False)
class Dora:
    """Source of a DoRA: its plain part, magnitudes and base weights.

    Args:
        plain: reads A and B.
        modules: as `plain` knows them.
        magnitudes: module -> key of m.
        base: the base model.
        turned: linear weights stand transposed in it.
    """

    plain: PeftSource
    modules: Mapping[str, Module]
    magnitudes: Mapping[str, str]
    base: Base
    turned: bool

    def check(self, module: Module, magnitude: tuple[int, ...]) -> None:
        """Refuse a magnitude or a base weight of the wrong shape, before any work."""
        if module.copies > 1:
            raise LoraSqueezeError(
                f"{module.name}: a DoRA of a convolution in groups or of experts, which PEFT 0.21.2 does not merge; "
                "train a plain LoRA"
            )
        rows = module.out_features
        if max(magnitude, default=0) != rows or torch.Size(magnitude).numel() != rows:
            raise LoraSqueezeError(
                f"{quoted(self.magnitudes[module.name])} is {list(magnitude)}, expected {rows} numbers; get the file "
                "again"
            )
        oriented(weight(self.base, module.name, only_shape=True), module, self.turned)

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules."""
        found = self.plain.updates([self.modules[module.name] for module in modules])
        return [
            self._update(module, update) if module.name in self.magnitudes else update
            for module, update in zip(modules, found, strict=True)
        ]

    def _update(self, module: Module, update: LowRank) -> LowRank:
        W = oriented(weight(self.base, module.name), module, self.turned).double()
        V = W + update.to(torch.float64).dense()
        m = self.plain.file.read(self.magnitudes[module.name]).double().reshape(-1, 1)
        return LowRank(*full(m / V.norm(dim=-1, keepdim=True) * V - W)).to(inner_dtype(module.dtype))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.plain.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the adapter's file."""
        return self.plain.digest()
