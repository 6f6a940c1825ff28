"""`lora-squeeze train`: flags, configuration files, what is printed, exit codes."""

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
from command_cases import Run, command, fresh_command
from test_import import imported
from train_cases import RANK, SOURCE_RANK, Place, private_cache, tensors
from typer.testing import CliRunner

from lora_squeeze.cli.app import app
from lora_squeeze.cli.train import train as run_train
from lora_squeeze.training import libraries, sft
from lora_squeeze.training.sft import Trained
from lora_squeeze.training.sft_settings import TrainSettings

runner = CliRunner()
SHORT = ("--rank", RANK, "--source-rank", SOURCE_RANK, "--steps", 3, "--save-steps", 0)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("command")
    with private_cache(folder / "cache"):
        yield Place(folder).written()


def words(place: Place, tmp_path: Path, *arguments: object) -> tuple[object, ...]:
    return "train", place.folder / "model", place.folder / "train.jsonl", "-o", tmp_path / "out", *arguments


def train(place: Place, tmp_path: Path, *arguments: object) -> Run:
    """Refused before a model is loaded."""
    return command(tmp_path, *words(place, tmp_path, *arguments))


def fresh_train(place: Place, tmp_path: Path, *arguments: object) -> Run:
    return fresh_command(place.folder / "cache", *words(place, tmp_path, *arguments))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the command up to the training; gives the settings that it would train with, or what it printed."""

    def run(*arguments: object) -> TrainSettings | Run:
        def note(settings: TrainSettings, report: Any) -> Trained:
            (tmp_path / "asked.json").write_text(json.dumps(settings.to_json()))
            return Trained(settings, 1, settings.rank, [], {}, {}, 0.0)

        with monkeypatch.context() as patch:
            patch.setattr(sft, "train", note)
            done = command(tmp_path, "train", *arguments)
        if done.code:
            return done
        found = json.loads((tmp_path / "asked.json").read_text())
        return TrainSettings(**{**found, "output": Path(found["output"])})

    return run


# --- a training -----------------------------------------------------------------------------------------------------


def test_a_training_tells_its_squeezes_and_losses_and_writes_the_adapter(place: Place, tmp_path: Path) -> None:
    run = fresh_train(place, tmp_path, *SHORT)
    assert run.code == 0, run.err
    lines = run.out.splitlines()
    assert re.fullmatch(r"step 1: squeezed to rank 4, \S+% of the energy kept, loss \S+ -> \S+", lines[0]), lines
    assert re.fullmatch(r"loss \S+ -> \S+ in 3 steps", lines[2])
    assert lines[-1] == f"written to {tmp_path / 'out'}, rank {RANK}"
    assert {t.shape[0] for name, t in tensors(tmp_path / "out").items() if "lora_A" in name} == {RANK}
    assert re.search(r"^step 1 of 3: loss \S+, squeezed to rank 4$", run.err, flags=re.MULTILINE), run.err


def test_json_is_what_the_record_holds_and_nothing_else_is_on_standard_output(place: Place, tmp_path: Path) -> None:
    adapter = place.folder / "adapter"
    run = fresh_train(
        place, tmp_path, "--continue", adapter, "--distill", "--generate", 3, "--steps", 1, "--rank", 1, "--json"
    )
    assert run.code == 0, run.err
    found = json.loads(run.out)
    assert found == json.loads((tmp_path / "out" / "training.json").read_text())
    assert (found["rank"], found["settings"]["adapter"], found["settings"]["distill"]) == (1, str(adapter), True)


# --- options --------------------------------------------------------------------------------------------------------


def options() -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands["train"].params}


def test_every_setting_is_an_option_with_a_help_text() -> None:
    found = options()
    assert {field.name for field in fields(TrainSettings)} | {"config", "as_json"} == found.keys()
    for name, parameter in found.items():
        assert parameter.help and len(parameter.help) > 10 and "`" not in parameter.help, name


FLAGS: dict[str, Any] = {
    "--source-rank": 32, "--rank": 4, "--mode": "adaptive", "--split": "train[:5]", "--subset": "main",
    "--eval": "held.jsonl", "--eval-split": "test", "--epochs": 2.5, "--batch-size": 3, "--gradient-accumulation": 5,
    "--learning-rate": 1e-3, "--warmup": 0.2, "--max-length": 77, "--alpha": 16, "--targets": "q_proj,v_proj",
    "--allocate": "global", "--energy": 0.9, "--optimizer-state": "reset", "--dtype": "float32", "--seed": 7,
    "--save-steps": 11, "--report-to": "wandb", "--data-aware": True, "--cpu": True, "--resume": True, "--force": True,
    "--learning-rate-policy": "rank", "--gradient-checkpointing": False,
}  # fmt: skip
NAMES = {"--eval": "eval_data", "--continue": "adapter"}


def field_of(flag: str) -> str:
    return NAMES.get(flag, flag.removeprefix("--").replace("-", "_"))


def test_every_flag_reaches_the_settings(asked: Any) -> None:
    words: list[object] = []
    for flag, value in FLAGS.items():
        words += [flag] if value is True else [f"--no-{flag[2:]}"] if value is False else [flag, value]
    found = asked("a/model", "a/data", "-o", "out", *words)
    expected = {field_of(flag): value for flag, value in FLAGS.items()}
    assert found == TrainSettings("a/model", "a/data", Path("out"), **expected)


def test_without_flags_the_settings_are_those_of_the_library(asked: Any) -> None:
    found = asked("a/model", "a/data", "-o", "out")
    assert found.to_json() == TrainSettings("a/model", "a/data", Path("out")).to_json()


@pytest.mark.parametrize("kind", ["toml", "json"])
def test_a_file_gives_any_option_by_its_name_and_flags_win(asked: Any, tmp_path: Path, kind: str) -> None:
    config = tmp_path / f"config.{kind}"
    given = {"model": "a/model", "data": "a/data", "output": "out", **{f[2:]: v for f, v in FLAGS.items()}}
    given["targets"] = ["q_proj", "v_proj"]
    lines = [f"{name.replace('-', '_')} = {json.dumps(value)}" for name, value in given.items()]
    config.write_text(json.dumps(given) if kind == "json" else "\n".join(lines))
    expected = {field_of(flag): value for flag, value in FLAGS.items()}
    assert asked("--config", config) == TrainSettings("a/model", "a/data", Path("out"), **expected)
    found = asked("--config", config, "--rank", 2, "--gradient-checkpointing", "-o", "other")
    changed = {**expected, "rank": 2, "gradient_checkpointing": True}
    assert found == TrainSettings("a/model", "a/data", Path("other"), **changed)


def test_a_file_names_an_adapter_to_continue_as_the_flag_does(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('continue = "adapter"\ndistill = true\nlearning_rate = 1\n')
    found = asked("a/model", "a/data", "-o", "out", "--config", tmp_path / "c.toml")
    assert (found.adapter, found.distill, found.learning_rate) == ("adapter", True, 1.0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.toml", "ranks = 3", r"c\.toml: unknown option 'ranks'; known are allocate, .*continue, .*source_rank, "),
        ("c.toml", "adapter = 'x'", r"unknown option 'adapter'"),
        ("c.toml", "rank = 3.5", r"c\.toml: rank must be of type int, got 3.5"),
        ("c.toml", "rank = true", r"rank must be of type int, got True"),
        ("c.toml", "resume = 1", r"resume must be of type bool, got 1"),
        ("c.toml", "warmup = 'long'", r"warmup must be of type float, got 'long'"),
        ("c.toml", "output = 3", r"output must be of type str, got 3"),
        ("c.toml", "rank =", r"c\.toml: no readable TOML, or JSON in a \.json file \("),
        ("c.json", "[1]", r"c\.json: expected options by name, found list"),
        ("missing.toml", None, r"missing\.toml: no readable TOML, or JSON .*No such file"),
    ],
)
def test_a_bad_file_is_refused(asked: Any, tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    run = asked("a/model", "a/data", "-o", "out", "--config", tmp_path / name)
    assert run.code == 1 and run.out == ""
    assert re.fullmatch(rf"lora-squeeze: .*{message}.*\n", run.err), run.err


# --- refusals and usage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--rank", 64), "nothing to squeeze: the target rank 64 is not below the source rank 64"),
        (("--steps", 2, "--rank", 1), "the schedule is longer than the training"),
        (("--distill",), "distill needs a finished adapter"),
        (("--continue", "no/adapter"), "no/adapter: no such folder here"),
        (("--eval", "no.jsonl"), "no.jsonl: no such file"),
    ],
)
def test_a_refused_training_is_one_line_and_exit_code_1(
    place: Place, tmp_path: Path, arguments: tuple[object, ...], text: str
) -> None:
    run = train(place, tmp_path, *arguments)
    assert run.code == 1 and run.out == ""
    assert re.fullmatch(rf"lora-squeeze: .*{text}.*\n", run.err), run.err
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_command_that_brings_them(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "find_spec", lambda name: None if name == "trl" else name)
    run = train(place, tmp_path)
    assert (run.code, run.err) == (1, "lora-squeeze: training needs trl: pip install 'lora-squeeze[train]'\n")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("a/model", "a/data"), "Missing option"),
        (("a/model", "-o", "out"), "Missing argument"),
        (("a/model", "a/data", "-o", "out", "--rank", "three"), "Invalid value for '--rank'"),
        (("a/model", "a/data", "-o", "out", "--ranks", "3"), "No such option"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[str, ...], text: str) -> None:
    result = runner.invoke(app, ["train", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and text in result.output


@pytest.mark.parametrize(
    ("begun", "text"), [(True, "interrupted; go on with --resume"), (False, "nothing was written")]
)
def test_an_interrupted_training_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, begun: bool, text: str
) -> None:
    def interrupted(settings: TrainSettings, report: Any) -> Trained:
        if begun:
            settings.checkpoints.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(sft, "train", interrupted)
    run = command(tmp_path, "train", "a/model", "a/data", "-o", tmp_path / "out")
    assert run.code == 130 and text in run.err and run.err.count("\n") == 1


def test_help_imports_nothing_heavy_and_has_the_texts_of_the_settings() -> None:
    code = """
from lora_squeeze.cli import main
sys.argv = ["lora-squeeze", "train", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert imported(code) <= {"rich"}
    text = " ".join(runner.invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).output.split())
    assert "Instead of steps, passes over the data; default 1." in text
    assert all(flag in text for flag in FLAGS)


def test_the_types_of_the_options_are_those_of_the_settings() -> None:
    def kinds(hint: Any) -> set[Any]:
        return set(typing.get_args(hint) or (hint,)) - {type(None)}

    ours, theirs = typing.get_type_hints(run_train), typing.get_type_hints(TrainSettings)
    assert {name: kinds(ours[name]) for name in theirs} == {name: kinds(hint) for name, hint in theirs.items()}
