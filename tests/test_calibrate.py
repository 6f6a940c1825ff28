"""Moments of an adapter that was trained elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_cases import CASES
from peft_models import adapted, outputs, reload, save
from statistics_cases import STEADY, Batch, alike, examples
from torch import Tensor, nn

from lora_squeeze import LoraSqueezeError
from lora_squeeze.training.ask import calibrate
from lora_squeeze.training.live import live_modules
from lora_squeeze.training.statistics import Statistics


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
