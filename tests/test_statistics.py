"""Moments collected while a model trains, against dense covariances of what autograd shows."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from peft_cases import CASES, VOCABULARY
from peft_models import Case, adapted
from statistics_cases import STEADY, WITH_ROWS, Dense, alike, examples, halves, loss_of, one_step, same
from torch import Tensor, nn

from lora_squeeze import LoraSqueezeError
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.live import LiveModule, live_modules
from lora_squeeze.training.statistics import Statistics


@pytest.mark.parametrize("name", WITH_ROWS)
def test_moments_are_those_of_the_dense_covariances(name: str) -> None:
    case = CASES[name]
    model = adapted(case)
    dense, statistics = Dense(model), Statistics(model, "default")
    loss_of(model, case).backward()
    statistics.step()
    found = statistics.moments()
    assert statistics.unseen == [] and found.keys() == dense.modules.keys()
    for path, moments in found.items():
        if name == "activated":  # the branch begins at the invocation: 5 of 7 tokens
            dense.rows[path] = [(x[:, 2:], g[:, 2:]) for x, g in dense.rows[path]]
        C, F, n = dense.moments(path)
        assert moments.rows == n > 0
        assert same(moments.C, C) and same(moments.F, F), path
        assert moments.C.dtype == moments.F.dtype == torch.float32


def test_an_embedding_that_scales_its_output_scales_the_branch_too() -> None:
    """As in Gemma 3."""

    class Scaled(nn.Embedding):
        embed_scale = torch.tensor(3.0)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * self.embed_scale

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = Scaled(VOCABULARY, 6)

        def forward(self, ids: Tensor) -> Tensor:
            return self.words(ids).tanh()

    case = Case(Words, dict(r=3, target_modules=["words"]), CASES["linear"].batch)
    model = adapted(case)
    dense, statistics = Dense(model), Statistics(model, "default")
    loss_of(model, case).backward()
    statistics.step()
    (moments,) = statistics.moments().values()
    C, F, _ = dense.moments("base_model.model.words")
    scale = 3.0  # the reference takes it for a part of x; here it is one of B^T g. What is weighted is the same.
    assert same(moments.C, C / scale**2) and same(moments.F, F * scale**2)


@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        ("experts", "mlp.experts"),
        ("matrix parameter", "proj"),
        ("attention module", "attention"),
    ],
)
def test_layers_without_rows_of_their_own_are_listed(name: str, unseen: str) -> None:
    case = CASES[name]
    model = adapted(case)
    statistics = Statistics(model, "default")
    loss_of(model, case).backward()
    statistics.step()
    assert statistics.unseen and all(unseen in path for path in statistics.unseen)
    assert not set(statistics.unseen) & statistics.moments().keys()


def test_micro_batches_add_up_to_the_batch() -> None:
    model = adapted(STEADY)
    batch = examples(7, 7, 7, 7)
    assert alike(one_step(model, batch), one_step(model, *halves(batch)))


def test_padding_is_not_counted() -> None:
    """Rows without a gradient are in neither mean: the same sequences without padding give the same moments."""
    model = adapted(STEADY)
    tight, padded = one_step(model, examples(6, 6)), one_step(model, examples(6, 6, padding=5))
    assert alike(tight, padded)
    assert {moments.rows for moments in tight.values()} == {2 * 5}, "the last token predicts nothing"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_every_row_once(reentrant: bool) -> None:
    model, batch = adapted(STEADY).train(), examples(7, 5)
    expected = one_step(model, batch)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert alike(one_step(model, batch), expected)


def test_autocast_is_summed_in_float32() -> None:
    model, batch = adapted(STEADY), examples(7, 5)
    expected = one_step(model, batch)
    statistics = Statistics(model, "default")
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).loss.backward()  # inside on purpose: the sums must not be cast either
    statistics.step()
    found = statistics.moments()
    assert all(m.C.dtype == m.F.dtype == torch.float32 for m in found.values())
    assert alike(found, expected, room=0.1) and not alike(found, expected, room=1e-5)


def test_steps_are_averaged_with_fading_weights() -> None:
    model, batches = adapted(STEADY), [examples(7, 5, seed=i) for i in range(3)]
    each = [one_step(model, batch) for batch in batches]
    for decay in (0.5, 1.0):
        statistics = Statistics(model, "default", decay=decay)
        for batch in batches:
            found = one_step(model, batch, statistics=statistics)
            statistics._attach()
        statistics.close()
        weights = [decay**2, decay, 1.0]
        for path, moments in found.items():
            for field in ("C", "F"):
                expected = sum(w * getattr(m[path], field) for w, m in zip(weights, each, strict=True)) / sum(weights)
                assert isinstance(expected, Tensor) and same(getattr(moments, field), expected)
            assert moments.rows == pytest.approx(sum(w * m[path].rows for w, m in zip(weights, each, strict=True)))


def test_one_step_in_many_is_recorded_when_asked() -> None:
    model, batches = adapted(STEADY), [examples(7, 5, seed=i) for i in range(4)]
    rare, dense = Statistics(model, "default", every=3), Statistics(model, "default")
    for i, batch in enumerate(batches):
        with dense.pause() if i % 3 else torch.enable_grad():
            model(**batch).loss.backward()
        rare.step()
        dense.step()
    assert alike(rare.moments(), dense.moments())


def test_steps_that_say_nothing_leave_the_mean_alone() -> None:
    """A zero B (the first step of every LoRA) and gradients that overflowed."""
    model, batch = adapted(STEADY), examples(7, 5)
    expected = one_step(model, batch)
    statistics = Statistics(model, "default", decay=1.0)
    original = [module.B.detach().clone() for module in live_modules(model, "default")]
    with torch.no_grad():
        for module in live_modules(model, "default"):
            module.B.zero_()
    model(**batch).loss.backward()
    statistics.step()
    assert statistics.moments() == {} and len(statistics.unseen) == len(original)
    with torch.no_grad():
        for module, B in zip(live_modules(model, "default"), original, strict=True):
            module.B.copy_(B)
    for factor in (1.0, float("inf"), float("nan")):
        (model(**batch).loss * factor).backward()
        statistics.step()
    assert alike(statistics.moments(), expected)


def test_a_scaled_loss_is_unscaled() -> None:
    model, batch = adapted(STEADY), examples(7, 5)
    expected = one_step(model, batch)
    statistics = Statistics(model, "default")
    (model(**batch).loss * 1024.0).backward()
    statistics.step(loss_scale=1024.0)
    assert alike(statistics.moments(), expected)


def test_nothing_is_recorded_without_gradients_or_in_a_pause_or_after_closing() -> None:
    model, batch = adapted(STEADY), examples(7, 5)
    statistics = Statistics(model, "default")
    with torch.no_grad():
        model(**batch)
    with statistics.pause(), statistics.pause():
        model(**batch).loss.backward()
    with pytest.raises(ZeroDivisionError), statistics.pause():
        _ = 1 / 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    model(**batch)
    for parameter in trained:
        parameter.requires_grad_(True)
    with model.disable_adapter():
        assert not model(**batch).loss.requires_grad
    statistics.step()
    assert statistics.moments() == {}
    model(**batch).loss.backward()
    statistics.step()
    before = statistics.moments()
    statistics.close()
    model(**batch).loss.backward()
    statistics.step()
    assert before and alike(statistics.moments(), before)


def test_rows_of_other_adapters_are_not_counted() -> None:
    case = CASES["embedding"]
    model = adapted(case)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    statistics, batch = Statistics(model, "default"), case.batch()
    model.set_adapter("other")
    model(batch).square().mean().backward()
    model.set_adapter("default")
    model(batch, adapter_names=["default", "other"]).square().mean().backward()
    statistics.step()
    assert {path: m.rows for path, m in statistics.moments().items()} == {"base_model.model.head": batch.shape[1]}
    assert statistics.unseen == ["base_model.model.words"], "an embedding cannot tell the rows apart: it leaves all out"


def rotated(module: LiveModule, seed: int) -> tuple[Tensor, Tensor]:
    """P and R of an exchange of coordinates that keeps the update; the layer gets the new factors."""
    A, B = module.rows(module.A.detach()), module.columns(module.B.detach())
    generator = torch.Generator().manual_seed(seed)
    R = torch.randn((*A.shape[:-1], A.shape[-2]), generator=generator) + 3 * torch.eye(A.shape[-2])
    P = torch.linalg.inv(R)
    module.put(nn.Parameter(module.like_A(R @ A)), nn.Parameter(module.like_B(B @ P)))
    return P, R


@pytest.mark.parametrize("case", [STEADY, CASES["grouped convolution"], CASES["embedding"]])
def test_mapped_statistics_are_those_of_the_new_factors(case: Case) -> None:
    """In other coordinates of the same update, mapping what was seen equals seeing it again; and it goes on."""
    model = adapted(case)
    statistics = Statistics(model, "default")
    loss_of(model, case).backward()
    statistics.step()
    maps = {module.path: rotated(module, i) for i, module in enumerate(live_modules(model, "default"))}
    statistics.map(maps)
    fresh = Statistics(model, "default", decay=1.0)
    loss_of(model, case).backward()
    fresh.step()
    expected = fresh.moments()
    found = statistics.moments()
    assert all(same(found[p].C, expected[p].C, 1e-4) and same(found[p].F, expected[p].F, 1e-4) for p in expected)
    statistics.step()  # what the second backward pass left in the same hooks
    again = statistics.moments()
    assert all(same(again[p].C, expected[p].C, 1e-4) and again[p].rows > found[p].rows for p in expected)


def test_new_modules_in_the_place_of_old_ones_are_watched_after_map() -> None:
    model, batch = adapted(STEADY), examples(7, 5)
    expected = one_step(model, batch)
    statistics, closed = Statistics(model, "default"), Statistics(model, "default")
    closed.close()
    for module in live_modules(model, "default"):
        module.layer.lora_A["default"] = copy.deepcopy(module.layer.lora_A["default"])
        module.layer.lora_A["default"]._forward_hooks.clear()
    statistics.map({})
    closed.map({})
    assert alike(one_step(model, batch, statistics=statistics), expected)
    closed.step()
    assert closed.moments() == {}


def test_a_branch_that_is_switched_off_says_nothing() -> None:
    """A scale of zero: B^T g cannot be found from s B^T g."""
    model = adapted(STEADY)
    for module in live_modules(model, "default"):
        module.layer.scaling["default"] = 0.0
    assert one_step(model, examples(7, 5)) == {}


def test_a_sharded_embedding_is_left_out() -> None:
    """Each process holds a share of the vocabulary only."""
    case = CASES["embedding"]
    model = adapted(case)
    words = next(module for module in live_modules(model, "default") if module.kind == "embedding")
    words.A.full_tensor = words.A.detach  # type: ignore[attr-defined]
    statistics = Statistics(model, "default")
    loss_of(model, case).backward()
    statistics.step()
    assert statistics.unseen == [words.path]


@pytest.mark.parametrize("way", ["replace", "mask"])
@pytest.mark.parametrize("name", ["linear", "convolutions", "grouped convolution", "embedding"])
def test_statistics_go_on_after_a_squeeze(name: str, way: str) -> None:
    """Both with new parameters and with old ones that keep zeros at the end."""
    case = CASES[name]
    model = adapted(case)
    statistics = Statistics(model, "default", decay=1e-30)
    loss_of(model, case).backward()
    statistics.step()
    done = squeeze_(model, case.rank, moments=statistics.moments(), in_place=way)
    statistics.map(done.maps)
    fresh = Statistics(model, "default")
    loss_of(model, case).backward()
    statistics.step()
    fresh.step()
    found = statistics.moments()
    assert alike(found, fresh.moments())
    assert {path: m.C.shape[-1] for path, m in found.items()} == {
        m.path: m.rank() for m in live_modules(model, "default")
    }
    squeeze_(model, 2 if "grouped" in name else 1, moments=found, in_place=way)


def test_a_squeeze_without_map_is_noticed() -> None:
    model, batch = adapted(STEADY), examples(7, 5)
    statistics = Statistics(model, "default")
    model(**batch).loss.backward()
    statistics.step()
    squeeze_(model, 3)
    model(**batch).loss.backward()
    with pytest.raises(LoraSqueezeError, match=r"statistics of rank 8 meet a layer of rank 3; call map\(\)"):
        statistics.step()


def test_maps_that_do_not_fit_are_refused_and_change_nothing() -> None:
    model = adapted(STEADY)
    statistics = Statistics(model, "default")
    model(**examples(7, 5)).loss.backward()
    statistics.step()
    before = statistics.moments()
    path = next(iter(before))
    eye = torch.eye(5, 3)
    with pytest.raises(LoraSqueezeError, match=rf"{path}: maps of rank 5 meet statistics of rank 8"):
        statistics.map({path: (eye, eye.T)})
    good = torch.eye(8, 3)
    with pytest.raises(LoraSqueezeError, match="no LoRA layer 'q_proj' in the statistics; map layers by their full"):
        statistics.map({path: (good, good.T), "q_proj": (good, good.T)})
    assert alike(statistics.moments(), before)


def test_the_state_survives_a_checkpoint_bit_for_bit() -> None:
    model = adapted(STEADY)
    statistics = Statistics(model, "default", every=2)
    for i in range(3):
        model(**examples(7, 5, seed=i)).loss.backward()
        statistics.step()
    file = io.BytesIO()
    torch.save(statistics.state_dict(), file)
    file.seek(0)
    other = Statistics(model, "default", every=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    for i in range(3, 5):
        model(**examples(7, 5, seed=i)).loss.backward()
        statistics.step()
        other.step()
    mine, theirs = statistics.moments(), other.moments()
    assert mine.keys() == theirs.keys()
    for path, moments in mine.items():
        assert torch.equal(moments.C, theirs[path].C) and torch.equal(moments.F, theirs[path].F)
        assert moments.rows == theirs[path].rows


def test_a_state_of_another_model_is_refused() -> None:
    model, other = adapted(STEADY), adapted(CASES["conv1d of gpt2"])
    statistics, small = Statistics(model, "default"), Statistics(adapted(STEADY, r=4), "default")
    model(**examples(7, 5)).loss.backward()
    statistics.step()
    with pytest.raises(
        LoraSqueezeError, match=r"the checkpoint's statistics have a layer '.*v_proj', the model does not"
    ):
        Statistics(other, "default").load_state_dict(statistics.state_dict())
    with pytest.raises(LoraSqueezeError, match=r"v_proj: the checkpoint's statistics have rank 8, the model has 4"):
        small.load_state_dict(statistics.state_dict())
    assert small.moments() == {}


def test_processes_share_what_they_have_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over two processes; twice is the same as once."""
    model = adapted(STEADY)
    both = [Statistics(model, "default") for _ in range(2)]
    for i, statistics in enumerate(both):
        with both[1 - i].pause():
            model(**examples(7, 5, seed=i)).loss.backward()
        statistics.step()
    each = [statistics.moments() for statistics in both]
    sent: list[Tensor] = []
    both[0].synchronise()  # without processes nothing happens
    assert alike(both[0].moments(), each[0])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for _ in range(2):
        sent.clear()
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: sent.append(flat.clone()))
        for statistics in both:
            copy.deepcopy(statistics).synchronise()
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda flat: flat.copy_(sent[0] + sent[1]))
        for statistics in both:
            statistics.synchronise()
        for path, moments in both[0].moments().items():
            assert same(moments.C, (each[0][path].C + each[1][path].C) / 2)
            assert same(moments.F, (each[0][path].F + each[1][path].F) / 2)
            assert moments.rows == (each[0][path].rows + each[1][path].rows) / 2
        assert alike(both[0].moments(), both[1].moments(), room=0.0)
