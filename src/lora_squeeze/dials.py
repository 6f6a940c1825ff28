"""Dials: one rule and the limits beside it, and the rank of every module of an adapter that they mean."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any

import torch

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.ranks import RULES, Allocation, Limits, Unit, allocation_for, choose, needs_spectra

SHARED = ("module", "type")
LARGEST = 2**63 - 1  # what readers of TOML and JSON agree on
Spectra = Mapping[str, list[list[float]]]  # module -> singular values of each copy


@dataclass(frozen=True)
class Dials:
    """How small: the arguments of `lora_squeeze.squeeze` that say it, which describes each of them."""

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    size: int | str | None = None
    params: int | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None
    allocate: Allocation | None = None
    min_rank: int = 0
    max_rank: int | None = None
    multiple_of: int = 1
    ranks: Sequence[int] | None = None
    same_rank_per: str = "module"
    dtype: torch.dtype | None = None

    @property
    def given(self) -> dict[str, Any]:
        """The dials that are not at their defaults."""
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {name: value for name, (value, default) in values.items() if value != default}

    def request(self, adapter: Adapter, *, data_aware: bool = False) -> Request:
        """The rule meant, checked.

        Args:
            adapter: the source.
            data_aware: the spectra that it will be given are those of the predicted loss.

        Raises:
            LoraSqueezeError: no rule or more than one, unknown words, impossible limits.
        """
        for name, value in self.given.items():
            numbers = value if isinstance(value, Sequence) else [value]
            if any(isinstance(number, int) and number > LARGEST for number in numbers):
                raise LoraSqueezeError(f"{name} is too large: a number must be below 2^63")
        asked = {name: value for name, value in self.given.items() if name in RULES}
        if len(asked) > 1:
            raise LoraSqueezeError(f"give one rule, not {len(asked)}: {', '.join(asked)}")
        if not asked and self.max_rank is None and self.dtype is None:
            raise LoraSqueezeError(f"how small? give one of {', '.join(RULES)}, or a plan")
        default = {"rank": adapter.rank if self.max_rank is None else self.max_rank}
        rule, value = next(iter((asked or default).items()))
        if self.same_rank_per not in SHARED:
            raise LoraSqueezeError(f"same_rank_per must be one of {', '.join(SHARED)}, got {self.same_rank_per!r}")
        if self.rank is not None and self.rank < min(self.min_rank, adapter.rank):
            raise LoraSqueezeError(f"rank {self.rank} is below min_rank {self.min_rank}; change one of them")
        choices = None if self.ranks is None else tuple(sorted(set(self.ranks)))
        return Request(
            rule=rule,
            value=value,
            number=parse_size(value) if rule == "size" else value,
            allocate=allocation_for(rule, self.allocate),
            limits=Limits(self.min_rank, self.max_rank, self.multiple_of, choices),
            per_type=self.same_rank_per == "type",
            dtype=self.dtype,
            data_aware=data_aware,
        )


@dataclass(frozen=True)
class Request:
    """Checked dials.

    Args:
        rule, value: as given.
        number: the value as `ranks.choose` takes it.
        allocate, limits: for `ranks.choose`.
        per_type: one rank for all modules of a type.
        dtype: of the factors to be written; None: as stored.
        data_aware: what decides is the predicted loss, not the energy.
    """

    rule: str
    value: Any
    number: float
    allocate: Allocation
    limits: Limits
    per_type: bool = False
    dtype: torch.dtype | None = None
    data_aware: bool = False

    @property
    def needs_spectra(self) -> bool:
        """Whether the singular values decide."""
        return needs_spectra(self.rule, self.allocate)

    def step(self, method: str = "gram", alpha: str = "keep") -> dict[str, Any]:
        """What the adapter's history says of it."""
        rule = f"{self.rule}={self.value}"
        step = {"step": "post-squeeze", "rule": rule, "allocate": self.allocate, "method": method, "alpha": alpha}
        return {**step, "metric": "data"} if self.data_aware else step

    def choose(self, adapter: Adapter, spectra: Spectra) -> dict[str, int]:
        """Module -> rank of its LowRank; 0: it leaves.

        Args:
            adapter: the source.
            spectra: of all modules, or empty where they do not matter.
        """
        units = self._units(adapter, spectra)
        chosen = choose([unit for unit, _ in units], *self._arguments(adapter, self.limits))
        if not any(chosen):
            raise LoraSqueezeError(
                f"{self.rule} {self.value} leaves no module in the adapter; ask for more, or set min_rank 1"
            )
        ranks: dict[str, int] = {}
        for (_, groups), k in zip(units, chosen, strict=True):
            for group in groups:  # one rank for a whole group
                common = min(k, _top(group, padded=self.limits.choices is not None))
                ranks.update({module.name: common for module in group})
        return {name: ranks[name] for name in adapter.modules}

    def reasons(self, adapter: Adapter, spectra: Spectra, ranks: Mapping[str, int]) -> dict[str, str]:
        """Module -> why it has its rank, in a few words; `ranks` as `choose` gives them for the same arguments.

        A limit is the reason where the rule alone, without limits, would have chosen another rank.
        """
        units = self._units(adapter, spectra)
        chosen = choose([unit for unit, _ in units], *self._arguments(adapter, self.limits))
        free = [replace(unit, floor=0) for unit, _ in units]
        wanted = choose(free, *self._arguments(adapter, Limits()))
        reasons: dict[str, str] = {}
        for (unit, groups), k, alone in zip(units, chosen, wanted, strict=True):
            text = self._reason(unit, k, alone)
            for module in (module for group in groups for module in group):
                rank = ranks[module.name]
                if rank == module.rank:
                    reason = "kept: source rank"
                elif rank > module.rank:
                    reason = "common rank of its group"
                elif rank < k or rank == unit.rank:
                    reason = "all its directions"
                else:
                    reason = f"{text}, shared by all {type_of(module.name)}" if len(groups) > 1 else text
                reasons[module.name] = reason
        return {name: reasons[name] for name in adapter.modules}

    def _reason(self, unit: Unit, k: int, wanted: int) -> str:
        limits = self.limits
        if k < wanted and limits.ceiling is not None and (k + 1) * unit.step > limits.ceiling:
            return f"max_rank {limits.ceiling}"
        if k > wanted and k == limits.ladder(unit)[0]:
            if limits.floor:
                return f"floor: min_rank {limits.floor}"
            if unit.floor:
                return "floor: the module cannot leave the adapter"
        text = self.text
        if k != wanted and limits.choices is not None:
            text += ", one of the allowed ranks"
        elif k != wanted and limits.multiple_of > 1:
            text += f", a multiple of {limits.multiple_of}"
        return text if k else f"{text}, not worth its place"

    @property
    def text(self) -> str:
        """The rule in words."""
        per = f"{'predicted loss' if self.data_aware else 'energy'} per parameter"
        if self.rule in ("params", "size"):
            return f"budget: {per}" if self.allocate == "global" else "budget: one rank for all"
        if self.rule == "rank":
            return f"budget of rank {self.value}: {per}" if self.allocate == "global" else f"rank {self.value}"
        metric = " of the predicted loss" if self.data_aware else ""
        where = {"each": "", "uniform": ", one rank for all", "global": f" over all, {per}"}[self.allocate]
        return f"{self.rule} {self.value}{metric}{where}"

    def _arguments(self, adapter: Adapter, limits: Limits) -> tuple[str, float, Allocation, Limits, int]:
        """The arguments of `ranks.choose` after the units."""
        fixed = 0
        if self.rule == "size":
            # The history has a place in the file. It is counted as if its words were of the longest: so the smallest
            # size that a refusal names is possible.
            step = self.step("dense")
            done = (*adapter.history, {**step, "rule": step["rule"].ljust(len("size=1234567890.12 GiB"))})
            fixed = adapter.extra_bytes + adapter.format.overhead_bytes(replace(adapter, history=done))
        return self.rule, self.number, self.allocate, limits, fixed

    def _units(self, adapter: Adapter, spectra: Spectra) -> list[tuple[Unit, list[list[Module]]]]:
        """What takes one rank, with the groups in it that must."""
        found = groups_of(adapter)
        together = _of_one_type(found) if self.per_type else [[group] for group in found]
        whole = [[module for group in groups for module in group] for groups in together]
        padded = self.limits.choices is not None
        units = [unit_of(members, spectra, self.rule, self.dtype, padded=padded) for members in whole]
        return list(zip(units, together, strict=True))


