"""The figures of a report against a recomputation from dense matrices."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_cases import PREFIX, RANK, SHAPES, dense, plain_config, plain_tensors, write_folder

import lora_squeeze
from lora_squeeze.adapter import Adapter
from lora_squeeze.decompose import METHODS
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.report import ENERGY_MARKS, by_kind


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
        assert other.energy_at_rank == pytest.approx(one.energy_at_rank, rel=1e-6)
        ranks = [(row.stable_rank, row.entropy_rank) for row in (one, other)]
        assert ranks[0] == pytest.approx(ranks[1], rel=1e-6)
        inexact = {
            "rounding": None,
            "energy": 0,
            "discarded": 0,
            "norm": 0,
            "singular_values": [],
            "energy_at_rank": [],
        }
        inexact |= {"stable_rank": 0, "entropy_rank": 0}
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
    assert found["curve"] == [point.to_json() for point in report.curve]


# --- which rank? ----------------------------------------------------------------------------------------------------


def mixed_folder(folder: Path) -> Path:
    """Linear layers, two groups of a convolution, and two parameters of three experts, which share one rank."""
    g = torch.Generator().manual_seed(1)
    shapes = {
        f"{PREFIX}layers.2.conv.lora_A.weight": (RANK, 3, 3, 3),
        f"{PREFIX}layers.2.conv.lora_B.weight": (6, RANK // 2, 1, 1),
        f"{PREFIX}layers.2.experts.base_layer.lora_A.weight": (3 * RANK, 12),
        f"{PREFIX}layers.2.experts.base_layer.lora_B.weight": (20, 3 * RANK),
        f"{PREFIX}layers.2.experts.lora_A.weight": (3 * RANK, 10),
        f"{PREFIX}layers.2.experts.lora_B.weight": (12, 3 * RANK),
    }
    more = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    more[f"{PREFIX}layers.2.experts.lora_B.weight"] *= 0.1
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    return write_folder(folder, plain_tensors() | more, plain_config(target_parameters=parameters))


@pytest.fixture
def mixed(tmp_path: Path) -> Adapter:
    return lora_squeeze.load(mixed_folder(tmp_path / "mixed"))


def pooled(adapter: Adapter, name: str) -> torch.Tensor:
    """Squared singular values summed over the copies of a module."""
    S = torch.linalg.svdvals(dense(adapter, name))
    return S.reshape(-1, S.shape[-1]).square().sum(0)[: adapter.modules[name].rank]


def test_effective_ranks_are_those_of_the_dense_update(mixed: Adapter) -> None:
    for row in mixed.report.rows:
        energies = pooled(mixed, row.name)
        shares = energies / energies.sum()
        assert row.stable_rank == pytest.approx(float(1 / shares[0]), rel=1e-6)
        assert row.entropy_rank == pytest.approx(float(torch.special.entr(shares).sum().exp()), rel=1e-6)
        eps = torch.finfo(torch.float32).eps
        assert row.numerical_rank == int(torch.linalg.matrix_rank(dense(mixed, row.name), rtol=eps).max())


def test_energy_and_bytes_of_a_module_at_every_rank(mixed: Adapter) -> None:
    squeezed = {rank: (mixed.squeeze(rank=rank) if rank < RANK else mixed).report for rank in range(1, RANK + 2)}
    for i, row in enumerate(mixed.report.rows):
        energies, step = pooled(mixed, row.name), row.step
        assert (step == 2) == (row.kind == "conv")
        assert row.energy_at_rank == pytest.approx((energies.cumsum(0) / energies.sum()).tolist(), rel=1e-6)
        assert row.size_bytes == row.rank // step * row.bytes_per_step
        for rank, report in squeezed.items():
            assert row.energy_at(rank) == pytest.approx(report.rows[i].energy, rel=1e-9)
        for mark in ENERGY_MARKS:
            k = row.rank_for_energy[str(mark)]
            assert row.energy_at(k) >= mark and (k == step or row.energy_at(k - step) < mark)


@pytest.mark.parametrize("allocate", ["uniform", "global"])
def test_the_curves_are_what_a_squeeze_gives(mixed: Adapter, allocate: str) -> None:
    report = mixed.report
    points = report.curve if allocate == "uniform" else report.best_curve
    assert [p.rank for p in points] == (list(range(1, RANK + 1)) if allocate == "uniform" else [1, 2, 4, 8])
    for point in points:
        small = mixed.squeeze(rank=point.rank, allocate=allocate)
        found = small.report
        assert (point.size_bytes, point.largest_rank) == (small.lora_bytes, small.rank)
        energies = (point.energy, point.mean_energy, point.min_energy)
        assert energies == pytest.approx((found.energy, found.mean_energy, found.min_energy), abs=1e-9)
    assert points[-1].energy == points[-1].min_energy == 1.0


def test_members_of_a_group_with_unequal_ranks_are_counted_as_they_are_written(tmp_path: Path) -> None:
    """PEFT gives tied modules one rank: a squeeze fills up the smaller one."""
    tensors = plain_tensors({"model.embed_tokens": (20, 40), "lm_head": (40, 20)})
    keys = [f"{PREFIX}model.embed_tokens.lora_{side}.weight" for side in "AB"]
    A, B = (tensors.pop(key) for key in keys)
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = A[:5]
    tensors[f"{PREFIX}model.embed_tokens.lora_embedding_B"] = B[:, :5]
    config = plain_config(target_modules=["embed_tokens"], ensure_weight_tying=True)
    adapter = lora_squeeze.load(write_folder(tmp_path / "in", tensors, config))
    for point in adapter.report.curve:
        small = adapter.squeeze(rank=point.rank)
        assert point.size_bytes == small.lora_bytes
        assert point.energy == pytest.approx(small.report.energy, abs=1e-9)


@pytest.mark.parametrize(
    "budget",
    [{"rank": 3, "allocate": "global"}, {"params": 1500}, {"size": "9kB"}, {"rank": 4}, {"size": "9kB", "max_rank": 4}],
)
def test_a_plan_is_what_the_squeeze_would_do(mixed: Adapter, budget: dict[str, Any]) -> None:
    report, small = lora_squeeze.inspect(mixed, **budget, min_rank=None), mixed.squeeze(**budget)
    ranks = {row.name: row.rank_after for row in report.rows}
    assert {n: k for n, k in ranks.items() if k} == {n: m.rank * m.step for n, m in small.modules.items()}
    assert (report.energy, report.lora_bytes_after) == (small.report.energy, small.lora_bytes)
    found = json.loads(json.dumps(report.inspection(), allow_nan=False))
    assert found["plan"] == {"request": budget, "ranks": ranks}
    kind = next(kind for kind in found["kinds"] if kind["name"] == "q_proj")
    q_ranks = [rank for name, rank in ranks.items() if name.endswith("q_proj")]
    assert kind["rank_after"] == [min(q_ranks), max(q_ranks)]


def test_without_a_budget_there_is_no_plan(adapter: Adapter) -> None:
    found = lora_squeeze.inspect(adapter, size=None).inspection()
    assert found["plan"] is found["base"] is None and found["rank"] == adapter.rank
    assert all(row["rank"] == row["rank_after"] for row in found["modules"])


def test_an_impossible_budget_is_refused_as_by_the_squeeze(adapter: Adapter) -> None:
    with pytest.raises(LoraSqueezeError, match="a budget of 1 parameters is too small"):
        lora_squeeze.inspect(adapter, params=1)


def test_the_json_of_an_inspection_keeps_what_squeeze_prints_and_adds_curves(mixed: Adapter) -> None:
    report = lora_squeeze.inspect(mixed)
    found = json.loads(json.dumps(report.inspection(), allow_nan=False))
    assert report.to_json().items() <= found.items()
    assert [point["rank"] for point in found["curve"]] == list(range(1, RANK + 1))
    assert {"rank", "energy", "mean_energy", "min_energy", "bytes"} <= found["curve"][0].keys()
    assert found["recommended_ranks"] == {str(mark): report.uniform_rank(mark) for mark in ENERGY_MARKS}
    for name, spread in found["effective_ranks"].items():
        values = [row[name] for row in found["modules"]]
        assert spread == {"min": min(values), "mean": pytest.approx(sum(values) / len(values)), "max": max(values)}


def test_kinds_are_modules_with_the_same_end_of_their_name(mixed: Adapter, tmp_path: Path) -> None:
    report = mixed.report
    assert list(by_kind(report.rows)) == ["q_proj", "v_proj", "down_proj", "conv", "gate_up_proj"]
    for kind in report.to_json()["kinds"]:
        rows = by_kind(report.rows)[kind["name"]]
        assert (kind["modules"], kind["bytes"]) == (len(rows), sum(row.size_bytes for row in rows))
        total = sum(row.norm**2 for row in rows)
        for rank in range(1, RANK + 1):
            kept = sum(row.norm**2 * row.energy_at(rank) for row in rows)
            assert kind["energy_at_rank"][rank - 1] == pytest.approx(kept / total, rel=1e-9)
    diffusion = plain_tensors({f"blocks.{i}.attn.to_out.0": (8, 8) for i in range(2)})
    config = plain_config(target_modules=["to_out.0"])
    other = lora_squeeze.load(write_folder(tmp_path / "diffusion", diffusion, config))
    assert list(by_kind(other.report.rows)) == ["to_out.0"], "a number alone names nothing"
