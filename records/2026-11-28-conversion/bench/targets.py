"""What the figures are held against. Each target is judged on its worst case."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

LONG = 8192  # out + in from which factors count as long


@dataclass(frozen=True)
class Target:
    """A bound and what was measured.

    Args:
        what: the quantity.
        bound: the target.
        at_least: True if more is better.
        worst: the worst case; None: not measured in this run.
        where: the case that it was found in.
    """

    what: str
    bound: float
    at_least: bool
    worst: float | None
    where: str

    @property
    def met(self) -> bool | None:
        """Whether the worst case meets the bound; None: not measured."""
        if self.worst is None:
            return None
        return self.worst >= self.bound if self.at_least else self.worst <= self.bound

    def to_json(self) -> dict[str, Any]:
        """Fields and verdict."""
        return {**asdict(self), "met": self.met}


def case_name(row: dict[str, Any]) -> str:
    """One word for a case of the module or file section."""
    what = "x".join(map(str, row["shape"])) if "shape" in row else row["model"]
    return f"{what} r={row['rank']} {row['dtype']}"


def ratio(row: dict[str, Any], over: str, under: str = "ours", measure: str = "median") -> float | None:
    """Seconds of one arm over seconds of another."""
    if over not in row["arms"]:
        return None
    found: float = row["arms"][over][measure] / row["arms"][under][measure]
    return found


def judge(result: dict[str, Any]) -> list[Target]:
    """All targets, from the sections that were measured."""
    modules, files = result.get("modules", []), result.get("files", [])
    long = [row for row in modules if sum(row["shape"]) >= LONG]
    square = [row for row in modules if row["shape"] == [4096, 4096]]

    def at_rank(rows: list[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
        return [row for row in rows if row["rank"] == rank]

    def against(rows: list[dict[str, Any]], arm: str) -> dict[str, float]:
        return {case_name(row): x for row in rows if (x := ratio(row, arm)) is not None}

    def rsvd(rows: list[dict[str, Any]]) -> dict[str, float]:
        return {case_name(row): row["svd_lowrank_extrapolated_seconds"] / row["arms"]["ours"]["median"] for row in rows}

    floor = {case_name(row): 1 / x for row in files if (x := ratio(row, "floor float64"))}
    errors = {f"{row['case']}, 1e-{row['decades']}": row["error"]["ours"] for row in result.get("accuracy", [])}
    peaks = {f"{row['bytes'] / 1e9:.2f} GB {row['rule']}": row["above_torch_mb"] for row in _rows(result, "memory")}
    start = {k: v["median"] for k, v in result.get("start_up", {}).items() if "help" in k}
    return [
        _worst("whole file: time over the float64 floor", 1.5, False, floor),
        _worst("whole file: times faster than (c) QR float64", 1, True, against(files, "qr float64")),
        _worst("module, long factors: times faster than (c)", 2, True, against(long, "qr float64")),
        _worst("module, any: times faster than (c)", 1, True, against(modules, "qr float64")),
        _worst("whole file, rank 64: times faster than (b) svd_lowrank", 20, True, rsvd(at_rank(files, 64))),
        _worst("whole file, rank 256: times faster than (b)", 8, True, rsvd(at_rank(files, 256))),
        _worst(
            "module 4096x4096, rank 64: times faster than (b)", 20, True, against(at_rank(square, 64), "svd_lowrank")
        ),
        _worst(
            "module 4096x4096, rank 256: times faster than (b)", 8, True, against(at_rank(square, 256), "svd_lowrank")
        ),
        _worst(
            "module 4096x4096, rank 64: times faster than (a) PEFT", 1000, True, against(at_rank(square, 64), "peft")
        ),
        _worst("module 4096x4096, rank 256: times faster than (a)", 1000, True, against(at_rank(square, 256), "peft")),
        _worst("singular values: largest relative error", 1e-6, False, errors),
        _worst("peak memory above import torch, MB", 400, False, peaks),
        _worst("lora-squeeze --help, seconds", 0.3, False, start),
    ]


def _worst(what: str, bound: float, at_least: bool, cases: dict[str, float]) -> Target:
    if not cases:
        return Target(what, bound, at_least, None, "not measured in this run")
    where = (min if at_least else max)(cases, key=lambda name: cases[name])
    return Target(what, bound, at_least, cases[where], where)


def _rows(result: dict[str, Any], section: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = result.get(section, {}).get("rows", [])
    return rows
