"""Post-Squeeze of a whole adapter: choose the ranks, truncate every update, carry the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lora_squeeze import data_aware
from lora_squeeze.adapter import Adapter, Module, Progress, is_finite
from lora_squeeze.decompose import METHODS, Decomposition, Method, decompose_all
from lora_squeeze.dials import Dials
from lora_squeeze.dials import parse_size as parse_size
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank
from lora_squeeze.moments import Moments, truncation
from lora_squeeze.plan import Plan
from lora_squeeze.ranks import RULES, Allocation

AlphaPolicy = Literal["keep", "fold"]
_WRITTEN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Measurement:
    """What is known of a module's source update after it was decomposed.

    Args:
        values: singular values of each copy, descending.
        total: sum of all squared singular values of all copies.
        rounding: norm of the error of storing the squeezed factors in their dtype, to first order; None: not known.
        cut: Frobenius norm of what was cut off, by a randomised truncation or one in the metric of the data; None: what
            the singular values say.
        loss_increase: of the training loss, predicted where the data were asked.
    """

    values: list[list[float]]
    total: float
    rounding: float | None = None
    cut: float | None = None
    loss_increase: float | None = None

    @classmethod
    def of(cls, found: Decomposition, total: float | None = None) -> Measurement:
        """The numbers of a decomposition; `total` where it is of the leading part of an update only.

        Raises:
            LoraSqueezeError: their squares are beyond the range of float64.
        """
        known = float(found.total.sum())
        if not math.isfinite(known):
            raise LoraSqueezeError(
                f"an update with singular values up to {float(found.S.max()):.3g} cannot be measured: check its alpha "
                "and factors"
            )
        return cls(found.S.reshape(-1, found.S.shape[-1]).tolist(), known if total is None else max(known, total))

    @property
    def spectrum(self) -> list[list[float]]:
        """The singular values; behind them one for all that was not looked at, so that bounds of energy count it."""
        unseen = self.total - math.fsum(s * s for row in self.values for s in row)
        if unseen <= 1e-9 * self.total:
            return self.values
        return [*self.values[:-1], [*self.values[-1], math.sqrt(unseen)]]

    @property
    def norm(self) -> float:
        """Frobenius norm of the source update."""
        return math.sqrt(self.total)

    def discarded(self, rank: int) -> float:
        """Frobenius norm of what the truncation to this rank cuts off."""
        if self.cut is not None:
            return self.cut
        tail = math.fsum(s * s for row in self.values for s in row[rank:])
        found = tail + math.fsum(s * s for row in self.values for s in row[:rank])
        unseen = self.total - found  # what a randomised decomposition did not look at
        return math.sqrt(tail + (unseen if unseen > 1e-12 * self.total else 0.0))

    def energy(self, rank: int) -> float:
        """Share of the squared singular values kept at this rank; 1 for a zero update."""
        return 1.0 - self.discarded(rank) ** 2 / self.total if self.total else 1.0


def measure(
    adapter: Adapter, names: Iterable[str] | None = None, progress: Progress | None = None
) -> dict[str, Measurement]:
    """Singular values of the updates of these modules (default: all), read batch by batch."""
    wanted = set(adapter.modules if names is None else names)
    measured: dict[str, Measurement] = {}
    done, total = 0, sum(adapter.modules[name].size_bytes for name in wanted)
    for batch in adapter.batches():
        batch = [module for module in batch if module.name in wanted]
        if not batch:
            continue
        for module, found in zip(
            batch, decomposed([module.name for module in batch], adapter.source.updates(batch)), strict=True
        ):
            measured[module.name] = Measurement.of(found, module.total)
        done += sum(module.size_bytes for module in batch)
        if progress:
            progress(done, total)
    return measured


def squeeze(
    adapter: Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: int | str | None = None,
    params: int | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    allocate: Allocation | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
    multiple_of: int = 1,
    ranks: Sequence[int] | None = None,
    same_rank_per: str = "module",
    plan: Plan | None = None,
    moments: Mapping[str, Moments] | None = None,
    method: Method = "gram",
    alpha: AlphaPolicy = "keep",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Adapter:
    """The best approximation of every update at a smaller rank: LoRA-Squeeze after training (Post-Squeeze).

    One of `rank`, `energy`, `error`, `size`, `params`, an `sv_` rule or a `plan` says how small; `lora_squeeze.ranks`
    defines the rules. A `dtype` or alpha="fold" alone keeps the ranks. The result is lazy: factors are computed when it
    is saved or an `update` is read. The rules that depend on the spectrum read the adapter once here and once when it
    is saved.

    Args:
        adapter: what to squeeze.
        rank: one rank for all modules; a module that has less keeps what it has.
        energy: share of the squared singular values to keep, in (0, 1].
        error: relative Frobenius error |dW - dW_k| / |dW| allowed, in [0, 1).
        size: bytes of the weights file, a number or text such as "10MB" (10^6) or "10MiB" (2^20), everything included.
        params: numbers in the factors.
        sv_ratio: keep the singular values above the largest divided by this.
        sv_cumulative: share of the sum of the singular values to keep, in (0, 1].
        sv_fro: share of the Frobenius norm to keep, in (0, 1]: energy of its square.
        allocate: "each" module meets the bound, "uniform" one rank for all, "global" one budget over all modules.
            Default: uniform for rank, global for size and params, else each. "global" with rank: the parameters of that
            uniform rank, spent where they keep the most energy.
        min_rank: lower bound of every rank. At 0 a module whose directions are not worth their place may leave.
        max_rank: upper bound of every rank; alone, it means rank=max_rank.
        multiple_of: every rank is a multiple of this, or the module's source rank.
        ranks: the ranks allowed, such as those that a server takes: 8,16,32,64.
        same_rank_per: "module" (default) or "type": one rank for all q_proj, one for all v_proj, and so on; a module
            that has less keeps what it has, but is priced like the others in a budget.
        plan: the rank of every module, from `make_plan` or `Plan.load`, in place of a rule and its limits.
        moments: what the data say about the modules, from `lora_squeeze.calibrate` with this adapter: every truncation
            is then the best one in the metric of the data, and where the spectrum decides, it is that of the predicted
            loss: `energy` and `error` are shares of it, and a budget goes where it saves the most. A module without
            moments is cut plainly, and its energy weighs as much as that of the others.
        method: "gram" (exact, default), "qr" (exact), "rsvd" (randomised), "dense" (reference).
        alpha: "keep" writes the adapter's own alpha / r for every module; "fold" multiplies it into B and writes 1.
        dtype: dtype of the factors written; default as stored.
        device: where to compute; default where the tensors are read, the CPU.
        seed: seed of "rsvd".
        progress: called with (bytes done, bytes in all) while spectra are measured.

    Returns:
        A new Adapter; `.report` has the figures, `.save(path)` writes it.

    Raises:
        LoraSqueezeError: no rule or more than one, a value out of range, an impossible budget, NaN in a factor.

    Notes:
        Exact in the Frobenius norm (Eckart-Young). Kept energy is not task quality: measure the task. Not for adapters
        whose base weights were changed at initialisation (PiSSA and others); reading refuses them.
    """
    if moments is not None and method != "gram":
        raise LoraSqueezeError(f"moments need the method 'gram', got {method!r}")
    known = {} if moments is None else data_aware.moments_of(adapter, moments)
    dials = Dials(
        rank=rank, energy=energy, error=error, size=size, params=params, sv_ratio=sv_ratio,
        sv_cumulative=sv_cumulative, sv_fro=sv_fro, allocate=allocate, min_rank=min_rank, max_rank=max_rank,
        multiple_of=multiple_of, ranks=ranks, same_rank_per=same_rank_per, dtype=dtype,
    )  # fmt: skip
    if alpha == "fold" and plan is None and not {*RULES, "max_rank"} & dials.given.keys():
        dials = replace(dials, rank=adapter.rank)
    if plan is not None:
        others = [name for name in dials.given if name != "dtype"]
        if others:
            raise LoraSqueezeError(f"give one rule: a plan says every rank, leave out {', '.join(others)}")
        dtype = plan.torch_dtype if dtype is None else dtype
    if alpha not in ("keep", "fold"):
        raise LoraSqueezeError(f"alpha must be 'keep' or 'fold', got {alpha!r}")
    if dtype not in (None, *_WRITTEN):
        raise LoraSqueezeError(f"dtype must be one of {', '.join(map(str, _WRITTEN))}, got {dtype}")
    if method not in METHODS:
        raise LoraSqueezeError(f"unknown method {method!r}: choose one of {', '.join(METHODS)}")
    measured: dict[str, Measurement] = {}
    if plan is not None:
        step: dict[str, Any] = {"step": "post-squeeze", "rule": "plan", "allocate": "each"}
        step |= {"method": method, "alpha": alpha} | ({"metric": "data"} if known else {})
        chosen = plan.ranks_for(adapter)
    else:
        request = dials.request(adapter, data_aware=bool(known))
        step = request.step(method, alpha)
        if request.needs_spectra:
            measured = measure(adapter, progress=progress)
        spectra = {name: found.spectrum for name, found in measured.items()}
        if known and spectra:
            spectra = data_aware.loss_spectra(adapter, known, spectra)
        chosen = request.choose(adapter, spectra)
    # In the metric of the data, what is lost is known only once it is cut.
    measured = {name: found for name, found in measured.items() if name not in known}
    source = Squeezed(adapter, method, seed, _usable(device), measured, known)
    scale = adapter.default_scale if alpha == "keep" and adapter.default_scale > 0 else 1.0
    return _squeezed(adapter, source, chosen, scale, dtype, step)


def _squeezed(
    adapter: Adapter,
    source: Squeezed,
    ranks: Mapping[str, int],
    scale: float,
    dtype: torch.dtype | None,
    step: Mapping[str, Any],
) -> Adapter:
    """The facts of the adapter after this step."""
    modules = {
        name: replace(
            module,
            rank=ranks[name],
            scale=scale,
            dtype=dtype or module.dtype,
            source_bytes=max(module.size_bytes, module.source_bytes),
        )
        for name, module in adapter.modules.items()
        if ranks[name]
    }
    extras = {
        name: extra if extra.module is None else replace(extra, factor=adapter.modules[extra.module].scale / scale)
        for name, extra in adapter.extras.items()
    }
    return replace(
        adapter,
        modules=modules,
        extras=extras,
        source=source,
        default_scale=scale,
        dropped=(*adapter.dropped, *(name for name, k in ranks.items() if not k)),
        history=(*adapter.history, step),
    )


@dataclass(eq=False)
class Squeezed:
    """Source of a squeezed adapter: reads its parent, truncates, and keeps the few numbers that it measured."""

    parent: Adapter
    method: Method
    seed: int
    device: torch.device | None
    measured: dict[str, Measurement] = field(default_factory=dict)
    moments: Mapping[str, Moments] = field(default_factory=dict)

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """Read, decompose and truncate these modules."""
        sources = [self.parent.modules[module.name] for module in modules]
        updates = self.parent.source.updates(sources)
        if self.device is not None:
            updates = [update.to(self.device) for update in updates]
        ranks = [module.rank for module in modules]
        found = decomposed([module.name for module in modules], updates, self.method, ranks, self.seed)
        return [self._truncated(*three) for three in zip(modules, updates, found, strict=True)]

    def _truncated(self, module: Module, update: LowRank, found: Decomposition) -> LowRank:
        exact = module.dtype if module.dtype.itemsize >= 4 else torch.float32
        measurement = Measurement.of(found, module.total)
        rank, moments = min(module.rank, found.S.shape[-1]), self.moments.get(module.name)
        cuts = module.rank < update.rank
        if not cuts:
            whole = update
        elif moments is not None and update.scale:
            cut = truncation(update, moments.to(update.device), rank)
            whole = data_aware.apply(update, cut, module.scale).to(exact)
            measurement = replace(measurement, cut=math.sqrt(cut.lost), loss_increase=cut.loss_increase)
        else:
            whole = LowRank(*found.factors(rank, module.scale, exact), module.scale)
        result = whole.to(module.dtype) if cuts else update.with_scale(module.scale, module.dtype)
        if not (is_finite(result.B) and is_finite(result.A)):
            raise LoraSqueezeError(
                f"{module.name}: the squeezed factors do not fit in {module.dtype} (largest singular value "
                f"{float(found.S.max()):.3g}); ask for dtype float32 or bfloat16"
            )
        changed = (module.dtype, module.scale) != (update.dtype, update.scale)
        if cuts:
            measurement = replace(measurement, rounding=_rounding(whole, result))
        elif changed and module.dtype.itemsize < max(4, update.dtype.itemsize):
            rounding = float(torch.linalg.vector_norm(update.distance(result)))
            measurement = replace(measurement, rounding=rounding)
        self.measured[module.name] = measurement
        if result.rank < module.rank:  # a member of a group with less: filled up to the common rank
            result = result.rank_up(module.rank, self.seed)
        return result.to("cpu")

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor of the parent."""
        return self.parent.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file that all of it comes from."""
        return self.parent.source.digest()


def _usable(device: torch.device | str | None) -> torch.device | None:
    if device is None:
        return None
    try:
        probe = torch.zeros(1, device=device)
        probe.item()  # "meta" holds no numbers
        return probe.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise LoraSqueezeError(f"device {str(device)!r} cannot be used here ({reason:.120})") from error


def decomposed(
    names: Sequence[str],
    updates: Sequence[LowRank],
    method: Method = "gram",
    ranks: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Decomposition]:
    """Decompositions of updates; an error for NaN or infinity names the module."""
    try:
        found = decompose_all([(update.B, update.A) for update in updates], method, ranks=ranks, seed=seed)
    except LoraSqueezeError:
        for name, update in zip(names, updates, strict=True):
            _find_fault(name, update)
        raise
    return [decomposition.scaled(update.scale) for decomposition, update in zip(found, updates, strict=True)]


def _find_fault(name: str, update: LowRank) -> None:
    """Name the module whose factors cannot be decomposed."""
    try:
        update.decompose("qr")
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{name}: {error}") from None


def _rounding(exact: LowRank, stored: LowRank) -> float | None:
    """|dW - dW_stored| to first order, of balanced factors: with S_i = s |b_i|^2 = s |a_i|^2,
    s * sum_i S_i (|delta b_i|^2 + |delta a_i|^2), rooted.
    """
    if exact.dtype == stored.dtype:
        return None
    B = exact.B.double()
    S = exact.scale * B.square().sum(-2)
    b = (B - stored.B.double()).square().sum(-2)
    a = (exact.A.double() - stored.A.double()).square().sum(-1)
    return math.sqrt(max(0.0, exact.scale * float((S * (b + a)).sum())))
