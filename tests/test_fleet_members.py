"""Members: which folders a command line means, what their headers say, and what is refused."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from adapter_cases import CONFIG, PREFIX, SHAPES, WEIGHTS, plain_config, plain_tensors, write_folder
from fleet_cases import BASE, RANKS, refusal, write_fleet, write_member

import lora_squeeze
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.find import find, listed
from lora_squeeze.fleet.members import read_fleet, stamp_of
from lora_squeeze.fleet.weights import complete, load_weights


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_fleet(tmp_path / "in")


# --- find -------------------------------------------------------------------------------------------------------------


def test_folders_patterns_and_files_mean_the_same_adapters(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {name: root / name for name in sorted(RANKS)}
    each = [root / name for name in RANKS]
    assert find([root]) == (expected, {})
    assert find(each) == find([*each, root, f"{root}/../in/c"]) == (expected, {}), "named twice is found once"
    assert find([f"{root}/*"]) == find([f"{root}/c", f"{root}/t*/[ab]"]) == (expected, {})
    assert find([folder / WEIGHTS for folder in each]) == (expected, {})
    monkeypatch.chdir(root.parent)
    assert find(["in"]) == find(["in/**"]) == (expected, {}), "names do not depend on the current folder"


def test_names_are_paths_below_the_common_parent(root: Path) -> None:
    assert list(find([root / "team"])[0]) == ["a", "b"]
    assert list(find([root / "c"])[0]) == ["c"]
    assert list(find([root / "c", root / "team" / "b"])[0]) == ["c", "team/b"]


def test_what_lies_inside_an_adapter_or_is_hidden_is_no_member(root: Path) -> None:
    write_member(root / "c" / "checkpoint-10", 2)
    write_member(root / ".c.12-0badcafe.lora-squeeze", 2)
    assert list(find([root])[0]) == list(find([f"{root}/**"])[0]) == sorted(RANKS)


def test_a_folder_that_somebody_has_named_by_a_link_is_a_member(root: Path) -> None:
    (root / "latest").symlink_to("c")
    assert list(find([root])[0]) == ["c", "latest", "team/a", "team/b"]


def test_half_an_adapter_is_a_member(root: Path) -> None:
    (root / "c" / CONFIG).unlink()
    (root / "team" / "a" / WEIGHTS).unlink()
    assert list(find([root])[0]) == sorted(RANKS), "so that it is told, and not left out"


def test_matches_without_an_adapter_are_told(root: Path) -> None:
    (root / "readme.txt").write_text("mine")
    (root / "empty").mkdir()
    found, without = find([f"{root}/*"])
    assert list(found) == sorted(RANKS)
    assert without == {str(root / name): f"no adapter: no {CONFIG} in it" for name in ("empty", "readme.txt")}
    assert find([root]) == (found, {}), "a search passes them by"


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (["nowhere"], "nowhere: no such folder; name folders of adapters, or a pattern in quotes"),
        (["in/x*"], "the pattern 'in/x*' matches nothing"),
        (["empty"], "no adapter in empty: expected folders with adapter_config.json and adapter_model.safetensors"),
        (["in/c", "in/c/deep"], "deep lies inside"),
    ],
)
def test_places_without_adapters_are_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], text: str
) -> None:
    monkeypatch.chdir(root.parent)
    (root.parent / "empty").mkdir()
    write_member(root / "c" / "deep", 2)
    assert text in refusal(lambda: find(inputs))


@pytest.mark.parametrize(
    ("inputs", "out", "text"),
    [
        (["in"], "in/out", "lies inside the input"),
        (["in"], "in", "lies inside the input"),
        (["in/c"], "in/c/out", "lies inside the input"),
        (["in/*"], "in/out", "the pattern 'in/*' matches in/out too, which is to be written"),
        (["in/team/a"], "in/team", "would be overwritten by the output"),
        (["link"], "in/out", "lies inside the input"),
    ],
)
def test_an_output_that_would_become_a_member_is_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str], out: str, text: str
) -> None:
    monkeypatch.chdir(root.parent)
    Path("link").symlink_to("in")
    assert text in refusal(lambda: find(inputs, [Path(out)]))
    assert find(inputs, [Path("out"), Path("out-fleet")])[0]


def test_lists_are_cut_short() -> None:
    names = [f"n{i}" for i in range(7)]
    assert listed(names[:5]) == "n0, n1, n2, n3, n4" and listed(names) == "n0, n1, n2, n3, n4 and 2 more"


# --- headers ----------------------------------------------------------------------------------------------------------


def test_members_are_what_their_headers_say(root: Path) -> None:
    told: list[tuple[int, int]] = []
    fleet = read_fleet(find([root])[0], tell=lambda *done: told.append(done))
    assert {name: member.rank for name, member in fleet.members.items()} == RANKS and not fleet.skipped
    assert {name: (s.out_features, s.in_features) for name, s in fleet.shapes.items()} == SHAPES
    assert told == [(1, 3), (2, 3), (3, 3)]
    for name, member in fleet.members.items():
        adapter = lora_squeeze.load(root / name)
        assert member.parameters(member.rank) == adapter.parameters
        smallest = min(map(min, SHAPES.values()))
        for rank in range(1, member.rank):
            squeezed = adapter.squeeze(rank=rank).parameters
            assert member.parameters(rank) == squeezed if rank <= smallest else member.parameters(rank) > squeezed
        assert (member.base, member.floor, member.file_bytes) == (BASE, 1, (root / name / WEIGHTS).stat().st_size)


def test_a_grouped_convolution_has_a_smallest_rank(tmp_path: Path) -> None:
    groups, rank = 4, 8
    tensors = plain_tensors({"q_proj": (16, 16)}, rank)
    tensors[f"{PREFIX}conv.lora_A.weight"] = torch.randn(rank, 4, 3, 3)
    tensors[f"{PREFIX}conv.lora_B.weight"] = torch.randn(16, rank // groups, 1, 1)
    write_folder(tmp_path / "conv", tensors, plain_config(target_modules=["conv", "q_proj"]))
    (member,) = read_fleet(find([tmp_path])[0]).members.values()
    adapter = lora_squeeze.load(tmp_path / "conv")
    assert (member.rank, member.floor) == (rank, groups)
    for k in range(1, rank + 1):
        assert member.parameters(k) == adapter.squeeze(rank=k).parameters


def test_a_changed_file_has_another_stamp(root: Path) -> None:
    before = stamp_of(root / "c")
    assert stamp_of(root / "c") == before
    os.utime(root / "c" / CONFIG, ns=(1, 1))
    assert stamp_of(root / "c") != before


def test_all_unreadable_members_are_told_or_left_out(root: Path) -> None:
    (root / "c" / WEIGHTS).write_bytes(b"x" * 20)
    (root / "team" / "a" / CONFIG).unlink()
    folders, without = find([root])
    text = refusal(lambda: read_fleet(folders, {"note": "no adapter"}))
    assert text.startswith("3 of 4 members cannot be read: note (no adapter), c (") and "team/a (" in text
    assert text.endswith("repair them, or leave them out with --skip-unreadable (skip_unreadable=True)")
    fleet = read_fleet(folders, without, skip_unreadable=True)
    assert list(fleet.members) == ["team/b"] and set(fleet.skipped) == {"c", "team/a"}
    shutil.rmtree(root / "team" / "b")
    assert "2 of 2 members cannot be read" in refusal(lambda: read_fleet(find([root])[0], skip_unreadable=True))


def test_several_base_models_are_refused_unless_one_is_chosen(root: Path) -> None:
    write_member(root / "d", 4, base_model_name_or_path="/models/base")
    write_member(root / "e", 4, base_model_name_or_path=None)
    folders, _ = find([root])
    text = refusal(lambda: read_fleet(folders))
    assert "the members have 3 base models" in text and f"{BASE!r} x 3 (c, team/a, team/b); '/models/base' x 1" in text
    one, two = read_fleet(folders, base=[BASE]), read_fleet(folders, base=[BASE, "/models/base"])
    assert list(one.members) == sorted(RANKS) and list(two.members) == ["c", "d", "team/a", "team/b"]
    assert one.skipped == {"d": "base model '/models/base'", "e": "base model ''"}
    assert "no member has the base model 'other'; found are" in refusal(lambda: read_fleet(folders, base=["other"]))


def test_one_name_with_several_sizes_is_refused(root: Path) -> None:
    name = next(iter(SHAPES))
    config = plain_config(base_model_name_or_path=BASE)
    write_folder(root / "d", plain_tensors({name: (24, 28)}), config)
    text = refusal(lambda: read_fleet(find([root])[0]))
    assert f"1 modules have several sizes, so these are not adapters of one base model: {name} is" in text
    assert "24 x 20 in c" in text and "24 x 28 in d" in text


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_are_read_and_completed(tmp_path: Path) -> None:
    toml, data = tmp_path / "w.toml", tmp_path / "w.json"
    toml.write_text('c = 3\n"team/a" = 0.5\n')
    data.write_text(json.dumps({"c": 3, "team/a": 0.5}))
    assert load_weights(toml) == load_weights(data) == {"c": 3.0, "team/a": 0.5}
    assert complete(load_weights(toml), sorted(RANKS)) == {"c": 3.0, "team/a": 0.5, "team/b": 1.0}
    assert complete({"gone": 2.0}, ["c"], {"gone"}) == {"c": 1.0}, "what is left out may have a weight"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("c = ", "no readable TOML, or JSON in a .json file"),
        ("c = 0", "the weight of 'c' must be a number above 0, found 0"),
        ("c = -1", "found -1"),
        ("c = nan", "found nan"),
        ("c = inf", "found inf"),
        ("c = true", "found True"),
        ('c = "1"', "found '1'"),
        ("team.a = 1", "(a name with dots or slashes stands in quotes)"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path: Path, text: str, found: str) -> None:
    path = tmp_path / "w.toml"
    path.write_text(text)
    with pytest.raises(LoraSqueezeError) as caught:
        load_weights(path)
    assert str(caught.value).startswith(f"{path}: ") and found in str(caught.value)


def test_weights_of_nobody_are_refused(tmp_path: Path) -> None:
    assert refusal(lambda: complete({"x": 1.0}, ["c", "d"])) == "there are weights for 'x', but the members are c, d"
    assert "must be a number above 0, found -1" in refusal(lambda: complete({"c": -1.0}, ["c"]))
    (tmp_path / "w.json").write_text("[1]")
    assert "expected names and weights, found [1]" in refusal(lambda: load_weights(tmp_path / "w.json"))
