"""SqueezeCallback in the Trainer of transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_models import seeded
from training_cases import SOURCE, STEPS, TARGET, Counting, adamw, model, small_llama
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import lora_squeeze
from lora_squeeze import LoraSqueezeError
from lora_squeeze.training.callback import SqueezeCallback
from lora_squeeze.training.inplace import squeeze_
from lora_squeeze.training.live import live_modules
from lora_squeeze.training.statistics import Statistics


class Tracker(TrainerCallback):
    """Keeps what a tracker would be told, at the moment it is told."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        self.told.append({"step": state.global_step, **logs})


def trainer(
    folder: Path, callback: SqueezeCallback | None = None, network: Any = None, before: Any = (), **arguments: Any
) -> Trainer:
    """A Trainer; `before` are callbacks that stand in the list where trackers do."""
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=100, dataloader_num_workers=0, seed=1,
    )  # fmt: skip
    return Trainer(
        model() if network is None else network,
        TrainingArguments(**(settings | arguments)),
        train_dataset=Counting(),
        eval_dataset=Counting(8),
        callbacks=[*before, *([] if callback is None else [callback])],
    )


def widths(network: torch.nn.Module) -> set[int]:
    return {m.width for m in live_modules(network, "default")}


def weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v for k, v in network.state_dict().items() if "lora_" in k}


def in_stages(**options: Any) -> SqueezeCallback:
    """Stages of 4 steps each, unless the options say otherwise."""
    return SqueezeCallback(TARGET, **({} if "mode" in options else {"steps": "equal"}) | options)


def test_one_callback_ends_at_the_target_rank(tmp_path: Path) -> None:
    callback = in_stages()
    run = trainer(tmp_path, callback)
    run.train()
    assert widths(run.model) == {TARGET}
    assert [(e["step"], e["rank"]) for e in callback.history] == [(4, 4), (8, 2)]
    run.save_model(str(tmp_path / "final"))
    adapter = lora_squeeze.load(tmp_path / "final")
    assert adapter.rank == TARGET
    assert adapter.default_scale == 2.0
    again = PeftModel.from_pretrained(seeded(small_llama), str(tmp_path / "final"))
    ids = torch.arange(3, 11)[None]
    assert torch.allclose(again(ids).logits, run.model.eval()(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "options", "expected"),
    [
        ("post", {}, [(12, 2)]),
        ("cont", {"last_steps": 3}, [(9, 2)]),
        ("in", {"ranks": [6, 2], "steps": [2, 4, 6]}, [(2, 6), (6, 2)]),
        ("in", {}, [(7, 4), (10, 2)]),  # proportional to the rank
        ("in", {"train_after_last": False}, [(8, 4), (12, 2)]),
        ("in", {"steps": "equal", "train_after_last": False}, [(6, 4), (12, 2)]),
    ],
)
def test_modes_are_one_schedule(tmp_path: Path, mode: str, options: Any, expected: list[tuple[int, int]]) -> None:
    callback = SqueezeCallback(TARGET, mode=mode, **options)
    run = trainer(tmp_path, callback)
    run.train()
    assert [(e["step"], e["rank"]) for e in callback.history] == expected
    assert widths(run.model) == {TARGET}


def test_adaptive_mode_reaches_the_budget(tmp_path: Path) -> None:
    callback = SqueezeCallback(TARGET, mode="adaptive", energy=0.9, every=2)
    run = trainer(tmp_path, callback)
    budget = sum(m.cost * TARGET for m in live_modules(run.model, "default"))
    run.train()
    assert sum(m.cost * m.width for m in live_modules(run.model, "default")) <= budget


def test_trackers_receive_ranks_energy_and_the_loss_jump(tmp_path: Path) -> None:
    tracker = Tracker()
    run = trainer(tmp_path, in_stages(), before=[tracker])
    run.train()
    told = {entry["step"]: entry for entry in tracker.told if "squeeze/rank" in entry}
    assert {step: entry["squeeze/rank"] for step, entry in told.items()} == {4: 4, 8: 2}
    for entry in told.values():
        assert 0 < entry["squeeze/energy"] <= 1
        assert entry["squeeze/loss_after"] == pytest.approx(entry["squeeze/loss_before"], abs=0.2)
        assert entry["squeeze/loss_after"] != entry["squeeze/loss_before"]
    assert [e["squeeze/rank"] for e in run.state.log_history if "squeeze/rank" in e] == [4, 2]


