"""A fleet from folders to folders: what is written equals single squeezes, nothing is done twice or replaced."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_cases import CONFIG, PREFIX, SHAPES, WEIGHTS, plain_config, plain_tensors, write_folder
from fleet_cases import BASE, RANKS, refusal, write_fleet, write_member
from fleet_cases import no_processes as no_processes
from folder_cases import tree
from peft_cases import CASES
from peft_models import Menagerie

import lora_squeeze
from lora_squeeze.fleet import jobs
from lora_squeeze.fleet.members import Shape
from lora_squeeze.fleet.memory import slot_parameters
from lora_squeeze.fleet.report import FleetReport
from lora_squeeze.fleet.run import squeeze_fleet
from lora_squeeze.servers import server_of

pytestmark = pytest.mark.usefixtures("no_processes")
SLOT = 2 * slot_parameters({name: Shape(*shape) for name, shape in SHAPES.items()}, server_of("vllm"))[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_fleet(tmp_path / "in")


def run(root: Path, rank: int = 8, out: str = "out", **options: Any) -> FleetReport:
    """With memory for slots of this rank."""
    slots = options.get("slots") or len(RANKS)
    return squeeze_fleet([root], root.parent / out, **{"memory": slots * rank * SLOT, **options})


def states(report: FleetReport) -> dict[str, str]:
    return {row.name: row.state for row in report.members}


def same_tensors(one: Path, other: Path) -> bool:
    left, right = (safetensors.torch.load_file(folder / WEIGHTS) for folder in (one, other))
    return left.keys() == right.keys() and all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# --- measuring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["decaying", "steps", "flat"])
def test_losses_are_those_of_a_squeeze_to_each_rank(tmp_path: Path, kind: str) -> None:
    folder = write_member(tmp_path / "in", 6, kind)
    adapter = lora_squeeze.load(folder)
    found = jobs.measure_member(str(folder))
    assert found["sha256"] == adapter.source.digest() and len(found["losses"]) == adapter.rank
    for rank, loss in enumerate(found["losses"], 1):
        assert loss == pytest.approx(1 - adapter.squeeze(rank=rank, dtype=torch.float64).report.energy, abs=1e-6)


def test_losses_of_modules_with_several_ranks_and_groups(tmp_path: Path) -> None:
    """A convolution of two groups and a module of rank 2 beside one of rank 4."""
    tensors = plain_tensors({"q_proj": (16, 16)}, 4) | plain_tensors({"v_proj": (16, 16)}, 2)
    tensors[f"{PREFIX}conv.lora_A.weight"] = torch.randn(4, 8, 3, 3)
    tensors[f"{PREFIX}conv.lora_B.weight"] = torch.randn(16, 2, 1, 1)
    config = plain_config(r=4, target_modules=["conv", "q_proj", "v_proj"], rank_pattern={"v_proj": 2})
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, config))
    losses = jobs.measure_member(str(tmp_path / "in"))["losses"]
    for rank in (2, 3, 4):
        assert losses[rank - 1] == pytest.approx(1 - adapter.squeeze(rank=rank).report.energy, abs=1e-6)


def test_an_adapter_that_changes_nothing_loses_nothing(tmp_path: Path) -> None:
    assert jobs.measure_member(str(write_member(tmp_path / "in", 4, "zero")))["losses"] == [0.0] * 4


# --- what is written --------------------------------------------------------------------------------------------------


def test_members_are_squeezed_as_each_alone_or_copied(root: Path) -> None:
    report, out = run(root), root.parent / "out"
    assert report.max_rank == 8 and states(report) == dict.fromkeys(sorted(RANKS), "written")
    lora_squeeze.load(root / "c").squeeze(rank=8).save(root.parent / "single")
    for name in (WEIGHTS, CONFIG, "README.md"):
        assert (out / "c" / name).read_bytes() == (root.parent / "single" / name).read_bytes()
    for name in ("team/a", "team/b"):
        assert same_tensors(out / name, root / name), "no more rank than a slot: as it is"
    assert {row.name: row.rank_after for row in report.members} == {"c": 8, "team/a": 8, "team/b": 4}
    for row in report.members:
        assert (row.bytes, row.bytes_after) == tuple((p / row.name / WEIGHTS).stat().st_size for p in (root, out))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_dtype_is_written_to_all(root: Path, dtype: torch.dtype) -> None:
    run(root, dtype=dtype)
    for name in RANKS:
        small = lora_squeeze.load(root.parent / "out" / name)
        assert {module.dtype for module in small.modules.values()} == {dtype}
        assert same_tensors(root.parent / "out" / name, root / name) == (dtype == torch.float32 and name != "c")
    assert set(states(run(root, dtype=dtype)).values()) == {"already there"}


def test_a_budget_of_the_host_gives_every_member_a_rank_of_its_own(root: Path) -> None:
    whole = run(root, 16, "large").host_bytes
    report = run(root, 16, host_memory=whole // 2, weights={"c": 50})
    found = {name: lora_squeeze.load(root.parent / "out" / name) for name in RANKS}
    assert {row.name: row.rank_after for row in report.members} == {name: a.rank for name, a in found.items()}
    assert sum(adapter.parameters for adapter in found.values()) * 2 <= report.host_bytes <= whole // 2
    assert "--max-cpu-loras 3" in report.options and report.max_rank == 16
    assert "--max-loras 1 --max-cpu-loras 3" in run(root, 16, slots=1, host_memory=whole, dry_run=True).options
    assert "--max-loras 1 --max-cpu-loras 1" in run(root, 16, slots=1, dry_run=True).options


def test_a_server_without_slots_gets_the_sum(root: Path) -> None:
    report = run(root, engine="peft", memory=3000, slot_dtype=torch.float32)
    parameters = sum(lora_squeeze.load(root.parent / "out" / name).parameters for name in RANKS)
    assert parameters * 4 == report.bytes == report.host_bytes <= 3000
    assert (report.max_rank, report.slots, report.options) == (None, None, "")


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_second_run_writes_nothing(root: Path) -> None:
    first = run(root)
    before = tree(root.parent / "out")
    again = run(root)
    assert tree(root.parent / "out") == before and set(states(again).values()) == {"already there"}
    assert [row.bytes_after for row in again.members] == [row.bytes_after for row in first.members]
    assert run(root, force=True).members == again.members and tree(root.parent / "out") == before


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("way", ["squeezed", "copied"])
def test_every_kind_of_adapter_is_known_again(menagerie: Menagerie, tmp_path: Path, name: str, way: str) -> None:
    source = menagerie.source(name)
    rank = source.case.rank if way == "squeezed" else source.adapter.rank
    arguments = (str(source.folder), str(tmp_path / "out"), rank, None, source.adapter.source.digest())
    written = jobs.squeeze_member(*arguments, None, False)
    before = tree(tmp_path)
    assert jobs.look(*arguments) == {**written, "state": "already there"}
    assert jobs.squeeze_member(*arguments, None, False) == jobs.look(*arguments) and tree(tmp_path) == before
    losses = jobs.measure_member(str(source.folder))["losses"]
    assert len(losses) == source.adapter.rank and losses[-1] == 0 and losses == sorted(losses, reverse=True)


def test_jobs_do_not_depend_on_the_current_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may run on machines that have another one."""
    paths: list[str] = []

    def noted(path: str, target: str, *rest: Any, squeeze: Any = jobs.squeeze_member) -> Any:
        paths.extend((path, target))
        return squeeze(path, target, *rest)

    monkeypatch.setattr(jobs, "squeeze_member", noted)
    monkeypatch.chdir(root.parent)
    squeeze_fleet(["in"], "out", memory=10**6)
    assert sorted(paths) == sorted(str(root.parent / part / name) for part in ("in", "out") for name in RANKS)


