"""A method's controller in a transformers or TRL trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lora_squeeze.methods.control import Controller, controller_for


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
        self.saved: dict[str, Any] | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer writes into its checkpoint."""
        saved = self.controller.state_dict() if self.controller else self.saved
        return {"args": {"adapter": self.adapter}, "attributes": {"saved": saved}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None,
        optimizer: Any = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        """Make the controller; on resume, where the checkpoint left it."""
        self.controller = controller_for(getattr(model, "module", model), state.max_steps, optimizer, self.adapter)
        saved = self._stored(state) if state.global_step else None
        if saved is not None:
            self.controller.load_state_dict(saved)

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
        """After the last step."""
        self._made.finish()

    def _stored(self, state: TrainerState) -> dict[str, Any] | None:
        """What the checkpoint has of this callback; a trainer hands it over by itself only if its arguments say so."""
        states: Any = state.stateful_callbacks  # by class name; several of one class are a list
        found = states.get(type(self).__name__, [])
        for one in found if isinstance(found, list) else [found]:
            if one["args"]["adapter"] == self.adapter:
                saved: dict[str, Any] | None = one["attributes"]["saved"]
                return saved
        return self.saved

    @property
    def _made(self) -> Controller:
        assert self.controller is not None  # the trainer begins with on_train_begin
        return self.controller
