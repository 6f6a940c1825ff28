"""Squeezing a whole adapter: ranks, budgets, scales, dtypes, memory."""

import json
import re
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_cases import (
    ALPHA,
    CONFIG,
    PREFIX,
    RANK,
    SHAPES,
    WEIGHTS,
    dense,
    plain_config,
    plain_tensors,
    read_dense,
    tail,
    write_folder,
)

import lora_squeeze
from lora_squeeze import adapter as adapter_module
from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.decompose import METHODS
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import peft
from lora_squeeze.lowrank import LowRank
from lora_squeeze.post_squeeze import parse_size
from lora_squeeze.ranks import RULES

VALUES = dict(
    rank=3, energy=0.9, error=0.3, size=6000, params=900, sv_ratio=4.0, sv_cumulative=0.8, sv_fro=0.95
)  # one request of every rule


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return lora_squeeze.load(write_folder(tmp_path / "source"))


def ranks(adapter: Adapter) -> dict[str, int]:
    return {name: module.rank for name, module in adapter.modules.items()}


def saved(adapter: Adapter, folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    adapter.save(folder, force=True)
    return json.loads((folder / CONFIG).read_text()), safetensors.torch.load_file(folder / WEIGHTS)


@pytest.mark.parametrize("method", METHODS)
def test_every_module_gets_its_best_approximation(adapter: Adapter, tmp_path: Path, method: str) -> None:
    """The error is the root of the discarded squared singular values; alpha / r and the number of tensors stay."""
    small = adapter.squeeze(rank=3, method=method)
    config, tensors = saved(small, tmp_path / "out")
    assert (config["r"], config["lora_alpha"] / config["r"]) == (3, ALPHA / RANK)
    assert len(tensors) == 2 * len(SHAPES)
    for name in SHAPES:
        before, after = dense(adapter, name), read_dense(tmp_path / "out", name)
        least, error = tail(before, 3), float((before - after).norm())
        assert error == pytest.approx(least, rel=1e-5), name
        assert torch.equal(after, dense(small, name))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_alone_makes_it_smaller(adapter: Adapter, rule: str) -> None:
    small = adapter.squeeze(**{rule: VALUES[rule]})
    assert small.parameters < adapter.parameters
    assert all(small.modules[name].rank <= RANK for name in small.modules)
    assert small.history[-1]["rule"] == f"{rule}={VALUES[rule]}"


@pytest.mark.parametrize("first", RULES)
def test_rules_exclude_each_other(adapter: Adapter, first: str) -> None:
    second = "energy" if first != "energy" else "rank"
    with pytest.raises(LoraSqueezeError) as error:
        adapter.squeeze(**{first: VALUES[first], second: VALUES[second]})
    assert first in str(error.value) and second in str(error.value)


def test_no_rule_is_refused_with_the_rules(adapter: Adapter) -> None:
    with pytest.raises(LoraSqueezeError, match=f"how small\\? give one of {', '.join(RULES)}"):
        adapter.squeeze()


@pytest.mark.parametrize("limits", [{}, {"max_rank": 5}, {"energy": 0.9}])
def test_the_scale_alone_keeps_the_ranks(adapter: Adapter, limits: dict[str, Any]) -> None:
    folded = adapter.squeeze(alpha="fold", **limits)
    assert ranks(folded) == ranks(adapter.squeeze(**limits) if limits else adapter)
    assert folded.default_scale == 1.0


def test_max_rank_alone_is_a_rank_and_a_bound_beside_a_rule(adapter: Adapter) -> None:
    assert ranks(adapter.squeeze(max_rank=5)) == dict.fromkeys(SHAPES, 5)
    whole = ranks(adapter.squeeze(energy=1.0))
    bounded = ranks(adapter.squeeze(energy=1.0, max_rank=5))
    assert bounded == {name: min(k, 5) for name, k in whole.items()} != whole


def test_limits_hold_for_every_module(adapter: Adapter) -> None:
    free = ranks(adapter.squeeze(energy=0.7))
    assert min(free.values()) < 4
    assert ranks(adapter.squeeze(energy=0.7, min_rank=4)) == {name: max(k, 4) for name, k in free.items()}
    assert all(k % 4 == 0 for k in ranks(adapter.squeeze(energy=0.9, multiple_of=4)).values())


def test_equal_ranks_are_written_without_patterns(adapter: Adapter, tmp_path: Path) -> None:
    config, _ = saved(adapter.squeeze(rank=3), tmp_path / "out")
    assert not config["rank_pattern"] and not config["alpha_pattern"]


@pytest.mark.parametrize("alpha", ["keep", "fold"])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"alpha_pattern": {"v_proj": 40}}, {"lora_alpha": -4}])
@pytest.mark.parametrize("rank", [3, RANK])
def test_alpha_policies(tmp_path: Path, alpha: str, changes: dict[str, Any], rank: int) -> None:
    """keep: the adapter's own alpha / r; fold: 1. In both, one number for all modules, and the same update."""
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", config=plain_config(**changes)))
    config, _ = saved(adapter.squeeze(rank=rank, alpha=alpha), tmp_path / "out")
    own = plain_config(**changes)["lora_alpha"] / (RANK**0.5 if "use_rslora" in changes else RANK)
    expected = own if alpha == "keep" and own > 0 else 1.0
    assert config["lora_alpha"] / config["r"] == pytest.approx(expected, rel=1e-12)
    assert not config["use_rslora"] and not config["alpha_pattern"]
    for name in SHAPES:
        before = dense(adapter, name)
        error = float((before - read_dense(tmp_path / "out", name)).norm())
        assert error == pytest.approx(tail(before, rank), rel=1e-5, abs=1e-6 * float(before.norm()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float32])
