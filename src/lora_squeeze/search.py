"""Search: the smallest squeezed adapter that a metric of the user still accepts."""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.plan_file import write_whole

FORMAT = 1
RESULTS_NAME = "results.json"
_ROUNDING = 1e-9  # of a metric: differences below it are none
OVER = ("rank", "size")
Metric = Callable[[Path, int], float]  # folder of an adapter, its rank


@dataclass(frozen=True)
class Measured:
    """One adapter under the metric.

    Args:
        rank: the uniform rank; over "size", the one whose number of parameters is the budget.
        metric: what was measured.
        size_bytes: bytes of its tensors.
        seconds: time that the metric took.
        passes: whether the metric is within the drop allowed.
        reused: whether it was measured by an earlier search.
    """

    rank: int
    metric: float
    size_bytes: int
    seconds: float
    passes: bool = True
    reused: bool = False

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data; a metric that is no finite number is null."""
        return {**asdict(self), "metric": self.metric if math.isfinite(self.metric) else None}


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Args:
        source: the adapter as it came.
        curve: the candidates that were measured, in ascending rank.
        bound: the worst metric allowed.
        rank: the smallest rank that passes; None if none does.
        adapter: the squeezed adapter of this rank, to be saved.
        notes: what a person should know, one line each.
    """

    source: Measured
    curve: tuple[Measured, ...]
    bound: float
    rank: int | None
    adapter: Adapter | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """JSON-ready data."""
        return {
            "rank": self.rank,
            "bound": self.bound,
            "source": self.source.to_json(),
            "curve": [row.to_json() for row in self.curve],
            "notes": list(self.notes),
        }


def search(
    adapter: Adapter,
    metric: Metric,
    *,
    max_drop: float | str,
    work: Path,
    ranks: Sequence[int] | None = None,
    over: str = "rank",
    every: bool = False,
    lower_is_better: bool = False,
    name: str | None = None,
    source: Path | None = None,
    tell: Callable[[str], None] | None = None,
) -> Found:
    """The smallest candidate whose metric is within `max_drop` of the source's, by bisection.

    Args:
        adapter: the source.
        metric: called with the folder of a candidate and its rank; larger is better.
        max_drop: how much worse than the source's the metric may be: "0.5%" of it, or a number in its own unit.
        work: folder for candidates while they are measured, and for the results.
        ranks: the ranks tried; default the powers of two. Those from the source rank on are left out: the source itself
            is always measured, first.
        over: "rank" (default): every module has the rank tried; "size": the parameters of that uniform rank are spent
            where they keep the most energy.
        every: measure every candidate, for the whole curve, instead of bisecting.
        lower_is_better: the metric is a loss.
        name: what the metric is called in the file of results. A search with the same name, source and `over` takes
            what is known from there; None: nothing is kept.
        source: folder of the source; default a copy written for the purpose.
        tell: called with a line of progress.

    Returns:
        Found.

    Raises:
        LoraSqueezeError: nothing to try, a drop that is not understood, a metric of the source that is no finite
            number, or what the metric raises: then the results so far and the candidate are kept.

    Notes:
        Bisection over n candidates measures about log2(n) of them and assumes that the metric does not fall with the
        rank. A pair that it does fall for is told in `notes`. With noise near the bound the answer is one of several;
        `every` shows them. A candidate whose metric is no finite number does not pass.

    Example:
        >>> def accuracy(folder, rank): ...  # doctest: +SKIP
        >>> found = search(adapter, accuracy, max_drop="0.5%", work=Path("search"))  # doctest: +SKIP
        >>> found.adapter.save("small-adapter")  # doctest: +SKIP
    """
    candidates = _candidates(adapter, ranks, over)
    drop = _Drop.of(max_drop)
    results = _Results(work / RESULTS_NAME, None if name is None else _key(adapter, name, over))
    tell = tell or (lambda line: None)
    bench = _Bench(adapter, metric, work, over, results, tell)
    best = bench.source(source)
    if not math.isfinite(best.metric):
        raise LoraSqueezeError(f"the metric of the source is {best.metric}: there is nothing to compare with")
    sign = -1 if lower_is_better else 1
    bound = best.metric - sign * drop.below(best.metric)
    tell(f"source: {best.metric:g}; a candidate passes {'up to' if lower_is_better else 'from'} {bound:g}")
    measured: dict[int, Measured] = {}

    def passes(rank: int) -> bool:
        found = bench.candidate(rank)
        good = math.isfinite(found.metric) and sign * (found.metric - bound) >= -_ROUNDING * abs(bound)
        measured[rank] = replace(found, passes=good)
        tell(f"rank {rank}: {found.metric:g}, {'passes' if good else 'does not pass'}")
        return good

    if every:
        smallest = next(iter([rank for rank in candidates if passes(rank)]), None)
    else:
        smallest = next(iter(candidates[bisect.bisect_left(candidates, True, key=passes) :]), None)
    curve = tuple(measured[rank] for rank in sorted(measured))
    result = None if smallest is None else candidate(adapter, smallest, over)
    return Found(best, curve, bound, smallest, result, _notes([*curve, best], sign, every))


def candidate(adapter: Adapter, rank: int, over: str) -> Adapter:
    """The candidate of this rank."""
    return adapter.squeeze(rank=rank, allocate="global" if over == "size" else "uniform")


