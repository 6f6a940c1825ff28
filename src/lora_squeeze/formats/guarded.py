"""A format for an adapter that is made of several: none of the sources is written over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lora_squeeze.adapter import Adapter, Format, Progress
from lora_squeeze.formats.single_file import check_source


@dataclass(frozen=True)
class Guarded:
    """The format of a sum: writes as the first adapter's does, over none of the sources.

    Args:
        formats: of the adapters; the first one writes.
    """

    formats: tuple[Format, ...]

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.formats[0].name

    @property
    def home(self) -> Path | None:
        """What the first adapter is read from."""
        return self.formats[0].home

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse what any source is read from, and what cannot be replaced."""
        self.formats[0].check_target(path, force=force)
        for other in self.formats[1:]:
            if other.home is not None:
                check_source(path, other.home)

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write the adapter to `path`."""
        self.check_target(path, force=force)
        self.formats[0].save(adapter, path, force=force, progress=progress)

    def overhead_bytes(self, adapter: Adapter) -> int:
        """An upper bound of the bytes in the weights file that are not tensors."""
        return self.formats[0].overhead_bytes(adapter)
