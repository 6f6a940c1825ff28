"""The tables, as markdown that is readable as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.targets import Target, case_name, ratio

LETTER = {
    "ours": "ours",
    "floor float64": "(d) floor",
    "floor float64 syrk": "floor, syrk",
    "floor float32": "floor, f32 Gram",
    "qr float64": "(c) QR f64",
    "qr float32": "QR f32",
    "svd_lowrank": "(b) svd_lowrank",
    "peft": "(a) PEFT",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    marks = [("-" * w if i == 0 else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    return "\n".join([line(head), f"|{'|'.join(f' {m} ' for m in marks)}|", *(line(row) for row in rows)])


def modules_tables(rows: list[dict[str, Any]]) -> str:
    """Milliseconds per module, then ratios to ours."""
    names = [name for name in LETTER if any(name in row["arms"] for row in rows)]
    times = [[case_name(row), *(_spread(row["arms"].get(name), 1e3) for name in names)] for row in rows]
    ratios = [[case_name(row), *(_times(ratio(row, name)) for name in names[1:])] for row in rows]
    distances = [
        [case_name(row), *(_small(row["distance_from_exact"].get(n)) for n in names if n in _COMPARED)] for row in rows
    ]
    return "\n\n".join(
        [
            "Milliseconds per module, median (quartiles):",
            table(["module", *(LETTER[name] for name in names)], times),
            "The same, as a multiple of ours:",
            table(["module", *(LETTER[name] for name in names[1:])], ratios),
            "Relative Frobenius distance of the stored result from the best approximation (rounding to bfloat16 "
            "included):",
            table(["module", *(LETTER[name] for name in names if name in _COMPARED)], distances),
        ]
    )


_COMPARED = ("ours", "qr float64", "qr float32", "svd_lowrank")


def files_tables(rows: list[dict[str, Any]]) -> str:
    """Seconds per file and ratios."""
    names = ["ours", "floor float64", "qr float64"]
    times, ratios = [], []
    for row in rows:
        rsvd = row["svd_lowrank_extrapolated_seconds"]
        size = f"{row['bytes'] / 1e6:,.0f}"
        times.append([case_name(row), size, *(_spread(row["arms"][name], 1) for name in names), f"{rsvd:.1f}"])
        ours = row["arms"]["ours"]
        ratios.append(
            [
                case_name(row),
                f"{1 / (ratio(row, 'floor float64') or 1):.2f}",
                f"{1 / (ratio(row, 'floor float64', measure='cpu_median') or 1):.2f}",
                _times(ratio(row, "qr float64")),
                _times(rsvd / ours["median"]),
                f"{row['bytes'] / 1e6 / ours['median']:,.0f}",
            ]
        )
    head = ["file", "MB", *(LETTER[name] for name in names), "(b) extrapolated"]
    return "\n\n".join(
        [
            "Seconds per file, median (quartiles); (b) is the sum over all modules of the time of one module of that "
            "shape, without reading and writing:",
            table(head, times),
            "Ratios (ours over floor: below 1.5 is the target; CPU counts all threads; the others: times slower than "
            "ours):",
            table(["file", "ours / floor", "CPU ours / floor", "(c) / ours", "(b) / ours", "MB/s ours"], ratios),
        ]
    )


def accuracy_table(rows: list[dict[str, Any]]) -> str:
    """Largest relative error of a singular value."""
    names = ["ours", "qr float32", "qr float64"]
    body = [[row["case"], f"1e-{row['decades']}", *(_small(row["error"][name]) for name in names)] for row in rows]
    return "\n\n".join(
        [
            "Singular values of float32 factors, 1024x1024, r = 64, against the float64 SVD of the product: largest "
            "relative error:",
            table(["spectrum", "smallest / largest", *(LETTER[name] for name in names)], body),
        ]
    )


def memory_table(found: dict[str, Any]) -> str:
    """Peak resident memory."""
    rows = [
        [
            f"{row['model']} r={row['rank']} {row['dtype']}",
            f"{row['bytes'] / 1e9:.2f}",
            row["rule"],
            f"{row['peak_mb']:.0f}",
            f"{row['above_torch_mb']:.0f}",
        ]
        for row in found["rows"]
    ]
    return "\n\n".join(
        [
            "Peak resident memory of `lora-squeeze squeeze`, MB (10^6 bytes); an interpreter that has imported torch "
            f"takes {found['import_torch_mb']:.0f}:",
            table(["file", "GB", "rule", "peak", "above torch"], rows),
        ]
    )


def start_table(found: dict[str, Any]) -> str:
    """Seconds of start-up."""
    rows = [[name, _spread(v, 1), f"{v['cpu_median']:.2f}"] for name, v in found.items()]
    return table(["command", "seconds, median (quartiles)", "CPU"], rows)


def targets_table(targets: list[Target]) -> str:
    """Verdicts."""
    verdict = {True: "met", False: "MISSED", None: "-"}
    rows = [
        [
            t.what,
            f"{'>=' if t.at_least else '<='} {t.bound:g}",
            "-" if t.worst is None else f"{t.worst:.3g}",
            verdict[t.met],
            t.where,
        ]
        for t in targets
    ]
    return table(["target", "bound", "worst case", "verdict", "where"], rows)


def _spread(arm: dict[str, Any] | None, unit: float) -> str:
    if arm is None:
        return "-"
    low, high = arm["quartiles"]
    return f"{_number(arm['median'] * unit)} ({_number(low * unit)}-{_number(high * unit)})"


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 1000 else f"{x:.3g}"


def _times(x: float | None) -> str:
    return "-" if x is None else f"{_number(x)}x"


def _small(x: float | None) -> str:
    return "-" if x is None else f"{x:.1e}"
