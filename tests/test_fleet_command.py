"""The command fleet: what is printed where, exit codes, and that an interrupted run loses nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import PREFIX, SHAPES, WEIGHTS, plain_config, plain_tensors, write_folder
from command_cases import Run, command
from fleet_cases import BASE, RANKS, write_fleet, write_member
from fleet_cases import no_processes as no_processes
from folder_cases import tree
from test_cli_plan import options_of
from test_import import imported
from typer.testing import CliRunner

import lora_squeeze
from lora_squeeze.cli.app import app
from lora_squeeze.fleet.run import squeeze_fleet

MEMORY = "1MB"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_fleet(tmp_path / "in")


def fleet(root: Path, *arguments: object) -> Run:
    return command(root.parent, "fleet", root, "-o", root.parent / "out", *arguments)


@pytest.mark.usefixtures("no_processes")
def test_the_trade_off_the_members_and_the_options_are_shown(root: Path) -> None:
    budget = squeeze_fleet([root], root.parent / "out", memory=MEMORY, dry_run=True).curve[1].bytes
    run = fleet(root, "--memory", budget)
    assert (run.code, run.err) == (0, "")
    report = json.loads((root.parent / "out-fleet" / "report.json").read_text())
    lines = run.out.splitlines()
    (chosen,) = [line for line in lines if line.startswith("│ ->")]
    assert " 8 " in chosen and "yes" in chosen
    assert any(line.strip() == report["options"] for line in lines), "to be copied from a line of its own"
    assert any("c " in line and "16 -> 8" in line and "written" in line for line in lines)
    assert f"written to {root.parent / 'out'}" in run.out
    again = fleet(root, "--memory", budget)
    assert again.code == 0 and again.out.count("already there") == 3


@pytest.mark.usefixtures("no_processes")
def test_notes_are_shown(root: Path) -> None:
    run = fleet(root, "--memory", MEMORY, "--engine", "sglang", "--dry-run")
    notes = json.loads((root.parent / "out-fleet" / "report.json").read_text())["notes"]
    assert notes and all(note in run.out for note in notes)


@pytest.mark.usefixtures("no_processes")
def test_json_is_the_report(root: Path) -> None:
    run = fleet(root, "--memory", MEMORY, "--json", "--dry-run")
    assert (run.code, run.err) == (0, "") and not (root.parent / "out").exists()
    assert json.loads(run.out) == json.loads((root.parent / "out-fleet" / "report.json").read_text())


@pytest.mark.usefixtures("no_processes")
def test_many_members_are_cut_short(root: Path) -> None:
    for i in range(10):
        write_member(root / f"more{i}", 2)
    run, each = (fleet(root, "--memory", MEMORY, "--dry-run", *more) for more in ((), ("--each",)))
    assert "and 3 members that lose less: --each shows all" in run.out and "dry run: nothing written" in run.out
    assert all(f"more{i} " in each.out for i in range(10)) and "--each shows" not in each.out


@pytest.mark.usefixtures("no_processes")
def test_every_option_reaches_the_library(root: Path) -> None:
    (root.parent / "w.toml").write_text("c = 5\n")
    write_member(root / "d", 4, base_model_name_or_path="/models/base")
    (root / "broken").mkdir()
    (root / "broken" / WEIGHTS).write_bytes(b"")
    run = fleet(
        root, "--memory", "90kB", "--engine", "sglang", "--slots", 3, "--host-memory", "5kB", "--weights",
        root.parent / "w.toml", "--base", BASE, "--base", "/models/base", "--dtype", "bf16", "--slot-dtype", "fp32",
        "--skip-unreadable", "--work", root.parent / "work", "--json",
    )  # fmt: skip
    found = json.loads(run.out)
    assert run.code == 0 and (root.parent / "work" / "report.json").exists()
    assert (found["engine"], found["slots"], found["memory"], found["host_memory"]) == ("sglang", 3, 90_000, 5000)
    assert found["slot_dtype"] == "float32" and list(found["skipped"]) == ["broken"]
    assert {row["name"]: row["weight"] for row in found["members"]} == {"c": 5, "d": 1, "team/a": 1, "team/b": 1}
    small = lora_squeeze.load(root.parent / "out" / "d")
    assert {module.dtype for module in small.modules.values()} == {torch.bfloat16}


@pytest.mark.usefixtures("no_processes")
def test_failed_members_are_told_at_the_end(root: Path) -> None:
    tensors = plain_tensors(SHAPES, 4)
    tensors[f"{PREFIX}{next(iter(SHAPES))}.lora_B.weight"][0, 0] = torch.inf
    write_folder(root / "bad", tensors, plain_config(r=4, base_model_name_or_path=BASE))
    run = fleet(root, "--memory", MEMORY)
    assert run.code == 1 and run.err.startswith("lora-squeeze: 1 of 4 members failed: bad (")
    assert run.err.endswith("; the others are done\n") and run.err.count("\n") == 1
    assert all((root.parent / "out" / name / WEIGHTS).exists() for name in RANKS)


@pytest.mark.usefixtures("no_processes")
def test_refusals_are_one_line(root: Path) -> None:
    before = tree(root)
    for arguments, text in [
        (("--memory", 10), "10 bytes (--memory) are too little for 3 slots"),
        (("--memory", MEMORY, "--weights", "nowhere.toml"), "nowhere.toml: no readable TOML"),
        (("--memory", MEMORY, "--dtype", "x"), "dtype 'x' is not known"),
    ]:
        run = fleet(root, *arguments)
        assert run.code == 1 and text in run.err and run.err.count("\n") == 1, run.err
    assert tree(root) == before and not (root.parent / "out").exists()


def test_wrong_usage_is_exit_code_2() -> None:
    for arguments, text in [((), "Missing argument"), (("in", "-o", "out"), "--memory"), (("in", "--memory", 1), "-o")]:
        result = CliRunner().invoke(app, ["fleet", *map(str, arguments)], env={"COLUMNS": "200"})
        assert result.exit_code == 2 and text in result.output


def test_every_option_has_a_text() -> None:
    for option, parameter in options_of("fleet").items():
        assert parameter.help and len(parameter.help) > 10 and "`" not in parameter.help, option


def test_help_does_not_wait_for_torch() -> None:
    code = """
