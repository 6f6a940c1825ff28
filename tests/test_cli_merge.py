"""The commands merge, subtract and rank-up: options, what is printed, exit codes, what is written."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer
from adapter_cases import CONFIG, SHAPES, dense, read_dense, tail
from combine_cases import NUMBERS, made, total
from folder_cases import tree
from typer.testing import CliRunner, Result

from lora_squeeze.adapter import Adapter
from lora_squeeze.cli import merge as commands
from lora_squeeze.combine import merge
from lora_squeeze.errors import LoraSqueezeError

app = typer.Typer(rich_markup_mode=None)
app.command("merge")(commands.merge)
app.command("subtract")(commands.subtract)
app.command("rank-up")(commands.rank_up)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The one line that a refused request prints."""
    error = run(*arguments).exception
    assert isinstance(error, LoraSqueezeError)
    return str(error)


@pytest.fixture
def three(tmp_path: Path) -> list[Adapter]:
    return [made(tmp_path / f"in{i}", rank, i, lora_alpha=4 + 3 * i) for i, rank in enumerate((8, 3, 5))]


def folders(tmp_path: Path) -> list[Path]:
    return [tmp_path / f"in{i}" for i in range(3)]


WEIGHTS = "--weights=" + ",".join(map(str, NUMBERS))


def test_three_adapters_become_one_of_the_rank_asked_for(three: list[Adapter], tmp_path: Path) -> None:
    done = run("merge", *folders(tmp_path), "-o", tmp_path / "out", "--rank", 4, WEIGHTS)
    assert done.exit_code == 0, done.output
    for name in SHAPES:
        expected = total(three, NUMBERS, name)
        lost = float((read_dense(tmp_path / "out", name) - expected).norm())
        assert math.isclose(lost, tail(expected, 4), rel_tol=1e-4)
    assert "residual |sum - written| / |sum| 0." in done.stdout
    assert done.stdout.rstrip().endswith(f"written to {tmp_path / 'out'}")


def test_without_a_rank_the_sum_is_whole(three: list[Adapter], tmp_path: Path) -> None:
    assert run("merge", *folders(tmp_path), "-o", tmp_path / "out").exit_code == 0
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["r"] == 16
    (tmp_path / "blocks.toml").write_text('default = [1, 0, -1]\n"*.q_proj" = 0.5\n')
    done = run("merge", *folders(tmp_path), "-o", tmp_path / "blocks", "--weights", tmp_path / "blocks.toml")
    assert done.exit_code == 0, done.output
    for name in SHAPES:
        row = [0.5] * 3 if name.endswith("q_proj") else [1, 0, -1]
        assert (read_dense(tmp_path / "blocks", name) - total(three, row, name)).abs().max() < 1e-5


def test_json_has_the_report_and_the_residual(three: list[Adapter], tmp_path: Path) -> None:
    arguments = ["merge", *folders(tmp_path), WEIGHTS, "--rank", 3, "--json"]
    found, dry = (json.loads(run(*arguments, *more).stdout) for more in (["-o", tmp_path / "out"], ["--dry-run"]))
    assert found == dry | {"output": str(tmp_path / "out")} and dry["output"] is None
    assert found["rank"] == 3 and found["adapters"] == [str(folder) for folder in folders(tmp_path)]
    wholes = [total(three, NUMBERS, name) for name in SHAPES]
    error = math.hypot(*(tail(dW, 3) for dW in wholes)) / math.hypot(*(float(dW.norm()) for dW in wholes))
    assert math.isclose(found["residual"]["error"], error, rel_tol=1e-5)
    assert {row["name"] for row in found["modules"]} == set(SHAPES)


@pytest.mark.parametrize("method", ["ties", "dare", "dare-ties"])
def test_dense_methods(three: list[Adapter], tmp_path: Path, method: str) -> None:
    options: dict[str, Any] = {"method": method, "density": 0.5, "seed": 3, "rank": 4}
    words = [f"--{name}={value}" for name, value in options.items()]
    assert run("merge", *folders(tmp_path), "-o", tmp_path / "out", WEIGHTS, *words).exit_code == 0
    expected = merge(three, NUMBERS, **options)
    for name in SHAPES:
        assert (read_dense(tmp_path / "out", name) - dense(expected, name)).abs().max() < 1e-6


