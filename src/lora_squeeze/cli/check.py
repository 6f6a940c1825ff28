"""The command check."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lora_squeeze.cli.options import AdapterArgument, Json, Revision, Subfolder, option

if TYPE_CHECKING:
    from rich.table import Table

    from lora_squeeze.readers import Finding, Verdict

SHOWN = 3  # modules that a finding names


def check(
    adapter: AdapterArgument,
    reader: Annotated[
        str | None,
        typer.Option(
            "--for",
            help="Who will read it: peft, vllm, sglang, tgi (or lorax), tensorrt-llm, llama.cpp, ollama, mlx-lm, "
            "diffusers, comfyui or sd-scripts; default a table of all.",
        ),
    ] = None,
    max_rank: Annotated[int | None, option("max_rank", module="readers/verdict", function="check")] = None,
    base: Annotated[str | None, option("base", module="readers/verdict", function="check")] = None,
    subfolder: Subfolder = None,
    revision: Revision = None,
    as_json: Json = False,
) -> None:
    """Tell how a server or program will read an adapter: as meant, with another scale, in part, or not at all.

    With --for the exit code is 0 if it is read as meant and 1 if not.
    """
    from lora_squeeze.cli import show
    from lora_squeeze.readers import check as checked

    verdicts = checked(adapter, reader, max_rank=max_rank, base=base, subfolder=subfolder, revision=revision)
    if as_json:
        found = [verdict.to_json() for verdict in verdicts]
        print(json.dumps(found[0] if reader is not None else found))
    elif reader is None:
        show.console().print(_table(verdicts))
    else:
        for line in _lines(verdicts[0]):
            show.console().print(line, markup=False, highlight=False)
    if reader is not None and not verdicts[0].read_as_meant:
        raise typer.Exit(1)


def _lines(verdict: Verdict) -> Iterator[str]:
    """The verdict, and one line per finding."""
    meant = "read as meant" if verdict.read_as_meant else f"not read as meant ({verdict.answer})"
    yield f"{verdict.name} ({verdict.version}): {meant}"
    for finding in verdict.findings:
        yield f"{finding.severity}: {_line(finding)}"


def _line(finding: Finding) -> str:
    text = finding.text
    if finding.modules:
        more = len(finding.modules) - SHOWN
        text += f": {', '.join(finding.modules[:SHOWN])}" + (f" and {more} more" if more > 0 else "")
    return f"{text} [{finding.rule}]" + (f"; cure: {finding.cure}" if finding.cure else "")


def _table(verdicts: Sequence[Verdict]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table("reader", "version", "read as meant", "why")
    for verdict in verdicts:
        first = next((finding for finding in verdict.findings if finding.severity != "note"), None)
        why = "" if first is None else first.text
        table.add_row(*map(escape, (verdict.reader, verdict.version, verdict.answer, why)))
    return table
