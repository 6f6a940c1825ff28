"""Squeeze a live model in place: the truncation and the maps to the new factors; `commit` puts them into place.

With B' = B P and A' = R A (P and R are r x k), every quantity that belongs to the old factors goes over to the new ones
by small products; s is the scale before, s' the one after (the same here):

============================  ==================================================================================
gradient, first moments       dL/dB' = (s'/s) dL/dB R^T, dL/dA' = (s'/s) P^T dL/dA: exact
second moments                the same with squared coefficients: an approximation, covariances are not stored
differences of parameters     least squares in the space of the update: B A ~ B' A'
============================  ==================================================================================

Where parameters cannot be replaced (DDP and FSDP hold on to them), they keep their shape: the new factors stand in the
first k places and zeros in the others. A direction whose column of B and row of A are both zero has zero gradients, so
it stays zero without any mask. `commit.compact` makes the parameters small once nobody holds them any more.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.decompose import Decomposition
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank
from lora_squeeze.methods.control import end_control
from lora_squeeze.moments import Moments, truncation
from lora_squeeze.post_squeeze import decomposed
from lora_squeeze.ranks import Allocation
from lora_squeeze.training.commit import New, commit
from lora_squeeze.training.live import (
    LiveModule,
    holder_of,
    is_sharded,
    live_modules,
    only_adapter,
    tied_pairs,
    without_autocast,
)
from lora_squeeze.training.live_ranks import check_rank, target_ranks
from lora_squeeze.training.optimizer_state import STATE_POLICIES, check_optimizer, concerned, unwrapped
from lora_squeeze.training.other_method import STATISTICS, AnyModule, become_lora, is_other, learned, other_modules

PLACEMENTS = ("auto", "replace", "mask")


@dataclass(frozen=True)
class Squeezed:
    """What a squeeze in place has done.

    Args:
        ranks: module -> rank after, as PEFT counts it.
        energy: share of the squared singular values kept, over all modules together.
        parameters, parameters_after: numbers in the factors in use.
        seconds: time taken.
        maps: path of the layer -> (P, R) of the modules that changed: B' = B P, A' = R A.
    """

    ranks: dict[str, int]
    energy: float
    parameters: int
    parameters_after: int
    seconds: float
    maps: dict[str, tuple[Tensor, Tensor]] = field(repr=False)

    @property
    def rank(self) -> int:
        """The largest rank after."""
        return max(self.ranks.values())


def squeeze_(
    model: nn.Module,
    rank: int | None = None,
    *,
    energy: float | None = None,
    params: int | None = None,
    ranks: Mapping[str, int] | None = None,
    allocate: Allocation | None = None,
    optimizer: Any = None,
    adapter: str | None = None,
    optimizer_state: str = "transport",
    moments: Mapping[str, Moments] | None = None,
    in_place: str = "auto",
) -> Squeezed:
    """Squeeze the LoRA of a live PEFT model to a lower rank, now; the optimiser goes on in the new coordinates.

    Call it between two steps, after the gradients are set to zero. The scale s of every layer stays, so lora_alpha
    follows the rank: lora_alpha = s * rank. Everything is computed before anything is changed; a failure half-way is
    rolled back.

    An adapter of another method than LoRA becomes a LoRA of scale 1, exactly where its rank allows it: its layers, its
    configuration, and in the optimiser its parameters are replaced; see `other_method`.

    Args:
        model: a PEFT model, or a transformers model with an adapter; wrapped by DDP, FSDP2 or torch.compile or not.
        rank: the rank for all modules, as PEFT counts it; modules with less keep what they have.
        energy: instead of a rank, the share of the squared singular values to keep, in (0, 1].
        params: instead of a rank, a budget of numbers in all factors.
        ranks: instead of one rank, module name -> rank.
        allocate: "each", "uniform" or "global", as in `lora_squeeze.squeeze`; "global" with a rank spends the
            parameters of that uniform rank where they keep the most energy.
        optimizer: the optimiser that trains the factors; accelerate's wrapper will do. Without one, only the model
            changes: build the optimiser afterwards.
        adapter: name of the adapter; default the one that is active and trained.
        optimizer_state: "transport" carries moments over (see the module's table), "reset" begins anew.
        moments: statistics of inputs and gradients by layer path, from `calibrate` or `Statistics`: the truncation
            is then the best one in the metric of the data, and a global budget is spent where the predicted increase
            of the loss is lowest. Modules that are missing are squeezed plainly, and then energy allots the budget.
        in_place: "replace" makes new, smaller parameters; "mask" keeps their shapes and sets the unused directions to
            zero; "auto" masks under a process group of several processes and for sharded parameters.

    Returns:
        Squeezed: ranks, energy kept, parameters before and after.

    Raises:
        LoraSqueezeError: not one rule, a rank above the present ones, an adapter that cannot be squeezed, an optimiser
            whose state is not known, NaN in a factor. Nothing has changed then.

    Notes:
        Costs one decomposition per module, 2 (out + in) r^2 operations in float64. The global random generator is not
        touched.

    Example:
        >>> squeeze_(peft_model, rank=8, optimizer=optimizer)  # doctest: +SKIP
    """
    start = time.perf_counter()
    with without_autocast(model):
        name = only_adapter(model) if adapter is None else adapter
        if is_other(model, name):
            rule = {"rank": rank, "energy": energy, "params": params, "ranks": ranks, "allocate": allocate}
            return _from_other_method(model, name, optimizer, moments, rule)
        modules = live_modules(model, name)
        optimizer = None if optimizer is None else unwrapped(optimizer)
        check_request(modules, optimizer, optimizer_state, in_place)
        updates = [module.update() for module in modules]
        found = decomposed([module.name for module in modules], updates)
        own, spectra = [update.rank for update in updates], [item.S for item in found]
        target = target_ranks(modules, own, spectra, rank, energy, params, ranks, allocate, moments or {})
        target = _useful(_agreed_ranks(target, modules), modules, updates, found, moments or {})
        before = sum(m.cost * u.rank for m, u in zip(modules, updates, strict=True))
        new = [
            _truncated(module, update, item, target[module.name], (moments or {}).get(module.path))
            for module, update, item in zip(modules, updates, found, strict=True)
            if target[module.name] < update.rank
        ]
        _agree(new)
        new = _tied(new, modules)
        replace_parameters = replaces(modules, in_place)
        commit(model, name, modules, new, optimizer, optimizer_state, replace_parameters)
        total = sum(float(item.total.sum()) for item in found)
        after = {
            m.name: (target[m.name] if target[m.name] < u.rank else u.rank)
            for m, u in zip(modules, updates, strict=True)
        }
        return Squeezed(
            ranks={m.name: after[m.name] * m.step for m in modules},
            energy=1.0 - sum(item.lost for item in new) / total if total else 1.0,
            parameters=before,
            parameters_after=sum(m.cost * after[m.name] for m in modules),
            seconds=time.perf_counter() - start,
            maps={item.module.path: (item.P, item.R) for item in new},
        )


def _from_other_method(
    model: nn.Module, adapter: str, optimizer: Any, moments: Any, rule: Mapping[str, Any]
) -> Squeezed:
    """Squeeze an adapter of another method, which becomes a LoRA by that."""
    start = time.perf_counter()
    if moments:
        raise LoraSqueezeError(STATISTICS)
    if processes() > 1:
        raise LoraSqueezeError("under several processes an adapter of another method cannot become a LoRA in place")
    modules = other_modules(model, adapter)
    if optimizer is not None:
        check_optimizer(unwrapped(optimizer), learned(model, modules), "reset")
    if rule["rank"] is not None:
        check_rank(rule["rank"], max(module.width for module in modules))
    end_control(holder_of(model), adapter)
    # One layer at a time: the updates of some methods are as large as the weights.
    known = rule["rank"] if rule["allocate"] in (None, "uniform") else None
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    spectra = []
    for module in modules:
        (item,) = decomposed([module.name], [module.update()])
        spectra.append(item.S)
        if known is not None:
            factors[module.name] = item.factors(min(known, len(item.S)), 1.0, torch.float32)
    target = target_ranks(modules, [len(S) for S in spectra], spectra, **rule, moments={})
    for module in modules if known is None else ():
        (item,) = decomposed([module.name], [module.update()])
        factors[module.name] = item.factors(target[module.name], 1.0, torch.float32)
    before = sum(p.numel() for p in learned(model, modules))
    become_lora(model, modules, factors, optimizer)
    kept = sum(float(S[: target[m.name]].square().sum()) for m, S in zip(modules, spectra, strict=True))
    total = sum(float(S.square().sum()) for S in spectra)
    return Squeezed(
        ranks=target,
        energy=kept / total if total else 1.0,
        parameters=before,
        parameters_after=sum(m.cost * target[m.name] for m in modules),
        seconds=time.perf_counter() - start,
        maps={},
    )


def check_request(modules: Sequence[AnyModule], optimizer: Any, optimizer_state: str, in_place: str) -> None:
    """Refuse what cannot be done, before the first step or before anything changes."""
    if optimizer_state not in STATE_POLICIES:
        raise LoraSqueezeError(f"optimizer_state must be one of {', '.join(STATE_POLICIES)}, got {optimizer_state!r}")
    if in_place not in PLACEMENTS:
        raise LoraSqueezeError(f"in_place must be one of {', '.join(PLACEMENTS)}, got {in_place!r}")
    lora = [module for module in modules if isinstance(module, LiveModule)]  # others are replaced whole
    if in_place == "replace" and is_sharded(lora):
        raise LoraSqueezeError("sharded parameters cannot be replaced; use in_place='mask' or 'auto'")
    if optimizer is not None and lora:
        inner = unwrapped(optimizer)
        check_optimizer(inner, concerned(inner, (p for m in lora for p in (m.A, m.B))), optimizer_state)
        codes = type(inner).__name__.endswith("8bit")
        if codes and not replaces(lora, in_place) and lora[0].A.device.type == "cpu":
            # bitsandbytes 0.50 has no code for zero there, so unused directions would drift away from it.
            raise LoraSqueezeError(
                f"{type(inner).__name__} on the CPU cannot keep unused directions at zero; use "
                "in_place='replace', or an optimiser with full states"
            )


def replaces(modules: Sequence[LiveModule], in_place: str) -> bool:
    """Whether parameters are replaced by smaller ones, or keep their shape."""
    if in_place == "auto":
        return not is_sharded(modules) and processes() == 1
    return in_place == "replace"


def processes() -> int:
    """How many train together."""
    return torch.distributed.get_world_size() if _distributed() else 1


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _truncated(module: LiveModule, update: LowRank, found: Decomposition, rank: int, moments: Moments | None) -> New:
    """The new factors and the maps to them, plain or in the metric of the data."""
    exact = torch.promote_types(update.dtype, torch.float32)
    if moments is None:
        B, A = found.factors(rank, abs(update.scale), exact)
        P, R = found.coordinates(update.B, update.A, rank, abs(update.scale))
        lost = float((found.total - found.S[..., :rank].square().sum(-1)).clamp_min(0).sum())
        return New(module, update, *_signed(update, B, A, P), R, lost)
    cut = truncation(update, moments, rank)
    B, A = (update.B.to(cut.P) @ cut.P).to(update.B), (cut.R @ update.A.to(cut.R)).to(update.A)
    return New(module, update, B, A, cut.P, cut.R, cut.lost)


def _signed(update: LowRank, B: Tensor, A: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """In the dtype of the update, and for its scale, which may be negative."""
    sign = -1.0 if update.scale < 0 else 1.0
    return (B * sign).to(update.B), A.to(update.A), P * sign


def _tied(new: list[New], modules: Sequence[LiveModule]) -> list[New]:
    """An output head that shares its factors with the embedding gets the transposed ones."""
    pairs = tied_pairs(modules)
    by_name = {item.module.name: item for item in new}
    result = []
    for item in new:
        source = by_name.get(pairs.get(item.module.name, ""))
        if source is None:
            result.append(item)
        else:
            B, A, P, R = source.A.mT, source.B.mT, source.R.mT, source.P.mT
            result.append(New(item.module, item.old, B, A, P, R, item.lost))
    return result


def _useful(
    target: Mapping[str, int],
    modules: Sequence[LiveModule],
    updates: Sequence[LowRank],
    found: Sequence[Decomposition],
    moments: Mapping[str, Moments],
) -> dict[str, int]:
    """No more than the plain truncation finds directions; what keeps its rank is left alone."""
    ranks = dict(target)
    for module, update, item in zip(modules, updates, found, strict=True):
        if target[module.name] < update.rank and module.path not in moments:
            ranks[module.name] = min(target[module.name], item.S.shape[-1])
    return ranks


def _agreed_ranks(target: dict[str, int], modules: Sequence[LiveModule]) -> dict[str, int]:
    ranks = agreed([target[m.name] for m in modules], modules[0].A.device)
    return {m.name: k for m, k in zip(modules, ranks, strict=True)}


def agreed(numbers: list[int], device: torch.device) -> list[int]:
    """Those of the first process: another one may round an energy differently."""
    if processes() == 1:
        return numbers
    told = torch.tensor(numbers, device=device)
    torch.distributed.broadcast(told, src=0)
    return list(map(int, told.tolist()))


def _agree(new: Iterable[New]) -> None:
    """All processes take the first one's factors: a singular vector may have another sign elsewhere."""
    if processes() == 1:
        return
    for item in new:
        for tensor in (item.B, item.A, item.P, item.R):
            whole = tensor.contiguous()
            torch.distributed.broadcast(whole, src=0)
            tensor.copy_(whole)
