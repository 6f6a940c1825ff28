"""The command check: what is printed, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import check_cases as cases
import pytest
import typer
from check_cases import TRIGGERS
from typer.testing import CliRunner, Result

from lora_squeeze.cli.check import check
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.readers import READERS

APP = typer.Typer()
APP.command()(check)


def run(*words: object) -> Result:
    return CliRunner().invoke(APP, [str(word) for word in words], catch_exceptions=False)


def test_what_is_read_as_meant_ends_with_0(tmp_path: Path) -> None:
    done = run(cases.peft()(tmp_path), "--for", "vllm", "--max-rank", 8)
    assert (done.exit_code, done.output) == (0, "vLLM (0.32.0): read as meant\n")


def test_what_is_not_ends_with_1_and_says_what_why_and_the_cure(tmp_path: Path) -> None:
    folder = cases.peft(rank=16, use_rslora=True)(tmp_path)
    done = run(folder, "--for", "sglang", "--max-rank", 8)
    first, refused, scale = done.output.splitlines()
    assert done.exit_code == 1
    assert first.endswith(": not read as meant (no)")
    assert refused.startswith("refused: rank 16 is above the largest that it is asked to take, 8 [sglang-rank]; cure: ")
    assert refused.endswith(f"lora-squeeze squeeze {folder} -o OUT --rank 8")
    shown = ", ".join(sorted(cases.SHAPES)[:3])
    assert scale.startswith("scale: ") and f": {shown} and 1 more [sglang-scale]" in scale


def test_notes_alone_end_with_0(tmp_path: Path) -> None:
    done = run(cases.peft(rank=32)(tmp_path), "--for", "vllm")
    assert done.exit_code == 0
    assert (
        "note: rank 32 is above its default limit of 16: start it with --max-lora-rank 32 [vllm-rank-option]"
        in done.output
    )


@pytest.mark.parametrize(
    "rule", ["vllm-dora", "vllm-init", "vllm-orphan", "peft-damaged", "comfyui-scale", "llama.cpp-suffix"]
)
def test_json_and_exit_code_agree(rule: str, tmp_path: Path) -> None:
    path = TRIGGERS[rule].build(tmp_path)
    done = run(path, "--for", TRIGGERS[rule].reader, "--json")
    data = json.loads(done.output)
    assert data["reader"] == TRIGGERS[rule].reader and data["read_as_meant"] is False and done.exit_code == 1
    assert rule in [finding["rule"] for finding in data["findings"]]


def test_without_a_reader_all_are_in_a_table_and_the_exit_code_is_0(tmp_path: Path) -> None:
    done = run(TRIGGERS["sglang-scale"].build(tmp_path))
    rows = {words[0]: line for line in done.output.splitlines() if (words := line.replace("│", " ").split())}
    assert done.exit_code == 0
    assert {reader.key for reader in READERS} <= rows.keys()
    assert "other scale: x 0.3536" in rows["sglang"] and " yes " in rows["vllm"] and " no " in rows["mlx-lm"]


def test_without_a_reader_json_is_a_list_of_all(tmp_path: Path) -> None:
    done = run(cases.kohya()(tmp_path), "--json")
    assert [row["reader"] for row in json.loads(done.output)] == [reader.key for reader in READERS]


def test_a_file_that_is_no_adapter_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(LoraSqueezeError, match=r"a\.safetensors"):
        run(tmp_path / "a.safetensors", "--for", "vllm")


def test_help_is_there_for_every_option() -> None:
    text = run("--help").output
    for option in ("--for", "--max-rank", "--base", "--subfolder", "--revision", "--json"):
        assert option in text
    assert "exit code" in text
