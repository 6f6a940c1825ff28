"""Search: the smallest candidate that a metric accepts, few measurements, and none of them twice."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import CONFIG, RANK, SHAPES, dense, plain_config, plain_tensors, read_dense, write_folder
from folder_cases import in_child, tree

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.search import Found, search

ALL = tuple(range(1, RANK))


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return lora_squeeze.load(write_folder(tmp_path / "in"))


class Fake:
    """A metric by rank that remembers what it was asked for."""

    def __init__(self, value: Callable[[int], float]) -> None:
        self.value, self.asked = value, list[int]()

    def __call__(self, folder: Path, rank: int) -> float:
        assert json.loads((folder / CONFIG).read_text())["r"] == rank, "the folder holds the candidate of this rank"
        self.asked.append(rank)
        return self.value(rank)


def found_by(adapter: Adapter, work: Path, metric: Fake, **options: Any) -> Found:
    return search(adapter, metric, **({"max_drop": 0.5, "work": work, "ranks": ALL} | options))


# --- what is found ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", range(1, RANK + 1))
def test_the_smallest_rank_that_passes_is_found_with_few_measurements(
    adapter: Adapter, tmp_path: Path, threshold: int
) -> None:
    metric = Fake(lambda rank: float(rank >= threshold))
    found = found_by(adapter, tmp_path / "work", metric)
    assert found.rank == (threshold if threshold < RANK else None)
    assert metric.asked[0] == RANK, "the source is measured first"
    assert len(metric.asked) <= 1 + math.ceil(math.log2(len(ALL) + 1)) and len(set(metric.asked)) == len(metric.asked)
    assert {row.rank: row.passes for row in found.curve} == {r: r >= threshold for r in sorted(metric.asked[1:])}
    assert (found.adapter is None) == (threshold == RANK) and found.notes == ()


def test_by_default_powers_of_two_are_tried(adapter: Adapter, tmp_path: Path) -> None:
    metric = Fake(lambda rank: 1.0)
    assert found_by(adapter, tmp_path / "work", metric, ranks=None, every=True).rank == 1
    assert metric.asked == [RANK, 1, 2, 4]


def test_the_result_is_the_squeeze_to_that_rank(adapter: Adapter, tmp_path: Path) -> None:
    found = found_by(adapter, tmp_path / "work", Fake(lambda rank: float(rank >= 3)))
    assert found.adapter is not None
    found.adapter.save(tmp_path / "out")
    adapter.squeeze(rank=3).save(tmp_path / "direct")
    for name in SHAPES:
        assert read_dense(tmp_path / "out", name).equal(read_dense(tmp_path / "direct", name))


def test_candidates_are_what_the_metric_sees_and_go_afterwards(adapter: Adapter, tmp_path: Path) -> None:
    """The source, given without its folder, is a copy with the same updates."""

    def metric(folder: Path, rank: int) -> float:
        wanted = adapter if rank == RANK else adapter.squeeze(rank=rank)
        return max(float((read_dense(folder, name) - dense(wanted, name)).abs().max()) for name in SHAPES)

    found = search(adapter, metric, max_drop=1.0, work=tmp_path / "work", every=True, lower_is_better=True)
    assert max(row.metric for row in (*found.curve, found.source)) < 1e-6
    assert not (tmp_path / "work").exists() or not list((tmp_path / "work").iterdir())


def test_the_folder_of_the_source_is_measured_where_it_is_known(adapter: Adapter, tmp_path: Path) -> None:
    seen = []

    def metric(folder: Path, rank: int) -> float:
        seen.append(folder)
        return 1.0

    before = tree(tmp_path / "in")
    search(adapter, metric, max_drop=0, work=tmp_path / "work", source=tmp_path / "in")
    assert seen[0] == tmp_path / "in" and tree(tmp_path / "in") == before


def test_over_size_the_parameters_of_a_rank_are_spent_globally(adapter: Adapter, tmp_path: Path) -> None:
    sizes: dict[int, int] = {}

    def metric(folder: Path, rank: int) -> float:
        sizes[rank] = lora_squeeze.load(folder).parameters
        return float(rank >= 3)

    found = search(adapter, metric, max_drop=0, work=tmp_path / "work", ranks=ALL, over="size")
    wanted = adapter.squeeze(rank=3, allocate="global")
    assert found.rank == 3 and found.adapter is not None
    assert {n: m.rank for n, m in found.adapter.modules.items()} == {n: m.rank for n, m in wanted.modules.items()}
    assert all(size <= adapter.squeeze(rank=rank).parameters for rank, size in sizes.items() if rank < RANK)


@pytest.mark.parametrize(
    ("drop", "lower", "source", "worst"),
    [
        (0.02, False, 0.8, 0.78),
        ("0.02", False, 0.8, 0.78),
        ("5%", False, 0.8, 0.76),
        ("5 %", False, -2.0, -2.1),
        ("5%", True, 2.0, 2.1),
        (0.25, True, 2.0, 2.25),
        (0, True, 2.0, 2.0),
    ],
)
def test_the_bound_is_the_source_s_metric_and_the_drop(
    adapter: Adapter, tmp_path: Path, drop: Any, lower: bool, source: float, worst: float
) -> None:
    sign = 1 if lower else -1
    for value, rank in ((worst, 1), (worst + sign * 1e-6, None)):
        metric = Fake(lambda k, value=value: source if k == RANK else value)  # type: ignore[misc]
        found = found_by(adapter, tmp_path / "work", metric, max_drop=drop, lower_is_better=lower)
        assert found.rank == rank and found.bound == pytest.approx(worst)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_candidate_without_a_finite_metric_does_not_pass(adapter: Adapter, tmp_path: Path, value: float) -> None:
    found = found_by(adapter, tmp_path / "work", Fake(lambda rank: 1.0 if rank >= 4 else value), name="fake")
    assert found.rank == 4
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["curve"][0]["metric"] is None
    again = Fake(lambda rank: 1.0)
    assert found_by(adapter, tmp_path / "work", again, name="fake").rank == 4 and again.asked == []
    with pytest.raises(LoraSqueezeError, match=r"the metric of the source is (nan|-inf): there is nothing to compare"):
        found_by(adapter, tmp_path / "work", Fake(lambda rank: value))


# --- a metric that does not grow with the rank ------------------------------------------------------------------------

BUMPY = {1: 0.0, 2: 1.0, 3: 0.2, 4: 0.9, 5: 0.4, 6: 0.8, 7: 1.0, 8: 1.0}


def test_bisection_tells_of_a_pair_in_the_wrong_order(adapter: Adapter, tmp_path: Path) -> None:
    found = found_by(adapter, tmp_path / "work", Fake(lambda rank: BUMPY[rank]), max_drop=0.3)
    assert [row.rank for row in found.curve] == [1, 2, 4] and found.rank == 2
    assert found.notes == (
        "rank 2 measures better (1) than rank 4 (0.9): the metric does not grow with the rank, which the search takes "
        "for granted; to measure every rank, ask for all",
    )


def test_the_whole_curve_shows_them_all(adapter: Adapter, tmp_path: Path) -> None:
    metric = Fake(lambda rank: -BUMPY[rank])
    found = found_by(adapter, tmp_path / "work", metric, max_drop=0.1, every=True, lower_is_better=True)
    assert {row.rank: -row.metric for row in (*found.curve, found.source)} == BUMPY
    assert [row.rank for row in found.curve if row.passes] == [2, 4, 7] and found.rank == 2
    assert found.notes == ("rank 2 measures better (-1) than rank 3 (-0.2): the metric does not grow with the rank",)


# --- going on ---------------------------------------------------------------------------------------------------------


def failing_after(count: int, value: Callable[[int], float]) -> Fake:
    def fails(rank: int) -> float:
        if len(fake.asked) > count:
            raise LoraSqueezeError("out of memory")
        return value(rank)

    fake = Fake(fails)
    return fake


def test_a_search_that_failed_goes_on_where_it_was(adapter: Adapter, tmp_path: Path) -> None:
    work = tmp_path / "work"
    first, second = failing_after(2, lambda rank: float(rank >= 3)), Fake(lambda rank: float(rank >= 3))
    with pytest.raises(LoraSqueezeError, match=r"out of memory; the candidate is kept in .*work/rank-2"):
        found_by(adapter, work, first, name="fake")
    assert lora_squeeze.load(work / "rank-2").rank == 2, "to try the metric by hand"
    found = found_by(adapter, work, second, name="fake")
    assert first.asked == [8, 4, 2] and second.asked == [2, 3]
    assert found.rank == 3 and [row.reused for row in found.curve] == [False, False, True] and found.source.reused
    assert found.curve[2].size_bytes == adapter.squeeze(rank=4).lora_bytes
    assert [path.name for path in work.iterdir()] == ["results.json"]


def test_a_search_that_was_killed_goes_on_where_it_was(adapter: Adapter, tmp_path: Path) -> None:
    def deadly(folder: Path, rank: int) -> float:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(rank >= 3)

    def child() -> None:
        search(adapter, deadly, max_drop=0.5, work=tmp_path / "work", ranks=ALL, name="fake")

    assert in_child(child) == -signal.SIGKILL
    metric = Fake(lambda rank: float(rank >= 3))
    assert found_by(adapter, tmp_path / "work", metric, name="fake").rank == 3
    assert metric.asked == [2, 3]


def test_nothing_is_measured_twice_but_what_differs_is(adapter: Adapter, tmp_path: Path) -> None:
    """Metric, source file, its settings, kind of candidate: each has results of its own."""

    def asked(adapter: Adapter = adapter, **options: Any) -> list[int]:
        metric = Fake(lambda rank: 1.0)
        found_by(adapter, tmp_path / "work", metric, **({"ranks": (2, 4), "name": "fake"} | options))
        return metric.asked

    assert asked() == [8, 4, 2] and asked() == []
    assert asked(max_drop=0, lower_is_better=True, every=True) == [], "what is measured is the same"
    assert asked(ranks=(2, 3, 4)) == [3]
    assert asked(name="other") == [8, 4, 2]
    tensors = {key: tensor + 1 for key, tensor in plain_tensors().items()}
    for i, (more, config) in enumerate([(tensors, None), (None, plain_config(lora_alpha=99))]):
        other = lora_squeeze.load(write_folder(tmp_path / f"other{i}", more, config))
        assert asked(other) == [8, 4, 2] and asked(other) == []
    assert asked(name=None) == [8, 4, 2] and asked(name=None) == [8, 4, 2]
    sizes: list[int] = []

    def metric(folder: Path, rank: int) -> float:
        sizes.append(rank)
        return 1.0

    search(adapter, metric, max_drop=0, work=tmp_path / "work", over="size", ranks=(2,), name="fake")
    assert sizes == [8, 2]


@pytest.mark.parametrize("text", ["[", "[]", '{"format": 2, "results": []}', '{"format": 1, "results": [{}]}'])
def test_results_that_cannot_be_read_are_refused_and_kept(adapter: Adapter, tmp_path: Path, text: str) -> None:
    path = tmp_path / "work" / "results.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(
        LoraSqueezeError, match=r"results.json: no readable results .*; move the file away to begin anew"
    ):
        found_by(adapter, tmp_path / "work", Fake(lambda rank: 1.0), name="fake")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_drop": "much"}, "max_drop 'much' is not understood; write a share such as 0.5%, or a number"),
        ({"max_drop": -1}, "max_drop '-1' is not understood"),
        ({"max_drop": "nan%"}, "max_drop 'nan%' is not understood"),
        ({"ranks": (0, 2)}, "ranks must be whole numbers from 1, got 0"),
        ({"ranks": (8, 16)}, r"no rank to try below the source rank 8; asked were \[8, 16\]"),
        ({"over": "energy"}, "over must be one of rank, size, got 'energy'"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_measured(
    adapter: Adapter, tmp_path: Path, options: dict[str, Any], text: str
) -> None:
    metric = Fake(lambda rank: 1.0)
    with pytest.raises(LoraSqueezeError, match=text):
        found_by(adapter, tmp_path / "work", metric, **options)
    assert metric.asked == [] and not (tmp_path / "work").exists()
