"""Chosen entries of W, trained as one vector in the place where they stand: what LIFT and SaRA have in common.

    W' = W, but W'[I] = W[I] + change,  I the chosen entries

The gradient and both moments of Adam have one number per entry. The matrix with the changes in it lives during one
pass of a layer and is not kept for the backward pass, which builds it again.

Both methods choose again while they train. What was trained and is no longer chosen keeps its change, in `kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import AdapterConfig, Delta, Site
from lora_squeeze.methods.adapters.paca import only_multiplies


@dataclass
class SparseConfig(AdapterConfig):
    """What both methods are configured with beside their own.

    Args:
        sizes: written when an adapter is saved: name of a layer -> how many entries it trains, and how many it keeps.
            A loader that compares shapes finds them right by that. Leave it out.
    """

    sizes: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.to_be_loaded = dict(self.sizes)  # of a file; none where a method begins


class SparseDelta(Delta):
    """One layer; trained: values (entries).

    Buffers: `index`, the entries as places in the flat W (out, in), ascending; `kept_index` and `kept`, entries that
    are trained no longer, and their changes. All are stored.
    """

    index: Tensor
    kept_index: Tensor
    kept: Tensor

    def __init__(self, site: Site, config: SparseConfig) -> None:
        super().__init__(site, config)
        self.replaces = not config.dropout  # the dropout acts on the inputs of the change alone
        size = site.in_features * site.out_features
        kind = torch.int32 if size < 2**31 else torch.int64
        # An adapter that is loaded has its entries in the file; to choose them can take long.
        sizes = config.to_be_loaded.pop(site.name, (0, 0) if config.inference_mode else None)
        index = self.choose(self.base()) if sizes is None else torch.zeros(sizes[0])
        kept = 0 if sizes is None else sizes[1]
        self.register_buffer("index", index.to(kind))
        self.register_buffer("kept_index", torch.zeros(kept, dtype=kind))
        self.register_buffer("kept", torch.zeros(kept, dtype=torch.float32))
        self.values = nn.Parameter(self.first_values())
        if not config.init_weights:
            self.values.data += torch.randn(len(index))

    def choose(self, weight: Tensor) -> Tensor:
        """The entries to train, ascending, of a weight in float32."""
        raise NotImplementedError

    def first_values(self) -> Tensor:
        """Of the trained vector, for no change."""
        return torch.zeros(len(self.index), dtype=torch.float32)

    def change(self) -> Tensor:
        """Of the chosen entries."""
        return self.values

    def base(self) -> Tensor:
        """W in float32 on the CPU."""
        return self.site.base_weight().detach().to("cpu", torch.float32)

    def changes(self) -> tuple[Tensor, Tensor]:
        """All entries that differ from W, and by how much."""
        if not len(self.kept):
            return self.index, self.change()
        return torch.cat([self.index, self.kept_index]), torch.cat([self.change(), self.frozen("kept")])

    def weight(self) -> Tensor:
        """dW (out, in), zero but for its entries."""
        index, change = self.changes()
        zeros = torch.zeros(self._shape[0] * self._shape[1], dtype=change.dtype, device=change.device)
        filled: Tensor = zeros.scatter(0, index.long(), change).view(self._shape)
        return filled

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """dW x."""
        return self._linear(x, None)

    def replaced(self, x: Tensor, base: nn.Module) -> Tensor:
        """(W + dW) x + b in one product; the sum of two where the base layer does more or is trained itself."""
        if not only_multiplies(base):
            base_output: Tensor = base(x)
            change: Tensor = self(x.to(self.dtype), base_output)
            return base_output + change.to(base_output.dtype)
        W, bias = self.site.base_weight(), self.site.base_bias()
        autocast = torch.is_autocast_enabled(x.device.type)
        y = self._linear(x.to(torch.get_autocast_dtype(x.device.type) if autocast else W.dtype), W)
        return y if bias is None else y + bias.to(y.dtype)

    def merge_into(self, weight: Tensor) -> Callable[[Tensor], None]:
        """Change the entries in place; they come back bit by bit."""
        index, change = self.changes()
        places = index.long() // self._shape[1], index.long() % self._shape[1]
        before = weight[places]
        weight[places] = (before.to(change.dtype) + change).to(weight.dtype)
        return partial(_put_back, places, before)

    @property
    def _shape(self) -> tuple[int, int]:
        return self.site.out_features, self.site.in_features

    def _linear(self, x: Tensor, base: Tensor | None) -> Tensor:
        index, change = self.changes()
        product: Any = _Product
        found: Tensor = product.apply(x, change, index, base, self._shape)
        return found

    def _save_to_state_dict(self, *args: Any) -> None:
        """The configuration is written after the numbers, and says how many there are."""
        self.config.sizes[self.site.name] = [len(self.index), len(self.kept)]
        parent: Any = super()
        parent._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """How many entries there are is told by the file alone."""
        make_room(self, state_dict, prefix, ("index", "kept_index", "kept", "values"))
        parent: Any = super()
        parent._load_from_state_dict(state_dict, prefix, *args)


def make_room(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, names: Iterable[str]) -> None:
    """Give tensors of a module the shapes that they have in a state that is to be loaded."""
    for name in names:
        found, own = state_dict.get(prefix + name), getattr(module, name)
        if found is not None and found.shape != own.shape:
            own.data = own.data.new_empty(found.shape)


def _put_back(places: tuple[Tensor, Tensor], before: Tensor, merged: Tensor) -> None:
    merged[places] = before


def _filled(base: Tensor | None, change: Tensor, index: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix with the changes in it, a new one."""
    places = index.long()
    if base is None:
        return torch.zeros(shape[0] * shape[1], dtype=dtype, device=change.device).index_put_(
            (places,), change.to(dtype)
        ).view(shape)  # fmt: skip
    flat = torch.empty(shape, dtype=dtype, device=base.device).copy_(base).view(-1)
    flat[places] = (flat[places].to(change.dtype) + change).to(dtype)
    return flat.view(shape)


