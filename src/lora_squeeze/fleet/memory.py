"""What a server's adapters take: bytes of one slot, and the options to start the server with.

A padded slot of rank R has room for every module of the fleet at rank R:

    slot_bytes(R) = R * itemsize * sum over modules of copies * (out + in)

Servers pack some modules into one layer (q, k and v; gate and up). Where one of them has slots all have, so those that
no adapter changes are counted too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from lora_squeeze.fleet.find import listed
from lora_squeeze.fleet.members import Shape
from lora_squeeze.servers import Server

_EXPERTS = "experts"
# Modules of equal size: o is q turned round.
_TWINS = {"q_proj": "o_proj", "k_proj": "v_proj", "v_proj": "k_proj", "gate_proj": "up_proj", "up_proj": "gate_proj"}


def slot_parameters(shapes: Mapping[str, Shape], server: Server) -> tuple[int, tuple[str, ...]]:
    """Numbers in one slot per unit of rank, and notes on what of it is not known exactly.

    Args:
        shapes: module -> Shape, of all modules that any adapter changes.
        server: how modules are packed.

    Notes:
        The size of a module that no adapter changes is taken from another layer, from its twin (v for k, up for gate, o
        for q), else from the largest module of its pack, which is an upper bound for all but q.
    """
    total = sum(shape.parameters_per_rank for shape in shapes.values())
    typical: dict[str, int] = {}
    for name, shape in shapes.items():
        kind = _kind(name)
        typical[kind] = max(typical.get(kind, 0), shape.parameters_per_rank)
    added, guessed = 0, set[str]()
    for parent, pack, present in _packs(shapes, server):
        for part in pack:
            if part in present:
                continue
            kinds = [_kind(f"{parent}.{name}") for name in (part, _TWINS.get(part, part))]
            known = next((typical[kind] for kind in kinds if kind in typical), None)
            if known is not None:
                added += known
            else:
                largest = max(shape.parameters_per_rank for shape in present.values())
                added += 2 * largest if part == "gate_up_proj" else largest  # two projections in one
                guessed.add(part)
    notes = []
    if guessed:
        notes.append(
            f"{server.name} gives slots to {', '.join(sorted(guessed))} too, which no adapter changes: counted as "
            f"large as the largest module beside them{', though q_proj may be larger' if 'q_proj' in guessed else ''}"
        )
    return total + added, tuple(notes)


def targets(shapes: Mapping[str, Shape]) -> list[str]:
    """Types of modules as servers name them: "q_proj"; "experts" for all that is in a layer of experts."""
    return sorted({_EXPERTS if _in_experts(name) else name.rpartition(".")[2] for name in shapes})


def start_options(server: Server, shapes: Mapping[str, Shape], rank: int, slots: int, cached: int) -> str:
    """The options that start the server with these slots."""
    return server.options.format(rank=rank, slots=slots, cached=cached, targets=" ".join(targets(shapes)))


def remarks(server: Server, partial: list[str]) -> list[str]:
    """What a person has to know of a server's padded slots.

    Args:
        server: with padded slots.
        partial: names of the members that are restricted to some layers.
    """
    notes = [server.slot_remark] if server.slot_remark else []
    if partial:
        notes.append(
            f"{listed(partial)} change only some layers (layers_to_transform): {server.name} gives slots to every "
            "layer with these types of modules, and layers that no adapter changes are not counted here"
        )
    return notes


def _in_experts(name: str) -> bool:
    return _EXPERTS in name.split(".")


def _kind(name: str) -> str:
    """Modules of the same kind have the same size in every layer."""
    part = name.rpartition(".")[2]
    return f"{_EXPERTS}.{part}" if _in_experts(name) else part


def _packs(shapes: Mapping[str, Shape], server: Server) -> Iterator[tuple[str, tuple[str, ...], dict[str, Shape]]]:
    """Parent, parts, and those of the parts that the fleet changes, of every pack that it touches."""
    siblings: dict[str, dict[str, Shape]] = defaultdict(dict)
    for name, shape in shapes.items():
        parent, _, part = name.rpartition(".")
        siblings[parent][part] = shape
    for parent, parts in siblings.items():
        packs = server.packed_experts if _in_experts(parent) else server.packed
        rest = dict(parts)
        for pack in sorted(packs, key=lambda pack: -sum(part in parts for part in pack)):
            present = {part: rest.pop(part) for part in pack if part in rest}
            if present:  # a part belongs to one pack: that of which the most is there
                yield parent, pack, present
