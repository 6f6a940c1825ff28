"""SqueezeCallback: one line in a transformers or TRL trainer, and training ends at the rank to be deployed."""

from __future__ import annotations

import json
import operator
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import number_of_arguments

from lora_squeeze.adaptive import Adaptive
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.callback import return_to_best, stored_states
from lora_squeeze.ranks import Allocation, check_together
from lora_squeeze.schedule import MODES, Schedule, make_schedule
from lora_squeeze.training.live import holder_of, trained_adapters
from lora_squeeze.training.other_method import is_other, modules_of
from lora_squeeze.training.resume import follow_loaded_ranks
from lora_squeeze.training.squeezer import Squeezer

STATISTICS_NAME = "squeeze_statistics.pt"
_LOGGED = ("rank", "energy", "parameters_after", "loss_predicted", "loss_before", "loss_after")
_FIXED = {
    name for name in signature(make_schedule).parameters if name not in ("source_rank", "target_rank", "total_steps")
}
_ADAPTIVE = {field.name for field in fields(Adaptive)} - {"rank", "total_steps", "allocate"}


class SqueezeCallback(TrainerCallback, ExportableState):
    """Squeezes the adapter while a `transformers.Trainer` or a TRL trainer trains it.

    The adapter begins at the rank of its LoraConfig and ends at `rank`; the number of steps stays the same. Pass it in
    `callbacks=[...]` when the trainer is made, so that a resumed run can load a checkpoint of any stage. An adapter of
    another method than LoRA becomes a LoRA at the first squeeze; a checkpoint from then on is one of a LoRA.

    Args:
        rank: target rank.
        mode: "in" squeezes step by step (default), "cont" once, with the last steps at the target rank, "post" once
            after the last step, "adaptive" when the spectrum says that nothing is lost.
        adapter: name of the adapter; default all that are active and trained.
        allocate: "uniform": the same rank for all modules; "global": the parameters of that rank, spent where they
            keep the most energy. Default uniform, and global for "adaptive".
        optimizer_state: "transport" carries moments into the new coordinates (default), "reset" begins anew.
        learning_rate: "continue" leaves the curve alone (default), "restart" runs the whole curve once per stage,
            "rank" multiplies it by sqrt(source rank / rank), "restart-rank" does both.
        data_aware: truncate in the metric of inputs and gradients, collected while training.
        in_place: "auto" (default), "replace" or "mask", as in `squeeze_`.
        measure_loss: measure the negative log-likelihood of the labels of the last batch right before and after each
            squeeze, where there are labels; for preference and reward training that is not the loss trained. Costs two
            forward passes per squeeze.
        schedule: further options, of `make_schedule` (ranks, squeezes, steps, min_steps, last_steps, train_after_last)
            or, with "adaptive", of `Adaptive` (energy, loss, every, deadline).

    Raises:
        LoraSqueezeError: unknown options at once; a schedule that does not fit the adapter or the number of steps, an
            adapter or optimiser that cannot be squeezed, or a changed schedule on resume before the first step.

    Notes:
        The trainer's trackers receive squeeze/rank, squeeze/energy, squeeze/parameters_after and the loss before and
        after at each squeeze. If training stops early, or the best checkpoint of an earlier stage is loaded at the
        end, the adapter is squeezed to the target then. Under DDP and FSDP2 parameters keep their shapes until the
        end, with zeros in the unused directions.

    Example:
        >>> trainer = SFTTrainer(..., callbacks=[SqueezeCallback(rank=8)])  # doctest: +SKIP
    """

    def __init__(
        self,
        rank: int,
        *,
        mode: str = "in",
        adapter: str | None = None,
        allocate: Allocation | None = None,
        optimizer_state: str = "transport",
        learning_rate: str = "continue",
        data_aware: bool = False,
        in_place: str = "auto",
        measure_loss: bool = True,
        **schedule: Any,
    ) -> None:
        if mode not in (*MODES, "adaptive"):
            raise LoraSqueezeError(f"mode must be one of {', '.join((*MODES, 'adaptive'))}, got {mode!r}")
        known = _ADAPTIVE if mode == "adaptive" else _FIXED - {"mode"}
        unknown = sorted(schedule.keys() - known)
        if unknown:
            raise LoraSqueezeError(f"no option {unknown[0]!r} with mode {mode!r}; there are {', '.join(sorted(known))}")
        try:
            rank = operator.index(rank)
        except TypeError:
            raise LoraSqueezeError(f"rank must be a whole number, got {rank!r}") from None
        self.rank, self.mode, self.adapter, self.schedule = rank, mode, adapter, schedule
        self.measure_loss = measure_loss
        self.options: dict[str, Any] = {
            "optimizer_state": optimizer_state,
            "learning_rate": learning_rate,
            "data_aware": data_aware,
            "in_place": in_place,
        }
        self.allocate: Allocation = allocate or ("global" if mode == "adaptive" else "uniform")
        check_together(self.allocate)
        self.saved: dict[str, Any] | None = None
        self.squeezers: dict[str, Squeezer] = {}
        self._following: list[RemovableHandle] = []
        self._batch: _LastBatch | None = None
        self._pending: dict[str, float] = {}

    @property
    def history(self) -> list[dict[str, Any]]:
        """One entry per squeeze, oldest first."""
        entries = [{"adapter": name, **entry} for name, s in self.squeezers.items() for entry in s.history]
        return sorted(entries, key=lambda entry: int(entry["step"]))

    def state(self) -> dict[str, Any]:
        """What the trainer writes into its checkpoint."""
        args = {
            "rank": self.rank, "mode": self.mode, "adapter": self.adapter, "allocate": self.allocate,
            "measure_loss": self.measure_loss, **self.options, **self.schedule,
        }  # fmt: skip
        saved = {name: squeezer.plain_state() for name, squeezer in self.squeezers.items()}
        return {"args": args, "attributes": {"saved": saved or self.saved}}

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Refuse what cannot work, and get ready for a checkpoint of another rank."""
        from transformers import Trainer

        self._follow(model, optimizer)
        for trainer, _ in _callers(Trainer):
            if trainer.model_init is not None:  # train() makes a model anew, and loads the checkpoint into that
                trainer.model_init = _and_then(trainer.model_init, self._follow)
                return

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        lr_scheduler: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the schedule, or take it up again."""
        self._stop_following()
        self._leave()
        stored = [one["attributes"]["saved"] or {} for one in stored_states(state, type(self))]
        saved = {name: last for one in stored for name, last in one.items()} or self.saved or {}
        checkpoint = _resumed_from(args, state)
        if self.measure_loss:
            self._batch = _LastBatch(model, self.adapter)
        for name in self._adapters(model):
            resumed = saved.get(name) if state.global_step else None
            if resumed and (found := _statistics_of(checkpoint, name)):
                resumed = {**resumed, "statistics": found}
            squeezer = Squeezer(
                model,
                optimizer,
                self._schedule(model, name, state.max_steps, resumed),
                adapter=name,
                allocate=self.allocate,
                scheduler=lr_scheduler,
                loss=self._batch.loss if self._batch else None,
                state=resumed,
                **self.options,
            )
            if resumed and squeezer.statistics is not None and "statistics" not in resumed:
                warnings.warn(
                    f"no {STATISTICS_NAME} of adapter {name!r} in {checkpoint}: its statistics begin anew",
                    stacklevel=2,
                )
            squeezer.steps_done = state.global_step
            self.squeezers[name] = squeezer
        _before_trackers(self)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Squeeze if it is time; the trainer logs that step."""
        for name, squeezer in self.squeezers.items():
            if args.load_best_model_at_end and state.global_step == state.max_steps and is_other(squeezer.model, name):
                squeezer.steps_done += 1  # the best may be loaded now, and that is to be squeezed: at the end
            elif squeezer.step() is not None:
                self._note(squeezer)
                control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figures of a squeeze to what the trackers receive."""
        if self._pending and logs is not None:
            logs.update(self._pending)
            if state.log_history:
                state.log_history[-1].update(self._pending)
            self._pending = {}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the statistics beside the checkpoint; they are too large for the trainer's JSON."""
        folder = _checkpoint(args, state)
        found = {n: s.statistics.state_dict() for n, s in self.squeezers.items() if s.statistics is not None}
        if found and args.should_save and folder.is_dir():
            torch.save(found, folder / STATISTICS_NAME)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Squeeze to the target if training ended above it, and make all parameters small."""
        for name, squeezer in self.squeezers.items():
            return_to_best(args, state, holder_of(squeezer.model), name)
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                best = Path(state.best_model_checkpoint)
                _warn_of_another_method(squeezer.model, name, best)
                _take_statistics(squeezer, _statistics_of(best, name))
            if squeezer.finish() is not None:
                self._note(squeezer)
        if self._pending:
            state.log_history.append({**self._pending, "step": state.global_step})
            self._pending = {}
        if self._batch is not None:
            self._batch.close()

    def _follow(self, model: nn.Module, optimizer: Any = None) -> None:
        for name in self._adapters(model):
            modules_of(model, name)
            self._following.append(follow_loaded_ranks(model, name, lambda: optimizer))

    def _adapters(self, model: nn.Module) -> list[str]:
        return trained_adapters(model) if self.adapter is None else [self.adapter]

    def _schedule(
        self, model: nn.Module, adapter: str, steps: int, saved: Mapping[str, Any] | None
    ) -> Schedule | Adaptive:
        if self.mode == "adaptive":
            return Adaptive(self.rank, steps, allocate=self.allocate, **self.schedule)
        ranks = (saved or {}).get("schedule", {}).get("ranks")
        source = ranks[0] if ranks else max(m.width * m.step for m in modules_of(model, adapter))
        return make_schedule(source, self.rank, steps, mode=self.mode, **self.schedule)

    def _note(self, squeezer: Squeezer) -> None:
        prefix = "squeeze/" if len(self.squeezers) == 1 else f"squeeze/{squeezer.adapter}/"
        entry = squeezer.history[-1]
        self._pending.update({prefix + key: entry[key] for key in _LOGGED if key in entry})

    def _stop_following(self) -> None:
        for handle in self._following:
            handle.remove()
        self._following = []

    def _leave(self) -> None:
        """Forget a run that was interrupted, or is over."""
        for squeezer in self.squeezers.values():
            squeezer.close()
        if self._batch is not None:
            self._batch.close()
        self.squeezers, self._batch, self._pending = {}, None, {}


class _LastBatch:
    """The inputs of the model's last training forward pass, to measure the loss on before and after a squeeze.

    One that an interrupted run has left with the same model and adapter is closed.
    """

    def __init__(self, model: nn.Module, adapter: str | None) -> None:
        self._model: nn.Module = holder_of(model)
        if (before := _BATCHES.get((id(self._model), adapter))) is not None:
            before.close()
        _BATCHES[id(self._model), adapter] = self
        self._inputs: dict[str, Any] | None = None
        self._hook = self._model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not args and kwargs.get("labels") is not None:
            # Without the number of items, by which a share of an accumulated batch is divided, it is the plain mean.
            self._inputs = {key: value for key, value in kwargs.items() if key != "num_items_in_batch"}

    def loss(self) -> Tensor | None:
        """The loss on it, the mean over the labels; None where the model tells none."""
        if self._inputs is None:
            return None
        outputs = self._model(**self._inputs)
        if getattr(outputs, "loss", None) is not None:
            loss: Tensor = outputs.loss
            return loss
        if getattr(outputs, "log_probs", None) is not None:  # TRL asks the model for these instead of a loss
            likelihood: Tensor = outputs.log_probs.sum() / outputs.label_mask.sum()
            return -likelihood
        return None

    def close(self) -> None:
        """Forget the batch and the model's hook."""
        self._hook.remove()
        self._inputs = None


