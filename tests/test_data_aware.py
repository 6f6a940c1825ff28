"""Squeezes and plans in the metric of the data, against dense references."""

import math
from pathlib import Path

import pytest
import torch
from adapter_cases import RANK, SHAPES, plain_config, read_dense, tail, write_folder
from peft_cases import CASES
from peft_models import adapted, save
from statistics_cases import WITH_ROWS
from statistics_cases import loss_of as case_loss
from torch import Tensor

from lora_squeeze import data_aware
from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.hub import load
from lora_squeeze.moments import Moments
from lora_squeeze.plan import Plan, make_plan
from lora_squeeze.post_squeeze import Squeezed, squeeze
from lora_squeeze.training.ask import calibrate
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.live import live_modules

NAMES = list(SHAPES)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return load(write_folder(tmp_path / "adapter"))


def covariance(size: int, seed: int, decay: float = 0.7) -> Tensor:
    """Positive definite, far from isotropic."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return Q * decay ** torch.arange(size, dtype=torch.float64) @ Q.mT


def data_of(adapter: Adapter, names: list[str] = NAMES) -> tuple[dict[str, Moments], dict[str, tuple[Tensor, Tensor]]]:
    """Moments of these modules, and the full covariances of inputs and output gradients that they come from."""
    moments, full = {}, {}
    for i, name in enumerate(names):
        update, (out_features, in_features) = adapter.update(name), SHAPES[name]
        C, F = covariance(in_features, i), covariance(out_features, 50 + i) * 10.0**-i
        A, B = update.A.double(), update.B.double()
        moments[name] = Moments(A @ C @ A.mT, B.mT @ F @ B, 100.0)
        full[name] = (C, F)
    return moments, full


def root(W: Tensor) -> Tensor:
    values, V = torch.linalg.eigh(W)
    return V * values.clamp_min(0).sqrt() @ V.mT


def loss_of(full: tuple[Tensor, Tensor], rest: Tensor) -> float:
    C, F = full
    return 0.5 * float((root(F) @ rest @ root(C)).square().sum())


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_cut_is_nearly_the_best_one_in_the_metric_of_the_data(adapter: Adapter, tmp_path: Path, rank: int) -> None:
    moments, full = data_of(adapter)
    adapter.squeeze(rank=rank, moments=moments).save(tmp_path / "aware")
    adapter.squeeze(rank=rank).save(tmp_path / "plain")
    for name in NAMES:
        whole = read_dense(tmp_path / "adapter", name)
        losses = {kind: loss_of(full[name], whole - read_dense(tmp_path / kind, name)) for kind in ("aware", "plain")}
        C, F = full[name]
        best = 0.5 * tail(root(F) @ whole @ root(C), rank) ** 2
        # One per cent of the plain metric is mixed in, which costs a little.
        assert best * (1 - 1e-6) <= losses["aware"] <= 1.1 * best, name
        assert losses["aware"] <= losses["plain"] * (1 + 1e-6), name


def test_the_report_tells_the_true_error_and_the_predicted_loss_of_each_cut(adapter: Adapter, tmp_path: Path) -> None:
    moments, full = data_of(adapter)
    small = adapter.squeeze(rank=3, moments=moments)
    small.save(tmp_path / "small")
    for row in small.report.rows:
        rest = read_dense(tmp_path / "adapter", row.name) - read_dense(tmp_path / "small", row.name)
        assert row.discarded == pytest.approx(float(rest.norm()), rel=1e-4)
        assert row.loss_increase == pytest.approx(loss_of(full[row.name], rest), rel=1e-3)
    assert small.report.loss_increase == pytest.approx(sum(row.loss_increase or 0 for row in small.report.rows))
    assert small.report.to_json()["loss_increase"] == small.report.loss_increase


def test_a_report_before_saving_has_the_same_figures(adapter: Adapter, tmp_path: Path) -> None:
    moments, _ = data_of(adapter)
    before = adapter.squeeze(params=400, moments=moments).report
    small = adapter.squeeze(params=400, moments=moments)
    small.save(tmp_path / "small")
    assert [(r.discarded, r.loss_increase, r.rank_after) for r in small.report.rows] == [
        (r.discarded, r.loss_increase, r.rank_after) for r in before.rows
    ]


def test_a_budget_goes_where_the_predicted_loss_is(adapter: Adapter) -> None:
    """The fourth module has a thousandth of the first one's gradients: plain energy does not see that."""
    moments, full = data_of(adapter)
    budget = 4 * sum(sum(shape) for shape in SHAPES.values())
    aware = adapter.squeeze(params=budget, moments=moments, min_rank=1)
    plain = adapter.squeeze(params=budget, min_rank=1)
    assert aware.parameters <= budget and plain.parameters <= budget
    assert aware.modules[NAMES[0]].rank > aware.modules[NAMES[3]].rank

    def loss(small: Adapter) -> float:
        found = {name: small.update(name) for name in NAMES}
        rest = {name: adapter.update(name).dense().double() - update.dense().double() for name, update in found.items()}
        return sum(loss_of(full[name], rest[name]) for name in NAMES)

    assert loss(aware) < 0.5 * loss(plain)


