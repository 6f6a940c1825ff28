"""A method's controller in a transformers or TRL trainer."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lora_squeeze.methods.control import Controller, at_work, controller_for


class ControllerCallback(TrainerCallback, ExportableState):
    """Calls the controller of the model's method at its places in a `transformers.Trainer` or a TRL trainer.

    Args:
        adapter: name of the adapter.

    Attributes:
        controller: the controller, from the beginning of the training on.

    Example:
        >>> trainer = SFTTrainer(..., peft_config=DyloraConfig(r=8), callbacks=[ControllerCallback()])  # doctest: +SKIP
    """

    def __init__(self, adapter: str = "default") -> None:
        self.adapter = adapter
        self.controller: Controller | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer writes into its checkpoint."""
        saved = self.controller.state_dict() if self.controller else None
        return {"args": {"adapter": self.adapter}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Make the controller; on resume, where the checkpoint left it."""
        self.controller = controller_for(getattr(model, "module", model), state.max_steps, optimizer, self.adapter)
        saved = _saved(state, self.adapter)
        if not state.global_step:
            return
        if saved is not None:
            self.controller.load_state_dict(saved)
            return
        self.controller.steps_done = state.global_step
        if type(self.controller) is not Controller and self.controller.acts(self.controller.config):
            warnings.warn(
                f"the checkpoint was written without the controller of adapter {self.adapter!r}: it begins at step "
                f"{state.global_step} of {state.max_steps}, and what it does before that is left out",
                stacklevel=2,
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the forward passes of a step."""
        self._made.before_forward()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the backward passes."""
        self._made.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the optimiser's step."""
        self._made.after_step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step, or where the best checkpoint is loaded after it."""
        return_to_best(args, state, self._made.model, self.adapter)
        self._made.finish()

    @property
    def _made(self) -> Controller:
        assert self.controller is not None  # the trainer begins with on_train_begin
        return self.controller


def return_to_best(args: TrainingArguments, state: TrainerState, model: nn.Module, adapter: str) -> None:
    """Let an adapter be what `from_pretrained` makes of the best checkpoint, if the trainer has loaded that at its end.

    The trainer loads numbers alone. The ranks, chosen layers and so on that belong to them are in the controller's
    state. The controller ends first: whatever it does at the end of a training, it does not do to this adapter.
    """
    controller = at_work(model, adapter)
    if controller is None or not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return
    controller.finish()
    best = Path(state.best_model_checkpoint)
    saved = _saved(TrainerState.load_from_json(str(best / "trainer_state.json")), adapter)
    if saved is None:
        warnings.warn(
            f"{best} was written without the controller of adapter {adapter!r}, so that the model is not what it was "
            "there; load it with PeftModel.from_pretrained",
            stacklevel=2,
        )
        return
    controller.load_state_dict(saved)
    folder = best if adapter == "default" else best / adapter
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"), adapter)


def stored_states(state: TrainerState, callback: type[ExportableState]) -> list[dict[str, Any]]:
    """What a trainer's state has of the callbacks of one class, oldest first.

    Of one callback it keeps the last state; where there are several, each save appends theirs. Where there is nothing,
    such as in a checkpoint that was written without them, room is made: the trainer's next save asks for it.
    """
    states: Any = state.stateful_callbacks  # by class name; annotated otherwise
    found = states.setdefault(callback.__name__, [])
    return found if isinstance(found, list) else [found]


def _saved(state: TrainerState, adapter: str) -> dict[str, Any] | None:
    """The last state of an adapter's controller."""
    found = [one for one in stored_states(state, ControllerCallback) if one["args"]["adapter"] == adapter]
    saved: dict[str, Any] | None = found[-1]["attributes"]["saved"] if found else None
    return saved