def unit_of(
    members: Sequence[Module], spectra: Spectra, rule: str, dtype: torch.dtype | None, *, padded: bool = False
) -> Unit:
    """Modules that share one rank as `ranks.choose` takes them; priced in bytes for "size", else in parameters.

    Args:
        members: one group, or all groups of a type.
        spectra: of the modules, or empty where they do not matter.
        rule: one of `ranks.RULES`.
        dtype: of the factors to be written; None: as stored.
        padded: ranks above the number of directions are written too, for a server that takes some ranks only.
    """
    itemsizes = [(dtype or module.dtype).itemsize if rule == "size" else 1 for module in members]
    return Unit(
        name=members[0].name,
        rank=_top(members, padded=padded),
        values=[row for module in members for row in spectra.get(module.name, ())],
        cost=sum(m.parameters_per_rank * itemsize for m, itemsize in zip(members, itemsizes, strict=True)),
        floor=max(module.floor for module in members),
        step=max(module.step for module in members),
    )


def _top(members: Sequence[Module], *, padded: bool) -> int:
    """The largest rank that these modules may get: no more than they have directions, unless `padded`."""
    return max(m.rank if padded else min(m.rank, m.out_features, m.in_features) for m in members)


def type_of(name: str) -> str:
    """The end of a module's name that is no bare number: "q_proj", "to_out.0"."""
    return re.split(r"\.(?!\d+(?:\.|$))", name)[-1]


