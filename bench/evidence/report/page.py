"""The page of tables: pictures, one part for each model, and where it all was run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bench.evidence.report.results import Report
from bench.evidence.report.tables import model_tables
from bench.tables import table

_FACTS = ("processor", "cores", "threads", "memory_gb", "system", "python", "torch", "peft", "commit")


def tables_page(report: Report, pictures: Mapping[str, Sequence[str]]) -> str:
    """The whole page."""
    parts = ["# Results", *_shown("means", pictures)]
    for results in report.models:
        tables = model_tables(results)
        parts += [next(tables), *_shown(results.title, pictures), *tables]
    return "\n\n".join([*parts, *_origin(report)]) + "\n"


def _shown(title: str, pictures: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"![{title}: {name.removesuffix('.png').rsplit('-', 1)[-1]}]({name})" for name in pictures.get(title, [])]


def _origin(report: Report) -> Iterator[str]:
    yield "## Where this comes from"
    finals = [row for results in report.models for cell in results.cells.values() for row in cell.values()]
    tried = sum(len(results.tuning) for results in report.models)
    commits = sorted({str(row.get("commit")) for row in finals})
    yield (
        f"{len(finals)} results on test data, {tried} on validation data. Rows left out, since an earlier one has the "
        f"same model, budget, task, method, rank, seed and purpose: {report.duplicates}. Commits: {', '.join(commits)}."
    )
    machines = sorted({tuple(str(row.get(name, "-")) for name in _FACTS) for row in report.machines})
    if machines:
        yield table(_FACTS, machines)
    commands = sorted({str(row["command"]) for row in report.machines if "command" in row})
    if commands:
        yield "```\n" + "\n".join(commands) + "\n```"
