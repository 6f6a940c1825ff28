"""Report: the figures of an adapter, or of a squeeze before and after, as plain data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lora_squeeze.adapter import Adapter, Module, Progress
from lora_squeeze.base_figures import BaseComparison, BaseFigures, Weights, compare
from lora_squeeze.curves import Point, Tradeoff, lost_shares, pooled
from lora_squeeze.data_aware import loss_without
from lora_squeeze.dials import type_of
from lora_squeeze.effective_rank import entropy_rank, numerical_rank, stable_rank
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.post_squeeze import Measurement, Squeezed, measure
from lora_squeeze.ranks import shortest_head

ENERGY_MARKS = (0.9, 0.95, 0.99)
_EFFECTIVE = ("stable_rank", "entropy_rank", "numerical_rank")


@dataclass(frozen=True)
class Row:
    """One module. Ranks are counted as files count them: of a grouped convolution, over all groups.

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
        step: ranks that one direction counts; 1 but for grouped convolutions.
        energy_at_rank: energy kept at rank step, 2 step, 3 step, ...
        bytes_per_step: bytes of `step` ranks.
        stable_rank, entropy_rank, numerical_rank: `lora_squeeze.effective_rank` defines them. Of stacked experts the
            first two count the energies summed over the copies, the third is the largest of any copy.
        loss_increase: predicted increase of the training loss by the cut; None where the data were not asked.
        base: figures beside the base weight; None where it was not read.
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
    step: int
    energy_at_rank: list[float]
    bytes_per_step: int
    stable_rank: float
    entropy_rank: float
    numerical_rank: int
    loss_increase: float | None = None
    base: BaseFigures | None = None

    def energy_at(self, rank: int) -> float:
        """Energy kept at a rank from 1; a grouped convolution keeps at least one direction per group."""
        k = max(rank // self.step, 1)
        return self.energy_at_rank[k - 1] if k <= len(self.energy_at_rank) else 1.0


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
        tradeoff: energy and size at every rank, before the squeeze.
        request: the dial that `rank_after` answers, where a plan was asked for.
        base: what was found beside the base model.
    """

    rows: list[Row]
    format: str
    lora_bytes: int
    lora_bytes_after: int
    extra_bytes: dict[str, int]
    causes: dict[str, str]
    notes: list[str]
    tradeoff: Tradeoff = field(repr=False)
    request: Mapping[str, Any] = field(default_factory=dict)
    base: BaseComparison | None = None

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
    def loss_increase(self) -> float | None:
        """Predicted increase of the training loss, summed over the modules that the data were asked about."""
        known = [row.loss_increase for row in self.rows if row.loss_increase is not None]
        return math.fsum(known) if known else None

    @property
    def mean_energy(self) -> float:
        """Mean over the modules of the energy kept."""
        return math.fsum(row.energy for row in self.rows) / len(self.rows)

    @property
    def min_energy(self) -> float:
        """Smallest energy kept by a module."""
        return min(row.energy for row in self.rows)

    @property
    def curve(self) -> list[Point]:
        """Energy and size at every uniform rank."""
        return self.tradeoff.uniform

    @property
    def best_curve(self) -> list[Point]:
        """The same at the best rank for each module, at the number of parameters of some uniform ranks."""
        return self.tradeoff.best

    def uniform_rank(self, energy: float = 0.95) -> int:
        """Smallest rank for all modules at which they keep this energy on average."""
        return next((point.rank for point in self.curve if point.mean_energy >= energy), self.tradeoff.top)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON-ready data; what `squeeze --json` prints."""
        return {
            "format": self.format,
            "modules": [asdict(row) for row in self.rows],
            "energy": self.energy,
            "error": self.error,
            "mean_energy": self.mean_energy,
            "min_energy": self.min_energy,
            "loss_increase": self.loss_increase,
            "bytes": {
                "lora": self.lora_bytes,
                "lora_after": self.lora_bytes_after,
                "extra": self.extra_bytes,
                "causes": self.causes,
            },
            "recommended_rank": self.uniform_rank(),
            "curve": [point.to_json() for point in self.curve],
            "effective_ranks": {name: _spread([getattr(row, name) for row in self.rows]) for name in _EFFECTIVE},
            "kinds": [_kind(name, rows) for name, rows in by_kind(self.rows).items()],
            "notes": self.notes,
        }

    def inspection(self) -> dict[str, Any]:
        """What `inspect --json` prints: `to_json`, and what takes longer to find."""
        ranks = {row.name: row.rank_after for row in self.rows}
        return {
            **self.to_json(),
            "rank": self.tradeoff.top,
            "recommended_ranks": {str(mark): self.uniform_rank(mark) for mark in ENERGY_MARKS},
            "best_curve": [point.to_json() for point in self.best_curve],
            "plan": {"request": dict(self.request), "ranks": ranks} if self.request else None,
            "base": self.base.to_json() if self.base else None,
        }


def report(adapter: Adapter, progress: Progress | None = None) -> Report:
    """The figures of an adapter; of a squeezed one, before and after.

    Reads the factors of the modules whose spectrum is not known yet, never the carried tensors.
    """
    source = adapter.source
    if isinstance(source, Squeezed):
        before, measured = source.parent, source.measured
        _cut_all(adapter, source)
        missing = [name for name, module in before.modules.items() if not _whole(module, measured.get(name))]
        for name, found in measure(before, missing, progress).items() if missing else ():
            if name in measured:  # by a randomised method, which has seen the first singular values only
                cut = measured[name].discarded(adapter.modules[name].rank)
                found = replace(found, rounding=measured[name].rounding, cut=cut)
            elif name in source.moments:  # it has left the adapter
                lost = loss_without(before.modules[name], source.moments[name])
                found = replace(found, loss_increase=lost)
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
        tradeoff=Tradeoff.of(before, measured),
    )


