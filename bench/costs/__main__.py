"""`python -m bench.costs --model NAME --out FOLDER`; see the package's docstring."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from bench.costs.measure import ROUNDS, Bench
from bench.costs.methods import methods
from bench.costs.tables import page
from bench.evidence.rows import append, like, read_rows
from bench.machine import commit, machine


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, write each row as soon as it is there, and the page."""
    known = {method.label: method for method in methods()}
    parser = argparse.ArgumentParser(prog="python -m bench.costs", description=__doc__)
    parser.add_argument("--model", choices=sorted(ROUNDS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, which are kept, and README.md")
    parser.add_argument("--methods", nargs="+", choices=known, default=list(known), metavar="NAME", help="default all")
    given = parser.parse_args(arguments)
    path = given.out / f"{given.model}.jsonl"
    done = {row["method"] for row in like(read_rows([path]), kind="cost")}
    missing = [known[name] for name in given.methods if name not in done]
    if missing:
        command = shlex.join(["python", "-m", "bench.costs", *(arguments or sys.argv[1:])])
        append(path, [{"kind": "machine", "command": command, "commit": commit(), **machine()}])
        bench = Bench(given.model)
        for method in missing:
            row = {"kind": "cost", **bench.row(method)}
            append(path, [row])
            print(f"{method.label}: step {row['ratio']:.2f} times LoRA {row['lora_rank']}'s", flush=True)
    (given.out / "README.md").write_text(page(given.out), encoding="utf-8")


if __name__ == "__main__":
    main()
