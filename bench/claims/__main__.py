"""`python -m bench.claims NAME ... --out FOLDER [--quick]`; see the package's docstring."""

from __future__ import annotations

import argparse
import json
import pkgutil
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import bench.claims
from bench.claims.outcome import Finding, Outcome, Row
from bench.machine import commit, machine
from bench.tables import table

_HELPERS = {"__main__", "arms", "matrices", "networks", "outcome", "problems", "plain_text", "nested", "teacher"}


def names() -> list[str]:
    """Of all experiments."""
    return sorted(m.name for m in pkgutil.iter_modules(bench.claims.__path__) if m.name not in _HELPERS)


def main(arguments: list[str] | None = None) -> None:
    """Run experiments, write their rows, and the page of all findings in the folder."""
    parser = argparse.ArgumentParser(prog="python -m bench.claims", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; default: only the page")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows and README.md")
    parser.add_argument("--quick", action="store_true", help="far too few steps and seeds, to see that all runs")
    given = parser.parse_args(arguments)
    if unknown := set(given.names) - set(names()):
        raise SystemExit(f"no experiment {', '.join(sorted(unknown))}; there are {', '.join(names())}")
    given.out.mkdir(parents=True, exist_ok=True)
    for name in given.names:
        start = time.perf_counter()
        outcome: Outcome = import_module(f"bench.claims.{name}").run(quick=given.quick)
        seconds = round(time.perf_counter() - start, 1) if outcome.seconds is None else outcome.seconds
        _write(given.out / f"{name}.jsonl", outcome, seconds, given.quick)
        for finding in outcome.findings:
            print(f"{name}: {_verdict(finding.holds)}: {finding.claim}: {finding.figures}", flush=True)
    (given.out / "README.md").write_text(page(given.out), encoding="utf-8")


def _write(path: Path, outcome: Outcome, seconds: float, quick: bool) -> None:
    command = f"python -m bench.claims {path.stem}{' --quick' if quick else ''}"
    facts = {"command": command, "commit": commit(), **machine()}
    lines: list[Row] = [{"kind": "run", "seconds": seconds, "quick": quick, **facts}]
    lines += [{"kind": "row", **row} for row in outcome.rows]
    lines += [{"kind": "finding", **asdict(finding)} for finding in outcome.findings]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def page(folder: Path) -> str:
    """All findings and rows of a folder, one part for each method."""
    parts = ["# The methods' claims, in small"]
    for path in sorted(folder.glob("*.jsonl")):
        lines: list[Row] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if lines and lines[0]["kind"] == "run":
            parts += _part(path.stem, lines)
    return "\n\n".join(parts) + "\n"


def _part(name: str, lines: list[Row]) -> list[str]:
    run = lines[0]
    says = (import_module(f"bench.claims.{name}").__doc__ or "").strip()
    found = [Finding(**{k: v for k, v in line.items() if k != "kind"}) for line in lines if line["kind"] == "finding"]
    parts = [f"## {name}", says]
    parts.append(table(("claim", "here", "figures"), [(f.claim, _verdict(f.holds), f.figures) for f in found]))
    rows = [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "row"]
    for part in dict.fromkeys(row.get("part") for row in rows):
        mine = [row for row in rows if row.get("part") == part]
        columns = list(dict.fromkeys(column for row in mine for column in row if column != "part"))
        cells = [tuple(_cell(row.get(column)) for column in columns) for row in mine]
        parts += [f"{part}:", table(tuple(columns), cells)]
    quick = " A quick run: its figures mean nothing." if run["quick"] else ""
    parts.append(f"`{run['command']}`, {run['seconds']} s, commit {run['commit']}.{quick}")
    return parts


def _verdict(holds: bool | None) -> str:
    return {True: "holds", False: "does not hold", None: "not decided"}[holds]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