def _candidates(adapter: Adapter, ranks: Sequence[int] | None, over: str) -> list[int]:
    if over not in OVER:
        raise LoraSqueezeError(f"over must be one of {', '.join(OVER)}, got {over!r}")
    top = adapter.rank
    asked = [2**i for i in range(top.bit_length())] if ranks is None else sorted(set(ranks))
    if asked and asked[0] < 1:
        raise LoraSqueezeError(f"ranks must be whole numbers from 1, got {asked[0]}")
    below = [rank for rank in asked if rank < top]
    if not below:
        raise LoraSqueezeError(f"no rank to try below the source rank {top}; asked were {asked}")
    return below


def _notes(rows: Sequence[Measured], sign: int, every: bool) -> tuple[str, ...]:
    """The first pair of neighbours of which the lower rank measures better."""
    for low, high in pairwise(rows):
        if sign * (low.metric - high.metric) > _ROUNDING * abs(high.metric):
            cure = "" if every else ", which the search takes for granted; to measure every rank, ask for all"
            return (
                f"rank {low.rank} measures better ({low.metric:g}) than rank {high.rank} ({high.metric:g}): the metric "
                f"does not grow with the rank{cure}",
            )
    return ()


@dataclass(frozen=True)
class _Drop:
    """How much worse a metric may be: a share of it, or a number."""

    number: float
    relative: bool

    @classmethod
    def of(cls, text: float | str) -> _Drop:
        """The drop in "0.5%" or 0.01."""
        written = str(text).strip()
        try:
            number = float(written.removesuffix("%"))
        except ValueError:
            number = math.nan
        if not 0 <= number < math.inf:
            raise LoraSqueezeError(f"max_drop {written!r} is not understood; write a share such as 0.5%, or a number")
        return cls(number / 100 if written.endswith("%") else number, written.endswith("%"))

    def below(self, metric: float) -> float:
        """The drop from this metric, in its unit."""
        return self.number * abs(metric) if self.relative else self.number


def _key(adapter: Adapter, name: str, over: str) -> dict[str, str]:
    """What a result holds for: the metric's name, the source's tensors and settings, the kind of candidate."""
    facts = [(m.name, m.rank, m.scale, str(m.dtype)) for m in adapter.modules.values()]
    text = json.dumps([adapter.source.digest(), facts, adapter.config], sort_keys=True, default=str)
    return {"metric_name": name, "source": hashlib.sha256(text.encode()).hexdigest(), "over": over}


class _Results:
    """The file of results: one record per measurement. Without a key nothing is read or written."""

    def __init__(self, path: Path, key: dict[str, str] | None) -> None:
        self.path, self.key = path, key
        self.records: list[dict[str, Any]] = []
        if key is None or not path.exists():
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT or not all({"rank", "metric", *key} <= row.keys() for row in found["results"]):
                raise ValueError("of another form")
            self.records = found["results"]
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise LoraSqueezeError(f"{path}: no readable results ({error}); move the file away to begin anew") from None

    def get(self, rank: int) -> Measured | None:
        """What is known of this rank."""
        for row in self.records:
            if self.key is not None and row["rank"] == rank and self.key.items() <= row.items():
                metric = math.nan if row["metric"] is None else float(row["metric"])
                return Measured(rank, metric, row["size_bytes"], row["seconds"], reused=True)
        return None

    def put(self, found: Measured) -> None:
        """Keep a measurement, at once: the search may be killed at any time."""
        if self.key is None:
            return
        row = found.to_json()
        self.records.append({**self.key, **{name: row[name] for name in ("rank", "metric", "size_bytes", "seconds")}})
        lines = ",\n".join(f"  {json.dumps(record)}" for record in self.records)
        write_whole(self.path, f'{{"format": {FORMAT}, "results": [\n{lines}\n]}}\n', force=True)


@dataclass(frozen=True)
class _Bench:
    """Measures adapters, one at a time."""

    adapter: Adapter
    metric: Metric
    work: Path
    over: str
    results: _Results
    tell: Callable[[str], None]

    def source(self, folder: Path | None) -> Measured:
        """The source itself, from its folder or from a copy."""
        return self._measured("source", self.adapter.rank, lambda: self.adapter, folder)

    def candidate(self, rank: int) -> Measured:
        """A squeezed candidate."""
        return self._measured(f"rank-{rank}", rank, lambda: candidate(self.adapter, rank, self.over))

    def _measured(self, label: str, rank: int, make: Callable[[], Adapter], folder: Path | None = None) -> Measured:
        known = self.results.get(rank)
        if known is not None:
            return known
        adapter, written = make(), self.work / label
        if folder is None:
            adapter.save(written, force=True)
        self.tell(f"{label}: measuring")
        begin = time.monotonic()
        try:
            value = float(self.metric(folder or written, rank))
        except LoraSqueezeError as error:
            where = f"; the candidate is kept in {written}" if folder is None else ""
            raise LoraSqueezeError(f"{error}{where}") from error
        found = Measured(rank, value, adapter.lora_bytes + adapter.extra_bytes, round(time.monotonic() - begin, 3))
        self.results.put(found)
        if folder is None:
            shutil.rmtree(written, ignore_errors=True)
        return found