class _Product(torch.autograd.Function):
    """(base + dW) x; x, the changes and what is there anyway are all that it saves."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, change: Tensor, index: Tensor, base: Tensor | None, shape: tuple[int, int]
    ) -> Tensor:
        ctx.save_for_backward(x, change, index, base)
        ctx.shape = shape
        return functional.linear(x, _filled(base, change, index, shape, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, change, index, base = ctx.saved_tensors
        upstream = upstream.to(x.dtype)  # half precision, where autocast has been at work
        for_x = for_change = None
        if ctx.needs_input_grad[0]:
            for_x = upstream @ _filled(base, change, index, ctx.shape, x.dtype)
        if ctx.needs_input_grad[1]:
            dense = upstream.reshape(-1, ctx.shape[0]).T @ x.reshape(-1, ctx.shape[1])
            for_change = dense.reshape(-1)[index.long()].to(change.dtype)
        return for_x, for_change, None, None, None


AnyDelta = TypeVar("AnyDelta", bound=SparseDelta)


def carry_state(optimizer: Any, parameter: nn.Parameter, moved: Callable[[Tensor], Tensor]) -> None:
    """Let an optimiser's numbers follow the entries of a vector.

    Args:
        optimizer: any of torch, or a wrapper of one; its `state` is changed in place.
        parameter: the vector, as the optimiser knows it.
        moved: makes of a tensor for the old entries the one for the new entries.

    Raises:
        LoraSqueezeError: the optimiser keeps tensors that are not one number per entry.
    """
    state = optimizer.state.get(parameter, {})
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and value.dim()}
    for key, value in tensors.items():
        if value.shape != parameter.shape or not value.is_floating_point():
            raise LoraSqueezeError(
                f"the optimiser's state {key!r} is {tuple(value.shape)} {value.dtype} for {len(parameter)} entries and "
                "cannot follow them; use one that keeps a number per entry, such as torch.optim.AdamW"
            )
    state.update({key: moved(value) for key, value in tensors.items()})