def groups_of(adapter: Adapter) -> list[list[Module]]:
    """Modules that share one rank, in file order of their first member."""
    key = {name: (1, module.group) if module.group else (0, name) for name, module in adapter.modules.items()}
    order = {k: i for i, k in reversed(list(enumerate(key.values())))}
    members = sorted(adapter.modules.values(), key=lambda module: order[key[module.name]])
    return [list(group) for _, group in groupby(members, key=lambda module: key[module.name])]


def _of_one_type(groups: Sequence[list[Module]]) -> list[list[list[Module]]]:
    """Groups in which the same types occur, with the same number of groups of a convolution."""
    together: list[tuple[set[tuple[str, int]], list[list[Module]]]] = []
    for group in groups:
        types, members = {(type_of(module.name), module.step) for module in group}, [group]
        apart = []
        for other, others in together:
            if other & types:
                types, members = types | other, others + members
            else:
                apart.append((other, others))
        together = [*apart, (types, members)]
    return [members for _, members in together]


def parse_size(text: float | int | str) -> int:
    """Bytes in a size such as 5000000, "10MB", "1.5 GiB" or "800k": powers of ten, of two with an i.

    Example:
        >>> parse_size("10MB"), parse_size("1 KiB")
        (10000000, 1024)
    """
    size = _bytes(text) if isinstance(text, str) else text
    if not abs(size) <= LARGEST:
        raise LoraSqueezeError(f"size {text!r:.80} is not understood; write bytes or a unit, such as 10MB or 10MiB")
    return int(size)


def _bytes(text: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    if not match:
        return math.nan
    number, prefix, binary = match.groups()
    return float(number) * float(1024 if binary else 1000) ** " kmgt".index(prefix or " ")