def test_trackers_receive_no_loss_where_the_model_tells_none(tmp_path: Path) -> None:
    """With label smoothing the Trainer keeps the labels, and computes the loss itself."""
    tracker, callback = Tracker(), in_stages()
    trainer(tmp_path, callback, before=[tracker], label_smoothing_factor=0.1).train()
    told = [entry for entry in tracker.told if "squeeze/rank" in entry]
    assert len(told) == 2
    assert not any("loss_before" in key or "loss_after" in key for entry in (*told, *callback.history) for key in entry)


def test_the_loss_is_measured_on_the_last_batch(tmp_path: Path) -> None:
    """Without dropout and with one batch of data, the loss after the squeeze is the one that the next step has."""

    class Same(Counting):
        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return self.rows[0]

    losses: list[float] = []
    network = model()
    network.register_forward_hook(lambda m, a, out: losses.append(out.loss.item()))
    callback = SqueezeCallback(TARGET, mode="cont", last_steps=6)
    run = trainer(tmp_path, callback, network, gradient_accumulation_steps=2)
    run.train_dataset = Same()
    run.train()
    (entry,) = callback.history
    shares = [2 * loss for loss in losses]  # of a step, in two parts
    assert any(entry["loss_after"] == pytest.approx(share, abs=1e-6) for share in shares)
    assert entry["loss_before"] < entry["loss_after"] < shares[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"data_aware": True}, {"allocate": "global"}, {"learning_rate": "restart"}, {"learning_rate": "rank"}],
)
@pytest.mark.parametrize("stop", [3, 4, 5, 8])
def test_resumed_training_is_bit_identical(tmp_path: Path, stop: int, options: dict[str, Any]) -> None:
    """Right before, at, and after a squeeze (4 and 8), from the checkpoints of one uninterrupted run."""
    saving = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "cosine"}
    whole = trainer(tmp_path / "whole", in_stages(**options), **saving)
    whole.train()
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{stop}", tmp_path / "again" / f"checkpoint-{stop}")
    callback, other = in_stages(**options), whole.callback_handler.callbacks[0]
    resumed = trainer(tmp_path / "again", callback, **saving)
    resumed.train(resume_from_checkpoint=True)
    assert weights(resumed.model).keys() == weights(whole.model).keys()
    for key, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[key]), key
    assert isinstance(other, SqueezeCallback)
    ranks = [[entry["rank"] for entry in found.history] for found in (other, callback)]
    assert ranks[0] == ranks[1], "the history is that of the whole run"


class Interruption(TrainerCallback):
    """Ends the training once, after a number of steps."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            raise self.error


@pytest.mark.parametrize("options", [{}, {"data_aware": True}], ids=str)
@pytest.mark.parametrize("way", ["same trainer", "new trainer"])
def test_an_interrupted_run_goes_on_in_the_same_process(tmp_path: Path, way: str, options: dict[str, Any]) -> None:
    """Interrupted at rank 4, taken up at rank 8; nothing of the first run listens any more."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer(tmp_path / "whole", in_stages(**options), **saving)
    whole.train()
    network, stop = model(), Interruption(5, KeyboardInterrupt())
    run = trainer(tmp_path / "again", in_stages(**options), network, before=[stop], **saving)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    if way == "new trainer":
        run = trainer(tmp_path / "again", in_stages(**options), network, **saving)
    run.train(resume_from_checkpoint=True)
    for key, value in weights(whole.model).items():
        assert torch.equal(value, weights(run.model)[key]), key
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks")
    for name, module in run.model.named_modules():
        assert [len(getattr(module, kind)) for kind in hooks] == [
            len(getattr(whole.model.get_submodule(name), kind)) for kind in hooks
        ], name


def test_a_run_that_begins_anew_with_smaller_batches_is_squeezed(tmp_path: Path) -> None:
    stop = Interruption(2, torch.cuda.OutOfMemoryError("CUDA out of memory."))
    callback = in_stages(data_aware=True)
    run = trainer(tmp_path, callback, before=[stop], auto_find_batch_size=True)
    run.train()
    assert [(e["step"], e["rank"]) for e in callback.history] == [(4, 4), (8, 2)]


