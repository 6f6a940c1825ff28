"""The command methods."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from lora_squeeze.cli.options import Json


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, in full; default a table of all.")] = None,
    as_json: Json = False,
) -> None:
    """List the methods that can be trained beside LoRA, and how each becomes a plain LoRA."""
    from lora_squeeze.cli import show
    from lora_squeeze.errors import LoraSqueezeError
    from lora_squeeze.methods.catalogue import CATALOGUE, becomes

    entries = [entry for entry in CATALOGUE if name in (None, entry.name)]
    if not entries:
        known = ", ".join(entry.name for entry in CATALOGUE)
        raise LoraSqueezeError(f"no method {name!r} in this catalogue; there are {known}")
    if as_json:
        found = [{**asdict(entry), "becomes": becomes(entry)} for entry in entries]
        print(json.dumps(found if name is None else found[0], indent=2))
        return
    if name is not None:
        for line in _told(entries[0], becomes(entries[0])):
            show.console().print(line, markup=False, highlight=False)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("method", "family", "update of W", "as a plain LoRA", "paper")
    for entry in entries:
        table.add_row(entry.name, entry.family, escape(entry.update), becomes(entry), f"arXiv {entry.paper}")
    show.console().print(table)


def _told(entry: object, end: str) -> list[str]:
    from lora_squeeze.methods.catalogue import Entry

    assert isinstance(entry, Entry)
    return [
        f"{entry.title} (arXiv {entry.paper}), {entry.family}",
        f"update: {entry.update}",
        f"as a plain LoRA: {end}",
        f"train: lora-squeeze train MODEL DATA -o OUT --method {entry.name} --rank 8",
        f"Python: {entry.module}" + (f".{entry.config}" if entry.config else ""),
        f"learning rate: {entry.rate:g} times that of a LoRA, to begin with",
        f"measured: {entry.record}",
    ]
