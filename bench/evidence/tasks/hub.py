"""Data sets of the Hugging Face hub, or files and folders that `datasets` reads, as tasks.

    hub:stanfordnlp/sst2?prompt=sentence&answer=label
    hub:mine.jsonl?prompt=question&answer=reply

A column of class labels becomes the classes of the task by their names; a column of texts has classes if `classes=yes`
is added. Where there is a split called "validation" or "test" it is used, unless its labels are hidden (-1, as in GLUE,
or nothing); what is missing is cut from "train" by hash of the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from bench.evidence.data import PARTS, Data, Example, split

_KNOWN = ("prompt", "answer", "subset", "data_files", "name", "classes", "prompt_tokens", "answer_tokens")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # of `datasets`, by kind of file


def from_hub(name: str) -> Data:
    """The task of "hub:NAME?prompt=COLUMN&answer=COLUMN[&subset=..][&prompt_tokens=N][&answer_tokens=N]...".

    Raises:
        SystemExit: an option that is not known, columns that are not there, a data set that cannot be loaded.
    """
    where, _, query = name.removeprefix("hub:").partition("?")
    options = dict(parse_qsl(query))
    unknown = sorted(set(options) - set(_KNOWN))
    if unknown or not {"prompt", "answer"} <= set(options):
        raise SystemExit(
            f"{name}: expected hub:NAME?prompt=COLUMN&answer=COLUMN, further options {', '.join(_KNOWN[2:])}"
            + (f"; {unknown[0]!r} is none of them" if unknown else "")
        )
    room = _count(options, "prompt_tokens", 64), _count(options, "answer_tokens", 16)
    loaded = _loaded(where, options)
    parts = _parts({part: _examples(rows, options) for part, rows in loaded.items() if part in PARTS}, name)
    classes = _classes(loaded["train"], options)
    if options.get("classes") == "yes" and not classes:
        classes = tuple(sorted({example.answer for part in parts.values() for example in part}))
    return Data(options.get("name", where), f"data set {where}", *(parts[part] for part in PARTS), classes, *room)


def _parts(found: dict[str, list[Example]], name: str) -> dict[str, list[Example]]:
    """Those that are there, the others cut from "train"."""
    if not found.get("train"):
        raise SystemExit(f"{name}: no split called train with answers in it, found {', '.join(found) or 'none'}")
    missing = [part for part in PARTS if not found.get(part)]
    if not missing:
        return found
    cut = split(((example.prompt, example) for example in found["train"]), name)
    there = [part for part in PARTS[1:] if part not in missing]
    kept = [example for part in ("train", *there) for example in cut[part]]  # nothing is cut off for what is there
    return {"train": kept, **{part: cut[part] if part in missing else found[part] for part in PARTS[1:]}}


def _count(options: dict[str, str], option: str, default: int) -> int:
    text = options.get(option, str(default))
    if not text.isdecimal() or int(text) == 0:
        raise SystemExit(f"{option} is a number of tokens, found {text!r}")
    return int(text)


def _loaded(where: str, options: dict[str, str]) -> Any:
    from datasets import load_dataset

    files = {"data_files": options["data_files"]} if "data_files" in options else {}
    reader = _READERS.get(Path(where).suffix)
    if reader is not None and Path(where).is_file():
        where, files = reader, {"data_files": where}
    try:
        return load_dataset(where, options.get("subset"), **files)
    except Exception as error:  # datasets raises kinds of its own, of the hub and of the file systems
        raise SystemExit(f"{where}: {type(error).__name__}: {error}".splitlines()[0]) from None


def _examples(rows: Any, options: dict[str, str]) -> list[Example]:
    """Rows with an answer."""
    prompt, answer = options["prompt"], options["answer"]
    for column in (prompt, answer):
        if column not in rows.column_names:
            raise SystemExit(f"no column {column!r}; there are {', '.join(rows.column_names)}")
    names = _classes(rows, options)
    found = []
    for question, reply in zip(rows[prompt], rows[answer], strict=True):
        if question is None or reply is None or (names and reply < 0):
            continue
        found.append(Example(str(question).rstrip(), names[reply] if names else str(reply).strip()))
    return found


def _classes(rows: Any, options: dict[str, str]) -> tuple[str, ...]:
    """The names of a column of class labels."""
    return tuple(getattr(rows.features[options["answer"]], "names", None) or ())
