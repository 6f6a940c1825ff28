"""Every broken or foreign adapter is refused in one sentence that helps, and a refusal leaves nothing behind."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import CONFIG, PICKLE, SHAPES, WEIGHTS, dense, plain_tensors, write_folder
from command_cases import command
from folder_cases import tree
from malformed_cases import CASES, Case

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError


@pytest.fixture(autouse=True)
def _never_hangs() -> Iterator[None]:
    """A pipe that is opened for reading would wait for its writer until the end of days."""
    signal.alarm(20)
    yield
    signal.alarm(0)


def refusal(folder: Path, out: Path) -> str:
    """The text with which loading, squeezing or saving is refused."""
    with pytest.raises(LoraSqueezeError) as error:
        lora_squeeze.load(folder).squeeze(rank=2).save(out)
    return str(error.value)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_refused_with_what_was_found_and_what_to_do(tmp_path: Path, case: Case) -> None:
    case.build(tmp_path / "in")
    before = tree(tmp_path)
    message = refusal(tmp_path / "in", tmp_path / "deep" / "out")
    missing = [fragment for fragment in case.fragments if fragment not in message]
    assert not missing, f"{missing} not in {message!r}"
    assert message.isprintable() and len(message) < 800, message
    assert tree(tmp_path) == before, "nothing is written, nothing is left behind, no code of a pickle has run"


# One of each stage: configuration, header, pickle, keys, data.
SAMPLE = ("config_is_not_json", "truncated", "pickle_that_runs_code", "a_without_b", "nan", "terminal_escape_in_a_name")


@pytest.mark.parametrize("name", SAMPLE)
def test_on_the_command_line_it_is_one_line_and_exit_code_1(tmp_path: Path, name: str) -> None:
    CASES[name].build(tmp_path / "in")
    before = tree(tmp_path)
    run = command(tmp_path, "squeeze", tmp_path / "in", "-o", tmp_path / "out", "--rank", 2)
    assert run.code == 1 and run.out == ""
    assert run.err.startswith("lora-squeeze: ") and run.err.count("\n") == 1 and run.err[:-1].isprintable()
    assert all(fragment in run.err for fragment in CASES[name].fragments), run.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before PyTorch 1.6"])
def test_a_pickle_of_tensors_alone_is_read(tmp_path: Path, zipped: bool) -> None:
    folder, plain = write_folder(tmp_path / "in"), write_folder(tmp_path / "plain")
    (folder / WEIGHTS).unlink()
    torch.save(plain_tensors(), folder / PICKLE, _use_new_zipfile_serialization=zipped)
    ours, theirs = lora_squeeze.load(folder), lora_squeeze.load(plain)
    assert all(torch.equal(dense(ours, name), dense(theirs, name)) for name in SHAPES)
    ours.squeeze(rank=2).save(tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).exists() and not (tmp_path / "out" / PICKLE).exists()


@pytest.mark.parametrize(
    "history", ["{}", "not json", "[1, {}]", "[" * 100_000], ids=["object", "text", "mixed", "deep"]
)
def test_a_strange_history_is_no_reason_to_refuse(tmp_path: Path, history: str) -> None:
    folder = write_folder(tmp_path / "in", metadata={"lora_squeeze": history})
    lora_squeeze.load(folder).squeeze(rank=2).save(tmp_path / "out")
    assert lora_squeeze.load(tmp_path / "out").history[-1]["rule"] == "rank=2"


# --- where to write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", ["in", "in/../in", "link"])
@pytest.mark.parametrize("force", [False, True])
def test_the_source_is_never_written_to(tmp_path: Path, spelling: str, force: bool) -> None:
    folder = write_folder(tmp_path / "in")
    (tmp_path / "link").symlink_to("in")
    before = tree(tmp_path)
    with pytest.raises(LoraSqueezeError, match="is the folder that the adapter is read from; choose another output"):
        lora_squeeze.load(folder).squeeze(rank=2).save(tmp_path / spelling, force=force)
    assert tree(tmp_path) == before


def test_a_folder_inside_the_source_leaves_the_source_as_it_was(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    content = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    lora_squeeze.load(folder).squeeze(rank=2).save(folder / "r2")
    assert {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)} == content
    assert sorted(path.name for path in folder.iterdir()) == sorted([*content, "r2"])
    assert lora_squeeze.load(folder, subfolder="r2").rank == 2


def output_is_a_file(out: Path) -> Any:
    out.write_text("mine")


def output_is_a_pipe(out: Path) -> Any:
    os.mkfifo(out)


def output_is_a_dangling_link(out: Path) -> Any:
    out.symlink_to("nowhere")


def output_is_full(out: Path) -> Any:
    write_folder(out)


@pytest.mark.parametrize(
    ("make", "text", "force"),
    [
        (output_is_a_file, "exists and is not a folder; remove it or choose another", True),
        (output_is_a_pipe, "exists and is not a folder; remove it or choose another", True),
        (output_is_a_dangling_link, "leads to no folder", True),
        (output_is_full, "exists already and nothing was written; choose another folder, or replace it", False),
    ],
)  # fmt: skip
def test_an_output_that_cannot_be_is_refused(tmp_path: Path, make: Any, text: str, force: bool) -> None:
    folder = write_folder(tmp_path / "in")
    make(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(LoraSqueezeError, match=text):
        lora_squeeze.load(folder).squeeze(rank=2).save(tmp_path / "out", force=force)
    assert tree(tmp_path) == before


def test_an_output_below_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    with pytest.raises(LoraSqueezeError, match="cannot be written"):
        lora_squeeze.load(folder).squeeze(rank=2).save(folder / CONFIG / "out")
