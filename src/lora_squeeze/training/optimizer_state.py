"""What becomes of an optimiser's state when a parameter is replaced by one in other coordinates.

A squeeze gives a LoRA factor a lower rank, or rotates it in place. The optimiser holds averages of gradients and of
their squares in the old coordinates; attached to the new factor as they are, they would be wrong or of the wrong shape.

=============  =====================================================  ================================================
what           carried over by                                        exact?
=============  =====================================================  ================================================
gradient       `Change.gradient`: averages of gradients               yes, the map is linear
square         `Change.square`: averages of squared gradients         for signed permutations; else approximate, since
                                                                      covariances between entries are not stored
displacement   `Change.displacement`: averages of steps taken         as good as the caller's least squares
point          p' + displacement(z - p): a second copy z of p         as displacement
factored       row and column means of the squares: multiplied out,   as square, then factored again
               mapped as square
8-bit          bitsandbytes' codes: decoded, mapped, coded again      to one more rounding of the codes; that of
                                                                      bitsandbytes 0.50 on the CPU misses zero
counters       kept: they count the updates of the parameter          yes
=============  =====================================================  ================================================

Weight decay that is added to the gradient (SGD, Adam; not AdamW) is in the averages and goes with them, exact for
orthogonal changes only. `_KNOWN` lists the optimisers, state key by state key; others can only be reset.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError

STATE_POLICIES = ("transport", "reset")


@dataclass(frozen=True)
class Change:
    """How quantities attached to one parameter go over to its new coordinates.

    Each function takes a tensor of the old parameter's shape and gives one of the new shape. The tensor is whole (not
    sharded), float32 or float64, and on the parameter's device.

    Args:
        gradient: a gradient; exact and linear.
        square: elementwise squared gradients: the map of the gradient with squared coefficients.
        displacement: the difference of two values of the parameter: least squares in the space of the update.
    """

    gradient: Callable[[Tensor], Tensor]
    square: Callable[[Tensor], Tensor]
    displacement: Callable[[Tensor], Tensor]


def unwrapped(optimizer: object) -> torch.optim.Optimizer:
    """The torch optimiser inside wrappers such as accelerate's, which hold it as `.optimizer` and show its state.

    Raises:
        LoraSqueezeError: there is no torch optimiser inside, or a wrapper keeps state of its own.
    """
    while hasattr(optimizer, "optimizer"):
        inner = optimizer.optimizer
        if getattr(optimizer, "state", None) is not getattr(inner, "state", None):
            raise LoraSqueezeError(
                f"{_name(optimizer)} keeps state of its own beside that of {_name(inner)}; use the inner one alone"
            )
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise LoraSqueezeError(f"{_name(optimizer)} is not a torch.optim.Optimizer; pass the optimiser of the training")
    return optimizer


def concerned(optimizer: torch.optim.Optimizer | None, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of some parameters whose exchange concerns an optimiser: what is trained now, and what it holds besides.

    A factor may be frozen for a while, and be trained again later: adapters, or A and B, in turn.
    """
    if optimizer is None:
        return []
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return [p for p in parameters if p.requires_grad or id(p) in held]


def check_optimizer(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], policy: str) -> None:
    """Refuse an optimiser that an exchange of these parameters would break. Changes nothing.

    Args:
        optimizer: as from `unwrapped`.
        parameters: the parameters that are to be exchanged.
        policy: "transport" carries the state over, and asks for a listed optimiser; "reset" drops it, and asks for one
            that makes the state of each parameter by itself at its next step.

    Raises:
        LoraSqueezeError: the optimiser does not hold a parameter, keeps state elsewhere than under its parameters, or
            does not suit the policy.

    Notes:
        A subclass of a listed optimiser is taken for one as long as its state has no other keys, which shows after its
        first step only.
    """
    if policy not in STATE_POLICIES:
        raise LoraSqueezeError(f"optimizer_state must be one of {', '.join(STATE_POLICIES)}, got {policy!r}")
    parameters = list(parameters)
    _check_keeping(optimizer, parameters)
    if policy == "transport":
        for parameter in parameters:
            _keys_of(optimizer, optimizer.state.get(parameter, {}))
        return
    known = _known(optimizer)
    counter = next((key for key in ("step", "k") for group in optimizer.param_groups if key in group), None)
    if counter is not None and (known is None or _square in known.values()):
        raise LoraSqueezeError(
            f"optimizer_state='reset' does not suit the optimiser {_name(optimizer)}: it counts steps per group "
            f"({counter!r}), so it would take the emptied state for a long average, and its next step would be far too "
            f"large; use optimizer_state='transport' with an optimiser it knows: {_choices()}"
        )