def test_isotropic_data_change_nothing(adapter: Adapter) -> None:
    """C = F = I: the metric is the plain one, up to the unit."""
    moments = {}
    for name in NAMES:
        A, B = adapter.update(name).A.double(), adapter.update(name).B.double()
        moments[name] = Moments(A @ A.mT, B.mT @ B, 1.0)
    for dial in ({"rank": 3}, {"params": 500}, {"energy": 0.9}, {"error": 0.2}):
        aware, plain = adapter.squeeze(moments=moments, **dial), adapter.squeeze(**dial)
        assert {n: m.rank for n, m in aware.modules.items()} == {n: m.rank for n, m in plain.modules.items()}, dial
        for name in aware.modules:
            assert float(aware.update(name).distance(plain.update(name))) < 1e-5 * float(plain.update(name).norm())


def test_a_module_without_moments_is_cut_plainly_and_its_energy_weighs_like_that_of_the_others(
    adapter: Adapter, tmp_path: Path
) -> None:
    moments, _ = data_of(adapter, NAMES[:2])
    small = adapter.squeeze(rank=2, moments=moments)
    plain = adapter.squeeze(rank=2)
    for name in NAMES[2:]:
        assert torch.equal(small.update(name).B, plain.update(name).B), name
    assert [row.loss_increase is None for row in small.report.rows] == [False, False, True, True]
    spectra = {name: [adapter.update(name).singular_values().tolist()] for name in NAMES}
    found = data_aware.loss_spectra(adapter, moments, spectra)
    seen = sum(s * s for name in NAMES[:2] for s in found[name][0])
    energy = sum(s * s for name in NAMES[:2] for s in spectra[name][0])
    for name in NAMES[2:]:
        assert found[name][0] == pytest.approx([s * math.sqrt(seen / energy) for s in spectra[name][0]])


def test_a_scale_written_anew_and_16_bits_give_the_same_update(tmp_path: Path) -> None:
    config = plain_config(alpha_pattern={"q_proj": 3.0, "layers.1.down_proj": -5.0})
    adapter = load(write_folder(tmp_path / "adapter", config=config))
    moments, _ = data_of(adapter)
    kept = adapter.squeeze(rank=3, moments=moments)
    folded = adapter.squeeze(rank=3, moments=moments, alpha="fold")
    half = adapter.squeeze(rank=3, moments=moments, dtype=torch.bfloat16)
    for name in NAMES:
        norm = float(kept.update(name).norm())
        assert float(kept.update(name).distance(folded.update(name))) < 1e-6 * norm
        assert float(kept.update(name).distance(half.update(name))) < 1e-2 * norm
        B, A = kept.update(name).B, kept.update(name).A
        gram = B.mT @ B
        assert torch.allclose(gram, A @ A.mT, atol=1e-5 * float(gram.abs().max())), "balanced"
    for row in half.report.rows:
        true = float(kept.update(row.name).distance(half.update(row.name)))
        assert row.rounding == pytest.approx(true, rel=0.2)


