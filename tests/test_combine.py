"""Sums, differences and rank-ups of adapters, against dense sums: weights, ranks, dtypes, notes, refusals, memory."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_cases import (
    CONFIG,
    PREFIX,
    SHAPES,
    WEIGHTS,
    dense,
    plain_config,
    plain_tensors,
    read_dense,
    tail,
    write_folder,
)
from combine_cases import NUMBERS, RANKS, made, total

import lora_squeeze
from lora_squeeze import adapter as adapter_module
from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.combine import merge, rank_up, residual, subtract
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank
from lora_squeeze.post_squeeze import Squeezed


@pytest.fixture
def three(tmp_path: Path) -> list[Adapter]:
    """Different ranks and scales."""
    return [made(tmp_path / f"in {i}", rank, i, lora_alpha=4 + 3 * i) for i, rank in enumerate(RANKS)]


# --- the sum ----------------------------------------------------------------------------------------------------------


def test_without_a_dial_the_sum_is_whole(three: list[Adapter], tmp_path: Path) -> None:
    both = merge(three, NUMBERS)
    both.save(tmp_path / "out")
    for name, shape in SHAPES.items():
        expected = total(three, NUMBERS, name)
        torch.testing.assert_close(read_dense(tmp_path / "out", name), expected, rtol=1e-5, atol=1e-6)
        assert both.modules[name].rank == min(sum(RANKS), *shape), "no more than the matrix has"
    assert residual(both.report).error < 1e-6


@pytest.mark.parametrize("rank", [1, 6])
def test_with_a_rank_it_is_the_best_of_that_rank_and_the_residual_says_how_far(
    three: list[Adapter], tmp_path: Path, rank: int
) -> None:
    small = merge(three, NUMBERS, rank=rank)
    small.save(tmp_path / "out")
    away = {
        name: (tail(total(three, NUMBERS, name), rank), float(total(three, NUMBERS, name).norm())) for name in SHAPES
    }
    for name, (lost, _) in away.items():
        found = float((read_dense(tmp_path / "out", name) - total(three, NUMBERS, name)).norm())
        assert math.isclose(found, lost, rel_tol=1e-5)
    told = residual(small.report)
    lost, norm = (math.hypot(*column) for column in zip(*away.values(), strict=True))
    assert math.isclose(told.error, lost / norm, rel_tol=1e-5)
    worst = max(away, key=lambda name: away[name][0] / away[name][1])
    assert told.module == worst and math.isclose(told.worst, away[worst][0] / away[worst][1], rel_tol=1e-5)


@pytest.mark.parametrize("dial", [{"energy": 0.8}, {"error": 0.3}, {"params": 700, "min_rank": 1}, {"max_rank": 2}])
def test_any_dial_of_a_squeeze_chooses_as_for_the_whole_sum(
    three: list[Adapter], tmp_path: Path, dial: dict[str, Any]
) -> None:
    merge(three, NUMBERS).save(tmp_path / "whole")
    expected = lora_squeeze.load(tmp_path / "whole").squeeze(**dial)
    found = merge(three, NUMBERS, **dial)
    assert {n: m.rank for n, m in found.modules.items()} == {n: m.rank for n, m in expected.modules.items()}


@pytest.mark.parametrize("size", [5000, 8000])
def test_a_size_is_that_of_the_file(three: list[Adapter], tmp_path: Path, size: int) -> None:
    merge(three, NUMBERS, size=size).save(tmp_path / "out")
    step = min(sum(shape) for shape in SHAPES.values()) * 4
    assert size - 5 * step < (tmp_path / "out" / WEIGHTS).stat().st_size <= size, "used up to what headers may take"


def test_the_residual_includes_the_rounding_of_16_bits(tmp_path: Path) -> None:
    pair = [made(tmp_path / f"in {i}", 4, i, torch.bfloat16) for i in range(2)]
    both = merge(pair, [0.3, 0.9])
    both.save(tmp_path / "out")
    assert {module.dtype for module in both.modules.values()} == {torch.bfloat16}
    expected = {name: total(pair, [0.3, 0.9], name) for name in SHAPES}
    lost = math.hypot(*(float((read_dense(tmp_path / "out", n) - dW).norm()) for n, dW in expected.items()))
    norm = math.hypot(*(float(dW.norm()) for dW in expected.values()))
    assert lost > 0 and math.isclose(residual(both.report).error, lost / norm, rel_tol=1e-3)


def test_sixteen_bit_factors_are_rounded_once(tmp_path: Path) -> None:
    """The weights are applied in float32: rounding to bfloat16 before the cut would show in the result."""
    pair = [made(tmp_path / f"in {i}", 4, i, torch.bfloat16) for i in range(2)]
    small = merge(pair, [1 / 3, 0.9], rank=5, dtype=torch.float32)
    for name in SHAPES:
        expected = total(pair, [1 / 3, 0.9], name)
        found = float((dense(small, name) - expected).norm())
        assert math.isclose(found, tail(expected, 5), rel_tol=1e-5)


@pytest.mark.parametrize(
    ("one", "two", "dtype"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float64, torch.bfloat16, torch.float64),
        (torch.float8_e4m3fn, torch.bfloat16, torch.float32),
    ],
)
def test_the_dtype_holds_those_of_all(tmp_path: Path, one: torch.dtype, two: torch.dtype, dtype: torch.dtype) -> None:
    pair = [made(tmp_path / "one", 4, 1, one), made(tmp_path / "two", 4, 2, two)]
    both = merge(pair)
    both.save(tmp_path / "out")
    assert {tensor.dtype for tensor in safetensors.torch.load_file(tmp_path / "out" / WEIGHTS).values()} == {dtype}
    for name in SHAPES:
        tolerance = 4 * torch.finfo(dtype).eps
        difference = float((read_dense(tmp_path / "out", name) - total(pair, (1, 1), name)).norm())
        assert difference <= max(tolerance, 1e-7) * float(total(pair, (1, 1), name).norm())


def test_one_adapter_with_weight_one_keeps_its_bits(three: list[Adapter], tmp_path: Path) -> None:
    merge(three[:1]).save(tmp_path / "out")
    before, after = (safetensors.torch.load_file(folder / WEIGHTS) for folder in (tmp_path / "in 0", tmp_path / "out"))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_order_changes_nothing_but_who_gives_the_settings(three: list[Adapter]) -> None:
    forward, back = merge(three, NUMBERS, rank=4), merge(three[::-1], NUMBERS[::-1], rank=4)
    for name in SHAPES:
        torch.testing.assert_close(dense(forward, name), dense(back, name), rtol=1e-4, atol=1e-6)
    assert (forward.default_scale, back.default_scale) == (three[0].default_scale, three[2].default_scale)


def test_an_adapter_of_weight_zero_is_as_if_it_were_not_there(three: list[Adapter]) -> None:
    found, expected = merge(three, [0, 0.5, 0]), merge(three[1:2], [0.5])
    assert {n: m.rank for n, m in found.modules.items()} == {n: m.rank for n, m in expected.modules.items()}
    assert all(torch.equal(dense(found, name), dense(expected, name)) for name in SHAPES)


def test_what_is_trained_from_an_adapter_minus_that_adapter_has_the_rank_of_the_training(tmp_path: Path) -> None:
    """Both factors moved, so the difference has rank 2 r; it is known exactly all the same."""
    start = made(tmp_path / "start", 3, 1)
    tensors = safetensors.torch.load_file(tmp_path / "start" / WEIGHTS)
    moved = {key: tensor + 0.1 * torch.randn_like(tensor) for key, tensor in tensors.items()}
    trained = lora_squeeze.load(write_folder(tmp_path / "trained", moved, plain_config(r=3)))
    change = subtract(trained, start)
    assert change.rank == 6
    for name in SHAPES:
        expected = dense(trained, name) - dense(start, name)
        torch.testing.assert_close(dense(change, name), expected, rtol=1e-4, atol=1e-6)
        small = subtract(trained, start, rank=3)
        assert math.isclose(float((dense(small, name) - expected).norm()), tail(expected, 3), rel_tol=1e-4)


def test_an_adapter_minus_itself_is_zero(three: list[Adapter], tmp_path: Path) -> None:
    nothing = subtract(three[0], three[0], rank=2)
    nothing.save(tmp_path / "out")
    for name in SHAPES:
        assert float(read_dense(tmp_path / "out", name).norm()) <= 1e-6 * float(dense(three[0], name).norm())


def test_modules_that_did_not_change_need_no_rank(tmp_path: Path) -> None:
    start = made(tmp_path / "start", 3, 1)
    tensors = safetensors.torch.load_file(tmp_path / "start" / WEIGHTS)
    moved = next(iter(SHAPES))
    tensors[f"{PREFIX}{moved}.lora_B.weight"] *= 1.001
    trained = lora_squeeze.load(write_folder(tmp_path / "trained", tensors, plain_config(r=3)))
    change = subtract(trained, start, energy=0.9)
    assert list(change.modules) == [moved] and residual(change.report).module == moved
    assert [row.norm > 0 for row in change.report.rows] == [row.name == moved for row in change.report.rows]


def test_memory_is_that_of_one_batch(three: list[Adapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a batch of one module, no source is asked for more than one at a time."""
    monkeypatch.setattr(adapter_module, "BATCH_BYTES", 1)
    asked: list[int] = []

    class Counting:
        def __init__(self, source: Any) -> None:
            self.source = source

        def updates(self, modules: Sequence[Module]) -> list[LowRank]:
            asked.append(len(modules))
            return list(self.source.updates(modules))

        def pieces(self, name: str) -> Any:
            return self.source.pieces(name)

        def digest(self) -> str | None:
            return None

    watched = [replace(adapter, source=Counting(adapter.source)) for adapter in three]
    both = merge(watched, NUMBERS, rank=4)
    assert asked == [], "the sum is lazy"
    both.save(tmp_path / "out")
    assert set(asked) == {1} and len(asked) == len(SHAPES) * len(three)