_BATCHES: WeakValueDictionary[tuple[int, str | None], _LastBatch] = WeakValueDictionary()


def _callers(kind: type) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Objects of a class whose methods are running, the innermost first, with the method's local variables.

    A trainer tells a callback nothing of its list of callbacks, of `model_init`, or of the checkpoint it goes on from.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), kind):
            yield owner, frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]


def _before_trackers(callback: SqueezeCallback) -> None:
    """Move a callback to the front of the trainer's list, so that what it adds to the logs reaches the trackers."""
    for handler, _ in _callers(CallbackHandler):
        if callback in handler.callbacks:
            # A new list: the handler is going through the old one right now.
            handler.callbacks = [callback, *(other for other in handler.callbacks if other is not callback)]
            return


def _and_then(model_init: Callable[..., Any], follow: Callable[[nn.Module], None]) -> Callable[..., Any]:
    """A `model_init` of as many arguments, 0 or 1, after which something else is done with the model."""

    def made(*trial: Any) -> Any:
        model = model_init(*trial)
        follow(model)
        return model

    of_a_trial: int = number_of_arguments(model_init)  # type: ignore[no-untyped-call]
    return (lambda trial: made(trial)) if of_a_trial else (lambda: made())


def _warn_of_another_method(model: nn.Module, adapter: str, best: Path) -> None:
    """A trainer loads nothing, and says nothing, where the best checkpoint was written before the change to a LoRA."""
    path = (best if adapter == "default" else best / adapter) / "adapter_config.json"
    kind = json.loads(path.read_text(encoding="utf-8"))["peft_type"] if path.is_file() else "LORA"
    if kind != "LORA" and not is_other(model, adapter):
        warnings.warn(
            f"the best checkpoint {best} is of {kind}, and the adapter {adapter!r} has become a LoRA since: it stays "
            "as after the last step; load that checkpoint with PeftModel.from_pretrained and squeeze it",
            stacklevel=2,
        )


def _take_statistics(squeezer: Squeezer, found: dict[str, Any] | None) -> None:
    """Of several adapters, a trainer loads one: for the others, those of the best checkpoint may not fit."""
    if squeezer.statistics is not None and found is not None and squeezer.statistics.fits(found):
        squeezer.statistics.load_state_dict(found)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _resumed_from(args: TrainingArguments, state: TrainerState) -> Path:
    """The checkpoint that the trainer goes on from."""
    from transformers import Trainer

    told = (found.get("resume_from_checkpoint") for _, found in _callers(Trainer))
    folders = (folder for folder in (*told, args.resume_from_checkpoint) if isinstance(folder, str | Path))
    return Path(next(folders, _checkpoint(args, state)))


def _statistics_of(checkpoint: Path, adapter: str) -> dict[str, Any] | None:
    path = checkpoint / STATISTICS_NAME
    if not path.is_file():
        return None
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return found.get(adapter)