from lora_squeeze.cli import main
sys.argv = ["lora-squeeze", "fleet", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert imported(code) <= {"rich"}


# --- interrupted, with real processes ---------------------------------------------------------------------------------

MANY = {f"m{i}": 4 + i for i in range(6)}


@pytest.fixture
def started(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A run over many members, each of which takes its time, in a process group of its own; two are done."""
    write_fleet(tmp_path / "in", MANY)
    code = "import fleet_cases; fleet_cases.slow_main()"
    arguments = ["fleet", "in", "-o", "out", "--memory", MEMORY, "--workers", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            while len(done(tmp_path)) < 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def done(folder: Path) -> dict[str, Any]:
    """The weights that are there, by member: file, time and content."""
    found = tree(folder / "out")
    return {name: found[path] for name in MANY if (path := str(folder / "out" / name / WEIGHTS)) in found}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_run_goes_on_where_it_stopped(
    started: "subprocess.Popen[str]", tmp_path: Path, number: signal.Signals, no_processes: None
) -> None:
    os.killpg(started.pid, number)
    out, err = started.communicate(timeout=30)
    before = done(tmp_path)
    assert 2 <= len(before) < len(MANY), "in the middle"
    if number == signal.SIGINT:
        assert (started.returncode, out) == (130, "")
        assert err == "lora-squeeze: interrupted; the same command goes on from here\n"
        assert not list((tmp_path / "out").glob(".*")), "nothing half-written"
    with pytest.raises(ProcessLookupError):  # no process is left in the group
        for _ in range(500):
            os.killpg(started.pid, 0)
            time.sleep(0.01)
    report = squeeze_fleet([tmp_path / "in"], tmp_path / "out", memory=MEMORY)
    states = {row.name: row.state for row in report.members}
    assert states == {name: "already there" if name in before else "written" for name in sorted(MANY)}
    after = done(tmp_path)
    assert after.keys() == MANY.keys() and {name: after[name] for name in before} == before, "none written twice"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(MANY), "no litter"
