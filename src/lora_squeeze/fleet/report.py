"""The one report of a fleet: what was chosen, what it costs, and what became of every member."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lora_squeeze.fleet.choose import Point

FORMAT = 1
State = Literal["planned", "written", "already there", "failed"]


@dataclass(frozen=True)
class Row:
    """One member.

    Args:
        name: in the fleet; also its folder in the output.
        base: base model that its configuration names.
        weight: how much its loss counts.
        rank: largest rank of any module, before.
        rank_after: after; as planned, where it has not been written.
        bytes: size of the weights file, before.
        bytes_after: after; None where it has not been written.
        loss: share of its energy that is cut off; None where it could not be measured.
        state: what became of it.
        reason: why it failed.
    """

    name: str
    base: str
    weight: float
    rank: int
    rank_after: int | None
    bytes: int
    bytes_after: int | None
    loss: float | None
    state: State
    reason: str = ""


@dataclass(frozen=True)
class FleetReport:
    """What `squeeze_fleet` has done.

    Args:
        engine: key of the server.
        options: what to start it with; "" where it has no slots.
        max_rank: rank of its slots; None without slots.
        slots: adapters that are there at once; None without slots.
        memory: bytes allowed.
        host_memory: bytes allowed outside the device; None: any.
        slot_dtype: dtype of what the server holds.
        bytes: needed on the device.
        host_bytes: all members as the server holds them, each at its own rank.
        loss: weighted loss of the members that could be measured.
        curve: one point for each rank that the server could have.
        members: one row each, by name.
        skipped: name or path -> why it is left out.
        notes: what a person should know, one line each.
        output: folder of the squeezed adapters.
    """

    engine: str
    options: str
    max_rank: int | None
    slots: int | None
    memory: int
    host_memory: int | None
    slot_dtype: str
    bytes: int
    host_bytes: int
    loss: float
    curve: tuple[Point, ...]
    members: tuple[Row, ...]
    skipped: Mapping[str, str]
    notes: tuple[str, ...]
    output: str

    @property
    def failed(self) -> tuple[Row, ...]:
        """The members that are not in the output."""
        return tuple(row for row in self.members if row.state == "failed")

    def worst(self, count: int) -> tuple[Row, ...]:
        """The members that could not be done, then those that lose most."""
        return tuple(sorted(self.members, key=lambda row: -2.0 if row.loss is None else -row.loss)[:count])

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {"format": FORMAT, **asdict(self), "skipped": dict(self.skipped)}
