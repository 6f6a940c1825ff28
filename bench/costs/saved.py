"""What autograd keeps for the backward pass.

Counted are storages, each once, however many views of it are kept: a slice keeps the whole alive. Parameters and
buffers are there anyway and are left out. A copy of one in another number format, which autocast makes of a frozen
weight for each product, is told by its numbers and counted apart: it says more of autocast than of a method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Key = tuple[int, torch.dtype, tuple[float, ...]]
_FIRST = 8  # numbers that a copy is looked up by, before all are compared


@dataclass(frozen=True)
class Saved:
    """Bytes.

    Args:
        activations: all that is kept but copies of weights.
        layers: the part of it that was kept inside of the adapted layers.
        copies: of parameters and buffers, in another number format.
    """

    activations: int
    layers: int
    copies: int


def saved_bytes(model: nn.Module, forward: Callable[[], Tensor]) -> Saved:
    """Kept after a forward pass, whose loss is thrown away."""
    known = {_pointer(t): t.detach() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, Tensor] = {}  # holds the storages, so that no address is given twice
    inside: set[int] = set()
    depth = [0]

    def pack(tensor: Tensor) -> None:
        for part in _parts(tensor.detach()):
            pointer = _pointer(part)
            if part.numel() and pointer not in known:
                kept.setdefault(pointer, part)
                if depth[0]:
                    inside.add(pointer)
        # Nothing is given to the graph: an output that it held would hold the graph, and neither would ever be freed.

    def enter(*_: Any) -> None:
        depth[0] += 1

    def leave(*_: Any) -> None:
        depth[0] -= 1

    layers = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(leave) for layer in layers]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    copies = _copies(kept, list(known.values()))
    size = {pointer: tensor.untyped_storage().nbytes() for pointer, tensor in kept.items()}
    activations = size.keys() - copies
    return Saved(
        sum(size[p] for p in activations), sum(size[p] for p in activations & inside), sum(size[p] for p in copies)
    )  # fmt: skip


def _copies(kept: dict[int, Tensor], weights: list[Tensor]) -> set[int]:
    """Those of the kept storages that have the numbers of a weight in another format."""
    flat = {
        p: torch.empty(0, dtype=t.dtype).set_(t.untyped_storage()) for p, t in kept.items() if t.device.type == "cpu"
    }
    flat = {p: t for p, t in flat.items() if t.is_floating_point()}
    sizes = {(t.numel(), t.dtype) for t in flat.values()}
    known: dict[Key, list[Tensor]] = {}
    for weight in weights:
        for dtype in {dtype for size, dtype in sizes if size == weight.numel() and dtype != weight.dtype}:
            known.setdefault(_key(weight.flatten()[:_FIRST].to(dtype), weight.numel()), []).append(weight)
    return {
        pointer
        for pointer, tensor in flat.items()
        if any(torch.equal(w.flatten().to(tensor.dtype), tensor) for w in known.get(_key(tensor, tensor.numel()), []))
    }


def _key(first: Tensor, size: int) -> Key:
    return size, first.dtype, tuple(first[:_FIRST].tolist())


def _parts(tensor: Tensor) -> tuple[Tensor, ...]:
    """The dense tensors that a tensor consists of."""
    return (tensor._indices(), tensor._values()) if tensor.layout == torch.sparse_coo else (tensor,)


def _pointer(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
