"""The command line: options, exit codes, what is printed where, and what is written."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import typer
from adapter_cases import ALPHA, CONFIG, PREFIX, RANK, SHAPES, WEIGHTS, plain_tensors, write_folder
from command_cases import command
from folder_cases import in_child, tree
from typer.testing import CliRunner

import lora_squeeze
from lora_squeeze.cli import main
from lora_squeeze.cli.app import app
from lora_squeeze.post_squeeze import squeeze
from lora_squeeze.ranks import RULES

runner = CliRunner()
ROW_KEYS = {"name", "rank", "rank_after", "energy", "scale", "singular_values"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "in")


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


# --- squeeze --------------------------------------------------------------------------------------------------------


def test_squeeze_writes_the_adapter_and_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    run = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", "--rank", 3)
    assert (run.code, run.err) == (0, "")
    assert "8 -> 3" in run.out and run.out.rstrip().endswith("written to " + str(tmp_path / "out").rstrip())
    assert re.search(r"LoRA factors .* -> ", run.out)
    assert (config_of(tmp_path / "out")["r"], config_of(tmp_path / "out")["lora_alpha"]) == (3, 3 * ALPHA / RANK)


def test_json_has_the_figures_and_nothing_else_is_printed(folder: Path, tmp_path: Path) -> None:
    run = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", "--energy", 0.9, "--json")
    found = json.loads(run.out)
    small = lora_squeeze.load(folder).squeeze(energy=0.9)
    assert (run.code, run.err, found["output"], found["rank"]) == (0, "", str(tmp_path / "out"), small.rank)
    assert ROW_KEYS <= found["modules"][0].keys()
    assert {row["name"]: row["rank_after"] for row in found["modules"]} == {n: m.rank for n, m in small.modules.items()}
    assert found["energy"] == pytest.approx(small.report.energy)


@pytest.mark.parametrize("output", [True, False])
def test_a_dry_run_writes_nothing_and_tells_the_same(folder: Path, tmp_path: Path, output: bool) -> None:
    where = ["-o", tmp_path / "out"] if output else []
    before = tree(tmp_path)
    dry = command(tmp_path, "squeeze", folder, *where, "--rank", 3, "--dry-run", "--json")
    text = command(tmp_path, "squeeze", folder, *where, "--rank", 3, "--dry-run")
    assert tree(tmp_path) == before
    wet = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", "--rank", 3, "--json")
    assert (dry.code, text.code, wet.code) == (0, 0, 0)
    assert text.out.rstrip().endswith("dry run: nothing written")
    dry_found, wet_found = json.loads(dry.out), json.loads(wet.out)
    assert (dry_found.pop("output"), wet_found.pop("output")) == (None, str(tmp_path / "out"))
    assert [row["energy"] for row in dry_found["modules"]] == pytest.approx(
        [row["energy"] for row in wet_found["modules"]], rel=1e-9
    )


@pytest.mark.parametrize(
    "request_", [("--rank", RANK), ("--rank", 99), ("--energy", 1), ("--dtype", "float32"), ("--max-rank", 99)]
)
def test_a_squeeze_that_changes_nothing_is_refused(folder: Path, tmp_path: Path, request_: tuple[str, Any]) -> None:
    run = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", *request_)
    assert run.code == 1 and "nothing to do: the adapter has rank 8" in run.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("request_", [("--dtype", "bf16"), ("--rank", RANK, "--alpha", "fold"), ("--alpha", "fold")])
def test_another_dtype_or_scale_is_something_to_do(folder: Path, tmp_path: Path, request_: tuple[Any, ...]) -> None:
    run = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", *request_)
    assert run.code == 0, run.err
    assert config_of(tmp_path / "out")["r"] == RANK


def test_an_output_is_replaced_only_with_force(folder: Path, tmp_path: Path) -> None:
    out = write_folder(tmp_path / "out")
    before = tree(out)
    run = command(tmp_path, "squeeze", folder, "-o", out, "--rank", 3)
    assert run.code == 1 and "exists already" in run.err and "--force" in run.err
    assert tree(out) == before
    assert command(tmp_path, "squeeze", folder, "-o", out, "--rank", 3, "--force").code == 0
    assert config_of(out)["r"] == 3


def test_each_prints_a_line_per_module(folder: Path, tmp_path: Path) -> None:
    summary = command(tmp_path, "squeeze", folder, "--dry-run", "--rank", 3)
    each = command(tmp_path, "squeeze", folder, "--dry-run", "--rank", 3, "--each")
    assert "q_proj x 2" in summary.out and "layers.0.q_proj" not in summary.out
    assert all(name in each.out for name in SHAPES)


def test_the_energy_of_a_line_is_that_of_its_modules_together(tmp_path: Path) -> None:
    """Where one of them is small, the mean over modules would say something else, beside the error of all."""
    tensors = plain_tensors()
    tensors[f"{PREFIX}layers.1.q_proj.lora_B.weight"] *= 1e-3
    tensors[f"{PREFIX}layers.1.q_proj.lora_A.weight"][1:] *= 1e-3
    folder = write_folder(tmp_path / "in", tensors)
    run = command(tmp_path, "squeeze", folder, "--dry-run", "--rank", 3)
    rows = [row for row in lora_squeeze.load(folder).squeeze(rank=3).report.rows if "q_proj" in row.name]
    kept = 1 - sum(row.discarded**2 for row in rows) / sum(row.norm**2 for row in rows)
    least = min(row.energy for row in rows)
    assert abs(kept - sum(row.energy for row in rows) / 2) > 1e-3
    assert f"{kept:.2%} (least {least:.2%})" in run.out and f"{(1 - kept) ** 0.5:.4f}" in run.out


@pytest.mark.parametrize("rank", [3, RANK])
def test_rounding_is_told_where_the_dtype_is_too_narrow(tmp_path: Path, rank: int) -> None:
    folder = write_folder(tmp_path / "in", {key: t * 1e-6 for key, t in plain_tensors().items()})
    told = r"rounding to 16 bits adds an error of 0\.\d{4}, 0\.\d{4} in layers.*: ask for dtype float32"
    for dtype, found in (("float16", True), ("bfloat16", False)):
        request = ("-o", tmp_path / "out", "--rank", rank, "--dtype", dtype, "--force")
        run = command(tmp_path, "squeeze", folder, *request)
        assert run.code == 0 and bool(re.search(told, run.out)) == found, run.out


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (("--error", 0.3), {"error": 0.3}),
        (("--size", "6kB"), {"size": "6kB"}),
        (("--params", 900), {"params": 900}),
        (("--sv-ratio", 3), {"sv_ratio": 3.0}),
        (("--sv-cumulative", 0.8), {"sv_cumulative": 0.8}),
        (("--sv-fro", 0.9), {"sv_fro": 0.9}),
        (("--rank", 4, "--allocate", "global"), {"rank": 4, "allocate": "global"}),
        (("--energy", 0.8, "--min-rank", 2, "--max-rank", 6, "--multiple-of", 2),
         {"energy": 0.8, "min_rank": 2, "max_rank": 6, "multiple_of": 2}),
        (("--rank", 3, "--method", "qr", "--dtype", "fp16", "--device", "cpu"),
         {"rank": 3, "method": "qr", "dtype": torch.float16, "device": "cpu"}),
        (("--rank", 3, "--method", "rsvd", "--seed", 7), {"rank": 3, "method": "rsvd", "seed": 7}),
    ],
)  # fmt: skip
def test_every_option_does_what_the_library_does(
    folder: Path, tmp_path: Path, request_: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """Bit for bit."""
    run = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", *request_)
    assert run.code == 0, run.err
    lora_squeeze.load(folder).squeeze(**options).save(tmp_path / "api")
    ours, theirs = (safetensors.torch.load_file(tmp_path / name / WEIGHTS) for name in ("out", "api"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert config_of(tmp_path / "out") == config_of(tmp_path / "api")


def test_an_adapter_in_a_subfolder_is_found(folder: Path, tmp_path: Path) -> None:
    run = command(tmp_path, "inspect", tmp_path, "--subfolder", folder.name, "--json")
    assert run.code == 0 and json.loads(run.out)["rank"] == RANK


# --- inspect --------------------------------------------------------------------------------------------------------


def test_inspect_shows_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    table, each, data = (command(tmp_path, "inspect", folder, *more) for more in ((), ("--each",), ("--json",)))
    assert tree(tmp_path) == before and (table.code, each.code, data.code) == (0, 0, 0)
    found, report = json.loads(data.out), lora_squeeze.load(folder).report
    assert found["rank"] == RANK and found["modules"] == report.to_json()["modules"]
    assert f"Rank {report.uniform_rank(0.95)} for all modules keeps 95 % of the energy" in " ".join(table.out.split())
    assert "q_proj x 2" in table.out and all(name in each.out for name in SHAPES)


def test_carried_tensors_are_named_with_their_cause(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", plain_tensors() | {f"{PREFIX}lm_head.weight": torch.ones(30, 20)})
    assert re.search(r"embedding 2.4 kB: PEFT saves", command(tmp_path, "inspect", folder).out)


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_inspect_names_the_way_to_leave_out_copies_of_the_base(tmp_path: Path, copies: int) -> None:
    (tmp_path / "base").mkdir()
    base = {"embed_tokens.weight": torch.ones(30, 20), "lm_head.weight": torch.ones(30, 20)}
    safetensors.torch.save_file(base, tmp_path / "base" / "model.safetensors")
    carried = {f"{PREFIX}{name}": t + (i >= copies) for i, (name, t) in enumerate(base.items())}
    folder = write_folder(tmp_path / "in", plain_tensors() | carried)
    run = command(tmp_path, "inspect", folder, "--base", tmp_path / "base")
    assert run.out.count("can be dropped") == copies
    modules = re.search(r"can become modules: (lora-squeeze convert .* -o OUT)", run.out)
    assert (modules is not None) == (copies < 2)
    if modules:
        words = modules[1].replace("ADAPTER", str(folder)).replace("OUT", str(tmp_path / "modules")).split()[1:]
        assert command(tmp_path, *words).code == 0
        assert len(safetensors.torch.load_file(tmp_path / "modules" / WEIGHTS)) == 2 * (len(SHAPES) + 2 - copies)
    told = {0: "", 1: "1 of the 2 tensors that it carries are in the base", 2: "all that it carries is in the base"}
    call = re.search(rf"{told[copies]}: (lora-squeeze convert .* -o OUT) writes it without", run.out)
    assert (call is not None) == (copies > 0)
    if call:
        words = call[1].replace("ADAPTER", str(folder)).replace("OUT", str(tmp_path / "out")).split()[1:]
        assert command(tmp_path, *words).code == 0
        assert len(safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)) == 2 * len(SHAPES) + 2 - copies


# --- refusals and usage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--rank", 3, "--energy", 0.9), "rank.*energy"),
        ((), "how small"),
        (("--rank", 0), "rank must be a whole number from 1, got 0"),
        (("--energy", 1.5), r"energy must be in \(0, 1\], got 1.5"),
        (("--params", 1), "the smallest possible is"),
        (("--size", "ten"), "size 'ten' is not understood"),
        (("--rank", 3, "--dtype", "int8"), "dtype must be one of .*torch.float16, got torch.int8"),
        (("--rank", 3, "--dtype", "spooky"), "dtype 'spooky' is not known; choose float32, float16 or bfloat16"),
        (("--rank", 3, "--dtype", "nn"), "dtype 'nn' is not known"),
        (("--energy", 0.9, "--min-rank", 5, "--max-rank", 4), "impossible limits: min_rank 5, max_rank 4"),
    ],
)  # fmt: skip
def test_a_refused_request_is_one_line_and_exit_code_1(
    folder: Path, tmp_path: Path, arguments: tuple[Any, ...], text: str
) -> None:
    before = tree(tmp_path)
    run = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", *arguments)
    assert run.code == 1 and run.out == ""
    assert re.fullmatch(rf"lora-squeeze: .*({text}).*\n", run.err), run.err
    assert tree(tmp_path) == before


WORDS = {
    "method": "method 'spooky'",
    "allocate": "allocation 'spooky'",
    "alpha": "alpha .*'spooky'",
    "device": "spooky",
}


def test_as_installed_unknown_words_are_refused_too(folder: Path, tmp_path: Path) -> None:
    """In a process of its own, without the type checker that the other tests run under."""
    code = f"""