# --- refusals, notes, files -------------------------------------------------------------------------------------------


def test_updates_that_cannot_be_added_are_refused_by_name(three: list[Adapter], tmp_path: Path) -> None:
    other = {**SHAPES, "layers.1.q_proj": (24, 16)}
    narrow = lora_squeeze.load(write_folder(tmp_path / "narrow", plain_tensors(other)))
    with pytest.raises(
        LoraSqueezeError, match=r"layers\.1\.q_proj: adapter 1 has linear 24 x 20, adapter 2 has linear 24 x 16"
    ):
        merge([three[0], narrow])


def test_another_kind_of_layer_under_the_same_name_is_refused(three: list[Adapter], tmp_path: Path) -> None:
    tensors = plain_tensors()
    for side in "AB":
        key = f"{PREFIX}layers.0.q_proj.lora_{side}.weight"
        tensors[key.replace(f"lora_{side}.weight", f"lora_embedding_{side}")] = tensors.pop(key)
    embedding = lora_squeeze.load(write_folder(tmp_path / "embedding", tensors))
    with pytest.raises(LoraSqueezeError, match=r"layers\.0\.q_proj: adapter 1 has linear .*adapter 2 has embedding"):
        merge([three[0], embedding])


def test_convolutions_of_other_kernels_are_refused(tmp_path: Path) -> None:
    pair = []
    for kernel in ((3, 2), (2, 3)):
        tensors = {
            f"{PREFIX}conv.lora_A.weight": torch.randn(2, 4, *kernel),
            f"{PREFIX}conv.lora_B.weight": torch.randn(6, 2, 1, 1),
        }
        config = plain_config(r=2, target_modules=["conv"])
        pair.append(lora_squeeze.load(write_folder(tmp_path / str(kernel), tensors, config)))
    with pytest.raises(LoraSqueezeError, match=r"conv 6 x 24, kernel \[3, 2\].*conv 6 x 24, kernel \[2, 3\]"):
        merge(pair)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "unknown method 'mean' of merging: choose one of sum, ties, dare, dare-ties"),
        ({"density": 0.5}, "the sum keeps all entries: leave out density, or choose one of ties, dare, dare-ties"),
        ({"method": "ties", "rank": 2}, "ties keeps a share of the entries: give density, such as 0.2"),
        ({"method": "dare", "density": 0.0, "rank": 2}, "density must be above 0 and at most 1, got 0.0"),
        ({"method": "ties", "density": 0.5}, "ties makes updates of full rank: say how small, such as rank=16"),
        ({"extras_from": 4}, "extras_from must be from 1 to 3, the number of adapters; got 4"),
        ({"rank": 2, "energy": 0.5}, "give one rule, not 2"),
    ],
)
def test_impossible_requests_are_refused(three: list[Adapter], options: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraSqueezeError, match=re.escape(message)):
        merge(three, **options)