def test_a_callback_that_serves_again_forgets_its_first_training(tmp_path: Path) -> None:
    callback = in_stages()
    trainer(tmp_path / "a", callback).train()
    network = get_peft_model(seeded(small_llama), LoraConfig(r=SOURCE, target_modules=["q_proj"]), adapter_name="other")
    run = trainer(tmp_path / "b", callback, network.train())
    run.train()
    assert [(e["adapter"], e["step"], e["rank"]) for e in callback.history] == [("other", 4, 4), ("other", 8, 2)]
    assert any("squeeze/rank" in entry for entry in run.state.log_history)


def test_resume_with_restored_callback_states(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "restore_callback_states_from_checkpoint": True}
    whole = trainer(tmp_path / "a", in_stages(), **saving)
    whole.train()
    resumed = trainer(tmp_path / "a", in_stages(), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-6"))
    for key, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[key]), key


@pytest.mark.parametrize("stop", [3, 5, 8])
@pytest.mark.parametrize("way", ["optimizer", "model_init", "model_init of a trial"])
def test_a_ready_made_optimiser_and_a_model_made_anew_resume_too(tmp_path: Path, way: str, stop: int) -> None:
    def run(**more: Any) -> Trainer:
        args = trainer(tmp_path, None, save_strategy="steps", save_steps=1).args
        made: dict[str, Any] = {"model_init": (lambda trial: model()) if way.endswith("trial") else lambda: model()}
        if way == "optimizer":
            network = model()
            made = {"model": network, "optimizers": (adamw(network), None)}
        found = Trainer(args=args, train_dataset=Counting(), callbacks=[in_stages()], **made)
        found.train(**more)
        return found

    whole = weights(run().model)
    resumed = weights(run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}")).model)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())


def test_two_callbacks_resume_from_their_own_last_states() -> None:
    def network() -> PeftModel:
        made = model()
        made.add_adapter("other", LoraConfig(r=SOURCE, lora_alpha=SOURCE, target_modules=["q_proj"]))
        made.base_model.set_adapter(["default", "other"])
        return made

    def callbacks() -> list[SqueezeCallback]:
        asked = {"default": TARGET, "other": 1}
        return [SqueezeCallback(rank, adapter=name, steps="equal", measure_loss=False) for name, rank in asked.items()]

    def begin(found: list[SqueezeCallback], state: TrainerState, live: PeftModel) -> None:
        for callback in found:
            callback.on_train_begin(args, state, control, model=live, optimizer=adamw(live))

    args, control, live, first = TrainingArguments(use_cpu=True), TrainerControl(), network(), callbacks()
    state = TrainerState(max_steps=STEPS, stateful_callbacks=first)  # type: ignore[arg-type]
    begin(first, state, live)
    states: Any = state.stateful_callbacks
    for step in range(1, 5):
        state.global_step = step
        for callback in first:
            callback.on_step_end(args, state, control)
            states["SqueezeCallback"].append(callback.state())
    state.stateful_callbacks = json.loads(json.dumps(states))
    second, again = callbacks(), network()
    begin(second, state, again)
    for one, other in zip(first, second, strict=True):
        assert one.history == other.history != []
        assert other.squeezers.keys() == {one.adapter}


def test_statistics_are_those_of_the_checkpoint_that_is_loaded(tmp_path: Path) -> None:
    """Another run's checkpoint of the same step lies in the folder of the new one."""
    saving = {"save_strategy": "steps", "save_steps": 6}
    whole = trainer(tmp_path / "old", in_stages(data_aware=True), **saving)
    whole.train()
    trainer(tmp_path / "new", in_stages(data_aware=True), **saving, learning_rate=0.1).train()
    resumed = trainer(tmp_path / "new", in_stages(data_aware=True), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "old" / "checkpoint-6"))
    for key, value in weights(whole.model).items():
        assert torch.equal(value, weights(resumed.model)[key]), key


