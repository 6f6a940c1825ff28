"""Plan: the rank of every module, as plain data that can be read, compared, edited and obeyed."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.adapter import Adapter, Module, Progress
from lora_squeeze.data_aware import loss_spectra, moments_of
from lora_squeeze.dials import Dials, groups_of
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.moments import Moments

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class PlanRow:
    """One module of a plan.

    Args:
        rank: the rank it is to have, as files count it (a grouped convolution: of all groups together); 0: it leaves.
        source_rank: the rank it had when the plan was made.
        reason: why it has its rank, in a few words.
        error: relative Frobenius error |dW - dW_k| / |dW| predicted from the singular values when the plan was made.
        loss_increase: increase of the training loss predicted for this module alone; None: the data were not asked.
    """

    rank: int
    source_rank: int | None = None
    reason: str = ""
    error: float | None = None
    loss_increase: float | None = None


@dataclass(frozen=True)
class Plan:
    """Ranks for an adapter. Only `modules` (their ranks), `default_rank` and `dtype` count when it is obeyed.

    Args:
        modules: name -> row, in file order.
        default_rank: rank of the modules that are not listed; one that has less keeps what it has. None: all are
            listed.
        dtype: dtype of the factors that the plan was made for: float64, float32, bfloat16 or float16; None: as stored.
        asked: the dials that it was made with.
        adapter: name of the adapter that it was made for.
        source_sha256: digest of that adapter's weights file.
        totals: `file_bytes`, an upper bound of the weights file; `parameters`; `energy` kept and relative `error` over
            all modules together; with data, `loss_increase`, the sum of those predicted.
    """

    modules: Mapping[str, PlanRow]
    default_rank: int | None = None
    dtype: str | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    adapter: str | None = None
    source_sha256: str | None = None
    totals: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dtype not in (None, *DTYPES):
            raise LoraSqueezeError(f"dtype of a plan must be one of {', '.join(DTYPES)}, got {self.dtype!r:.80}")
        if self.default_rank is not None and self.default_rank < 1:
            raise LoraSqueezeError(f"default_rank of a plan must be at least 1, got {self.default_rank}")

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank, of the modules listed."""
        return {name: row.rank for name, row in self.modules.items()}

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """`dtype` as torch has it."""
        found: torch.dtype | None = getattr(torch, self.dtype) if self.dtype else None
        return found

    def ranks_for(self, adapter: Adapter) -> dict[str, int]:
        """The ranks of an adapter's updates that the plan means, in file order: what `squeeze(plan=...)` uses.

        The adapter need not be the one that the plan was made for: it must have the same modules, and enough rank.

        Raises:
            LoraSqueezeError: a module that the adapter does not have, one that the plan does not have, a rank that this
                module cannot have. The message names it.
        """
        self._check_names(adapter)
        ranks: dict[str, int] = {}
        for group in groups_of(adapter):
            top = max(module.rank for module in group)
            for module in group:
                ranks[module.name] = self._rank(module, top)
            self._check_group(group, ranks)
        if not any(ranks.values()):
            raise LoraSqueezeError("the plan leaves no module in the adapter: give one of them a rank above 0")
        return {name: ranks[name] for name in adapter.modules}

    def note_for(self, adapter: Adapter) -> str | None:
        """What a person should know who squeezes this adapter by the plan: that it was made for another file."""
        found = None if self.source_sha256 is None else adapter.source.digest()
        if found in (None, self.source_sha256):
            return None
        return "the plan was made for another file: its ranks are kept, what it predicted does not hold for this one"

    def _check_names(self, adapter: Adapter) -> None:
        unknown = [name for name in self.modules if name not in adapter.modules]
        if unknown:
            raise LoraSqueezeError(
                f"the plan has {_listed(unknown)}, which the adapter has not; it has {_listed(list(adapter.modules))}"
            )
        missing = [name for name in adapter.modules if name not in self.modules]
        if missing and self.default_rank is None:
            raise LoraSqueezeError(
                f"the plan has no rank for {_listed(missing)}; add a line for each, or default_rank for all of them"
            )

    def _rank(self, module: Module, top: int) -> int:
        """The rank of one module's LowRank; `top` is the highest source rank in its group."""
        name, step = module.name, module.step
        if name not in self.modules and self.default_rank is not None:
            return min(max(self.default_rank // step, 1), top)
        asked = self.modules[name].rank
        rank, left = divmod(asked, step)
        if left:
            raise LoraSqueezeError(
                f"{name}: rank {asked} in the plan is no multiple of {step}, the number of its groups"
            )
        if rank > top:
            raise LoraSqueezeError(
                f"{name}: rank {asked} in the plan is above its source rank {top * step}; a squeeze cannot add rank"
            )
        if rank < module.floor:
            raise LoraSqueezeError(
                f"{name}: rank {asked} in the plan is too low: it cannot leave the adapter, give it at least "
                f"{module.floor * step}"
            )
        return rank

    def _check_group(self, group: list[Module], ranks: Mapping[str, int]) -> None:
        first = group[0]
        for other in group[1:]:
            if ranks[other.name] != ranks[first.name]:
                raise LoraSqueezeError(
                    f"{first.name} has rank {ranks[first.name] * first.step} in the plan and {other.name} has rank "
                    f"{ranks[other.name] * other.step}; these modules must share one rank ({first.group})"
                )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the plan, all or nothing: as JSON if the name ends with .json, else as TOML.

        Raises:
            LoraSqueezeError: the file exists and `force` is not given, or it cannot be written.
        """
        from lora_squeeze import plan_file

        plan_file.save(self, Path(path).expanduser(), force=force)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Raises:
            LoraSqueezeError: no readable TOML or JSON, another format version, or an entry that is not understood.
        """
        from lora_squeeze import plan_file

        return plan_file.load(Path(path).expanduser())


def make_plan(
    adapter: Adapter,
    *,
    name: str | None = None,
    moments: Mapping[str, Moments] | None = None,
    progress: Progress | None = None,
    **dials: Any,
) -> Plan:
    """The ranks that `squeeze` would choose with these dials, with a reason and a predicted error for each.

    Args:
        adapter: what is to be squeezed.
        name: what the plan calls the adapter.
        moments: what the data say, as for `squeeze`: give them there again, so that the cut is the one meant here.
        progress: called with (bytes done, bytes in all) while spectra are measured.
        dials: rank, energy, size and the others of `squeeze` that say how small, and dtype.

    Returns:
        Plan; `squeeze(adapter, plan=...)` obeys it.

    Raises:
        LoraSqueezeError: what `squeeze` refuses.

    Notes:
        Reads every factor once, twice with moments, and the file once more for its digest. The predicted errors are
        those of truncation, exact in the Frobenius norm; rounding to 16 bits comes on top. The predicted increase of
        the loss (`lora_squeeze.moments.Truncation`) is good for small cuts and falls short for large ones.

    Example:
        >>> plan = make_plan(lora_squeeze.load("my-adapter"), size="10MB")  # doctest: +SKIP
        >>> plan.save("plan.toml")  # doctest: +SKIP
    """
    from lora_squeeze.post_squeeze import squeeze  # which imports this file
    from lora_squeeze.report import report

    small = squeeze(adapter, moments=moments, progress=progress, **dials)
    found = report(small, progress)
    chosen = Dials(**dials)
    known = {} if moments is None else moments_of(adapter, moments)
    spectra = {row.name: _copies(row.singular_values) for row in found.rows}
    ranks = {row.name: row.rank_after // row.step for row in found.rows}
    request = chosen.request(adapter, data_aware=bool(known))
    reasons = request.reasons(adapter, loss_spectra(adapter, known, spectra) if known else spectra, ranks)
    rows = {
        row.name: PlanRow(
            row.rank_after,
            row.rank,
            reasons[row.name],
            _short(row.discarded / row.norm if row.norm else 0.0),
            None if row.loss_increase is None else _short(row.loss_increase),
        )
        for row in found.rows
    }
    totals = {
        "file_bytes": small.lora_bytes + small.extra_bytes + small.format.overhead_bytes(small),
        "parameters": small.parameters,
        "energy": _short(found.energy, 6),
        "error": _short(found.error),
    }
    if found.loss_increase is not None:
        totals["loss_increase"] = _short(found.loss_increase)
    asked = {dial: _plain(value) for dial, value in chosen.given.items() if dial != "dtype"}
    dtype = None if chosen.dtype is None else str(chosen.dtype).removeprefix("torch.")
    return Plan(rows, None, dtype, asked, name, adapter.source.digest(), totals)


def _copies(values: Sequence[float] | Sequence[Sequence[float]]) -> list[list[float]]:
    """Singular values of each copy, from those of a report."""
    rows: list[list[float]] = [list(row) for row in values if not isinstance(row, float)]
    return rows or [[float(s) for s in values if isinstance(s, float)]]


def _short(number: float, digits: int = 4) -> float:
    """Few digits: rounding noise is no difference between two plans."""
    return float(f"{number:.{digits}g}")


def _plain(value: Any) -> Any:
    """Numbers, text and lists as files have them; those of NumPy and torch too."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return value if isinstance(value, (int, float, str)) else [_plain(item) for item in value]


def _listed(names: list[str]) -> str:
    """The first of these names, and how many there are."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