def test_a_dry_run_writes_nothing(three: list[Adapter], tmp_path: Path) -> None:
    before = tree(tmp_path)
    done = run("merge", *folders(tmp_path), "--rank", 2, "-o", tmp_path / "out", "--dry-run")
    assert done.exit_code == 0 and "dry run: nothing written" in done.stdout
    assert tree(tmp_path) == before


def test_without_output_or_adapters_the_usage_is_wrong(three: list[Adapter], tmp_path: Path) -> None:
    assert run("merge", *folders(tmp_path), "--rank", 2).exit_code == 2
    assert run("merge", "-o", tmp_path / "out").exit_code == 2
    assert run("subtract", folders(tmp_path)[0], "-o", tmp_path / "out").exit_code == 2


def test_no_source_and_nothing_that_is_there_is_replaced(three: list[Adapter], tmp_path: Path) -> None:
    before = tree(tmp_path)
    for folder in folders(tmp_path):
        assert "read from" in refused("merge", *folders(tmp_path), "-o", folder, "--force")
    assert tree(tmp_path) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CONFIG).write_text("{}")
    assert "--force" in refused("merge", *folders(tmp_path), "-o", tmp_path / "out")
    assert run("merge", *folders(tmp_path), "-o", tmp_path / "out", "--force").exit_code == 0


def test_refusals_are_one_line(three: list[Adapter], tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    for arguments, text in (
        (("merge", *folders(tmp_path), *out, "--weights=1,2"), "2 numbers for 3 adapters"),
        (("merge", *folders(tmp_path), *out, "--weights=x"), "weights 'x' are not understood"),
        (("merge", *folders(tmp_path), *out, "--method=ties"), "give density"),
        (("rank-up", folders(tmp_path)[0], *out, "--rank", 2), "has rank 8 already"),
    ):
        message = refused(*arguments)
        assert text in message and "\n" not in message
    assert not (tmp_path / "out").exists()


def test_subtract_takes_the_second_from_the_first(three: list[Adapter], tmp_path: Path) -> None:
    done = run("subtract", *folders(tmp_path)[:2], "-o", tmp_path / "out", "--rank", 20)
    assert done.exit_code == 0, done.output
    for name in SHAPES:
        expected = total(three[:2], (1, -1), name)
        assert (read_dense(tmp_path / "out", name) - expected).abs().max() < 1e-5


def test_rank_up_pads(three: list[Adapter], tmp_path: Path) -> None:
    done, data = (
        run("rank-up", folders(tmp_path)[1], "-o", tmp_path / name, "--rank", 12, *more)
        for name, more in (("out", ()), ("data", ("--json",)))
    )
    assert "rank 3 -> 12" in done.stdout and (tmp_path / "out" / CONFIG).exists()
    found = json.loads(data.stdout)
    assert (found["rank_before"], found["rank"], found["bytes"]) == (3, 12, 4 * three[1].lora_bytes)
    for name in SHAPES:
        assert (read_dense(tmp_path / "out", name) - dense(three[1], name)).abs().max() < 1e-6


DIALS: list[tuple[list[object], dict[str, Any]]] = [
    (["--rank", 4, "--allocate", "global"], {"rank": 4, "allocate": "global"}),
    (["--energy", 0.9, "--multiple-of", 4, "--same-rank-per", "type"],
     {"energy": 0.9, "multiple_of": 4, "same_rank_per": "type"}),
    (["--params", 900, "--ranks", "2,4"], {"params": 900, "ranks": (2, 4)}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "dials"), DIALS, ids=str)
@pytest.mark.parametrize("command", ["merge", "subtract"])
def test_every_dial_does_what_the_library_does(
    three: list[Adapter], tmp_path: Path, command: str, words: list[object], dials: dict[str, Any]
) -> None:
    found = json.loads(run(command, *folders(tmp_path)[:2], *words, "--dry-run", "--json").stdout)
    expected = merge(three[:2], [1, 1 if command == "merge" else -1], **dials)
    ranks = {row["name"]: row["rank_after"] for row in found["modules"]}
    assert ranks == {row.name: row.rank_after for row in expected.report.rows}


@pytest.mark.parametrize("command", ["merge", "subtract", "rank-up"])
def test_help_explains_every_option(command: str) -> None:
    done = run(command, "--help")
    assert done.exit_code == 0 and "--output" in done.stdout and "--rank" in done.stdout
