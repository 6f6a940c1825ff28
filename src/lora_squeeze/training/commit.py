"""Put new factors into a live model and its optimiser: all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.lowrank import LowRank
from lora_squeeze.training.live import (
    LiveModule,
    is_sharded,
    live_modules,
    only_adapter,
    resized,
    sync_config,
    without_autocast,
    write,
)
from lora_squeeze.training.optimizer_state import Change, carried_state, concerned, exchange, unwrapped


@dataclass(frozen=True)
class New:
    """One module's new factors B' = B P and A' = R A, and the squared norm that they lose."""

    module: LiveModule
    old: LowRank
    B: Tensor
    A: Tensor
    P: Tensor
    R: Tensor
    lost: float


def commit(
    model: nn.Module,
    adapter: str,
    modules: Sequence[LiveModule],
    new: Sequence[New],
    optimizer: Any,
    policy: str,
    replace_parameters: bool,
) -> None:
    """Exchange parameters and states; on any failure everything is put back.

    Args:
        modules: all of the adapter.
        new: the ones that change.
        optimizer: a torch optimiser, or None.
        policy: "transport" or "reset".
        replace_parameters: new parameters of the new rank; else the old ones, with zeros in the unused directions.
    """
    exchanged: dict[nn.Parameter, nn.Parameter] = {}
    states: dict[nn.Parameter, dict[str, Any]] = {}
    values: list[tuple[LiveModule, Tensor, Tensor]] = []
    taken_over = set(concerned(optimizer, (p for item in new for p in (item.module.A, item.module.B))))
    for item in new:
        module, room = item.module, None if replace_parameters else item.module.width
        new_A, new_B = module.like_A(_padded(item.A, room, -2)), module.like_B(_padded(item.B, room, -1))
        values.append((module, new_A, new_B))
        for old, value, change in (
            (module.A, new_A, _change_of_A(item, room)),
            (module.B, new_B, _change_of_B(item, room)),
        ):
            exchanged[old] = nn.Parameter(value, requires_grad=old.requires_grad) if replace_parameters else old
            if old in taken_over:
                states[old] = carried_state(optimizer, old, value, change, policy)
    undo: list[Callable[[], object]] = []
    try:
        for module, new_A, new_B in values:
            undo.append(_way_back(module, keep_values=not replace_parameters))
            if replace_parameters:
                module.put(exchanged[module.A], exchanged[module.B])
            else:
                write(module.A, new_A)
                write(module.B, new_B)
        if optimizer is not None:
            undo.append(exchange(optimizer, {old: exchanged[old] for old in states}, states))
        if replace_parameters:
            sync_config(model, adapter, modules)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _padded(matrix: Tensor, room: int | None, dim: int) -> Tensor:
    """Zeros up to the room that the parameter has; as it is where it will be replaced."""
    missing = 0 if room is None else room - matrix.shape[dim]
    if not missing:
        return matrix
    shape = list(matrix.shape)
    shape[dim] = missing
    return torch.cat([matrix, matrix.new_zeros(shape)], dim)


def _change_of_B(item: New, room: int | None) -> Change:
    module, rank = item.module, item.old.rank
    move = _wide(item.old.A) @ _wide(item.A).mT / _squared_norms(item.A, -1).unsqueeze(-2)

    def by(matrix: Tensor, tensor: Tensor) -> Tensor:
        return module.like_B(_padded(module.columns(tensor)[..., :rank] @ matrix.to(tensor), room, -1))

    return Change(partial(by, item.R.mT), partial(by, item.R.mT.square()), partial(by, move))


def _change_of_A(item: New, room: int | None) -> Change:
    module, rank = item.module, item.old.rank
    move = _wide(item.B).mT @ _wide(item.old.B) / _squared_norms(item.B, -2).unsqueeze(-1)

    def by(matrix: Tensor, tensor: Tensor) -> Tensor:
        return module.like_A(_padded(matrix.to(tensor) @ module.rows(tensor)[..., :rank, :], room, -2))

    return Change(partial(by, item.P.mT), partial(by, item.P.mT.square()), partial(by, move))


def _wide(factor: Tensor) -> Tensor:
    return factor.to(torch.promote_types(factor.dtype, torch.float32))


def _squared_norms(factor: Tensor, dim: int) -> Tensor:
    """Of the new factor's directions, which are orthogonal; a zero direction takes over nothing."""
    norms = _wide(factor).square().sum(dim)
    return torch.where(norms > 0, norms, torch.inf)


def _way_back(module: LiveModule, keep_values: bool) -> Callable[[], object]:
    """A function that makes the layer what it is now."""
    A, B = module.A, module.B
    alpha = module.layer.lora_alpha[module.adapter]
    values = (A.detach().clone(), B.detach().clone()) if keep_values else None

    def back() -> None:
        if values is None:
            module.put(A, B)
            module.layer.lora_alpha[module.adapter] = alpha
        else:
            with torch.no_grad():
                A.copy_(values[0])
                B.copy_(values[1])

    return back


def compact(
    model: nn.Module, *, optimizer: Any = None, adapter: str | None = None, optimizer_state: str = "transport"
) -> bool:
    """Make parameters small that a squeeze has left in their old shape; the update stays bit for bit.

    Call it where nothing holds on to the parameters any more: after training, or before the model is wrapped again.

    Returns:
        Whether there was anything to do. Sharded parameters cannot be made smaller and stay.
    """
    name = only_adapter(model) if adapter is None else adapter
    modules = live_modules(model, name)
    if is_sharded(modules):
        return False
    new = []
    for module in modules:
        old = module.update()
        if old.rank < module.width:
            eye = torch.eye(old.rank, dtype=torch.float64, device=old.device)
            new.append(New(module, old, old.B.contiguous(), old.A.contiguous(), eye, eye, 0.0))
    if new:
        inner = None if optimizer is None else unwrapped(optimizer)
        with without_autocast(model):
            commit(model, name, modules, new, inner, optimizer_state, replace_parameters=True)
    return bool(new)


def make_room(model: nn.Module, ranks: Mapping[str, int], *, optimizer: Any = None, adapter: str | None = None) -> None:
    """Give the layers zero factors of these ranks, for values that are about to be loaded.

    Args:
        ranks: module name -> rank, as PEFT counts it.
        optimizer: takes the new parameters over; their state is dropped, since it will be loaded too.
    """
    name = only_adapter(model) if adapter is None else adapter
    modules = live_modules(model, name)
    exchanged: dict[nn.Parameter, nn.Parameter] = {}
    for module in modules:
        rank = ranks.get(module.name, module.width * module.step) // module.step
        if rank != module.width:
            A, B = resized(module, rank)
            exchanged.update({module.A: A, module.B: B})
            module.put(A, B)
    if exchanged:
        if optimizer is not None:
            inner = unwrapped(optimizer)
            exchange(inner, {old: exchanged[old] for old in concerned(inner, exchanged)}, {})
        sync_config(model, name, modules)