def _cut_all(adapter: Adapter, source: Squeezed) -> None:
    """In the metric of the data, what is lost is known only once it is cut."""
    if not source.moments:
        return
    for batch in adapter.batches():
        waiting = [module for module in batch if module.name in source.moments and module.name not in source.measured]
        if waiting:
            source.updates(waiting)


def _whole(module: Module, found: Measurement | None) -> bool:
    """Whether all singular values are known."""
    return found is not None and len(found.values[0]) == min(module.rank, module.out_features, module.in_features)


def inspect(
    adapter: Adapter,
    progress: Progress | None = None,
    *,
    base: Weights | None = None,
    intruders: bool = False,
    **budget: Any,
) -> Report:
    """Spectra, ranks and sizes of an adapter, and the rank it needs; for the result of a squeeze, before and after.

    Args:
        adapter: what to look at; nothing is written.
        progress: called with (bytes done, bytes in all) while tensors are read.
        base: the base model's weights, from `lora_squeeze.base_model.open_base`; read one tensor at a time.
        intruders: count the intruder directions of linear layers in the base weights (`lora_squeeze.intruders`): two
            eigenproblems per module, hours for a large model.
        budget: one dial of `lora_squeeze.squeeze` and the options that go with it, such as size="10MB" or
            rank=8, allocate="global". `rank_after` and `energy` are then the plan for it, by module.

    Returns:
        Report. Without a budget it is the same as `adapter.report`.

    Raises:
        LoraSqueezeError: NaN in a factor, a budget that `squeeze` would refuse, or intruders asked for without a base.
    """
    if intruders and base is None:
        raise LoraSqueezeError("intruder directions are counted in the base weights: give the base model")
    asked = {name: value for name, value in budget.items() if value is not None}
    found = report(adapter.squeeze(**asked, progress=progress) if asked else adapter, progress)
    if asked:
        found = replace(found, request=asked)
    return found if base is None else _beside(found, adapter, base, progress, intruders)


def _beside(found: Report, adapter: Adapter, base: Weights, progress: Progress | None, intruders: bool) -> Report:
    """The report with the figures that need the base weights."""
    source = adapter.source.parent if isinstance(adapter.source, Squeezed) else adapter
    norms = {row.name: row.norm for row in found.rows}
    figures, comparison = compare(source, norms, base, progress, intruders=intruders)
    rows = [replace(row, base=figures.get(row.name)) for row in found.rows]
    return replace(found, rows=rows, base=comparison, notes=[*found.notes, *comparison.notes(figures)])


def _rows(before: Adapter, after: Adapter, measured: Mapping[str, Measurement]) -> list[Row]:
    rows = []
    for name, module in before.modules.items():
        found, kept = measured[name], after.modules.get(name)
        rank, energies = kept.rank if kept else 0, pooled(measured[name].values)
        cut = rank < module.rank or module.total is not None
        lost = found.discarded(rank) if cut else 0.0
        rows.append(
            Row(
                name=name,
                kind=module.kind,
                rank=module.rank * module.step,
                rank_after=rank * module.step,
                energy=found.energy(rank) if cut else 1.0,
                scale=module.scale,
                scale_after=kept.scale if kept else 0.0,
                norm=found.norm,
                discarded=lost,
                rounding=found.rounding,
                rank_for_energy={str(mark): module.step * shortest_head(energies, 1 - mark) for mark in ENERGY_MARKS},
                size_bytes=module.size_bytes,
                size_bytes_after=kept.size_bytes if kept else 0,
                singular_values=found.values if module.copies > 1 else found.values[0],
                step=module.step,
                energy_at_rank=[1.0 - share for share in lost_shares(energies)[1:]],
                bytes_per_step=module.parameters_per_rank * module.dtype.itemsize,
                stable_rank=stable_rank(energies),
                entropy_rank=entropy_rank(energies),
                numerical_rank=max(numerical_rank(values, module.dtype) for values in found.values),
                loss_increase=found.loss_increase,
            )
        )
    return rows


def by_kind(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The modules by the end of their name, such as q_proj or to_out.0, in the order in which these occur."""
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        kinds[type_of(row.name)].append(row)
    return dict(kinds)


def _kind(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Modules of one kind together; [smallest, largest] where they differ."""
    total = math.fsum(row.norm**2 for row in rows)
    ranks = range(1, max(row.rank for row in rows) + 1)
    lost = [math.fsum(row.norm**2 * (1.0 - row.energy_at(rank)) for row in rows) for rank in ranks]
    return {
        "name": name,
        "modules": len(rows),
        "rank": _bounds([row.rank for row in rows]),
        "rank_after": _bounds([row.rank_after for row in rows]),
        "rank_for_energy": {
            mark: _bounds([row.rank_for_energy[mark] for row in rows]) for mark in rows[0].rank_for_energy
        },
        "effective_ranks": {name: _spread([getattr(row, name) for row in rows]) for name in _EFFECTIVE},
        "energy_at_rank": [1.0 - share / total if total else 1.0 for share in lost],
        "bytes": sum(row.size_bytes for row in rows),
    }


def _bounds(values: Sequence[int]) -> list[int]:
    return [min(values), max(values)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"min": min(values), "mean": math.fsum(values) / len(values), "max": max(values)}
