"""A planted problem for the methods that find ranks, and the training loop that their controllers are made for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from adapters_cases import IN, drawn_from, net
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from torch.nn import functional

import lora_squeeze.methods.ranks  # noqa: F401 (registers the methods)
from lora_squeeze.methods.control import Controller, controller_for

PLANTED = {
    "blocks.0.wide": 3,
    "blocks.0.tall": 1,
    "blocks.1.wide": 0,
    "blocks.1.tall": 2,
}  # rank of the teacher's update


def planted(ranks: dict[str, int] = PLANTED, rows: int = 64) -> tuple[Tensor, Tensor]:
    """Inputs, and the outputs of the tiny net with an update of these ranks."""
    generator = torch.Generator().manual_seed(9)
    teacher = net()
    for name, rank in ranks.items():
        weight = teacher.get_submodule(name).weight
        B, A = (torch.randn(shape, generator=generator) for shape in ((len(weight), rank), (rank, weight.shape[1])))
        weight.data += 0.3 * B @ A
    x = torch.randn(rows, IN, generator=generator)
    return x, teacher(x).detach()


def adam(model: nn.Module, lr: float = 2e-2) -> torch.optim.Optimizer:
    """AdamW over all that is trained."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)


def go_on(
    model: nn.Module, controller: Controller, optimizer: torch.optim.Optimizer, steps: int,
    data: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Some steps of a training whose rates fall to zero, with the calls that a controller asks for; not its end."""
    x, y = planted() if data is None else data
    model.train()
    for _ in range(steps):
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * (1 - controller.steps_done / controller.total_steps)
        controller.before_forward()
        functional.mse_loss(model(x), y).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()


def fresh(config: Any) -> Any:
    """The tiny net with an adapter that begins with the same numbers on every call."""
    with drawn_from(0):
        return get_peft_model(net(), config)


def trained(config: Any, steps: int, make: Callable[[nn.Module], torch.optim.Optimizer] = adam) -> tuple[Any, Any]:
    """The tiny net after a whole training, in eval mode, and its controller."""
    model = fresh(config)
    optimizer = make(model)
    controller = controller_for(model, steps, optimizer)
    go_on(model, controller, optimizer, steps)
    controller.finish()
    return model.eval(), controller


def cut_and_resumed(
    config: Any, steps: int, cut: int, make: Callable[[nn.Module], torch.optim.Optimizer] = adam
) -> tuple[Any, Any]:
    """The same training, stopped after some steps and gone on with by objects that know its checkpoint alone.

    The checkpoint is what a trainer has: the adapter's file without its configuration, the optimiser's state, and the
    controller's.
    """
    twin = copy.deepcopy(config)
    first = fresh(config)
    optimizer = make(first)
    controller = controller_for(first, steps, optimizer)
    go_on(first, controller, optimizer, cut)
    checkpoint = copy.deepcopy((get_peft_model_state_dict(first), optimizer.state_dict(), controller.state_dict()))
    model = fresh(twin)
    second = make(model)
    again = controller_for(model, steps, second)
    set_state(model, checkpoint[0])
    second.load_state_dict(checkpoint[1])
    again.load_state_dict(checkpoint[2])
    go_on(model, again, second, steps - cut)
    again.finish()
    return model.eval(), again


def set_state(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Load an adapter's file into a live model."""
    from peft import set_peft_model_state_dict

    found = set_peft_model_state_dict(model, state)
    assert not found.unexpected_keys


def same(one: nn.Module, other: nn.Module) -> None:
    """All numbers of two models agree bit by bit."""
    for (name, found), wanted in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name