def test_the_dtype_is_kept_or_chosen(tmp_path: Path, dtype: torch.dtype, source: torch.dtype) -> None:
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors(dtype=source)))
    assert all(t.dtype == source for t in saved(adapter.squeeze(rank=3), tmp_path / "out")[1].values())
    for request in ({"rank": 3}, {}):  # a dtype alone keeps the ranks
        small = adapter.squeeze(dtype=dtype, **request)
        config, tensors = saved(small, tmp_path / "out")
        assert all(t.dtype == dtype for t in tensors.values())
        assert config["r"] == request.get("rank", RANK)
        for name in SHAPES:
            before = dense(adapter, name)
            error = float((before - read_dense(tmp_path / "out", name)).norm())
            room = 2 * torch.finfo(dtype).eps * float(before.norm()) + 1e-6
            assert error <= tail(before, config["r"]) + room


def test_factors_that_overflow_are_refused_with_a_dtype_that_holds_them(tmp_path: Path) -> None:
    """Singular values of 1e12 need factors of 1e6: above the 65504 of float16."""
    tensors = {key: t * 1e6 for key, t in plain_tensors(kind="flat").items()}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors))
    for rank in (3, RANK):
        with pytest.raises(
            LoraSqueezeError, match=r"q_proj: .*do not fit in torch.float16.*ask for dtype float32 or bfloat16"
        ):
            adapter.squeeze(rank=rank, dtype=torch.float16).save(tmp_path / "out")
        assert not (tmp_path / "out").exists()
    adapter.squeeze(rank=3, dtype=torch.bfloat16).save(tmp_path / "out")


@pytest.mark.parametrize("rank", [None, RANK + 1])
@pytest.mark.parametrize("broken", ["NaN", "range", "bias"])
def test_what_no_reader_can_use_is_not_written_either_without_a_squeeze(
    tmp_path: Path, broken: str, rank: int | None
) -> None:
    """One scale is written for all modules: neither the factors nor the bias of this one hold the rest of its own."""
    tensors = {key: (t * 100 / t.abs().max()).half() for key, t in plain_tensors().items()}
    bias, key = f"{PREFIX}layers.0.v_proj.lora_B.bias", f"{PREFIX}layers.0.v_proj.lora_B.weight"
    config = plain_config(lora_bias=True, alpha_pattern={} if broken == "NaN" else {"v_proj": 12e8})
    tensors[key][0, 0] *= torch.nan if broken == "NaN" else 1
    if broken == "bias":
        tensors |= {bias: torch.ones(8).half(), key: tensors[key] * 0}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, config))
    text = "times 1e\\+08 it .*float16" if broken == "bias" else "layers.0.v_proj: the factors hold NaN .*float16"
    with pytest.raises(LoraSqueezeError, match=text):
        (adapter if rank is None else lora_squeeze.rank_up(adapter, rank)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stored", "written", "size", "alpha"),
    [
        (torch.bfloat16, torch.float16, 1e-4, "keep"),
        (torch.float16, torch.bfloat16, 1.0, "keep"),
        (torch.bfloat16, torch.bfloat16, 1.0, "fold"),
        (torch.float32, torch.float16, 1e-4, "fold"),
    ],
)
def test_rounding_is_known_where_the_rank_stays(
    tmp_path: Path, stored: torch.dtype, written: torch.dtype, size: float, alpha: str
) -> None:
    """Another dtype, or another scale in the same."""
    tensors = {key: (t * size).to(stored) for key, t in plain_tensors().items()}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors))
    small = adapter.squeeze(rank=RANK, dtype=written, alpha=alpha)
    small.save(tmp_path / "out")
    for row in small.report.rows:
        error = float((dense(adapter, row.name) - read_dense(tmp_path / "out", row.name)).norm())
        assert 0 < error == pytest.approx(row.rounding, rel=1e-4)
    assert all(row.rounding is None for row in adapter.squeeze(rank=RANK).report.rows)