def test_what_is_missing_is_written_and_nothing_else(root: Path) -> None:
    run(root)
    shutil.rmtree(root.parent / "out" / "team" / "a")
    before = tree(root.parent / "out")
    assert states(run(root)) == {"c": "already there", "team/a": "written", "team/b": "already there"}
    after = tree(root.parent / "out")
    kept = [path for path in before if Path(path).is_file()]
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}


def test_measurements_are_kept_until_a_file_changes(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(path: str, measure: Any = jobs.measure_member) -> Any:
        calls.append(Path(path).name)
        return measure(path)

    monkeypatch.setattr(jobs, "measure_member", counted)
    run(root, dry_run=True)
    assert sorted(calls) == ["a", "b", "c"]
    run(root, 16, dry_run=True)
    assert len(calls) == 3, "another budget needs no new measurement"
    write_member(root / "c", 16, "steps")
    (root.parent / "out-fleet" / "measured" / "team%2Fb.json").write_text("{")
    run(root, dry_run=True)
    assert sorted(calls[3:]) == ["b", "c"]


def test_a_changed_source_is_not_taken_for_done(root: Path) -> None:
    run(root)
    write_member(root / "c", 16, "steps")
    text = refusal(lambda: run(root))
    assert "at the places of 1 members the output holds something else than the result asked for: c;" in text
    assert states(run(root, force=True)) == {"c": "written", "team/a": "already there", "team/b": "already there"}
    config = json.loads((root / "team" / "a" / CONFIG).read_text())
    (root / "team" / "a" / CONFIG).write_text(json.dumps({**config, "lora_alpha": 99}))
    assert "something else than the result asked for: team/a;" in refusal(lambda: run(root)), "its scale has changed"
    (root / "team" / "a" / CONFIG).write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
    assert "something else than the result asked for: team/a;" in refusal(lambda: run(root))


@pytest.mark.parametrize("how", ["foreign file", "other adapter", "other rank", "other dtype", "a file"])
def test_something_else_at_the_output_is_refused_before_work_begins(root: Path, how: str) -> None:
    place = root.parent / "out" / "c"
    if how == "foreign file":
        place.mkdir(parents=True)
        (place / "notes.txt").write_text("mine")
    elif how == "other adapter":
        write_member(place, 2)
    elif how == "a file":
        place.parent.mkdir()
        place.write_text("mine")
    else:
        squeezed = lora_squeeze.load(root / "c").squeeze(rank=8 if how == "other dtype" else 7)
        (squeezed if how == "other rank" else squeezed.squeeze(dtype=torch.float16)).save(place)
    before = tree(root.parent / "out")
    text = refusal(lambda: run(root))
    assert "output holds something else than the result asked for: c; nothing was written there." in text
    assert "replace them with --force (force=True)" in text and tree(root.parent / "out") == before
    if how != "a file":
        assert states(run(root, force=True))["c"] == "written"
    if how == "foreign file":
        assert (place / "notes.txt").read_text() == "mine"


# --- what does not work -----------------------------------------------------------------------------------------------


def test_a_member_that_fails_stops_no_other(root: Path) -> None:
    tensors = plain_tensors(SHAPES, 4)
    name = f"{PREFIX}{next(iter(SHAPES))}.lora_A.weight"
    tensors[name][0, 0] = torch.nan
    write_folder(root / "bad", tensors, plain_config(r=4, base_model_name_or_path=BASE))
    report = run(root, slots=4)
    assert states(report) == {"bad": "failed", **dict.fromkeys(sorted(RANKS), "written")}
    (row,) = report.failed
    assert "NaN" in row.reason and row.loss is None and row.rank_after is None and report.worst(1) == (row,)
    assert not (root.parent / "out" / "bad").exists()
    alone = root.parent / "alone"
    shutil.copytree(root / "bad", alone)
    assert "no member can be measured: alone (" in refusal(
        lambda: squeeze_fleet([alone], root.parent / "o", memory=10**6)
    )


def test_a_member_that_cannot_be_copied_fails_alone(root: Path) -> None:
    """One scale is written for all modules: there that of one module cannot go into its factors."""
    large = {key: (t * 3e4 / t.abs().max()).half() for key, t in plain_tensors(SHAPES, RANKS["team/b"]).items()}
    changes = {"base_model_name_or_path": BASE, "alpha_pattern": {"v_proj": 1e8}}
    write_folder(root / "team/b", large, plain_config(r=RANKS["team/b"], **changes))
    report = run(root)
    assert states(report) == {"c": "written", "team/a": "written", "team/b": "failed"}
    assert "v_proj: the factors hold NaN or infinity, or do not fit in torch.float16" in report.failed[0].reason
    assert not (root.parent / "out" / "team" / "b").exists()


def test_a_member_that_cannot_be_written_fails_alone(root: Path) -> None:
    large = {key: tensor * 1e5 for key, tensor in plain_tensors(SHAPES, RANKS["c"]).items()}
    write_folder(root / "c", large, plain_config(r=RANKS["c"], base_model_name_or_path=BASE))
    report = run(root, dtype=torch.float16)
    assert states(report) == {"c": "failed", "team/a": "written", "team/b": "written"}
    assert "do not fit in torch.float16" in report.failed[0].reason


def test_what_a_server_will_not_load_is_told(root: Path) -> None:
    tensors = plain_tensors(SHAPES, 4)
    tensors[f"{PREFIX}score.weight"] = torch.ones(2, 3)
    config = plain_config(r=4, base_model_name_or_path=BASE, modules_to_save=["score"], layers_to_transform=[0])
    write_folder(root / "head", tensors, config)
    notes = run(root, slots=4).notes
    assert "vLLM does not load, for what they carry besides: head (module to save)" in notes
    assert any(note.startswith("head change only some layers") for note in notes)
    assert lora_squeeze.load(root.parent / "out" / "head").extras, "it is squeezed all the same"
    assert not any("does not load" in note for note in run(root, slots=4, engine="sglang", dry_run=True).notes)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"engine": "tgi"}, "unknown engine 'tgi'"),
        ({"engine": "peft", "slots": 2}, "PEFT and transformers has no slots: leave out --slots"),
        ({"engine": "llama.cpp", "host_memory": "1MB"}, "llama.cpp keeps every adapter at its own size: leave out"),
        ({"slots": 0}, "slots must be a whole number from 1, got 0"),
        ({"dtype": torch.int8}, "dtype must be one of float64, float32, bfloat16, float16, got int8"),
        ({"slot_dtype": torch.int8}, "slot_dtype must be a dtype of floating point, got int8"),
        ({"memory": "much"}, "size 'much' is not understood"),
        ({"memory": 10}, "10 bytes (--memory) are too little for 3 slots"),
        ({"host_memory": 10}, "10 bytes (--host-memory) are too little for 3 adapters"),
        ({"weights": {"d": 1.0}}, "there are weights for 'd', but the members are c, team/a, team/b"),
        ({"base": ["other"]}, "no member has the base model 'other'"),
    ],
)  # fmt: skip
def test_impossible_requests_are_refused_and_write_nothing(root: Path, options: dict[str, Any], text: str) -> None:
    assert text in refusal(lambda: run(root, **options))
    assert not (root.parent / "out").exists() and not (root.parent / "out-fleet").exists(), "not even measured"