def test_no_adapters_make_no_sum() -> None:
    with pytest.raises(LoraSqueezeError, match="no adapters to merge: give at least one"):
        merge([])


@pytest.mark.parametrize(
    ("bases", "told"),
    [
        (["org/base", "org/other"], True),
        (["org/base", "/models/Base/"], False),
        (["org/base", None], False),
        (["org/base", "org/base"], False),
    ],
)
def test_bases_of_different_names_are_told(tmp_path: Path, bases: list[Any], told: bool) -> None:
    pair = [made(tmp_path / f"{i}", 4, i, base_model_name_or_path=base) for i, base in enumerate(bases)]
    notes = [note for note in merge(pair).notes if "different base models" in note]
    assert bool(notes) == told
    assert not told or "org/base, org/other" in notes[0]


def test_no_source_is_overwritten(three: list[Adapter], tmp_path: Path) -> None:
    both = merge(three)
    for i in range(3):
        with pytest.raises(LoraSqueezeError, match=r"is (what one of )?the.* adapters? is read from"):
            both.save(tmp_path / f"in {i}", force=True)
    both.save(tmp_path / "out")
    with pytest.raises(LoraSqueezeError, match="exists"):
        both.save(tmp_path / "out")


def test_the_file_says_what_was_done(three: list[Adapter], tmp_path: Path) -> None:
    """The history has the weights and one digest over those of the sources."""
    from hashlib import sha256

    merge(three, NUMBERS, rank=4).save(tmp_path / "out")
    merged, cut = lora_squeeze.load(tmp_path / "out").history
    assert merged == {"step": "merge", "adapters": 3, "method": "sum", "weights": list(NUMBERS)}
    digests = [sha256((tmp_path / f"in {i}" / WEIGHTS).read_bytes()).hexdigest() for i in range(3)]
    assert cut["rule"] == "rank=4" and cut["source_sha256"] == sha256("".join(digests).encode()).hexdigest()
    merge(three).save(tmp_path / "whole")
    (only,) = lora_squeeze.load(tmp_path / "whole").history
    assert only["step"] == "merge"
    config = json.loads((tmp_path / "whole" / CONFIG).read_text())
    assert math.isclose(config["lora_alpha"] / config["r"], three[0].default_scale)


