"""What is in an adapter's files, sound or not: configuration, keys, pairs of factors, and all that fits nowhere.

What `hub.load` refuses (DoRA, PiSSA, orphans, several adapters in one file) is described too, since the question is
what other readers make of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Kind, Module
from lora_squeeze.formats.lycoris import PLAIN

PEFT, MLX, GGUF, DIFFUSERS, KOHYA = "peft", "mlx", "gguf", "diffusers", "kohya"
NAMES = {
    PEFT: "a PEFT folder",
    MLX: "an mlx-lm folder",
    GGUF: "a GGUF file",
    DIFFUSERS: "a diffusers file",
    KOHYA: "a file with the keys of kohya, ComfyUI or LyCORIS",
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """The factors of one module.

    Args:
        name: of the module, as reports call it.
        path: of the module, as the keys spell it.
        rank: as files count it.
        scale: s, as the reader that the format is made for takes it: what is meant.
        kind: of the layer, as far as the file tells.
        alpha: the module's own alpha, None where it has none.
        form: "LoRA", or another form of an update that kohya's and LyCORIS' files can have.
    """

    name: str
    path: str
    rank: int
    scale: float
    kind: Kind = "linear"
    alpha: float | None = None
    form: str = PLAIN


@dataclass(frozen=True)
class Facts:
    """An adapter's files, described.

    Args:
        path: the folder or the file.
        format: PEFT, MLX, GGUF, DIFFUSERS or KOHYA.
        shapes: key -> shape of every tensor, in file order.
        config: the configuration as it stands, whatever it says; the fields of a GGUF file.
        pairs: the modules with both factors.
        orphans: keys of factors without a partner.
        magnitudes: keys of DoRA's magnitude vectors.
        strange: keys of other tensors that change what the factors mean, or that are not known.
        extras: key -> kind, of tensors beside the update, see `adapter.Extra`.
        adapters: names of adapters that keys hold; more than one: the pairs are those of the first.
        companions: names of the small files beside the weights.
        damage: why the factors could not be paired; "" where they could.
    """

    path: Path
    format: str
    shapes: Mapping[str, Shape]
    config: Mapping[str, Any] = field(default_factory=dict)
    pairs: tuple[Pair, ...] = ()
    orphans: tuple[str, ...] = ()
    magnitudes: tuple[str, ...] = ()
    strange: tuple[str, ...] = ()
    extras: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    damage: str = ""

    @property
    def rank(self) -> int:
        """The largest rank of any pair; 1 where there is none."""
        return max((pair.rank for pair in self.pairs), default=1)

    def of_kind(self, *kinds: str) -> tuple[str, ...]:
        """Names of the modules of these kinds."""
        return tuple(pair.name for pair in self.pairs if pair.kind in kinds)

    def extras_of(self, *kinds: str) -> tuple[str, ...]:
        """Keys of the tensors of these kinds beside the update."""
        return tuple(key for key, kind in self.extras.items() if kind in kinds)


def pair_of(module: Module, path: str, alpha: float | None = None, form: str = PLAIN) -> Pair:
    """The pair that a module of our own readers is; one "expert" alone is a matrix like others."""
    kind = "linear" if module.kind == "experts" and module.copies == 1 else module.kind
    return Pair(module.name, path, module.rank * module.step, module.scale, kind, alpha, form)
