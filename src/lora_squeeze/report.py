"""Report: the figures of an adapter, or of a squeeze before and after, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_squeeze.adapter import Adapter, Module, Progress
from lora_squeeze.post_squeeze import Measurement, Squeezed, measure
from lora_squeeze.ranks import shortest_head

ENERGY_MARKS = (0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Row:
    """One module.

    Args:
        name, kind: the module.
        rank, rank_after: rank before and after; equal for an adapter that was only inspected, 0 for a module that left.
        energy: kept share of the squared singular values.
        scale, scale_after: s of dW = s B A, before and after.
        norm: Frobenius norm of the update before.
        discarded: Frobenius norm of what was cut off.
        rounding: Frobenius norm of the error of storing the new factors in 16 bits; None where not known.
        rank_for_energy: smallest rank that keeps 90, 95, 99 % of the energy.
        size_bytes, size_bytes_after: bytes of the factors.
        singular_values: of the update before, descending; a list per copy for stacked experts.
    """

    name: str
    kind: str
    rank: int
    rank_after: int
    energy: float
    scale: float
    scale_after: float
    norm: float
    discarded: float
    rounding: float | None
    rank_for_energy: dict[str, int]
    size_bytes: int
    size_bytes_after: int
    singular_values: list[float] | list[list[float]]


@dataclass(frozen=True)
class Report:
    """The figures of an adapter.

    Args:
        rows: one per module, in file order.
        format: format of the file.
        lora_bytes, lora_bytes_after: bytes of the factors.
        extra_bytes: kind of carried tensor -> bytes.
        causes: kind of carried tensor -> why it is there.
        notes: things a person should know.
    """

    rows: list[Row]
    format: str
    lora_bytes: int
    lora_bytes_after: int
    extra_bytes: dict[str, int]
    causes: dict[str, str]
    notes: list[str]

    @property
    def energy(self) -> float:
        """Energy kept over all modules together: 1 - sum discarded^2 / sum norm^2."""
        total = math.fsum(row.norm**2 for row in self.rows)
        return 1.0 - math.fsum(row.discarded**2 for row in self.rows) / total if total else 1.0

    @property
    def error(self) -> float:
        """Relative Frobenius error over all modules together."""
        return math.sqrt(max(0.0, 1.0 - self.energy))

    @property
    def mean_energy(self) -> float:
        """Mean over the modules of the energy kept."""
        return math.fsum(row.energy for row in self.rows) / len(self.rows)

    @property
    def min_energy(self) -> float:
        """Smallest energy kept by a module."""
        return min(row.energy for row in self.rows)

    def uniform_rank(self, energy: float = 0.95) -> int:
        """Smallest rank for all modules at which they keep this energy on average."""
        top = max(row.rank for row in self.rows)
        curves = [_energy_curve(row) for row in self.rows]
        for rank in range(1, top + 1):
            if sum(curve[min(rank, len(curve)) - 1] for curve in curves) / len(curves) >= energy:
                return rank
        return top

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data; what `--json` prints."""
        return {
            "format": self.format,
            "modules": [asdict(row) for row in self.rows],
            "energy": self.energy,
            "error": self.error,
            "mean_energy": self.mean_energy,
            "min_energy": self.min_energy,
            "bytes": {
                "lora": self.lora_bytes,
                "lora_after": self.lora_bytes_after,
                "extra": self.extra_bytes,
                "causes": self.causes,
            },
            "recommended_rank": self.uniform_rank(),
            "notes": self.notes,
        }


def report(adapter: Adapter, progress: Progress | None = None) -> Report:
    """The figures of an adapter; of a squeezed one, before and after.

    Reads the factors of the modules whose spectrum is not known yet, never the carried tensors.
    """
    source = adapter.source
    if isinstance(source, Squeezed):
        before, measured = source.parent, source.measured
        missing = [name for name, module in before.modules.items() if not _whole(module, measured.get(name))]
        for name, found in measure(before, missing, progress).items() if missing else ():
            if name in measured:  # by a randomised method, which has seen the first singular values only
                cut = measured[name].discarded(adapter.modules[name].rank)
                found = replace(found, rounding=measured[name].rounding, cut=cut)
            measured[name] = found
    else:
        before, measured = adapter, measure(adapter, progress=progress)
    extra_bytes: dict[str, int] = {}
    causes: dict[str, str] = {}
    for extra in adapter.extras.values():
        extra_bytes[extra.kind] = extra_bytes.get(extra.kind, 0) + extra.size_bytes
        causes.setdefault(extra.kind, extra.cause)
    return Report(
        rows=_rows(before, adapter, measured),
        format=adapter.format.name,
        lora_bytes=before.lora_bytes,
        lora_bytes_after=adapter.lora_bytes,
        extra_bytes=extra_bytes,
        causes=causes,
        notes=list(adapter.notes),
    )


def _whole(module: Module, found: Measurement | None) -> bool:
    """Whether all singular values are known."""
    return found is not None and len(found.values[0]) == min(module.rank, module.out_features, module.in_features)


def inspect(adapter: Adapter, progress: Progress | None = None) -> Report:
    """Spectrum, ranks and sizes of an adapter; for the result of a squeeze, before and after. The same as `.report`."""
    return report(adapter, progress)


def _rows(before: Adapter, after: Adapter, measured: Mapping[str, Measurement]) -> list[Row]:
    rows = []
    for name, module in before.modules.items():
        found, kept = measured[name], after.modules.get(name)
        rank = kept.rank if kept else 0
        lost = found.discarded(rank) if rank < module.rank else 0.0
        rows.append(
            Row(
                name=name,
                kind=module.kind,
                rank=module.rank * module.step,
                rank_after=rank * module.step,
                energy=found.energy(rank) if rank < module.rank else 1.0,
                scale=module.scale,
                scale_after=kept.scale if kept else 0.0,
                norm=found.norm,
                discarded=lost,
                rounding=found.rounding,
                rank_for_energy={str(mark): _rank_for(found, mark) for mark in ENERGY_MARKS},
                size_bytes=module.size_bytes,
                size_bytes_after=kept.size_bytes if kept else 0,
                singular_values=found.values if module.copies > 1 else found.values[0],
            )
        )
    return rows


def _rank_for(found: Measurement, energy: float) -> int:
    pooled = [sum(s * s for s in column) for column in zip(*found.values, strict=True)]
    return shortest_head(pooled, 1 - energy) if any(pooled) else 0


def _energy_curve(row: Row) -> list[float]:
    copies: Any = (
        row.singular_values
        if row.singular_values and isinstance(row.singular_values[0], list)
        else [row.singular_values]
    )
    pooled = [sum(s * s for s in column) for column in zip(*copies, strict=True)]
    total, kept, curve = math.fsum(pooled), 0.0, []
    for energy in pooled:
        kept += energy
        curve.append(kept / total if total else 1.0)
    return curve