@torch.no_grad()
def carried_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, new_value: Tensor, change: Change, policy: str
) -> dict[str, Any]:
    """The state entry for the new value of a parameter. Pure: nothing is modified, and no memory is shared.

    Args:
        optimizer: one that `check_optimizer` accepts.
        parameter: the old parameter, still with its old value.
        new_value: value of the new one; of the same shape where it changes in place.
        change: from the old coordinates to the new ones.
        policy: "transport" or "reset".

    Returns:
        State by key, each tensor in the dtype, on the device and with the sharding of the old one; where the new tensor
        is too small for 8-bit state, float32. {} with "reset", and where there is no state yet.

    Raises:
        LoraSqueezeError: the optimiser or one of its keys is unknown ("transport" only).

    Notes:
        Computed in float32, or float64 for float64 state. Squares are at least 0. With sharded tensors (FSDP2) all
        processes must call this together, for the same parameters in the same order.
    """
    state = optimizer.state.get(parameter)
    if policy == "reset" or not state:
        return {}
    keys = _keys_of(optimizer, state)
    move = _Move(optimizer, state, parameter, new_value, change)
    carried: dict[str, Any] = {}
    for key, value in state.items():
        carried |= {key: None} if value is None else keys[key](move, key)
    return carried


def exchange(
    optimizer: torch.optim.Optimizer,
    replacements: Mapping[nn.Parameter, nn.Parameter],
    states: Mapping[nn.Parameter, Mapping[str, Any]],
) -> Callable[[], None]:
    """Put new parameters in the places of old ones and install their state.

    The groups stay the same objects with the same settings, so the optimiser and its LR schedulers stay valid.

    Args:
        optimizer: the optimiser that holds the old parameters.
        replacements: old -> new; the same object twice where a parameter changes in place, then only its state does.
        states: old -> state of the new one, from `carried_state`; none or an empty one: the optimiser starts anew.

    Returns:
        A function that takes the exchange back: called before the next step, it leaves groups and states exactly as
        they were. The values of parameters that change in place are the caller's.

    Raises:
        LoraSqueezeError: an old parameter is not in the groups.
    """
    _check_held(optimizer, replacements)
    groups = [group["params"] for group in optimizer.param_groups]
    groups_before = [list(group) for group in groups]
    state_before: dict[Any, Any] = dict(optimizer.state)

    def put(members: Iterable[list[nn.Parameter]], state: Mapping[Any, Any]) -> None:
        for group, row in zip(groups, members, strict=True):
            group[:] = row
        optimizer.state.clear()
        optimizer.state.update(state)

    entries: dict[Any, Any] = {}
    for key in {**state_before, **replacements}:  # in the old order: a saved state lists them as before
        if key not in replacements:
            entries[key] = state_before[key]
        elif states.get(key):
            entries[replacements[key]] = dict(states[key])
    put([[replacements.get(p, p) for p in row] for row in groups_before], entries)
    return lambda: put(groups_before, state_before)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor: a sharded one (DTensor of FSDP2) is gathered, which all processes must do together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def like(value: Tensor, model: Tensor) -> Tensor:
    """A contiguous copy of a whole tensor in the dtype, on the device and with the sharding of another one."""
    made = value.to(model.device, model.dtype, copy=True, memory_format=torch.contiguous_format)
    sharded: Any = model
    if hasattr(sharded, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(made, sharded.device_mesh, sharded.placements)
    return made


@dataclass(frozen=True)
class _Move:
    """One parameter on its way, with all that the functions below need."""

    optimizer: Any
    state: Mapping[str, Any]
    parameter: nn.Parameter
    new_value: Tensor
    change: Change


_Carrier = Callable[[_Move, str], dict[str, Any]]


def _keep(move: _Move, key: str) -> dict[str, Any]:
    return {key: copy.deepcopy(move.state[key])}


def _gradient(move: _Move, key: str) -> dict[str, Any]:
    return _written(move, key, move.change.gradient(_read(move, key)))


def _square(move: _Move, key: str) -> dict[str, Any]:
    return _written(move, key, move.change.square(_read(move, key)).clamp_min(0))


def _displacement(move: _Move, key: str) -> dict[str, Any]:
    return _written(move, key, move.change.displacement(_read(move, key)))


def _point(move: _Move, key: str) -> dict[str, Any]:
    moved = move.change.displacement(_read(move, key) - _wide(move.parameter, move))
    return _written(move, key, _wide(move.new_value, move) + moved)


def _factored(move: _Move, key: str) -> dict[str, Any]:
    """Means over the last and over the last but one dimension, under a key with "row" and its twin with "col"."""
    twin = key.replace("row", "col")
    row, column = _read(move, key), _read(move, twin)
    kept = row.ndim == move.parameter.ndim  # torch keeps the reduced dimension, transformers drops it
    if not kept:
        row, column = row.unsqueeze(-1), column.unsqueeze(-2)
    mean = row.mean(-2, keepdim=True)
    V = move.change.square(row * column / torch.where(mean > 0, mean, 1)).clamp_min(0)
    return _written(move, key, V.mean(-1, keepdim=kept)) | _written(move, twin, V.mean(-2, keepdim=kept))


def _beside(move: _Move, key: str) -> dict[str, Any]:
    """Written together with another key."""
    return {}


def _rms(move: _Move, key: str) -> dict[str, Any]:
    old, value = move.state[key], _wide(move.new_value, move)
    rms = value.norm() / value.numel() ** 0.5
    return {key: rms.to(old.dtype) if isinstance(old, Tensor) else float(rms)}


def _wide(tensor: Tensor, move: _Move) -> Tensor:
    whole = full(tensor.detach()).to(move.parameter.device)
    return whole.to(torch.promote_types(whole.dtype, torch.float32))


def _read(move: _Move, key: str) -> Tensor:
    """A state tensor as `Change` takes it."""
    value: Tensor = move.state[key]
    if value.dtype == torch.uint8:
        from bitsandbytes.functional import dequantize_blockwise

        code, absmax = move.state[f"qmap{key[-1]}"], move.state[f"absmax{key[-1]}"]
        value = dequantize_blockwise(value, absmax=absmax, code=code, blocksize=_blocksize(value, absmax))
    return _wide(value, move)


def _written(move: _Move, key: str, value: Tensor) -> dict[str, Any]:
    """The state tensor as the optimiser keeps it, with what belongs to it."""
    old: Tensor = move.state[key]
    if old.dtype != torch.uint8:
        return {key: like(value, old)}
    whole = value.to(old.device, torch.float32, copy=True, memory_format=torch.contiguous_format)
    if whole.numel() < move.optimizer.args.min_8bit_size:
        return {key: whole}
    from bitsandbytes.functional import quantize_blockwise

    code, absmax = move.state[f"qmap{key[-1]}"], move.state[f"absmax{key[-1]}"]
    codes, found = quantize_blockwise(whole, code=code, blocksize=_blocksize(old, absmax))
    return {key: codes, f"qmap{key[-1]}": code.clone(), f"absmax{key[-1]}": found.absmax}


def _blocksize(codes: Tensor, absmax: Tensor) -> int:
    """Codes per absmax: 256 in current releases of bitsandbytes, a larger power of two in old ones."""
    size = 256
    while -(-codes.numel() // size) > absmax.numel():
        size *= 2
    return size


_Keys = Mapping[str, _Carrier]
_ADAM: _Keys = {"step": _keep, "exp_avg": _gradient, "exp_avg_sq": _square, "max_exp_avg_sq": _square}
_BNB_1: _Keys = {"step": _keep, "state1": _gradient, "qmap1": _beside, "absmax1": _beside}
_BNB_2: _Keys = {**_BNB_1, "state2": _square, "qmap2": _beside, "absmax2": _beside}

# By top-level package and class; a name without a package: that class wherever it comes from.
_KNOWN: dict[str, _Keys] = {
    "torch.Adam": _ADAM,
    "torch.AdamW": _ADAM,
    "torch.NAdam": {**_ADAM, "mu_product": _keep},
    "torch.RAdam": _ADAM,
    "torch.SGD": {"momentum_buffer": _gradient},
    "torch.Adafactor": {"step": _keep, "row_var": _factored, "col_var": _beside, "variance": _square},
    "transformers.Adafactor": {
        "step": _keep,
        "exp_avg": _displacement,  # an average of steps taken, not of gradients
        "exp_avg_sq_row": _factored,
        "exp_avg_sq_col": _beside,
        "exp_avg_sq": _square,
        "RMS": _rms,  # of the parameter
    },
    "schedulefree.AdamWScheduleFree": {"z": _point, "exp_avg_sq": _square},
    "schedulefree.RAdamScheduleFree": {"z": _point, "exp_avg_sq": _square},
    "schedulefree.SGDScheduleFree": {"z": _point},
    "bitsandbytes.Adam": _BNB_2,
    "bitsandbytes.AdamW": _BNB_2,
    "bitsandbytes.Lion": _BNB_1,
    "Lion": {"step": _keep, "exp_avg": _gradient},
}

_REFUSED = {
    "torch.LBFGS": "it keeps one history of all parameters together",
    "torch.ZeroRedundancyOptimizer": "it steps an inner optimiser with groups of its own",
    "peft.LoraFAOptimizer": "it keeps its state by the names of the modules",
    "peft.RiemannianPreconditionedOptimizer": "it refers to the old factors outside its groups",
}


def _name(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _names(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names under which the tables may list an optimiser, its own class first, then its bases."""
    names = []
    for cls in type(optimizer).__mro__:
        package, short = cls.__module__.partition(".")[0], cls.__name__
        if package == "bitsandbytes":  # PagedAdamW8bit and the like differ from AdamW in how the state is stored only
            short = re.sub(r"^Paged|(8|32)bit$", "", short)
        names += [f"{package}.{short}", short]
    return names


def _known(optimizer: torch.optim.Optimizer) -> _Keys | None:
    return next((_KNOWN[name] for name in _names(optimizer) if name in _KNOWN), None)


def _choices() -> str:
    return f"{', '.join(_KNOWN)} (those of bitsandbytes also 8-bit and paged)"


def _keys_of(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> _Keys:
    """The listed keys of this optimiser, refusing one that is not listed or has others in the state."""
    known, what = _known(optimizer), f"the optimiser {_name(optimizer)}"
    others = [key for key in state if known is not None and key not in known]
    if known is None or others:
        raise LoraSqueezeError(
            f"optimizer_state='transport' does not know {f'the state {others[0]!r} of ' if others else ''}{what}: "
            f"use optimizer_state='reset', or an optimiser it knows: {_choices()}"
        )
    return known


def _check_held(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> set[int]:
    """Refuse parameters that are not in the groups; gives the ids of those that are."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    wanted = list(parameters)
    missing = [tuple(p.shape) for p in wanted if id(p) not in held]
    if missing:
        raise LoraSqueezeError(
            f"the optimiser {_name(optimizer)} does not hold {len(missing)} of {len(wanted)} parameters to exchange, "
            f"the first of shape {missing[0]}; pass the one that trains the adapter, with the parameters themselves "
            "and not copies of them (as DeepSpeed, FSDP1 and layer-wise optimisers have)"
        )
    return held


def _check_keeping(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Refuse an optimiser that keeps anything about the parameters elsewhere than in its groups and their states."""
    found = [_REFUSED[name] for name in _names(optimizer) if name in _REFUSED]
    if not found:
        held, states = _check_held(optimizer, parameters), [optimizer.state.get(p, {}) for p in parameters]
        others = [key for key in optimizer.state if id(key) not in held]
        found += [f"it keeps state under keys that are not its parameters ({type(key).__name__})" for key in others]
        found += [f"its state of a parameter is no dict but {_name(s)}" for s in states if not isinstance(s, dict)]
    if found:
        raise LoraSqueezeError(
            f"the optimiser {_name(optimizer)} cannot be used while ranks change: {found[0]}; use one of: {_choices()}"
        )