def test_missing_statistics_are_told(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 6}
    trainer(tmp_path, in_stages(data_aware=True), **saving).train()
    (tmp_path / "checkpoint-6" / "squeeze_statistics.pt").unlink()
    resumed = trainer(tmp_path, in_stages(data_aware=True), **saving)
    with pytest.warns(UserWarning, match=r"no squeeze_statistics.pt of adapter 'default' in .*checkpoint-6"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert widths(resumed.model) == {TARGET}


def test_checkpoints_are_adapters_of_their_stage(tmp_path: Path) -> None:
    run = trainer(tmp_path, in_stages(), save_strategy="steps", save_steps=3, save_total_limit=2)
    run.train()
    ranks = {p.name: lora_squeeze.load(p).rank for p in tmp_path.glob("checkpoint-*")}
    assert ranks == {"checkpoint-9": 2, "checkpoint-12": 2}


def test_another_schedule_on_resume_is_refused_before_the_first_step(tmp_path: Path) -> None:
    trainer(tmp_path, in_stages(), save_strategy="steps", save_steps=6).train()
    resumed = trainer(tmp_path, in_stages(steps="inverse"))
    with pytest.raises(LoraSqueezeError, match=r"another schedule: steps was \[4, 4, 4\]"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert resumed.state.global_step == 6


@pytest.mark.parametrize(
    "options",
    [{}, {"data_aware": True}, {"data_aware": True, "in_place": "mask"}, {"mode": "adaptive", "loss": 9.0, "every": 8}],
    ids=str,
)
@pytest.mark.parametrize("best", [2, 6])
def test_the_best_checkpoint_is_squeezed_at_the_end(tmp_path: Path, best: int, options: dict[str, Any]) -> None:
    """The best one has a higher rank than the last one; it is loaded, then squeezed to the target: with the statistics
    of its own step.
    """
    scores = iter([1.0 if step == best else 2.0 for step in range(2, 13, 2)])

    class Scored(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": next(scores, 3.0)}
            self.log(dict(metrics))
            return metrics

    run = trainer(
        tmp_path, in_stages(**options), load_best_model_at_end=True, save_strategy="steps",
        eval_strategy="steps", save_steps=2, eval_steps=2, metric_for_best_model="eval_loss",
    )  # fmt: skip
    run.__class__ = Scored
    run.train()
    checkpoint = tmp_path / f"checkpoint-{best}"
    assert run.state.best_model_checkpoint == str(checkpoint)
    network = PeftModel.from_pretrained(seeded(small_llama), str(checkpoint), is_trainable=True)
    how: dict[str, Any] = {"rank": TARGET}
    if options.get("data_aware"):
        statistics = Statistics(network, "default")
        statistics.load_state_dict(torch.load(checkpoint / "squeeze_statistics.pt")["default"])
        how["moments"] = statistics.moments()
    if "loss" in options:
        how = {"params": sum(m.cost * TARGET for m in live_modules(network, "default"))}
    squeeze_(network, **how)
    for mine, expected in zip(live_modules(run.model, "default"), live_modules(network, "default"), strict=True):
        assert mine.width == expected.width
        assert float(mine.update().distance(expected.update())) < 1e-5, mine.name


def test_early_stopping_ends_at_the_target(tmp_path: Path) -> None:
    class Worse(Trainer):
        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            metrics = {"eval_loss": float(self.state.global_step)}
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    callback = in_stages()
    run = trainer(
        tmp_path, callback, before=[EarlyStoppingCallback(2)], eval_strategy="steps", eval_steps=1, save_steps=1,
        save_strategy="steps", load_best_model_at_end=False, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    run.__class__ = Worse
    run.train()
    assert run.state.global_step < 4
    assert widths(run.model) == {TARGET}
    assert [e["step"] for e in callback.history] == [run.state.global_step]
    assert run.state.log_history[-1]["squeeze/rank"] == TARGET


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_accumulation_steps": 3},
        {"bf16": True},
        {"max_grad_norm": 0.1},
        {"activation_checkpointing": True},
        {"optim": "adafactor"},
        {"optim": "sgd"},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"optim": "adamw_bnb_8bit"},
        {"optim": "adamw_torch"},
        {"lr_scheduler_type": "cosine", "warmup_steps": 2},
        {"num_train_epochs": 1, "max_steps": -1},
        {"full_determinism": False, "dataloader_drop_last": True},
        {"weight_decay": 0.1},
        {"neftune_noise_alpha": 5},
    ],
    ids=str,
)
def test_ways_of_training_go_on_across_squeezes(tmp_path: Path, arguments: dict[str, Any]) -> None:
    callback = in_stages(data_aware=True)
    run = trainer(tmp_path, callback, **({"logging_steps": 1} | arguments))
    run.train()
    assert widths(run.model) == {TARGET}
    assert [e["rank"] for e in callback.history] == [4, 2]
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert all(loss == loss and loss < 5 for loss in losses)


def test_all_trained_adapters_are_squeezed(tmp_path: Path) -> None:
    network = model()
    network.add_adapter("second", LoraConfig(r=6, lora_alpha=6, target_modules=["q_proj"]))
    network.base_model.set_adapter(["default", "second"])
    tracker, callback = Tracker(), in_stages()
    trainer(tmp_path, callback, network, before=[tracker]).train()
    assert [{m.width for m in live_modules(network, name)} for name in ("default", "second")] == [{TARGET}, {TARGET}]
    assert {e["adapter"] for e in callback.history} == {"default", "second"}
    assert any("squeeze/second/rank" in entry for entry in tracker.told)


def test_torch_compile_in_the_trainer(tmp_path: Path) -> None:
    torch.compiler.reset()
    run = trainer(tmp_path, in_stages(), torch_compile=True, torch_compile_backend="eager")
    run.train()
    assert widths(run.model) == {TARGET}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SqueezeCallback(2, squeeze=3), r"no option 'squeeze' with mode 'in'; there are .*squeezes"),
        (lambda: SqueezeCallback(2, mode="adaptive", steps="equal"), r"no option 'steps' with mode 'adaptive'"),
        (lambda: SqueezeCallback(2.0), r"rank must be a whole number, got 2.0"),  # type: ignore[arg-type]
        (lambda: SqueezeCallback("2"), r"rank must be a whole number, got '2'"),  # type: ignore[arg-type]
        (lambda: SqueezeCallback(2, allocate="each"), r"allocate must be one of uniform, global, got 'each'"),
        (lambda: SqueezeCallback(2, mode="adaptive", allocate="x"), r"must be .*got 'x'"),  # type: ignore[arg-type]
        (lambda: SqueezeCallback(2, mode="never"), r"mode must be one of post, cont, in, adaptive, got 'never'"),
    ],
)
def test_unknown_options_are_refused_at_once(
    make: Callable[[], Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types are checked in this suite alone
    with pytest.raises(LoraSqueezeError, match=message):
        make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": SOURCE + 1}, r"rank 9"),
        ({"rank": SOURCE}, r"nothing to squeeze"),
        ({"rank": 2, "min_steps": 100}, r"100"),
        ({"rank": 2, "steps": [1, 2, 3]}, r"6"),
    ],
)
def test_schedules_that_do_not_fit_are_refused_before_the_first_step(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    run = trainer(tmp_path, SqueezeCallback(**options))
    before = weights(run.model)
    before = {key: value.clone() for key, value in before.items()}
    with pytest.raises(LoraSqueezeError, match=message):
        run.train()
    assert all(torch.equal(value, before[key]) for key, value in weights(run.model).items())


def test_a_variant_is_refused_when_the_trainer_is_made(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match="DoRA"):
        trainer(tmp_path, in_stages(), model(use_dora=True))


def test_an_unknown_optimiser_is_refused_before_the_first_step(tmp_path: Path) -> None:
    class Strange(torch.optim.AdamW.__mro__[2]):  # type: ignore[misc]
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1.0})

    run = trainer(tmp_path, in_stages())
    run.optimizer = Strange([p for p in run.model.parameters() if p.requires_grad])
    with pytest.raises(LoraSqueezeError, match="Strange"):
        run.train()


def test_the_callbacks_state_is_json(tmp_path: Path) -> None:
    run = trainer(tmp_path, in_stages(ranks=[4, 2]), save_strategy="steps", save_steps=12)
    run.train()
    state = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["SqueezeCallback"]
    assert stored["args"]["rank"] == TARGET
    assert stored["attributes"]["saved"]["default"]["schedule"] == {"ranks": [8, 4, 2], "steps": [4, 4, 4]}
