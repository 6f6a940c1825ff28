"""`python -m bench.evidence.report ROWS ... --out FOLDER`: tables.md, verdicts.md and pictures from files of rows."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.evidence.report.curves import draw_all
from bench.evidence.report.page import tables_page
from bench.evidence.report.results import read
from bench.evidence.report.verdicts_page import verdicts_page
from lora_squeeze.errors import LoraSqueezeError


def main(arguments: list[str] | None = None) -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(prog="python -m bench.evidence.report", description=__doc__)
    parser.add_argument("rows", nargs="+", type=Path, help="JSON Lines, as the bench writes them")
    parser.add_argument("--out", type=Path, required=True, help="folder for the report")
    given = parser.parse_args(arguments)
    try:
        report = read(given.rows)
    except LoraSqueezeError as error:
        raise SystemExit(str(error)) from None
    if not report.models:
        raise SystemExit(f"no results in {', '.join(map(str, given.rows))}")
    given.out.mkdir(parents=True, exist_ok=True)
    pictures = draw_all(report.models, given.out)
    (given.out / "tables.md").write_text(tables_page(report, pictures), encoding="utf-8")
    (given.out / "verdicts.md").write_text(verdicts_page(report.models), encoding="utf-8")
    for name in ("tables.md", "verdicts.md", *(name for names in pictures.values() for name in names)):
        print(given.out / name)


if __name__ == "__main__":
    main()
