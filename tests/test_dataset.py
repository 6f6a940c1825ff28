"""Training data: files of every kind, the forms that are understood, what is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from train_cases import private_cache, write_rows

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.training.dataset import PROMPT_FORMS, load_data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path) -> Iterator[None]:
    with private_cache(tmp_path / "cache"):
        yield


def test_every_kind_of_file_gives_the_same_texts(tmp_path: Path) -> None:
    texts = ["a b", "c, d", 'e "f"']
    table = datasets.Dataset.from_dict({"text": texts, "other": [1, 2, 3]})
    write_rows(tmp_path / "x.jsonl", [{"text": text} for text in texts])
    (tmp_path / "x.json").write_text(json.dumps([{"text": text} for text in texts]))
    table.to_csv(tmp_path / "x.csv")
    table.to_parquet(tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text("\n\n".join(texts) + "\n")
    for name in ("x.jsonl", "x.json", "x.csv", "x.parquet", "x.txt"):
        data = load_data(str(tmp_path / name))
        assert (list(data.rows["text"]), data.rows.column_names, data.form) == (texts, ["text"], ("text",)), name
    assert list(load_data(str(tmp_path / "x.csv"), split="train[1:]").rows["text"]) == texts[1:]


def test_the_form_is_told_by_the_columns_and_other_columns_are_left_out(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a"}]
    both = {"prompt": "a", "completion": "b", "text": "c", "labels": [1], "input_ids": [2]}
    cases: list[tuple[dict[str, Any], tuple[str, ...], bool]] = [
        (both, ("prompt", "completion"), False),
        ({"prompt": chat, "completion": chat, "id": 3}, ("prompt", "completion"), True),
        ({"messages": chat, "text": "c"}, ("messages",), True),
    ]
    for i, (row, form, is_chat) in enumerate(cases):
        data = load_data(str(write_rows(tmp_path / f"{i}.jsonl", [row])))
        assert (data.form, data.chat, tuple(data.rows.column_names)) == (form, is_chat, form)
    data = load_data(str(tmp_path / "0.jsonl"), forms=PROMPT_FORMS)
    assert data.rows.column_names == ["prompt"], "without its answer"


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"question": "a", "answer": "b"}],
         "the columns question, answer; understood are prompt and completion, or messages, or text; rename"),
        ([{"prompt": "a"}], "found the columns prompt; understood"),
        ([{"text": 3}], "column text holds int, expected a text"),
        ([{"messages": "hello"}], "column messages holds str, expected a list of messages with role and content"),
        ([{"prompt": "a", "completion": 1.5}], "column completion holds float, expected a text or a list of messages"),
        ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "must both be texts, or both lists"),
        ([{"text": "a"}, {"text": None}, {"text": None}], "column text is empty in 2 rows, first in row 1"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_learned_are_refused(tmp_path: Path, rows: list[dict[str, Any]], text: str) -> None:
    data = write_rows(tmp_path / "x.jsonl", rows)
    with pytest.raises(LoraSqueezeError, match=rf"x\.jsonl: .*{text}"):
        load_data(str(data))


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"\n{')
    (tmp_path / "x.npy").write_text("a")
    (tmp_path / "blank.txt").write_text("\n \n")
    cases = [
        ("bad.jsonl", r"bad\.jsonl: cannot be read \("),
        ("x.npy", r"x\.npy: no reader for \.npy; \.jsonl, \.json, \.csv, \.parquet, \.txt"),
        ("blank.txt", r"blank\.txt: no examples"),
        ("missing.jsonl", "no such file, and not the form of a hub id"),
        (".", "is a folder; name a file in it"),
    ]
    for name, text in cases:
        with pytest.raises(LoraSqueezeError, match=text):
            load_data(str(tmp_path / name))
    with pytest.raises(LoraSqueezeError, match=r"nobody/nothing: cannot be read"):
        load_data("nobody/nothing")
    write_rows(tmp_path / "good.jsonl", [{"text": "a"}])
    with pytest.raises(LoraSqueezeError, match=r'cannot be read \(Unknown split "test"'):
        load_data(str(tmp_path / "good.jsonl"), split="test")
