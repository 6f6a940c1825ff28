"""Moments collected from live models, against dense covariances of what autograd shows."""

from __future__ import annotations

import copy
import io
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CASES, VOCABULARY
from peft_models import Case, adapted, outputs, reload, save
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze import LoraSqueezeError
from lora_squeeze.moments import Moments
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.live import LiveModule, live_modules
from lora_squeeze.training.statistics import Statistics, calibrate

WITH_ROWS = [
    "linear", "conv1d of gpt2", "convolutions", "grouped convolution", "embedding", "activated", "rslora", "mica",
    "negative alpha", "tied embedding and head",
]  # fmt: skip
# Without queries: that of a first token has no effect, since the softmax is over one key. Its gradient is zero or
# rounding, so whether it counts as a row is a matter of luck.
STEADY = replace(
    CASES["linear"],
    config=CASES["linear"].config | {"target_modules": ["v_proj", "o_proj", "down_proj"]},
)
Batch = dict[str, Tensor]


def loss_of(model: nn.Module, case: Case) -> Tensor:
    """A mean over the rows of the batch."""
    batch = case.batch()
    found = model(batch)
    return (found if isinstance(found, Tensor) else found.logits).square().mean()


def examples(*lengths: int, seed: int = 0, padding: int = 0) -> Batch:
    """Token sequences of these lengths, padded at the end, with labels for all but the padding."""
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    real = functional.pad(torch.arange(width) < torch.tensor(lengths)[:, None], (0, padding))
    ids = torch.where(real, functional.pad(ids, (0, padding)), 0)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.where(real, ids, -100)}


def halves(batch: Batch) -> Iterator[Batch]:
    n = len(batch["input_ids"]) // 2
    for part in (slice(0, n), slice(n, None)):
        yield {key: tensor[part] for key, tensor in batch.items()}


def inputs_as_rows(module: LiveModule, x: Tensor) -> Tensor:
    """The rows x such that the branch is s B A x: tokens, patches, or one-hot rows of the vocabulary."""
    if module.kind == "embedding":
        scale = getattr(module.layer.get_base_layer(), "embed_scale", torch.ones(()))
        return functional.one_hot(x.flatten(), module.A.shape[1]).double() * scale
    if module.kind == "conv":
        conv = module.layer.get_base_layer()
        x = functional.pad(x, [p for padding in reversed(conv.padding) for p in (padding, padding)])
        for i, (kernel, stride) in enumerate(zip(conv.kernel_size, conv.stride, strict=True)):
            x = x.unfold(2 + i, kernel, stride)
        positions = len(conv.kernel_size)
        x = x.movedim(1, 1 + positions).flatten(1 + positions)
    return x.reshape(-1, x.shape[-1]).double()


def outputs_as_rows(module: LiveModule, g: Tensor) -> Tensor:
    g = g.movedim(1, -1) if module.kind == "conv" else g
    return g.reshape(-1, g.shape[-1]).double()


