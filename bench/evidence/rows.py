"""Results as plain text: JSON Lines, one finished run a line, appended and never changed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SETTING = ("model", "steps", "batch", "source_rank", "weights")  # what rows that are compared have in common
LOCAL = ("precision", "build")  # what machines differ in: one of each for all rows of a task with one seed


def read_rows(paths: Iterable[Path]) -> list[Row]:
    """All rows of these files; a line that was cut off while it was written is passed over: its run is done again."""
    rows: list[Row] = []
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def append(path: Path, rows: Iterable[Row]) -> None:
    """Write rows at the end of a file, in one call, so that several runs may share it."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # the line before was cut off: it stays a line of its own
            text = "\n" + text
        os.write(file, text.encode())
    finally:
        os.close(file)


def like(rows: Iterable[Row], **key: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row.get(name) == value for name, value in key.items())]