@pytest.mark.parametrize("alpha", [12, -3, 0])
def test_an_adapter_that_is_saved_as_it_is_keeps_every_update(tmp_path: Path, alpha: int) -> None:
    """One scale is written, whatever scales were read; the bias of B follows it."""
    bias = torch.arange(8.0)
    key = f"{PREFIX}layers.0.v_proj.lora_B.bias"
    config = plain_config(lora_alpha=alpha, lora_bias=True, alpha_pattern={"v_proj": 40, "down_proj": 3})
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors() | {key: bias}, config))
    _, written = saved(adapter, tmp_path / "out")
    for name in adapter.modules:
        torch.testing.assert_close(read_dense(tmp_path / "out", name), dense(adapter, name), rtol=1e-5, atol=1e-6)
    written_scale = lora_squeeze.load(tmp_path / "out").default_scale
    torch.testing.assert_close(written[key] * written_scale, bias * 40 / RANK)


@pytest.mark.parametrize("device", ["meta", "no such device"])
def test_a_device_that_cannot_compute_is_refused(adapter: Adapter, device: str) -> None:
    with pytest.raises(LoraSqueezeError, match=f"device '{device}' cannot be used here"):
        adapter.squeeze(rank=3, device=device)


def test_an_update_beyond_float64_is_refused(tmp_path: Path) -> None:
    tensors = {name: 1e30 * tensor for name, tensor in plain_tensors().items()}
    found = lora_squeeze.load(write_folder(tmp_path / "huge", tensors, plain_config(lora_alpha=1e99)))
    with pytest.raises(LoraSqueezeError, match=r"an update with singular values up to .* cannot be measured"):
        found.squeeze(energy=0.9)


def test_a_dtype_without_fractions_is_refused(adapter: Adapter) -> None:
    with pytest.raises(LoraSqueezeError, match=r"dtype must be one of .*torch\.float16, got torch\.int8"):
        adapter.squeeze(rank=3, dtype=torch.int8)


def test_extras_are_carried_unchanged_and_the_lora_bias_follows_the_scale(tmp_path: Path) -> None:
    bias = torch.arange(8.0)
    tensors = plain_tensors() | {
        f"{PREFIX}layers.0.v_proj.lora_B.bias": bias,
        f"{PREFIX}model.embed_tokens.weight": torch.randn(30, 20, dtype=torch.float16),
        f"{PREFIX}score.weight": torch.randn(3, 20).double(),
    }
    config = plain_config(lora_bias=True, modules_to_save=["score"], alpha_pattern={"v_proj": 40})
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, config))
    _, written = saved(adapter.squeeze(rank=3), tmp_path / "out")
    assert written.keys() == tensors.keys()
    for key in (f"{PREFIX}model.embed_tokens.weight", f"{PREFIX}score.weight"):
        assert written[key].dtype == tensors[key].dtype and torch.equal(written[key], tensors[key])
    scale, own = ALPHA / RANK, 40 / RANK
    assert torch.allclose(written[f"{PREFIX}layers.0.v_proj.lora_B.bias"] * scale, bias * own)
    assert {extra.kind for extra in adapter.extras.values()} == {"lora bias", "embedding", "module to save"}


# --- size -----------------------------------------------------------------------------------------------------------


def long_names(count: int) -> dict[str, tuple[int, int]]:
    return {f"模型.layers.{i}.注意力.q_proj": (40 + i % 3, 32) for i in range(count)}