def test_moments_come_by_the_names_of_a_live_model_too(adapter: Adapter) -> None:
    moments, _ = data_of(adapter)
    live = {f"base_model.model.{name}": item for name, item in moments.items()}
    assert data_aware.moments_of(adapter, live) == moments


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: {"layers.9.q_proj": m[NAMES[0]]}, "statistics for 'layers.9.q_proj', which the adapter has not"),
        (
            lambda m: {NAMES[0]: Moments(m[NAMES[0]].C[:4, :4], m[NAMES[0]].F[:4, :4], 1.0)},
            r"statistics of shape \(4, 4\) meet an update of rank 8; expected \(8, 8\): collect them again",
        ),
        (lambda m: {}, "say nothing about any module"),
        (
            lambda m: {name: Moments(0 * item.C, 0 * item.F, 1.0) for name, item in m.items()},
            "the statistics are zero everywhere",
        ),
    ],
    ids=["another module", "another rank", "nothing", "zero"],
)
def test_statistics_that_do_not_fit_are_refused(adapter: Adapter, change, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(LoraSqueezeError, match=text):
        adapter.squeeze(params=500, moments=change(data_of(adapter)[0]))


def test_another_method_than_gram_is_refused_with_moments(adapter: Adapter) -> None:
    with pytest.raises(LoraSqueezeError, match="moments need the method 'gram', got 'qr'"):
        squeeze(adapter, rank=2, moments=data_of(adapter)[0], method="qr")


def test_a_plan_tells_the_metric_the_errors_and_the_losses_and_is_obeyed(adapter: Adapter, tmp_path: Path) -> None:
    moments, _ = data_of(adapter)
    plan = make_plan(adapter, name="adapter", moments=moments, params=500)
    assert {row.reason for row in plan.modules.values()} <= {
        "budget: predicted loss per parameter", "budget: predicted loss per parameter, not worth its place",
        "kept: source rank",
    }  # fmt: skip
    small = adapter.squeeze(plan=plan, moments=moments)
    same = adapter.squeeze(params=500, moments=moments)
    assert {n: m.rank for n, m in small.modules.items()} == {n: m.rank for n, m in same.modules.items()}
    for row in small.report.rows:
        assert plan.modules[row.name].error == pytest.approx(row.discarded / row.norm, rel=1e-3)
        assert plan.modules[row.name].loss_increase == pytest.approx(row.loss_increase, rel=1e-3)
    assert plan.totals["loss_increase"] == pytest.approx(small.report.loss_increase, rel=1e-3)
    for path in (tmp_path / "plan.toml", tmp_path / "plan.json"):
        plan.save(path)
        assert Plan.load(path) == plan


def test_a_module_that_leaves_is_charged_with_all_its_predicted_loss(adapter: Adapter) -> None:
    moments, full = data_of(adapter)
    small = adapter.squeeze(params=100, moments=moments)
    gone = [row for row in small.report.rows if row.rank_after == 0]
    assert gone and isinstance(small.source, Squeezed)
    for row in gone:
        whole = adapter.update(row.name).dense().double()
        assert row.loss_increase == pytest.approx(loss_of(full[row.name], whole), rel=1e-4)


def test_the_history_names_the_metric(adapter: Adapter) -> None:
    moments, _ = data_of(adapter)
    assert adapter.squeeze(rank=2, moments=moments).history[-1]["metric"] == "data"
    assert "metric" not in adapter.squeeze(rank=2).history[-1]


def _written_and_asked(name: str, folder: Path):  # type: ignore[no-untyped-def]
    """A real PEFT adapter of this kind: the model, its folder, and its moments."""
    case = CASES[name]
    model = adapted(case)
    save(model, folder)
    return model, calibrate(model, [None], loss=lambda m, _: case_loss(m, case))


@pytest.mark.parametrize("name", WITH_ROWS)
def test_a_file_is_cut_as_the_live_model_is_whatever_the_layers(name: str, tmp_path: Path) -> None:
    """Statistics of the live layers hold in the coordinates of the file: every kind, every layout."""
    model, moments = _written_and_asked(name, tmp_path / "adapter")
    assert moments
    adapter = load(tmp_path / "adapter")
    modules = live_modules(model, "default")
    rank = max(2, *(module.step for module in modules))
    small = adapter.squeeze(rank=rank, moments=moments, min_rank=1)
    squeeze_(model, rank, moments=moments)
    tied = {name for name, module in adapter.modules.items() if module.group == data_aware.TIED}
    for module in live_modules(model, "default"):
        expected, found = module.update(), small.update(module.name)
        if module.name not in tied:
            assert float(expected.distance(found).sum()) <= 1e-4 * float(expected.norm().sum()), module.name


def test_tied_embeddings_are_cut_plainly_and_alike(tmp_path: Path) -> None:
    _, moments = _written_and_asked("tied embedding and head", tmp_path / "adapter")
    adapter = load(tmp_path / "adapter")
    small, plain = adapter.squeeze(rank=2, moments=moments), adapter.squeeze(rank=2)
    tied = [name for name, module in adapter.modules.items() if module.group == data_aware.TIED]
    assert len(tied) == 2
    for name in tied:
        assert torch.equal(small.update(name).B, plain.update(name).B)


@pytest.mark.parametrize("name", [name for name in WITH_ROWS if name != "tied embedding and head"])
def test_the_slope_is_the_gradient_with_respect_to_a_matrix_between_the_factors(name: str, tmp_path: Path) -> None:
    """Found from dL/dA; here from dL/dB: both are s B^T (dL/dW) A^T."""
    model, moments = _written_and_asked(name, tmp_path / "adapter")
    model.eval()
    for module in live_modules(model, "default"):
        module.B.requires_grad_(True)  # MiCA freezes it
    case_loss(model, CASES[name]).backward()
    for module in live_modules(model, "default"):
        slope, grad = moments[module.path].slope, module.B.grad
        assert slope is not None and grad is not None
        expected = module.columns(module.B.detach()).double().mT @ module.columns(grad).double()
        assert torch.allclose(slope.double(), expected, atol=1e-4 * float(expected.abs().max()) + 1e-12), module.name


def test_no_slope_is_told_of_tied_embeddings(tmp_path: Path) -> None:
    """Their gradients are sums over both uses."""
    model, moments = _written_and_asked("tied embedding and head", tmp_path / "adapter")
    adapter = load(tmp_path / "adapter")
    for module in live_modules(model, "default"):
        assert (moments[module.path].slope is None) == (adapter.modules[module.name].group == data_aware.TIED)


def test_the_prediction_counts_the_slope_of_what_is_cut(adapter: Adapter) -> None:
    plain, _ = data_of(adapter)
    slopes = {name: covariance(RANK, i) for i, name in enumerate(NAMES)}
    moments = {name: Moments(m.C, m.F, m.rows, slopes[name]) for name, m in plain.items()}
    small, before = adapter.squeeze(rank=3, moments=moments), adapter.squeeze(rank=3, moments=plain)
    told, curved = ({row.name: row.loss_increase or 0.0 for row in found.report.rows} for found in (small, before))
    for name in NAMES:
        update = small.update(name)
        assert torch.equal(update.B, before.update(name).B), "the cut is the same"
        # M with B M A = B' A', from pseudo-inverses
        source = adapter.update(name)
        M = torch.linalg.pinv(source.B.double()) @ update.B.double() @ update.A.double()
        M = M @ torch.linalg.pinv(source.A.double())
        straight = float((slopes[name] * (M - torch.eye(RANK))).sum())
        assert told[name] - curved[name] == pytest.approx(straight, rel=1e-4, abs=1e-8)
    gone = adapter.squeeze(params=100, moments=moments).report.rows
    for row in (row for row in gone if row.rank_after == 0):
        whole = data_aware.loss_without(adapter.modules[row.name], plain[row.name])
        assert row.loss_increase == pytest.approx(whole - float(slopes[row.name].trace()))
