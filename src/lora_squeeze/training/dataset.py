"""Training data: a local file or a data set of the hub, in one of the forms that TRL understands.

=====================  =========================================================================================
columns                what is learned
=====================  =========================================================================================
prompt, completion     the completion; each a text, or a list of messages
messages               the whole conversation, by the chat template of the model
text                   the whole text
=====================  =========================================================================================

Where several forms are there, the first one of this list counts. Other columns are left out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError

FORMS: tuple[tuple[str, ...], ...] = (("prompt", "completion"), ("messages",), ("text",))
PROMPT_FORMS: tuple[tuple[str, ...], ...] = (("prompt",), ("messages",), ("text",))
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_BESIDE = ("tools", "chat_template_kwargs")  # columns that a chat template reads beside the messages
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Data:
    """Checked examples.

    Args:
        rows: a datasets.Dataset with the columns of the form, and nothing else but what a chat template reads.
        form: the columns that make the form.
        chat: whether the examples are messages, which need a chat template.
    """

    rows: Any
    form: tuple[str, ...]
    chat: bool


def load_data(
    data: str, *, split: str = "train", subset: str | None = None, forms: Sequence[tuple[str, ...]] = FORMS
) -> Data:
    """Read examples and check that they can be trained on.

    Args:
        data: a file (.jsonl, .json, .csv, .parquet; .txt has one example per line, blank lines left out), or the name
            of a data set on the hub. What exists on disk is never looked up on the hub.
        split: which part, in the words of `datasets`, such as "train" or "train[:1000]"; a file has one, "train".
        subset: name of the configuration, for a data set on the hub that has several.
        forms: the forms understood, the preferred one first.

    Raises:
        LoraSqueezeError: nothing there, unreadable, no rows, no form that is understood, values of another type,
            empty cells.
    """
    path = Path(data).expanduser()
    rows = _from_file(path, split) if path.exists() else _from_hub(data, split, subset)
    form = next((form for form in forms if set(form) <= set(rows.column_names)), None)
    if form is None:
        raise LoraSqueezeError(
            f"{data}: found the columns {', '.join(rows.column_names)}; understood are "
            f"{', or '.join(' and '.join(columns) for columns in forms)}; rename the columns"
        )
    if not len(rows):
        raise LoraSqueezeError(f"{data}: no examples")
    kinds = {_kind(data, rows, column) for column in form}
    if len(kinds) > 1:
        raise LoraSqueezeError(f"{data}: {' and '.join(form)} must both be texts, or both lists of messages")
    chat = kinds == {"messages"}
    return Data(rows.select_columns([*form, *(c for c in _BESIDE if chat and c in rows.column_names)]), form, chat)


def _from_file(path: Path, split: str) -> Any:
    if not path.is_file():
        raise LoraSqueezeError(f"{path} is a folder; name a file in it ({', '.join(READERS)})")
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise LoraSqueezeError(f"{path}: no reader for {path.suffix or 'a name without ending'}; {', '.join(READERS)}")
    rows = _load(str(path), reader, split, data_files=str(path))
    return rows.filter(_is_written) if reader == "text" else rows


def _is_written(row: dict[str, Any]) -> bool:
    return bool(row["text"].strip())


def _from_hub(data: str, split: str, subset: str | None) -> Any:
    if not _HUB_ID.fullmatch(data) or Path(data).suffix.lower() in READERS:
        raise LoraSqueezeError(f"{data}: no such file, and not the form of a hub id (user/name)")
    return _load(data, data, split, name=subset)


def _load(data: str, reader: str, split: str, **options: Any) -> Any:
    from datasets import Dataset, load_dataset  # type: ignore[import-untyped]

    try:
        rows = load_dataset(reader, split=split, **options)
    except Exception as error:  # its own kinds, those of pyarrow and pandas, of the system and of the network
        first = (str(error.__cause__ or error).strip().splitlines() or [type(error).__name__])[0]
        raise LoraSqueezeError(f"{data}: cannot be read ({first:.200})") from error
    if not isinstance(rows, Dataset):
        raise LoraSqueezeError(f"{data}: split {split!r} is no single table; name one split")
    return rows


def _kind(data: str, rows: Any, column: str) -> str:
    """ "text" or "messages", after a look at all cells for empty ones and at the first for its type."""
    empty = rows.data.column(column).null_count
    if empty:
        row = next(i for i, value in enumerate(rows[column]) if value is None)
        raise LoraSqueezeError(f"{data}: column {column} is empty in {empty} rows, first in row {row}; leave them out")
    value = rows[0][column]
    if isinstance(value, str) and column != "messages":
        return "text"
    if column != "text" and isinstance(value, list) and value and all(_is_message(item) for item in value):
        return "messages"
    wanted = {"text": "a text", "messages": "a list of messages with role and content"}
    raise LoraSqueezeError(
        f"{data}: column {column} holds {type(value).__name__}, expected "
        f"{wanted.get(column, 'a text or a list of messages with role and content')}"
    )


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and {"role", "content"} <= item.keys()