def test_many_adapters_fit_in_the_header(tmp_path: Path) -> None:
    many = [made(tmp_path / f"in {i}", 1, i) for i in range(40)]
    merge(many, [1 / 3] * 40, rank=2).save(tmp_path / "out")
    for name in SHAPES:
        expected = total(many, [1 / 3] * 40, name)
        lost = float((read_dense(tmp_path / "out", name) - expected).norm())
        assert math.isclose(lost, tail(expected, 2), rel_tol=1e-4)


class Memory:
    """A format of its own, which knows nothing of PEFT's configuration."""

    name = "memory"
    home = None

    def check_target(self, path: Path, *, force: bool) -> None: ...

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Any) -> None: ...

    def overhead_bytes(self, adapter: Adapter) -> int:
        return 0


def test_adapters_of_any_format_are_added(three: list[Adapter]) -> None:
    """Layouts and settings are then those of the first adapter that has the module."""
    others = [replace(adapter, format=Memory(), config={"from": "all"}) for adapter in three]
    q_proj = {name: module for name, module in others[0].modules.items() if name.endswith("q_proj")}
    both = merge([replace(others[0], modules=q_proj), *others[1:]], NUMBERS)
    assert both.config == {"from": "all"} and both.format.name == "memory"
    for name in SHAPES:
        weights = NUMBERS if name in q_proj else (0.0, *NUMBERS[1:])
        torch.testing.assert_close(dense(both, name), total(three, weights, name), rtol=1e-5, atol=1e-6)
        assert both.modules[name].layout == others[0 if name in q_proj else 1].modules[name].layout


