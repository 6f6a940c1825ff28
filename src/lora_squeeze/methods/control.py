"""What a method does around the steps of an optimiser: draw ranks, add to gradients, threshold gates, choose entries.

One object per model, called from any loop:

    controller = controller_for(model, total_steps, optimizer)
    for batch in data:
        controller.before_forward()
        loss(model, batch).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()

`ControllerCallback` does the same in a transformers or TRL trainer. What is drawn depends on the seed and the step
alone: all processes of a distributed run draw the same, and a resumed run goes on with the same draws.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.seeds import seeded

CONTROLLERS: dict[str, type[Controller]] = {}  # method -> its controller
_AT_WORK: WeakValueDictionary[tuple[int, str], Controller] = WeakValueDictionary()  # by model and adapter
_OWN: WeakValueDictionary[tuple[int, str], Any] = WeakValueDictionary()  # configurations, by model and adapter
_SETTLED: WeakValueDictionary[tuple[int, str], Any] = WeakValueDictionary()  # that need no warning, by their own id


class Controller:
    """The base of all controllers: knows the updates of one adapter and counts the steps.

    Args:
        model: a PEFT model of the method.
        total_steps: optimiser steps of the whole training.
        optimizer: the optimiser that trains the adapter; only methods that exchange parameters while training need it.
        adapter: name of the adapter.

    Attributes:
        config: of the adapter, a copy of its own: what the training finds is written there and saved with it.
        deltas: name of the layer -> its update, in the order of the model.
        steps_done: finished optimiser steps.
        over: it has finished, and does nothing any more.

    A method overrides `_before_forward`, `_before_step`, `_after_step`, which counts, and `_finish`.
    """

    def __init__(
        self, model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default"
    ) -> None:  # fmt: skip
        if total_steps < 1:
            raise LoraSqueezeError(f"total_steps must be a whole number from 1, got {total_steps}")
        self.model, self.total_steps, self.optimizer, self.adapter = model, total_steps, optimizer, adapter
        self.config: Any = own_config(model, adapter)
        _SETTLED[id(self.config), adapter] = self.config
        self.deltas: dict[str, Any] = deltas_of(model, adapter)
        self.steps_done = 0
        self.over = False

    def before_forward(self) -> None:
        """Before the first forward pass of a step."""
        if not self.over:
            self._before_forward()

    def before_step(self) -> None:
        """After the last backward pass of a step: gradients may be changed. Sums over micro-batches are complete."""
        if not self.over:
            self._before_step()

    def after_step(self) -> None:
        """After the optimiser's step."""
        if not self.over:
            self._after_step()

    def finish(self) -> None:
        """After the last step, or before the adapter becomes a plain LoRA."""
        if not self.over:
            self._finish()
            self.over = True

    def _before_forward(self) -> None:
        pass

    def _before_step(self) -> None:
        pass

    def _after_step(self) -> None:
        self.steps_done += 1

    def _finish(self) -> None:
        pass

    def generator(self, *labels: object) -> torch.Generator:
        """For what is drawn in the present step."""
        return seeded(self.config.seed, type(self).__name__, self.steps_done, *labels)

    @staticmethod
    def acts(config: Any) -> bool:
        """Whether there is anything to do with this configuration."""
        return True

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint has to hold beside model and optimiser: plain numbers and tensors."""
        return {"steps_done": self.steps_done, "total_steps": self.total_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            LoraSqueezeError: the training there had another length.
        """
        if state["total_steps"] != self.total_steps:
            raise LoraSqueezeError(
                f"the checkpoint is of a training of {state['total_steps']} steps, this one has {self.total_steps}"
            )
        self.steps_done = int(state["steps_done"])