class Dense:
    """The dense covariances E[x x^T] and E[g g^T] of each layer, from its input and the gradient of its output."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.modules = {module.path: module for module in live_modules(model, "default")}
        for module in self.modules.values():
            module.layer.register_forward_hook(self._watch(module))

    def _watch(self, module: LiveModule) -> Callable[..., None]:
        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda g: self.rows[module.path].append((x, g.detach())))

        return forward

    def moments(self, path: str) -> tuple[Tensor, Tensor, int]:
        """A E[x x^T] A^T, B^T E[(n g)(n g)^T] B and n, over the rows where the branch gets a gradient."""
        module = self.modules[path]
        pieces = [(inputs_as_rows(module, x), outputs_as_rows(module, g)) for x, g in self.rows[path]]
        x, g = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        A, B = module.rows(module.A.detach()).double(), module.columns(module.B.detach()).double()
        A, B = (t if t.ndim == 3 else t[None] for t in (A, B))
        per_copy = g.unflatten(-1, (len(B), -1)).transpose(0, 1)  # groups of a convolution
        seen = ((per_copy @ B) != 0).any(-1).any(0)
        x, per_copy, n = x[seen], per_copy[:, seen], int(seen.sum())
        C_x, F_y = x.T @ x / n, per_copy.mT @ per_copy * n
        return (A @ C_x @ A.mT).squeeze(0), (B.mT @ F_y @ B).squeeze(0), n


def same(found: Tensor, expected: Tensor, room: float = 1e-5) -> bool:
    return found.shape == expected.shape and bool(
        ((found.double() - expected.double()).abs() <= room * expected.double().abs().max()).all()
    )


def alike(left: Mapping[str, Moments], right: Mapping[str, Moments], room: float = 1e-5) -> bool:
    """The same layers, and the same moments up to rounding."""
    return left.keys() == right.keys() and all(
        same(left[path].C, right[path].C, room)
        and same(left[path].F, right[path].F, room)
        and left[path].rows == pytest.approx(right[path].rows)
        for path in left
    )


def one_step(model: nn.Module, *batches: Batch, statistics: Statistics | None = None) -> dict[str, Moments]:
    """Moments of one step over these micro-batches, each with its share of the mean loss."""
    statistics = statistics or Statistics(model, "default")
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    statistics.step()
    statistics.close()
    return statistics.moments()


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


@pytest.mark.parametrize("name", ["linear", "conv1d of gpt2"])
def test_calibration_of_a_frozen_adapter_equals_what_training_sees(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = reload(case, save(adapted(case), tmp_path)).float()
    assert not any(p.requires_grad for p in model.parameters())
    batches = [examples(7, 5), examples(4, 4)]
    found = calibrate(model, batches)
    trained = adapted(case)
    statistics = Statistics(trained, "default", decay=1.0)
    for batch in batches:
        trained(**batch).loss.backward()
        statistics.step()
    assert alike(found, statistics.moments(), 1e-4)
    own = calibrate(model, [batch["input_ids"] for batch in batches], loss=lambda m, ids: m(ids, labels=ids).loss)
    assert own.keys() == found.keys()


@pytest.mark.parametrize("fails", [False, True])
def test_calibration_leaves_everything_as_it_was(fails: bool) -> None:
    """Values, flags, modes, gradients, hooks and the random state, bit for bit, after an error too."""
    model = adapted(STEADY, lora_dropout=0.5)
    model.train()
    model.get_submodule("base_model.model.model.layers.0").eval()
    model(**examples(7, 5)).loss.backward()
    frozen = live_modules(model, "default")[3]
    frozen.A.requires_grad_(False)

    def snapshot() -> tuple[Any, ...]:
        return (
            [(n, p.requires_grad, p.grad, p.detach().clone(), p.data_ptr()) for n, p in model.named_parameters()],
            [(n, b.clone()) for n, b in model.named_buffers()],
            [(n, m.training, len(m._forward_hooks)) for n, m in model.named_modules()],
        )

    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    parameters, buffers, modules = snapshot()

    def loss(m: nn.Module, batch: Batch) -> Tensor:
        if fails and len(batch["input_ids"]) == 1:
            raise RuntimeError("out of memory")
        found: Tensor = m(**batch).loss
        return found

    batches = [examples(7, 5), examples(6)]
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            calibrate(model, batches, loss=loss)
    else:
        with torch.no_grad():
            first = calibrate(model, batches, loss=loss)
        assert alike(first, calibrate(model, batches), room=0.0)
    after = snapshot()
    assert torch.equal(torch.get_rng_state(), state)
    assert modules == after[2]
    for (name, *old, value, _), (_, *new, value_after, _) in zip(parameters, after[0], strict=True):
        assert old[0] == new[0] and old[1] is new[1] and torch.equal(value, value_after), name
    assert [p[-1] for p in parameters] == [p[-1] for p in after[0]], "the very memory"
    assert all(torch.equal(a[1], b[1]) for a, b in zip(buffers, after[1], strict=True))
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        assert grad is None or (parameter.grad is not None and torch.equal(grad, parameter.grad))


def test_calibration_leaves_the_outputs_alone() -> None:
    case = CASES["embedding and head"]
    model = adapted(case)
    before = outputs(model, case)
    assert calibrate(model, [examples(7, 5)]).keys() == {m.path for m in live_modules(model, "default")}
    assert torch.equal(outputs(model, case), before)


def test_calibration_that_makes_no_sense_is_refused() -> None:
    model, batch = adapted(STEADY), examples(7, 5)
    unlabelled = {key: tensor for key, tensor in batch.items() if key != "labels"}
    with pytest.raises(LoraSqueezeError, match="there is no batch to calibrate with; give at least one"):
        calibrate(model, [])
    with pytest.raises(
        LoraSqueezeError, match="the model returned no loss; put labels into the batches, or give loss="
    ):
        calibrate(model, [unlabelled])
    with pytest.raises(LoraSqueezeError, match="a batch must be a dict of tensors, got Tensor; or give loss="):
        calibrate(model, [batch["input_ids"]])
    with pytest.raises(LoraSqueezeError, match="the loss must be one number with a gradient"):
        calibrate(model, [batch], loss=lambda m, b: m(**b).logits)
    with pytest.raises(LoraSqueezeError, match="the loss must be one number with a gradient"):
        calibrate(model, [batch], loss=lambda m, b: m(**b).loss.detach())
    with pytest.raises(LoraSqueezeError, match="adapter 'nobody' must be active; active: 'default'"):
        calibrate(model, [batch], adapter="nobody")
    with model.disable_adapter(), pytest.raises(LoraSqueezeError, match="must be active; active: none"):
        calibrate(model, [batch])
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(LoraSqueezeError, match="the adapter to calibrate must be active; active: 'default', 'other'"):
        calibrate(model, [batch])
    assert calibrate(model, [batch], adapter="other") == {}, "its B is zero"
    model.merge_adapter()
    with pytest.raises(LoraSqueezeError, match="adapters are merged into the base weights"):
        calibrate(model, [batch], adapter="default")


@pytest.mark.parametrize(("options", "text"), [({"decay": 0.0}, "got 0.0 and 1"), ({"every": 0}, "got 0.95 and 0")])
def test_numbers_out_of_range_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(LoraSqueezeError, match=rf"decay must be in \(0, 1\] and every at least 1, {text}"):
        Statistics(adapted(STEADY), "default", **options)