@pytest.mark.parametrize(
    ("shapes", "rank"),
    [({"q_proj": (3, 2)}, 2), ({"q_proj": (512, 256)}, 32), (SHAPES, RANK), (long_names(12), 16)],
    ids=["tiny", "one", "few", "many"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("allocate", ["global", "uniform"])
def test_the_file_fits_the_size(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], rank: int, dtype: torch.dtype, allocate: str
) -> None:
    """For sizes all over the range, header, extras and metadata included; and little of the room stays unused.

    Unused may be: less than one direction, and the header's room for modules that left.
    """
    tensors = plain_tensors(shapes, rank, torch.float32) | {f"{PREFIX}score.weight": torch.ones(7)}
    metadata = {"trainer": "a story of ünïcödé " * 10}
    folder = write_folder(tmp_path / "in", tensors, plain_config(r=rank), metadata)
    adapter = lora_squeeze.load(folder)
    adapter.squeeze(rank=1, dtype=dtype).save(tmp_path / "out", force=True)
    least = (tmp_path / "out" / WEIGHTS).stat().st_size
    adapter.squeeze(dtype=dtype).save(tmp_path / "out", force=True)
    most = (tmp_path / "out" / WEIGHTS).stat().st_size
    step = max(module.parameters_per_rank for module in adapter.modules.values()) * dtype.itemsize
    step *= len(shapes) if allocate == "uniform" else 1
    for i in range(4):
        size = least + (most - least) * i // 3 + 200 + 100 * len(shapes)
        small = adapter.squeeze(size=size, dtype=dtype, allocate=allocate)
        small.save(tmp_path / "out", force=True)
        used = (tmp_path / "out" / WEIGHTS).stat().st_size
        left = len(small.dropped) / len(shapes) * adapter.format.overhead_bytes(adapter)
        assert used <= size
        assert used >= min(most, 0.8 * size - step - left), f"only {used} of {size} bytes used"


@pytest.mark.parametrize("name", ["q_proj", "模型" * 60, 'with."quotes"'])
def test_the_room_kept_for_the_header_is_enough(tmp_path: Path, name: str) -> None:
    """Whatever names and history; counted before the ranks are known."""
    tensors = plain_tensors({f"{name}.{i}": (6, 5) for i in range(8)}, 3)
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, plain_config(r=3)))
    for rank in (2, 1):
        small = adapter.squeeze(rank=rank)
        small.save(tmp_path / f"{rank}")
        used = (tmp_path / f"{rank}" / WEIGHTS).stat().st_size
        assert used - small.lora_bytes <= adapter.format.overhead_bytes(replace(adapter, history=small.history))
        adapter = lora_squeeze.load(tmp_path / f"{rank}")


@pytest.mark.parametrize("allocate", ["global", "uniform"])
def test_a_size_that_is_too_small_names_one_that_is_enough(tmp_path: Path, allocate: str) -> None:
    tensors = plain_tensors() | {f"{PREFIX}score.weight": torch.ones(1000)}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors))
    with pytest.raises(LoraSqueezeError) as error:
        adapter.squeeze(size="3 kB", allocate=allocate)
    found = re.search(
        r"a budget of 3,000 bytes is too small: the smallest possible is ([\d,]+), ([\d,]+) of them for the header "
        r"and the tensors carried along",
        str(error.value),
    )
    assert found
    least, fixed = (int(text.replace(",", "")) for text in found.groups())
    assert 4000 < fixed < least
    adapter.squeeze(size=least, allocate=allocate).save(tmp_path / "out")
    assert (tmp_path / "out" / WEIGHTS).stat().st_size <= least
    with pytest.raises(LoraSqueezeError, match="too small"):
        adapter.squeeze(size=least - 1, allocate=allocate)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (5000, 5000), (5000.0, 5000), ("5000", 5000), ("10MB", 10**7), ("10 mb", 10**7), ("10MiB", 10 * 2**20),
        ("1.5 GiB", 3 * 2**29), ("800k", 800_000), ("2 TiB", 2**41), ("7B", 7), (" 1 kB ", 1000), ("0.5KiB", 512),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: float | str, expected: int) -> None:
    assert parse_size(float(text) if isinstance(text, float) else text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "MB", "-5MB", "1e6", "10 XB", "10MBit", "1,000", "ten", float("inf"), float("nan"), "9" * 320,
     "9" * 300 + "TB", "9" * 19, 2**63],
)  # fmt: skip
def test_sizes_that_are_not_understood_are_refused(text: float | str) -> None:
    with pytest.raises(LoraSqueezeError, match=r"is not understood; write bytes or a unit, such as 10MB or 10MiB"):
        parse_size(text)


# --- modules that leave, groups, device -----------------------------------------------------------------------------


