"""What a method computes for one layer: its parameters, and the update from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.seeds import seed_of, seeded, usual_defaults

Pair = tuple[Tensor, Tensor]


class Shared(dict[Any, Any]):
    """Objects that the layers of one adapter have in common, by key; see `Delta.share`.

    Copies of a model have the tensors in common too, and a pickled one goes without them: they are made again.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        memo[id(self)] = twin = Shared()
        for key, value in self.items():
            twin[key] = value if isinstance(value, Tensor) else copy.deepcopy(value, memo)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (), None, None, iter([item for item in self.items() if not isinstance(item[1], Tensor)])


@dataclass(frozen=True, eq=False)
class Site:
    """Where a delta belongs.

    Args:
        layer: the adapted layer, see `layer.DeltaLayer`. In a copy of the model it is the copy's.
        shared: what the layers of the adapter have in common. While they are made, "model" is a weak reference to the
            model that the adapter is put on.
    """

    layer: Any
    shared: Shared

    @property
    def name(self) -> str:
        """Dotted path in the base model."""
        return str(self.layer.name)

    @property
    def in_features(self) -> int:
        """Of the layer."""
        return int(self.layer.in_features)

    @property
    def out_features(self) -> int:
        """Of the layer."""
        return int(self.layer.out_features)

    def base_weight(self) -> Tensor:
        """W (out, in) of the layer, dequantised, in the dtype of the base, without merged updates.

        It is not a copy while none is merged.
        """
        weight: Tensor = self.layer.own_weight()
        return weight

    def base_bias(self) -> Tensor | None:
        """The bias, without merged changes; None where there is none."""
        bias: Tensor | None = self.layer.own_bias()
        return bias

    def generator(self, seed: int, *labels: object) -> torch.Generator:
        """A generator of its own, on the CPU, for this layer's name, a seed and labels."""
        return seeded(seed, self.name, *labels)

    def seeds(self, seed: int, *labels: object) -> Tensor:
        """What the generators of this layer's name, a seed and each of the labels are seeded with (labels), int64."""
        return torch.tensor([seed_of(seed, self.name, label) for label in labels])


class Delta(nn.Module):
    """The update of one layer by one adapter.

    Trained numbers are parameters. Frozen ones are buffers: they keep float32 whatever the model is cast to, since they
    are drawn from a seed or computed from W and not stored; those with `persistent=True` are stored. PEFT may load an
    adapter under other names of layers, so what is drawn by the layer's name is drawn from a buffer `seeds`, see
    `Site.seeds`, which is stored.

    Attributes:
        rank: bound of the rank of dW, for an exact plain LoRA; None: no bound below min(out, in).
        replaces: `replaced` computes the whole output in the place of base layer and update.
        moves_bias: the method changes the layer's bias too, see `bias`.
    """

    rank: int | None = None
    replaces: bool = False
    moves_bias: bool = False
    seeds: Tensor

    def __init__(self, site: Site, config: Any) -> None:
        super().__init__()
        self.site, self.config = site, config
        self.dropout: nn.Module = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def weight(self) -> Float[Tensor, "out in"]:
        """The update dW, its scale included."""
        raise NotImplementedError

    def bias(self) -> Float[Tensor, " out"] | None:
        """The change of the layer's bias, None where the method makes none."""
        return None

    def forward(self, x: Float[Tensor, "*batch in"], base_output: Float[Tensor, "*batch out"]) -> Tensor:
        """What is added to the output of the base layer: dW x, here by forming dW."""
        return functional.linear(x, self.weight(), self.bias())

    def replaced(self, x: Float[Tensor, "*batch in"], base: nn.Module) -> Tensor:
        """The layer's whole output, for methods that compute it at once."""
        raise NotImplementedError

    def merge_into(self, weight: Float[Tensor, "out in"]) -> Callable[[Tensor], None] | None:
        """Add dW in place.

        Returns:
            What takes it out of the weight again, or None: then dW is computed anew and subtracted. A dW that depends
            on W as it is at the time needs the former.
        """
        weight += self.weight().to(weight.dtype)
        return None

    def draw(self) -> None:
        """Draw the frozen numbers from `seeds`, for methods that have it."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """Of the trained numbers, which is what x is cast to."""
        return next(self.parameters()).dtype

    def frozen(self, name: str) -> Tensor:
        """A buffer in the dtype of the trained numbers."""
        buffer: Tensor = getattr(self, name)
        return buffer.to(self.dtype) if buffer.is_floating_point() else buffer

    def share(self, key: Any, make: Callable[[], Any]) -> Any:
        """An object that all layers of the adapter have in common, made by the first one that asks for it.

        Tensors in it are not part of the state and do not follow the model to another device: see `shared_tensor`.
        """
        if key not in self.site.shared:
            with usual_defaults():
                self.site.shared[key] = make()
        return self.site.shared[key]

    def shared_tensor(self, key: Any, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that all layers have in common, at the device and in the dtype of the trained numbers.

        There is one copy for each device and dtype in use, however many layers read it.
        """
        like = next(self.parameters())
        where = (key, like.device, like.dtype)
        found: Tensor = self.share(where, lambda: self.share((key, "cpu"), make).to(like.device, like.dtype))
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Draw again where the seeds are others. A file without them is of layers with these names."""
        own = self._buffers.get("seeds")
        before = None if own is None or own.is_meta else own.tolist()
        if own is not None:
            state_dict.setdefault(f"{prefix}seeds", own)
        parent: Any = super()
        parent._load_from_state_dict(state_dict, prefix, *args)
        if own is not None and not self.seeds.is_meta and self.seeds.tolist() != before:
            self.draw()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Frozen numbers change their place but never their dtype."""
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        parent: Any = super()
        parent._apply(fn, recurse)
        for name, before in kept.items():
            owner, _, last = name.rpartition(".")
            holder = self.get_submodule(owner)
            moved = getattr(holder, last)
            if moved.dtype != before.dtype:
                setattr(holder, last, before.to(moved.device))
        return self


class FactorDelta(Delta):
    """An update that is a product of two factors, so an exact plain LoRA."""

    def factors(self) -> Pair:
        """B (out, rank) and A (rank, in) with dW = B A, the scale in B."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """dW = B A."""
        B, A = self.factors()
        return B @ A

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """B (A x), without forming dW."""
        B, A = self.factors()
        return functional.linear(functional.linear(x, A), B, self.bias())