import sys
from lora_squeeze.cli import main
for option in {list(WORDS)}:
    sys.argv = ["lora-squeeze", "squeeze", {str(folder)!r}, "--dry-run", "--rank", "3", "--" + option, "spooky"]
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1"] * len(WORDS), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(WORDS), done.stderr
    for text, line in zip(WORDS.values(), lines, strict=True):
        assert re.match(f"lora-squeeze: .*{text}", line), line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("squeeze", "IN", "--rank", 3), "give an output folder with -o, or --dry-run"),
        (("squeeze", "IN", "-o", "OUT", "--rank", "three"), "Invalid value for '--rank'"),
        (("squeeze", "IN", "-o", "OUT", "--rnak", 3), "No such option"),
        (("squeeze",), "Missing argument"),
        (("sqeeze",), "No such command"),
    ],
)
def test_wrong_usage_is_exit_code_2(folder: Path, tmp_path: Path, arguments: tuple[Any, ...], text: str) -> None:
    places = {"IN": str(folder), "OUT": str(tmp_path / "out")}
    result = runner.invoke(app, [places.get(str(a), str(a)) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 2 and text in result.output
    assert not (tmp_path / "out").exists()


def test_version(tmp_path: Path) -> None:
    run = command(tmp_path, "--version")
    assert (run.code, run.out) == (0, f"{lora_squeeze.__version__}\n")
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", lora_squeeze.__version__)


def test_a_reader_that_stops_reading_is_no_error() -> None:
    """`lora-squeeze ... | head -1`"""
    code = "from lora_squeeze.cli import main; main()"
    command_ = f"{sys.executable} -c '{code}' squeeze --help; echo code $? >&2"
    done = subprocess.run(f"({command_}) | true", shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == "code 0\n"


@pytest.mark.parametrize("unbuffered", [True, False])
@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("name", ["squeeze", "inspect"])
def test_a_full_disk_behind_standard_output_is_one_line(
    folder: Path, tmp_path: Path, name: str, more: tuple[str, ...], unbuffered: bool
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("a file of Linux")
    squeeze = ("-o", str(tmp_path / "out"), "--rank", "3") if name == "squeeze" else ()
    words = (name, str(folder), *squeeze, *more)
    assert with_output("/dev/full", tmp_path / "err", *words, unbuffered=unbuffered) == 1
    err = (tmp_path / "err").read_text()
    assert re.fullmatch(r"lora-squeeze: cannot write \(No space .*\n", err), err
    assert (tmp_path / "out" / WEIGHTS).exists() == (name == "squeeze")


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_without_a_standard_output_the_work_is_done(folder: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    words = ("squeeze", str(folder), "-o", str(tmp_path / "out"), "--rank", "3", *more)
    assert with_output(None, tmp_path / "err", *words) == 0
    assert (tmp_path / "err").read_text() == "" and config_of(tmp_path / "out")["r"] == 3


def with_output(out: str | None, err: Path, *words: str, unbuffered: bool = False) -> int:
    """Exit code of the command in a fork, as the interpreter would have it at its end; None: no standard output."""

    def child() -> None:
        sys.argv = ["lora-squeeze", *words]
        sys.stdout = None if out is None else open(out, "w")  # noqa: SIM115
        if unbuffered:
            sys.stdout.reconfigure(write_through=True)
        code: Any = 0
        with err.open("w") as sys.stderr:
            try:
                main()
            except SystemExit as stop:
                code = stop.code or 0
            if out is not None:
                sys.stdout.flush()
        os._exit(code)

    return in_child(child)


# --- help -----------------------------------------------------------------------------------------------------------


def options_of(name: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands[name].params}


@pytest.mark.parametrize("name", ["squeeze", "inspect", "demo"])
def test_every_option_has_a_help_text(name: str) -> None:
    for option, parameter in options_of(name).items():
        if option != "help":
            assert parameter.help and len(parameter.help) > 10, option
            assert parameter.help in parameter.help.strip() and "`" not in parameter.help, option


def test_the_command_offers_every_argument_of_the_library() -> None:
    ours = set(inspect.signature(squeeze).parameters) - {"adapter", "progress", "moments"}
    assert "calibrate" in options_of("squeeze"), "for moments"
    assert ours <= options_of("squeeze").keys()
    assert set(RULES) <= ours


def test_help_prints_every_option_with_the_text_of_the_library() -> None:
    result = runner.invoke(app, ["squeeze", "--help"], env={"COLUMNS": "300"})
    assert result.exit_code == 0
    text = " ".join(result.output.split())  # lines are broken
    assert "Share of the squared singular values to keep, in (0, 1]" in text
    for name in RULES:
        assert f"--{name.replace('_', '-')}" in result.output


def test_an_interruption_is_one_line_and_its_own_exit_code(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_squeeze.hub.load", interrupted)
    run = command(tmp_path, "squeeze", folder, "-o", tmp_path / "out", "--rank", 2)
    assert (run.code, run.out) == (130, "")
    assert run.err.strip() == "lora-squeeze: interrupted; an output is there as a whole or not at all"
    assert not (tmp_path / "out").exists()


def test_statistics_are_written_under_a_name_that_calibrate_knows(folder: Path, tmp_path: Path) -> None:
    """Refused before any work: the examples are not there."""
    words = ["calibrate", str(folder), "none.jsonl", "-o", str(tmp_path / "statistics")]
    result = runner.invoke(app, words, env={"COLUMNS": "200"})
    assert result.exit_code == 2 and "the name must end in .safetensors" in result.output
