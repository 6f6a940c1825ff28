"""The figures of a report against a recomputation from dense matrices."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import PREFIX, RANK, SHAPES, dense, plain_tensors, write_folder

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.decompose import METHODS
from lora_squeeze.report import ENERGY_MARKS


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return lora_squeeze.load(write_folder(tmp_path / "source"))


def spectrum(adapter: Adapter, name: str) -> list[float]:
    values: list[float] = torch.linalg.svdvals(dense(adapter, name))[:RANK].tolist()
    return values


def squares(values: list[float]) -> float:
    return math.fsum(s * s for s in values)


def test_inspect_tells_what_is_in_the_file(adapter: Adapter) -> None:
    report = lora_squeeze.inspect(adapter)
    assert [row.name for row in report.rows] == list(adapter.modules) and set(adapter.modules) == set(SHAPES)
    for row in report.rows:
        S = spectrum(adapter, row.name)
        out, inp = SHAPES[row.name]
        assert row.singular_values == pytest.approx(S, rel=1e-6)
        assert row.norm == pytest.approx(float(dense(adapter, row.name).norm()), rel=1e-6)
        assert (row.rank, row.rank_after, row.energy, row.discarded) == (RANK, RANK, 1.0, 0.0)
        assert row.scale == row.scale_after == adapter.default_scale
        assert row.size_bytes == row.size_bytes_after == 4 * RANK * (out + inp)
        for mark in ENERGY_MARKS:
            k = row.rank_for_energy[str(mark)]
            assert squares(S[:k]) >= mark * squares(S) > squares(S[: k - 1])
    assert report.lora_bytes == report.lora_bytes_after == sum(row.size_bytes for row in report.rows)
    assert (report.energy, report.error, report.mean_energy, report.min_energy) == (1.0, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_squeeze_tells_what_it_cut_off(adapter: Adapter, method: str) -> None:
    small = adapter.squeeze(energy=0.8, method=method)
    report = small.report
    lost = total = 0.0
    for row in report.rows:
        before, after = dense(adapter, row.name), dense(small, row.name)
        error, norm = float((before - after).norm()), float(before.norm())
        assert row.discarded == pytest.approx(error, rel=1e-4)
        assert row.energy == pytest.approx(1 - error**2 / norm**2, rel=1e-4)
        assert (row.rank, row.rank_after) == (RANK, small.modules[row.name].rank)
        assert row.size_bytes_after == row.size_bytes * row.rank_after // row.rank
        lost, total = lost + error**2, total + norm**2
    assert report.energy == pytest.approx(1 - lost / total, rel=1e-4)
    assert report.error == pytest.approx(math.sqrt(lost / total), rel=1e-4)
    assert report.mean_energy == pytest.approx(sum(row.energy for row in report.rows) / len(SHAPES))
    assert report.min_energy == min(row.energy for row in report.rows)
    assert report.lora_bytes_after == small.lora_bytes < report.lora_bytes == adapter.lora_bytes


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("request_", [{"rank": 3}, {"energy": 0.9}])
def test_saving_does_not_change_the_figures(
    adapter: Adapter, tmp_path: Path, method: str, request_: dict[str, Any]
) -> None:
    """But for the rounding error, which is known only then. The spectrum is the whole one in both."""
    lazy, done = (adapter.squeeze(method=method, **request_) for _ in range(2))
    done.save(tmp_path / "out")
    for one, other in zip(lazy.report.rows, done.report.rows, strict=True):
        assert len(other.singular_values) == RANK
        # What a randomised method kept is known when it has run; before that, the optimum stands in its place.
        assert (other.energy, other.discarded) == pytest.approx((one.energy, one.discarded), rel=1e-6)
        assert other.singular_values == pytest.approx(one.singular_values, rel=1e-6)
        inexact = {"rounding": None, "energy": 0, "discarded": 0, "norm": 0, "singular_values": []}
        assert replace(one, **inexact) == replace(other, **inexact)
    assert lazy.report.uniform_rank() == done.report.uniform_rank()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rounding_estimate_is_right_within_a_factor_of_two(tmp_path: Path, dtype: torch.dtype) -> None:
    """Against the difference between 16-bit and float32 factors of one squeeze."""
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors(kind="decaying")))
    exact, stored = (adapter.squeeze(rank=4, dtype=d) for d in (torch.float32, dtype))
    stored.save(tmp_path / "out")
    for row in stored.report.rows:
        measured = float((dense(exact, row.name) - dense(stored, row.name)).norm())
        assert row.rounding is not None and 0.5 * measured < row.rounding < 2 * measured
    exact.save(tmp_path / "exact")
    assert all(row.rounding is None for row in exact.report.rows)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.95, 0.999])
def test_the_recommended_rank_is_the_smallest_with_that_mean_energy(adapter: Adapter, energy: float) -> None:
    spectra = [spectrum(adapter, name) for name in SHAPES]
    means = [sum(squares(S[:k]) / squares(S) for S in spectra) / len(spectra) for k in range(1, RANK + 1)]
    expected = next((k for k, mean in enumerate(means, 1) if mean >= energy), RANK)
    assert adapter.report.uniform_rank(energy) == expected
    assert adapter.squeeze(rank=expected).report.mean_energy >= energy


def test_a_module_that_left_is_reported_with_rank_zero(tmp_path: Path) -> None:
    tensors = plain_tensors()
    tensors[f"{PREFIX}layers.1.q_proj.lora_B.weight"].zero_()
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors))
    for small in (adapter.squeeze(energy=0.9), adapter.squeeze(rank=2)):
        row = next(row for row in small.report.rows if row.name == "layers.1.q_proj")
        assert (row.norm, row.energy, row.discarded) == (0.0, 1.0, 0.0)
        assert set(row.rank_for_energy.values()) == {0}
        assert math.isfinite(small.report.energy)
        assert (row.size_bytes_after == 0) == (row.rank_after == 0) == ("layers.1.q_proj" in small.dropped)


def test_carried_bytes_are_listed_with_their_cause(tmp_path: Path) -> None:
    extra = {f"{PREFIX}model.embed_tokens.weight": torch.ones(30, 20), f"{PREFIX}lm_head.weight": torch.ones(30, 20)}
    report = lora_squeeze.load(write_folder(tmp_path / "in", plain_tensors() | extra)).squeeze(rank=2).report
    assert report.extra_bytes == {"embedding": 2 * 30 * 20 * 4}
    assert "save_embedding_layers" in report.causes["embedding"]


def test_the_json_has_every_figure_and_nothing_that_json_cannot_hold(adapter: Adapter) -> None:
    report = adapter.squeeze(rank=3).report
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["modules"] == [asdict(row) for row in report.rows]
    assert found["energy"] == report.energy and found["recommended_rank"] == report.uniform_rank()
    assert found["bytes"]["lora_after"] == report.lora_bytes_after
