"""SHiRA adapters in and out of a model by writing their entries alone, and how far two of them overlap.

PEFT merges and unmerges SHiRA with the whole matrix and subtracts, which rounding makes inexact. Here the entries are
written to their places, and what stood there before is written back: bit by bit, in time that goes with the entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError


class ShiraSwitch:
    """Puts SHiRA adapters of a PEFT model into its base weights and takes them out.

    Args:
        model: with one or more SHiRA adapters, trained or loaded.

    Notes:
        While any is on, the layers compute with the base weight alone; the numbers of an adapter are read when it is
        put on. Several can be on at once: the paper's fusion, W + sum of scale S.

    Example:
        >>> switch = ShiraSwitch(model)  # doctest: +SKIP
        >>> switch.on("code"); model.generate(...); switch.off(); switch.on("chat")  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers = _layers(model)
        self._on: list[tuple[str, list[tuple[Any, tuple[Tensor, ...], Tensor]]]] = []

    @property
    def active(self) -> list[str]:
        """Adapters that are on, in their order."""
        return [name for name, _ in self._on]

    @torch.no_grad()
    def on(self, adapter: str, scale: float = 1.0) -> None:
        """Add an adapter's entries to the base weights.

        Args:
            adapter: its name.
            scale: of its update; 1 as it was trained, 0 is the base model.

        Raises:
            LoraSqueezeError: no layer has it, it is on already, PEFT has merged something, or a base weight is
                quantised.
        """
        if adapter in self.active:
            raise LoraSqueezeError(f"adapter {adapter!r} is on already; turn it off first to change its scale")
        owners = [layer for layer in self.layers.values() if adapter in layer.shira_weight]
        if not owners:
            raise LoraSqueezeError(f"no layer has a SHiRA adapter {adapter!r}; there are {', '.join(self._names())}")
        if any(layer.merged_adapters != self._own(layer) for layer in owners):
            raise LoraSqueezeError("PEFT has merged an adapter into these weights; call model.unmerge_adapter() first")
        if any(layer.quantization_backend is not None for layer in owners):
            raise LoraSqueezeError("entries of a quantised weight cannot be written; load the base in 16 or 32 bits")
        written = []
        for layer in owners:
            weight = layer.get_base_layer().weight
            places = tuple(layer.shira_indices[adapter].to(weight.device).long())
            values = scale * layer.shira_weight[adapter].to(weight.device)
            before = weight[places]
            weight[places] = (before.to(values.dtype) + values).to(weight.dtype)
            layer.merged_adapters.append(adapter)
            written.append((layer, places, before))
        self._on.append((adapter, written))

    @torch.no_grad()
    def off(self) -> None:
        """Write back what stood in the weights before, for all adapters that are on."""
        while self._on:
            adapter, written = self._on.pop()
            for layer, places, before in written:
                layer.get_base_layer().weight[places] = before
                if adapter in layer.merged_adapters:  # PEFT unmerges by itself where adapters are disabled
                    layer.merged_adapters.remove(adapter)

    def _own(self, layer: Any) -> list[str]:
        return [name for name, written in self._on if any(owner is layer for owner, _, _ in written)]

    def _names(self) -> list[str]:
        return sorted({name for layer in self.layers.values() for name in layer.shira_weight})


@dataclass(frozen=True)
class Overlap:
    """How two sparse updates A and B of one layer stand to each other, as the paper counts it.

    Args:
        magnitude: AWOM, norm of A^T B over all entries (the paper says l2 norm); 0 where they are orthogonal.
        zeros: AWOR, share of zeros in A^T B; the higher, the less they disturb each other.
    """

    magnitude: float
    zeros: float


def overlaps(model: nn.Module, first: str, second: str) -> dict[str, Overlap]:
    """AWOM and AWOR of two SHiRA adapters, layer by layer.

    Raises:
        LoraSqueezeError: no layer has both.

    Notes:
        A^T B (in, in) is formed for one layer at a time, at the cost of entries times in.
    """
    both = {n: m for n, m in _layers(model).items() if first in m.shira_weight and second in m.shira_weight}
    if not both:
        raise LoraSqueezeError(f"no layer has both SHiRA adapters {first!r} and {second!r}")
    found = {}
    for name, layer in both.items():
        product = _sparse(layer, first).T @ _sparse(layer, second).to_dense()
        zeros = float((product == 0).double().mean())
        found[name] = Overlap(float(product.norm()), zeros)
    return found


def changed_share(model: nn.Module, *adapters: str) -> float:
    """The paper's %C as a share: entries of the adapted weights that differ from the base with these adapters on."""
    changed = total = 0
    for layer in _layers(model).values():
        weight = layer.get_base_layer().weight
        touched = torch.zeros(weight.shape, dtype=torch.bool)
        for adapter in adapters:
            if adapter in layer.shira_weight:
                places = layer.shira_indices[adapter].long().cpu()
                touched[tuple(places)] |= layer.shira_weight[adapter].detach().cpu() != 0
        changed += int(touched.sum())
        total += touched.numel()
    return changed / total


def _layers(model: nn.Module) -> dict[str, Any]:
    from peft.tuners.shira import ShiraLayer

    found = {name: module for name, module in model.named_modules() if isinstance(module, ShiraLayer)}
    if not found:
        raise LoraSqueezeError("the model has no SHiRA layer; make one with get_peft_model or load an adapter")
    return found


def _sparse(layer: Any, adapter: str) -> Tensor:
    shape = layer.get_base_layer().weight.shape
    values = layer.shira_weight[adapter].detach().double()
    return torch.sparse_coo_tensor(layer.shira_indices[adapter].long(), values, shape, check_invariants=True).coalesce()
