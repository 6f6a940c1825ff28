"""What each way of reading a method gives, the source of those that compute their factors, and how they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Module, Progress, Source
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.kohya_keys import inner_dtype
from lora_squeeze.formats.peft import PeftFormat, Tensors
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.lowrank import LowRank


@dataclass(frozen=True, eq=False)
class Parts:
    """An adapter's content, read.

    Args:
        modules: by name.
        source: reads them.
        extras: carried tensors.
        config: settings of a LoraConfig that go with it.
        notes: for a person.
    """

    modules: Mapping[str, Module]
    source: Source
    extras: Mapping[str, Extra]
    config: Mapping[str, Any]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Computed:
    """Source of updates that are made from other tensors than A and B.

    Args:
        file: holds the carried tensors.
        factors: module -> makes B and A, their product the update.
        biases: key of a bias of B -> makes it.
    """

    file: Tensors
    factors: Mapping[str, Callable[[], tuple[Tensor, Tensor]]]
    biases: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules; NaN and infinity are found when they are decomposed."""
        return [LowRank(*self.factors[module.name]()).to(inner_dtype(module.dtype)) for module in modules]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return iter([self.biases[name]().flatten()]) if name in self.biases else self.file.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the adapter's file."""
        return self.file.sha256()


@contextmanager
def told(what: str) -> Iterator[None]:
    """Settings of the wrong kind, or that do not fit the tensors, become one line: every method has its own."""
    try:
        yield
    except LoraSqueezeError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise LoraSqueezeError(
            f"{what}: the configuration and the tensors do not fit together ({type(error).__name__}: {quoted(error)}); "
            "get the adapter again"
        ) from None


@dataclass(frozen=True, eq=False)
class Checked:
    """Source that tells of such settings where they show late.

    Args:
        source: what is asked.
        what: the adapter, for the message.
    """

    source: Source
    what: str

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules."""
        with told(self.what):
            return self.source.updates(modules)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.source.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the adapter's file."""
        return self.source.digest()


@dataclass(frozen=True, eq=False)
class Rounded:
    """Source of updates in the dtype that their modules are written in; computed ones are more precise."""

    source: Source

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules."""
        found = self.source.updates(modules)
        return [update.to(module.dtype) for module, update in zip(modules, found, strict=True)]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.source.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the adapter's file."""
        return self.source.digest()


@dataclass(frozen=True)
class MethodFormat(PeftFormat):
    """Writes an adapter of any method as a plain LoRA of PEFT, rounded to the dtype of what was read."""

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write the folder."""
        rounded = replace(adapter, source=Rounded(adapter.source))
        super().save(rounded, path, force=force, progress=progress)