def test_settings_of_other_formats_are_not_taken_for_modules_that_they_may_not_name(three: list[Adapter]) -> None:
    one, two = (replace(adapter, format=Memory(), config={"from": i}) for i, adapter in enumerate(three[:2]))
    few = replace(one, modules={name: module for name, module in one.modules.items() if "v_proj" not in name})
    with pytest.raises(LoraSqueezeError, match=r"layers\.0\.v_proj: the first adapter does not have this module"):
        merge([few, two])
    assert merge([two, few]).modules.keys() == merge([one, two]).modules.keys() == set(SHAPES)


def test_carried_tensors_of_an_adapter_without_weight_can_be_taken(three: list[Adapter], tmp_path: Path) -> None:
    head = {f"{PREFIX}head.weight": torch.randn(5, 4)}
    folder = write_folder(tmp_path / "head", plain_tensors() | head, plain_config(modules_to_save=["head"]))
    members = [three[0], lora_squeeze.load(folder)]
    assert merge(members, [1, 0]).extras == {}
    merge(members, [1, 0], extras_from=2).save(tmp_path / "out")
    assert torch.equal(safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)[f"{PREFIX}head.weight"], *head.values())
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["modules_to_save"] == ["head"]
    for name in SHAPES:
        torch.testing.assert_close(read_dense(tmp_path / "out", name), dense(three[0], name), rtol=1e-6, atol=1e-7)


# --- rank-up ----------------------------------------------------------------------------------------------------------


def test_rank_up_changes_no_update(three: list[Adapter], tmp_path: Path) -> None:
    mixed = three[0].squeeze(energy=0.9)
    up = rank_up(mixed, 12)
    up.save(tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == 12 and not config["rank_pattern"]
    assert len({module.rank for module in mixed.modules.values()}) > 1
    for name in SHAPES:
        torch.testing.assert_close(read_dense(tmp_path / "out", name), dense(mixed, name), rtol=1e-6, atol=1e-7)
    assert lora_squeeze.load(tmp_path / "out").history[-1]["step"] == "rank-up"


def test_rank_up_is_the_same_for_a_seed_and_another_for_another(three: list[Adapter]) -> None:
    one, again, other = (rank_up(three[0], 10, seed=seed).update("layers.0.q_proj").A for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(8, "nothing to do: every module has rank 8 already"), (4, "has rank 8 already; to make it smaller use squeeze")],
)
def test_rank_up_to_no_higher_rank_is_refused(three: list[Adapter], rank: int, message: str) -> None:
    with pytest.raises(LoraSqueezeError, match=message):
        rank_up(three[0], rank)


def test_a_rank_that_groups_do_not_divide_is_refused(tmp_path: Path) -> None:
    tensors = {
        f"{PREFIX}conv.lora_A.weight": torch.randn(4, 8, 3),
        f"{PREFIX}conv.lora_B.weight": torch.randn(6, 2, 1),
    }
    grouped = lora_squeeze.load(write_folder(tmp_path / "in", tensors, plain_config(r=4, target_modules=["conv"])))
    with pytest.raises(LoraSqueezeError, match="conv: its 2 groups do not divide rank 7; ask for a multiple"):
        rank_up(grouped, 7)
    assert rank_up(grouped, 6).modules["conv"].rank == 3


def test_the_result_of_a_merge_is_a_squeeze_of_the_sum(three: list[Adapter]) -> None:
    """So everything that reports know of a squeeze they know of a merge."""
    small = merge(three, NUMBERS, rank=2)
    assert isinstance(small.source, Squeezed)
    rows = {row.name: row for row in small.report.rows}
    for name in SHAPES:
        expected = torch.linalg.svdvals(total(three, NUMBERS, name))
        found = torch.tensor(rows[name].singular_values, dtype=torch.float64)
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-5, atol=1e-6)
