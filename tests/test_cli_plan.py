"""The commands plan and search: options, exit codes, what is printed where, and what is written."""

import inspect
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import typer
from adapter_cases import CONFIG, RANK, SHAPES, WEIGHTS, plain_config, plain_tensors, write_folder
from command_cases import Run, command
from folder_cases import start, tree
from pool_cases import alive
from test_import import imported
from typer.testing import CliRunner

import lora_squeeze
from lora_squeeze.cli import main
from lora_squeeze.cli.app import app
from lora_squeeze.dials import Dials
from lora_squeeze.plan import Plan, make_plan
from lora_squeeze.search import search

# The metric is the rank in the candidate's configuration, as JSON or as text; calls are counted in a file.
EVAL = f"""
import json, sys
from pathlib import Path
rank = json.loads((Path(sys.argv[1]) / {CONFIG!r}).read_text())["r"]
with open(sys.argv[2], "a") as calls:
    print(rank, file=calls)
if len(sys.argv) > 3 and rank == int(sys.argv[3]):
    sys.exit("no memory left")
print(f"of 100 the rank is {{rank}}.") if len(sys.argv) < 5 else print(json.dumps({{"rank": rank, "n": 1}}))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "in")


def ranks(folder: Path) -> dict[str, int]:
    return {name: module.rank for name, module in lora_squeeze.load(folder).modules.items()}


# --- plan -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plan.toml", "plan.json"])
def test_a_plan_is_written_edited_and_obeyed(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    run = command(tmp_path, "plan", folder, "--size", "6kB", "--min-rank", 1, "-o", path)
    assert (run.code, run.err) == (0, "") and run.out.rstrip().endswith(f"written to {path}")
    assert "budget: energy per parameter" in run.out and "q_proj x 2" in run.out
    made = make_plan(lora_squeeze.load(folder), name=str(folder), size="6kB", min_rank=1)
    assert Plan.load(path) == made
    one = next(iter(made.modules))
    path.write_text(re.sub(rf'("{re.escape(one)}".*?\brank"?\W+)\d+', r"\g<1>7", path.read_text(), count=1))
    assert command(tmp_path, "squeeze", folder, "--plan", path, "-o", tmp_path / "out").code == 0
    assert ranks(tmp_path / "out") == Plan.load(path).ranks == made.ranks | {one: 7} != made.ranks


def test_squeeze_tells_that_a_plan_was_made_for_another_file(folder: Path, tmp_path: Path) -> None:
    tensors = {key: 2 * tensor for key, tensor in plain_tensors().items()}
    write_folder(tmp_path / "other", tensors)
    path, told = tmp_path / "plan.toml", "the plan was made for another file"
    command(tmp_path, "plan", folder, "--rank", 3, "-o", path)
    for name, expected in (("in", False), ("other", True)):
        run = command(tmp_path, "squeeze", tmp_path / name, "--plan", path, "-o", tmp_path / f"{name}-out")
        assert run.code == 0 and (told in run.out) is expected, run.err


def test_without_a_file_a_plan_is_shown(folder: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    run, each = (command(tmp_path, "plan", folder, "--energy", 0.9, *more) for more in ((), ("--each",)))
    data = command(tmp_path, "plan", folder, "--energy", 0.9, "--json")
    assert (run.code, each.code, data.code) == (0, 0, 0) and tree(tmp_path) == before
    assert "nothing written: give -o plan.toml" in run.out and all(name in each.out for name in SHAPES)
    made = make_plan(lora_squeeze.load(folder), energy=0.9)
    found = json.loads(data.out)
    assert {name: row["rank"] for name, row in found["modules"].items()} == made.ranks
    assert found["totals"] == made.totals and found["adapter"] == str(folder)


def test_kinds_are_named_without_bare_numbers(tmp_path: Path) -> None:
    shapes = {"0.attn.to_out.0": (24, 20), "0.ff.net.0": (24, 20), "1.attn.to_out.0": (24, 20)}
    config = plain_config(target_modules=["to_out.0", "net.0"])
    folder = write_folder(tmp_path / "in", plain_tensors(shapes), config)
    out = command(tmp_path, "plan", folder, "--rank", 3).out
    assert "to_out.0 x 2" in out and "net.0" in out


@pytest.mark.parametrize(
    ("request_", "options"),
    [
        (("--rank", 3), {"rank": 3}),
        (("--error", 0.3), {"error": 0.3}),
        (("--params", 900, "--allocate", "uniform"), {"params": 900, "allocate": "uniform"}),
        (("--energy", 0.9, "--min-rank", 2, "--max-rank", 6, "--multiple-of", 2),
         {"energy": 0.9, "min_rank": 2, "max_rank": 6, "multiple_of": 2}),
        (("--params", 900, "--ranks", "1, 4,8"), {"params": 900, "ranks": (1, 4, 8)}),
        (("--params", 900, "--same-rank-per", "type"), {"params": 900, "same_rank_per": "type"}),
    ],
)  # fmt: skip
def test_every_dial_does_what_the_library_does(
    folder: Path, tmp_path: Path, request_: tuple[Any, ...], options: dict[str, Any]
) -> None:
    """In `plan` and in `squeeze`."""
    wanted = make_plan(lora_squeeze.load(folder), **options).ranks
    assert command(tmp_path, "plan", folder, "-o", tmp_path / "plan.toml", *request_).code == 0
    assert Plan.load(tmp_path / "plan.toml").ranks == wanted
    run = command(tmp_path, "squeeze", folder, "--dry-run", "--json", *request_)
    assert {row["name"]: row["rank_after"] for row in json.loads(run.out)["modules"]} == wanted


def test_a_dtype_is_planned_for(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    assert command(tmp_path, "plan", folder, "--size", "5kB", "--dtype", "bf16", "-o", path).code == 0
    assert command(tmp_path, "squeeze", folder, "--plan", path, "-o", tmp_path / "out").code == 0
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= 5000
    assert {str(m.dtype) for m in lora_squeeze.load(tmp_path / "out").modules.values()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("plan", "IN", "-o", "PLAN"), "how small"),
        (("plan", "IN", "-o", "PLAN", "--rank", 3, "--energy", 0.9), "give one rule, not 2: rank, energy"),
        (("plan", "IN", "-o", "PLAN", "--size", 10), "a budget of 10 bytes is too small: the smallest possible is"),
        (("plan", "IN", "-o", "PLAN", "--rank", 3, "--ranks", "a,b"), "ranks 'a,b' are not understood"),
        (("plan", "IN", "-o", "PLAN", "--rank", 3, "--ranks", "16"), "rank 3 is below all allowed ranks 16"),
        (("plan", "IN", "-o", "OLD", "--rank", 3), "old.toml exists already and nothing was written"),
        (("squeeze", "IN", "-o", "OUT", "--plan", "PLAN"), "no readable TOML"),
        (("squeeze", "IN", "-o", "OUT", "--plan", "OLD"), "no plan: expected a line format = 1"),
        (("squeeze", "IN", "-o", "OUT", "--plan", "GOOD", "--rank", 3), "give one rule: a plan says every rank, leave"),
        (("squeeze", "IN", "-o", "OUT", "--plan", "ALL"), "nothing to do: the adapter has rank 8"),
    ],
)  # fmt: skip
def test_a_refused_request_is_one_line_and_exit_code_1(
    folder: Path, tmp_path: Path, arguments: tuple[Any, ...], text: str
) -> None:
    places = {"IN": folder, "PLAN": tmp_path / "plan.toml", "OUT": tmp_path / "out", "OLD": tmp_path / "old.toml"}
    for name, default in (("GOOD", 3), ("ALL", RANK)):
        places[name] = tmp_path / f"{name}.toml"
        places[name].write_text(f"format = 1\ndefault_rank = {default}\n")
    places["OLD"].write_text("x = 1\n")
    before = tree(tmp_path)
    run = command(tmp_path, *(places.get(a, a) for a in arguments))
    assert run.code == 1 and run.out == ""
    assert re.fullmatch(rf"lora-squeeze: .*{text}.*\n", run.err), run.err
    assert tree(tmp_path) == before


# --- search -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def metric(tmp_path: Path) -> str:
    (tmp_path / "eval.py").write_text(EVAL)
    return f"{sys.executable} -S {tmp_path / 'eval.py'} {{adapter}} {tmp_path / 'calls'}"


def searched(tmp_path: Path, metric: str, *more: object) -> Run:
    return command(tmp_path, "search", tmp_path / "in", "--metric", metric, "-o", tmp_path / "out", *more)


def calls(tmp_path: Path) -> list[int]:
    found = [int(line) for line in (tmp_path / "calls").read_text().split()]
    (tmp_path / "calls").unlink()
    return found


def test_a_search_writes_the_smallest_that_passes(folder: Path, tmp_path: Path, metric: str) -> None:
    before = tree(folder)
    run = searched(tmp_path, metric, "--max-drop", "60%")
    assert run.code == 0 and tree(folder) == before
    assert calls(tmp_path) == [8, 2, 4] and ranks(tmp_path / "out") == dict.fromkeys(SHAPES, 4)
    assert "rank 4 is the smallest that passes; written to" in run.out and "at least 3.2" in run.out
    assert re.search(r"4 +│ 4 +│ -4 +│ .*passes", run.out) and re.search(r"2 +│ 2 .*does not pass", run.out)
    assert run.err.splitlines()[0] == "source: measuring" and "rank 2: 2, does not pass" in run.err
    assert {path.name for path in (tmp_path / "out-search").iterdir()} == {"results.json", "logs"}
    assert (tmp_path / "out-search" / "logs" / "rank-2.stdout").read_text() == "of 100 the rank is 2.\n"


def test_a_search_goes_on_and_finds_its_results_again(folder: Path, tmp_path: Path, metric: str) -> None:
    failed = searched(tmp_path, f"{metric} {{rank}}", "--max-drop", 5, "--ranks", "3,5,6")  # the source's rank fails
    assert failed.code == 1 and "rank 8: the command failed with exit code 1: no memory left; what" in failed.err
    assert failed.err.splitlines()[-1].startswith("lora-squeeze: ") and not (tmp_path / "out").exists()
    assert calls(tmp_path) == [8]
    assert searched(tmp_path, metric, "--max-drop", 5, "--ranks", "3,5,6").code == 0
    assert calls(tmp_path) == [8, 5, 3] and ranks(tmp_path / "out") == dict.fromkeys(SHAPES, 3)
    refused = searched(tmp_path, metric, "--max-drop", 2.5, "--ranks", "3,5,6")
    assert refused.code == 1 and "exists already" in refused.err and not (tmp_path / "calls").exists()
    again = searched(tmp_path, metric, "--max-drop", 2.5, "--ranks", "3,5,6", "--force", "--json")
    assert again.code == 0 and calls(tmp_path) == [6] and ranks(tmp_path / "out") == dict.fromkeys(SHAPES, 6)
    found = json.loads(again.out)
    assert (found["rank"], found["bound"], found["output"]) == (6, 5.5, str(tmp_path / "out"))
    assert [(row["rank"], row["passes"], row["reused"]) for row in found["curve"]] == [
        (5, False, True),
        (6, True, False),
    ]
    assert found["source"]["reused"] and found["source"]["metric"] == 8


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_if_none_passes_the_curve_is_shown_and_the_exit_code_is_1(
    folder: Path, tmp_path: Path, metric: str, more: tuple[str, ...]
) -> None:
    run = searched(tmp_path, metric, "--max-drop", 0, "--all", *more)
    assert run.code == 1 and calls(tmp_path) == [8, 1, 2, 4] and not (tmp_path / "out").exists()
    assert run.err.splitlines()[-1] == (
        "lora-squeeze: no candidate passes: the largest, rank 4, measures 4, the bound is 8; nothing was written"
    )
    if more:
        found = json.loads(run.out)
        assert (found["rank"], found["output"]) == (None, None) and [row["rank"] for row in found["curve"]] == [1, 2, 4]
    else:
        assert len(re.findall("does not pass", run.out)) == 3 and "source" in run.out


def test_losses_json_keys_and_sizes(folder: Path, tmp_path: Path, metric: str) -> None:
    """Here the rank is the loss: smaller candidates are better, and the search says that this is strange."""
    arguments = ("--max-drop", 0, "--lower-is-better", "--json-key", "rank", "--timeout", 60)
    run = searched(tmp_path, f"{metric} 0 json", *arguments)
    assert run.code == 0, run.err
    assert ranks(tmp_path / "out") == dict.fromkeys(SHAPES, 1)
    assert "rank 1 measures better (1) than rank 2 (2): the metric does not grow with the rank" in run.out
    missing = searched(tmp_path, f"{metric} 0 json", "--max-drop", 0, "--json-key", "f1", "--force")
    assert missing.code == 1 and "no number 'f1' in the JSON object that the command printed" in missing.err
    size = (
        "from pathlib import Path; import sys; print((Path(sys.argv[1]) / 'adapter_model.safetensors').stat().st_size)"
    )
    (tmp_path / "size.py").write_text(size)
    command_ = f"{sys.executable} -S {tmp_path / 'size.py'} {{adapter}}"
    run = searched(tmp_path, command_, "--max-drop", "30%", "--over", "size", "--force", "--work", tmp_path / "w")
    assert run.code == 0, run.err
    wanted = lora_squeeze.load(folder).squeeze(rank=4, allocate="global")
    assert ranks(tmp_path / "out") == {name: module.rank for name, module in wanted.modules.items()}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--max-drop", "much"), "max_drop 'much' is not understood"),
        (("--max-drop", 1, "--ranks", "9"), "no rank to try below the source rank 8"),
        (("--max-drop", 1, "--timeout", 0), "timeout must be above 0 seconds, got 0"),
        (("--max-drop", 1, "--metric", "python eval.py"), "does not mention {adapter}"),
        (("--max-drop", 1, "--over", "energy"), "over must be one of rank, size, got 'energy'"),
        (("--max-drop", 1, "-o", "IN"), "is the folder that the adapter is read from"),
    ],
)
def test_a_search_that_cannot_be_meant_runs_nothing(
    folder: Path, tmp_path: Path, metric: str, more: tuple[Any, ...], text: str
) -> None:
    before = tree(tmp_path)
    run = searched(tmp_path, metric, *(str(folder) if part == "IN" else part for part in more))
    assert run.code == 1 and run.out == "" and text in run.err and run.err.count("\n") == 1, run.err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_stopped_search_ends_its_command(folder: Path, tmp_path: Path, number: int, code: int) -> None:
    (tmp_path / "slow.py").write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(f'{{os.getpid()}} '); time.sleep(60)"
    )

    def child() -> None:
        metric = f"{sys.executable} -S {tmp_path / 'slow.py'} {{adapter}}"
        sys.argv = ["", "search", str(folder), "--metric", metric, "--max-drop", "1", "-o", str(tmp_path / "out")]
        with (tmp_path / "err").open("w") as sys.stderr:
            try:
                main()
            except SystemExit as stop:
                sys.stderr.flush()
                os._exit(int(stop.code or 0))

    pid = start(child)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith(" "):
        time.sleep(0.02)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == code
    command_id, deadline = int((tmp_path / "pid").read_text()), time.monotonic() + 5
    while alive(command_id) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(command_id)
    if number == signal.SIGINT:
        assert "interrupted; the same command goes on from " in (tmp_path / "err").read_text()


# --- usage and help ---------------------------------------------------------------------------------------------------


def options_of(name: str) -> dict[str, Any]:
    group: Any = typer.main.get_command(app)
    return {parameter.name: parameter for parameter in group.commands[name].params}


@pytest.mark.parametrize("name", ["plan", "search", "squeeze", "merge", "subtract", "convert"])
def test_every_option_has_a_help_text(name: str) -> None:
    for option, parameter in options_of(name).items():
        if option != "help":
            assert parameter.help and len(parameter.help) > 10 and "`" not in parameter.help, option


def test_the_commands_offer_every_argument_of_the_library() -> None:
    dials = set(Dials.__dataclass_fields__)
    assert dials <= options_of("plan").keys() and dials | {"plan"} <= options_of("squeeze").keys()
    assert all(
        dials - {"sv_ratio", "sv_cumulative", "sv_fro"} <= options_of(name).keys() for name in ("merge", "convert")
    )
    ours = set(inspect.signature(search).parameters) - {"name", "source", "tell"}
    assert ours <= options_of("search").keys()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("plan",), "Missing argument"),
        (("plan", "IN", "--rank", "three"), "Invalid value for '--rank'"),
        (("search", "IN", "--max-drop", 1, "-o", "OUT"), "Missing option '--metric'"),
        (("search", "IN", "--metric", "x {adapter}", "-o", "OUT"), "Missing option '--max-drop'"),
        (("search", "IN", "--metric", "x {adapter}", "--max-drop", 1), "Missing option '--output'"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: tuple[Any, ...], text: str) -> None:
    result = CliRunner().invoke(app, list(map(str, arguments)), env={"COLUMNS": "200"})
    assert result.exit_code == 2 and text in result.output


@pytest.mark.parametrize("name", ["plan", "search"])
def test_help_does_not_wait_for_torch(name: str) -> None:
    code = f"""
from lora_squeeze.cli import main
sys.argv = ["lora-squeeze", {name!r}, "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert imported(code) <= {"rich"}