def controller_for(model: nn.Module, total_steps: int, optimizer: Any = None, adapter: str = "default") -> Controller:
    """The controller of a PEFT model's method; one that only counts where the method needs none.

    Args:
        model: a PEFT model.
        total_steps, optimizer, adapter: as for `Controller`.
    """
    kind = str(getattr(_config(model, adapter).peft_type, "value", _config(model, adapter).peft_type))
    made = CONTROLLERS.get(kind.lower(), Controller)(model, total_steps, optimizer, adapter)
    _AT_WORK[id(model), adapter] = made
    return made


def warn_if_uncontrolled(config: Any, adapter: str) -> None:
    """Warn, once for each adapter, that it is trained without the controller that its method needs."""
    if (id(config), adapter) in _SETTLED:
        return
    _SETTLED[id(config), adapter] = config
    kind = CONTROLLERS.get(config.method)
    if kind is not None and kind.acts(config):
        warnings.warn(
            f"the adapter {adapter!r} is trained without its controller, so as something else than {config.method}: "
            "add lora_squeeze.methods.callback.ControllerCallback() to the trainer, or call a controller_for(model, "
            "total_steps, optimizer) in the loop",
            stacklevel=3,
        )


def at_work(model: nn.Module, adapter: str = "default") -> Controller | None:
    """The controller that an adapter is trained with; None where there is none, or it has finished."""
    found = _AT_WORK.get((id(model), adapter))
    return found if found is not None and found.model is model and not found.over else None


def end_control(model: nn.Module, adapter: str = "default") -> None:
    """Let the controller that an adapter is trained with finish, if there is one."""
    if (found := at_work(model, adapter)) is not None:
        found.finish()


def parameter_groups(
    model: nn.Module, lr: float, *, weight_decay: float = 0.0, adapter: str = "default"
) -> list[dict[str, Any]]:
    """All that a PEFT model trains, as groups for Adam or AdamW: with the settings that its method asks for.

    Args:
        model: a PEFT model.
        lr: learning rate of the first group: all, a new head included, but what a method trains at rates of its own,
            such as gates. Those come from its configuration.
        weight_decay: of the first group; gates have none but where their method says so.
        adapter: name of the adapter.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))  # doctest: +SKIP
    """
    config = _config(model, adapter)
    asked: dict[str, dict[str, Any]] = config.own_settings(lr) if hasattr(config, "own_settings") else {}
    own: dict[str, list[nn.Parameter]] = {}
    for delta in deltas_of(model, adapter).values() if asked else ():
        for name, parameter in delta.named_parameters():
            found = next((key for key in asked if re.fullmatch(key, name.rpartition(".")[2])), None)
            if found is not None and parameter.requires_grad:
                own.setdefault(found, []).append(parameter)
    taken = {id(parameter) for members in own.values() for parameter in members}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
    first = {"params": rest, "lr": lr, "weight_decay": weight_decay}
    return [first, *({"params": own[key], "weight_decay": 0.0, **asked[key]} for key in asked if key in own)]


def controlled_by(name: str, controller: type[Controller]) -> None:
    """Say which controller a method has."""
    CONTROLLERS[name] = controller


def deltas_of(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """Name of the layer in the base model -> the update that an adapter has there."""
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "deltas") and hasattr(m, "get_delta_weight")]
    return {layer.name: layer.deltas[adapter] for layer in layers if adapter in layer.deltas}


def own_config(model: nn.Module, adapter: str) -> Any:
    """An adapter's configuration, from now on a copy: PEFT keeps the user's object, which may serve again."""
    holder: Any = model
    found = _config(model, adapter)
    if _OWN.get((id(model), adapter)) is not found:
        found = copy.copy(found)
        _OWN[id(model), adapter] = holder.peft_config[adapter] = found
        for delta in deltas_of(model, adapter).values():
            delta.config = found
    return found


def _config(model: nn.Module, adapter: str) -> Any:
    configs: Any = getattr(model, "peft_config", None) or {}
    if adapter not in configs:
        raise LoraSqueezeError(f"the model has no adapter {adapter!r}; it has {', '.join(configs) or 'none'}")
    return configs[adapter]