# --- the report -------------------------------------------------------------------------------------------------------


def test_a_dry_run_plans_what_a_run_does(root: Path) -> None:
    planned = run(root, dry_run=True)
    assert not (root.parent / "out").exists() and set(states(planned).values()) == {"planned"}
    report = run(root)
    for one, other in zip(planned.members, report.members, strict=True):
        assert (one.name, one.rank_after, one.loss) == (other.name, other.rank_after, other.loss)
    assert (planned.curve, planned.loss, planned.options) == (report.curve, report.loss, report.options)


def test_the_report_is_a_file_too(root: Path) -> None:
    write_member(root / "other", 2, base_model_name_or_path="another")
    report = run(root, base=[BASE], weights={"c": 2.0}, work=root.parent / "work")
    assert json.loads((root.parent / "work" / "report.json").read_text()) == json.loads(json.dumps(report.to_json()))
    found = report.to_json()
    assert found["skipped"] == {"other": "base model 'another'"} and found["engine"] == "vllm"
    assert [row["weight"] for row in found["members"]] == [2.0, 1.0, 1.0]
    assert found["bytes"] == len(RANKS) * 8 * SLOT and found["memory"] >= found["bytes"]
    losses = {row["name"]: row["loss"] for row in found["members"]}
    assert found["loss"] == pytest.approx(losses["c"] * 2 / 4) and losses["team/a"] == losses["team/b"] == 0


def test_all_that_is_done_is_told(root: Path) -> None:
    told: list[tuple[str, int, int]] = []
    run(root, tell=lambda *progress: told.append(progress))
    for label in ("reading", "measuring", "squeezing"):
        counts = [(done, total) for what, done, total in told if what == label]
        assert counts[-3:] == [(1, 3), (2, 3), (3, 3)]
