"""The members of a fleet: what the headers of their files say, and whether they can share one server."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from lora_squeeze.adapter import Adapter
from lora_squeeze.dials import groups_of
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.find import listed
from lora_squeeze.formats.peft import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lora_squeeze.hub import load

Tell = Callable[[int, int], None]  # members done, members in all


@dataclass(frozen=True)
class Shape:
    """Size of one module of the base model, as an adapter sees it."""

    out_features: int
    in_features: int
    copies: int = 1

    @property
    def parameters_per_rank(self) -> int:
        """Numbers per unit of rank: copies * (out + in)."""
        return self.copies * (self.out_features + self.in_features)


@dataclass(frozen=True)
class Member:
    """One adapter of a fleet; small, since there may be thousands.

    Args:
        name: unique in the fleet.
        path: its folder.
        base: `base_model_name_or_path` of its configuration; "" if it names none.
        rank: largest rank of any module, as files count it.
        floor: smallest rank that it can be squeezed to.
        widths: (source rank, step) -> numbers per unit of rank, of the modules with these.
        stamp: size and mtime_ns of its weights and its configuration.
        carried: kinds of the tensors beside the factors.
        partial: it is restricted to some layers of the model.
    """

    name: str
    path: Path
    base: str
    rank: int
    floor: int
    widths: Mapping[tuple[int, int], int]
    stamp: tuple[int, ...]
    carried: tuple[str, ...] = ()
    partial: bool = False

    @property
    def parameters_per_rank(self) -> int:
        """An upper bound of the numbers in all factors per unit of rank, as files count it."""
        return sum(-(-numbers // step) for (_, step), numbers in self.widths.items())

    @property
    def file_bytes(self) -> int:
        """Size of the weights file."""
        return self.stamp[0]

    def parameters(self, rank: int) -> int:
        """An upper bound of the numbers in all factors at this rank: a squeeze stops at the sides of a small matrix."""
        return sum(
            min(max(rank // step, 1), source) * numbers for (source, step), numbers in self.widths.items()
        )  # a group of a convolution keeps at least one


@dataclass(frozen=True)
class Fleet:
    """Adapters of one base model.

    Args:
        members: name -> Member, sorted.
        shapes: module -> Shape, of every module that any member changes.
        skipped: name or path -> why it is left out.
    """

    members: Mapping[str, Member]
    shapes: Mapping[str, Shape]
    skipped: Mapping[str, str]


def read_fleet(
    folders: Mapping[str, Path],
    unreadable: Mapping[str, str] | None = None,
    *,
    base: Collection[str] = (),
    skip_unreadable: bool = False,
    tell: Tell | None = None,
) -> Fleet:
    """Read the header of every adapter, and check that one base model serves them all.

    Args:
        folders: name -> folder.
        unreadable: path -> why, of what is known to be no adapter.
        base: names of the base model that count as one, such as its hub id and its local path; members of others are
            left out. Empty: all must name the same one.
        skip_unreadable: leave out what cannot be read instead of refusing all.
        tell: called with (members read, members in all).

    Raises:
        LoraSqueezeError: members that cannot be read, several base models, or modules of one name and several sizes.

    Notes:
        One header is in memory at a time.
    """
    bad = dict(unreadable or {})
    members: dict[str, Member] = {}
    shapes: dict[str, dict[str, dict[Shape, str]]] = defaultdict(lambda: defaultdict(dict))  # base, module
    for done, (name, path) in enumerate(folders.items(), 1):
        try:
            adapter = load(path)
            member = members[name] = _member(name, path, adapter)
        except (LoraSqueezeError, OSError) as error:
            bad[name] = " ".join(str(error).split())
        else:
            for module in adapter.modules.values():
                shape = Shape(module.out_features, module.in_features, module.copies)
                shapes[member.base][module.name].setdefault(shape, name)
        if tell:
            tell(done, len(folders))
    if bad and not (skip_unreadable and members):
        raise LoraSqueezeError(
            f"{len(bad)} of {len(bad) + len(members)} members cannot be read: "
            f"{listed(f'{name} ({reason})' for name, reason in bad.items())}; repair them, or leave them out with "
            "--skip-unreadable (skip_unreadable=True)"
        )
    kept = _of_one_base(members, base)
    others = {name: f"base model {m.base!r}" for name, m in members.items() if name not in kept}
    used = {member.base for member in kept.values()}
    return Fleet(kept, _one_shape([shapes[name] for name in sorted(used)]), bad | others)


def stamp_of(folder: Path) -> tuple[int, ...]:
    """Size and mtime_ns of the weights and of the configuration: others when one of the two has been changed."""
    weights = folder / WEIGHTS_NAME
    files = (weights if weights.exists() else folder / PICKLE_NAME, folder / CONFIG_NAME)
    return tuple(number for info in map(os.stat, files) for number in (info.st_size, info.st_mtime_ns))


def _member(name: str, path: Path, adapter: Adapter) -> Member:
    widths: Counter[tuple[int, int]] = Counter()
    for group in groups_of(adapter):
        top = max(module.rank for module in group)  # modules of a group share one rank
        for module in group:
            widths[top, module.step] += module.parameters_per_rank
    return Member(
        name=name,
        path=path,
        base=str(adapter.config.get("base_model_name_or_path") or ""),
        rank=adapter.rank,
        floor=max(module.step for module in adapter.modules.values()),
        widths=dict(widths),
        stamp=stamp_of(path),
        carried=tuple(sorted({extra.kind for extra in adapter.extras.values()})),
        partial=adapter.config.get("layers_to_transform") is not None,
    )


def _of_one_base(members: Mapping[str, Member], base: Collection[str]) -> dict[str, Member]:
    """The members that one base model serves."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, member in members.items():
        names[member.base].append(name)
    found = "; ".join(f"{one!r} x {len(names[one])} ({listed(names[one])})" for one in names)
    if base:
        kept = {name: member for name, member in members.items() if member.base in base}
        if not kept:
            asked = ", ".join(map(repr, base))
            raise LoraSqueezeError(f"no member has the base model {asked}; found are {found}")
        return kept
    if len(names) > 1:
        raise LoraSqueezeError(
            f"the members have {len(names)} base models, which no server can hold together: {found}; choose one with "
            "--base, several times if they are names of the same"
        )
    return dict(members)


def _one_shape(tables: list[dict[str, dict[Shape, str]]]) -> dict[str, Shape]:
    """The one size of every module."""
    together: dict[str, dict[Shape, str]] = defaultdict(dict)
    for table in tables:
        for module, shapes in table.items():
            together[module] = shapes | together[module]
    different = [module for module, shapes in together.items() if len(shapes) > 1]
    if different:
        first = "; ".join(
            f"{shape.out_features} x {shape.in_features} in {name}" for shape, name in together[different[0]].items()
        )
        raise LoraSqueezeError(
            f"{len(different)} modules have several sizes, so these are not adapters of one base model: {different[0]} "
            f"is {first}; give only adapters of one of them"
        )
    return {module: next(iter(shapes)) for module, shapes in sorted(together.items())}
