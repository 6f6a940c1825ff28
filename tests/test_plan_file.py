"""A plan as a file."""

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import SHAPES, write_folder
from factor_cases import quick
from folder_cases import tree
from hypothesis import given
from hypothesis import strategies as st

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.plan import Plan, PlanRow, make_plan
from lora_squeeze.plan_file import load, to_json, to_toml


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return lora_squeeze.load(write_folder(tmp_path / "in"))


def test_the_same_plan_is_the_same_text(adapter: Adapter, tmp_path: Path) -> None:
    for name in ("a.toml", "b.toml", "a.json", "b.json"):
        make_plan(lora_squeeze.load(tmp_path / "in"), size="6kB", name="mine").save(tmp_path / name)
    for kind in ("toml", "json"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


def test_numbers_of_numpy_are_written_as_numbers(adapter: Adapter, tmp_path: Path) -> None:
    """In a process without this suite's type checker, which lets only some of them pass."""
    code = """
import numpy as np
import lora_squeeze
from lora_squeeze.plan import Plan, make_plan
adapter = lora_squeeze.load("in")
for dials in (
    {"rank": np.int64(4)}, {"energy": np.float64(0.9)}, {"energy": np.float32(0.5)},
    {"rank": 4, "ranks": [np.int64(2), 4]},
):
    for name in ("plan.toml", "plan.json"):
        plan = make_plan(adapter, **dials)
        plan.save(name, force=True)
        assert Plan.load(name) == plan, dials
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_file_is_made_to_be_read(adapter: Adapter, tmp_path: Path) -> None:
    """A head with what was asked, then a line per module in the order of the adapter; TOML and JSON say the same."""
    plan = make_plan(adapter, size="6kB", allocate="global", ranks=(1, 2, 4), name="mine")
    text, data = to_toml(plan), tomllib.loads(to_toml(plan))
    assert json.loads(to_json(plan)) == data
    assert data["format"] == 1 and list(data["modules"]) == list(adapter.modules)
    assert data["asked"] == {"size": "6kB", "allocate": "global", "ranks": [1, 2, 4]}
    assert data.keys() == {"format", "adapter", "source_sha256", "asked", "totals", "modules"}
    for lines in (text.splitlines(), to_json(plan).splitlines()):
        for name, row in plan.modules.items():
            (line,) = [line for line in lines if f'"{name}"' in line]
            assert f"{row.rank}" in line and f"{row.error}" in line and row.reason in line


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


ROWS = st.tuples(st.integers(0, 99), st.none() | st.integers(1, 99), NAMES | st.just(""), st.none() | st.floats(0, 1))


@quick
@given(
    st.dictionaries(NAMES | st.sampled_from(['a"b', "a\\b", "\x7f", "a\nb", "#", "=", "", "💡", "a.b"]), ROWS), NAMES
)
def test_any_name_survives_both_kinds_of_file(rows: dict[str, Any], text: str) -> None:
    plan = Plan(
        {name: PlanRow(*values) for name, values in rows.items()},
        default_rank=4, dtype="float16", asked={text: text}, adapter=text, totals={"energy": 0.5, "error": 1e-9},
    )  # fmt: skip
    again = tomllib.loads(to_toml(plan))
    assert list(again["modules"]) == list(rows) and again == json.loads(to_json(plan))
    for suffix, written in ((".toml", to_toml(plan)), (".json", to_json(plan))):
        assert parsed(written, suffix) == plan


def parsed(text: str, suffix: str) -> Plan:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"plan{suffix}"
        path.write_text(text, encoding="utf-8", newline="")
        return load(path)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("modules = 3", "no plan: expected a line format = 1 at the top"),
        ("format = 2", "the plan has format 2, this version reads 1"),
        ("format = true", "the plan has format True"),
        ("format = 1\nmodules = 3", "modules must be a table of module names, got 3"),
        ("format = 1\nmodels = 3", "unknown key 'models'; known are adapter, source_sha256, dtype, default_rank"),
        ("format = 1\ndefault_rank = 0", "default_rank of a plan must be at least 1, got 0"),
        ("format = 1\ndefault_rank = 1.5", "default_rank must be a whole number, got 1.5"),
        ('format = 1\ndtype = "int8"', "dtype of a plan must be one of .*float16, got 'int8'"),
        ("format = 1\ntotals = 7", "totals must be a table, got 7"),
        ("format = 1\nasked = { size = 1979-05-27 }", "asked: size must be a number, text or a list"),
        ('format = 1\n[modules]\nq = { rank = "3" }', "module 'q': rank must be a whole number, got '3'"),
        ("format = 1\n[modules]\nq = { rank = true }", "module 'q': rank must be a whole number, got True"),
        ("format = 1\n[modules]\nq = -1", "module 'q': rank must be a whole number from 0, got -1"),
        ("format = 1\n[modules]\nq = { reason = '' }", "module 'q': no rank"),
        ("format = 1\n[modules]\nq = { rank = 1, rnak = 2 }", "module 'q': unknown key 'rnak'; known are rank, "),
        ("format = 1\n[modules]\nlayers.0.q = 3", r"unknown key '0' \(a module name with dots stands in quotes\)"),
        ("format = 1\n[modules]\nq = 1\nq = 2", "no readable TOML, or JSON in a .json file"),
        ("format 1", "no readable TOML"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_plan_is_refused_with_its_name(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(LoraSqueezeError, match=rf"plan\.toml: .*{found}"):
        Plan.load(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"format": 1, "modules": {"q": 1, "q": 2}}', "the key 'q' occurs twice"),
        ("[1]", "no plan"),
        ("[" * 100_000, "no readable TOML, or JSON"),
    ],
)
def test_json_is_read_as_strictly(tmp_path: Path, text: str, found: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(LoraSqueezeError, match=found):
        Plan.load(tmp_path / "plan.json")


def test_a_missing_or_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    for name in ("none.toml", "binary.toml", "."):
        with pytest.raises(LoraSqueezeError, match="no readable TOML"):
            Plan.load(tmp_path / name)


def test_an_existing_file_is_replaced_only_with_force_and_nothing_is_left_behind(
    adapter: Adapter, tmp_path: Path
) -> None:
    plan, path = make_plan(adapter, rank=3), tmp_path / "deep" / "plan.toml"
    plan.save(path)
    before = tree(tmp_path)
    with pytest.raises(
        LoraSqueezeError, match=r"plan.toml exists already and nothing was written; replace it with --force"
    ):
        plan.save(path)
    with pytest.raises(LoraSqueezeError, match="deep is a folder; name a file"):
        plan.save(tmp_path / "deep", force=True)
    with pytest.raises(LoraSqueezeError, match="cannot be written"):
        plan.save(path / "below", force=True)
    assert tree(tmp_path) == before
    make_plan(adapter, rank=2).save(path, force=True)
    assert set(Plan.load(path).ranks.values()) == {2} and [p.name for p in path.parent.iterdir()] == ["plan.toml"]


def test_a_plan_of_a_tensor_in_memory_has_no_digest(adapter: Adapter) -> None:
    small = adapter.squeeze(rank=4)
    plan = make_plan(small, rank=2)
    assert plan.ranks == dict.fromkeys(SHAPES, 2) and plan.adapter is None