def test_a_module_without_energy_may_leave_and_is_excluded(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors[f"{PREFIX}layers.1.q_proj.lora_B.weight"].zero_()
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors))
    small = adapter.squeeze(energy=0.9)
    config, written = saved(small, tmp_path / "out")
    assert small.dropped == ("layers.1.q_proj",)
    assert not any("layers.1.q_proj" in key for key in written)
    assert config["exclude_modules"] == r"(?:layers\.1\.q_proj)"
    kept = adapter.squeeze(energy=0.9, min_rank=1)
    assert not kept.dropped and kept.modules["layers.1.q_proj"].rank == 1
    assert float(dense(kept, "layers.1.q_proj").norm()) == 0


def test_an_adapter_of_zeros_is_not_emptied(tmp_path: Path) -> None:
    tensors = {key: t * ("lora_A" in key) for key, t in plain_tensors().items()}
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors))
    for request in ({"energy": 0.9}, {"params": 500}):
        with pytest.raises(LoraSqueezeError, match="leaves no module in the adapter; ask for more, or set min_rank 1"):
            adapter.squeeze(**request)
    adapter.squeeze(rank=2).save(tmp_path / "out")
    written = safetensors.torch.load_file(tmp_path / "out" / WEIGHTS)
    assert all(bool(t.any()) == ("lora_A" in key) and t.isfinite().all() for key, t in written.items())


def test_modules_of_one_group_keep_one_rank(adapter: Adapter) -> None:
    modules = {name: replace(m, group="tied" if "q_proj" in name else None) for name, m in adapter.modules.items()}
    tied = replace(adapter, modules=modules)
    alone, together = ranks(adapter.squeeze(params=700)), ranks(tied.squeeze(params=700))
    assert alone["layers.0.q_proj"] != alone["layers.1.q_proj"]
    assert together["layers.0.q_proj"] == together["layers.1.q_proj"]
    assert tied.squeeze(params=700).parameters <= 700


def test_the_order_of_modules_does_not_matter(adapter: Adapter) -> None:
    turned = replace(adapter, modules=dict(reversed(adapter.modules.items())))
    for request in ({"energy": 0.9}, {"params": 900}, {"rank": 4, "allocate": "global"}):
        one, other = adapter.squeeze(**request), turned.squeeze(**request)
        assert ranks(one) == ranks(other)
        assert all(torch.equal(dense(one, name), dense(other, name)) for name in one.modules)


@pytest.mark.parametrize("method", METHODS)
def test_two_squeezes_write_the_same_bytes(adapter: Adapter, tmp_path: Path, method: str) -> None:
    for out in ("one", "two"):
        adapter.squeeze(rank=3, method=method, device="cpu").save(tmp_path / out)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two"))
    assert one == two


def test_a_squeeze_can_be_squeezed_again(adapter: Adapter, tmp_path: Path) -> None:
    """In memory and over a file, with both steps in the history."""
    twice = adapter.squeeze(rank=5).squeeze(rank=2)
    for name in SHAPES:
        assert float((dense(twice, name) - dense(adapter.squeeze(rank=2), name)).norm()) < 1e-5
    adapter.squeeze(rank=5).save(tmp_path / "five")
    again = lora_squeeze.load(tmp_path / "five").squeeze(rank=2)
    again.save(tmp_path / "two")
    assert [step["rule"] for step in lora_squeeze.load(tmp_path / "two").history] == ["rank=5", "rank=2"]


# --- memory ---------------------------------------------------------------------------------------------------------


class Counting(peft.PeftSource):
    """Keeps count of the source factors that are alive."""

    alive: list[weakref.ref[torch.Tensor]]

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        found = super().updates(modules)
        self.alive = [ref for ref in getattr(self, "alive", []) if ref() is not None]
        object.__setattr__(self, "alive", [*self.alive, *(weakref.ref(update.A) for update in found)])
        object.__setattr__(self, "most", max(getattr(self, "most", 0), len(self.alive)))
        return found


@pytest.mark.parametrize("request_", [{"rank": 2}, {"energy": 0.9}])
def test_memory_does_not_grow_with_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict[str, Any]
) -> None:
    """Of sixty modules, no more than the few of a batch are in memory, while they are measured and while written."""
    tensors = plain_tensors({f"layers.{i}.q_proj": (16, 16) for i in range(60)}, 4)
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, plain_config(r=4)))
    source = Counting(adapter.source.file)  # type: ignore[attr-defined]
    monkeypatch.setattr(adapter_module, "BATCH_BYTES", 3 * adapter.modules["layers.0.q_proj"].size_bytes)
    assert max(len(batch) for batch in adapter.batches()) == 3
    small = replace(adapter, source=source).squeeze(**request_)
    small.save(tmp_path / "out")
    assert len(small.report.rows) == 60
    assert 3 <= source.most <= 6  # type: ignore[attr-defined]
