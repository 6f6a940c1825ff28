"""How Queryable LoRA chooses among its atoms, and what its layers tell each other during a forward pass."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError

Key = tuple[int, tuple[int, ...]]  # a block, and the shape of the tokens that it saw

_FAR = 0.1  # relative; what is computed again differs by rounding at most


@dataclass(frozen=True, eq=False)
class Route:
    """What a block was routed by.

    Args:
        layer: which one of the block routed it.
        value: what later blocks see of its state (..., d).
        weights: of the atoms (..., K).
    """

    layer: int
    value: Tensor
    weights: Tensor


class Context:
    """The routes of one forward pass of one adapter, in the order in which its blocks were reached.

    They stay until the next pass begins, since checkpointing comes back for them. A copy, or one read back from a
    file, is empty: a pass is not carried over. `continues`: the pass goes on from a cache of earlier tokens.
    """

    def __init__(self) -> None:
        self.layers = 0
        self.continues = False
        self.instruction: Tensor | None = None
        self.routes: dict[Key, Route] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Context, ()

    def join(self) -> int:
        """The number of a new layer."""
        self.layers += 1
        return self.layers - 1

    def earlier(self, key: Key) -> list[Tensor]:
        """What is to be seen of the blocks that were reached before, as far as they saw tokens of the same shape."""
        values = []
        for (block, shape), route in self.routes.items():
            if (block, shape) == key:
                break
            if shape == key[1]:
                values.append(route.value)
        return values

    def keep(self, key: Key, route: Route) -> None:
        """Remember a route; one that is computed again keeps its place.

        Raises:
            LoraSqueezeError: it is computed again for a backward pass, and another forward pass has come between.
        """
        if _in_backward():
            before, now = self.routes.get(key), route.value.detach()
            if before is None or (before.value.detach() - now).norm() > _FAR * now.norm():
                raise LoraSqueezeError(
                    "gradient checkpointing has come back to a forward pass that is not the last one, whose routes are "
                    "gone; call backward after each forward pass, or turn checkpointing off"
                )
        self.routes[key] = route


class ClearAtEntry:
    """A forward pre-hook of a model that empties a context, and goes when nobody has the context any more."""

    def __init__(self, context: Context) -> None:
        self.context = weakref.ref(context)

    def __reduce__(self) -> tuple[Any, ...]:
        return ClearAtEntry, (self.context() or Context(),)

    def __call__(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        context = self.context()
        if context is not None:
            context.routes.clear()
            context.continues = _holds_tokens(kwargs.get("past_key_values"))
            return
        for key, hook in list(model._forward_pre_hooks.items()):
            if hook is self:
                del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def _holds_tokens(cache: Any) -> bool:
    """Whether a cache of keys and values has any: one of transformers, or a tuple."""
    count = getattr(cache, "get_seq_length", None)
    return bool(cache) if count is None else bool(count() > 0)


def with_gradient(kept: Tensor, trained: bool) -> Tensor:
    """A number of an earlier layer, as it is.

    Raises:
        LoraSqueezeError: its gradient is wanted and would be lost.
    """
    if trained and _in_backward() and torch.is_grad_enabled() and not kept.requires_grad:
        raise LoraSqueezeError(
            "gradient checkpointing of the reentrant kind loses the gradient between the layers of Queryable LoRA; "
            "turn it on with gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return kept


def _in_backward() -> bool:
    """Whether this runs inside of a backward pass: then checkpointing computes something again."""
    task: int = torch._C._current_graph_task_id()
    return task != -1


def pooled(h: Float[Tensor, "*batch r"], pool: str) -> Float[Tensor, "*batch r"]:
    """The state of each token: of itself, or the mean over it and the ones before, or over all.

    The first axis is the batch, those between it and the last are tokens; with two axes there are no tokens.
    """
    if h.dim() < 3 or pool == "token":
        return h
    tokens = h.flatten(1, -2).to(torch.promote_types(h.dtype, torch.float32))
    if pool == "mean":
        means = tokens.mean(1, keepdim=True).expand_as(tokens)
    else:
        means = tokens.cumsum(1) / torch.arange(1, tokens.shape[1] + 1, device=h.device)[:, None]
    return means.reshape(h.shape).to(h.dtype)


def convex(logits: Float[Tensor, "*batch K"], top_k: int) -> Float[Tensor, "*batch K"]:
    """The softmax over the largest top_k, exactly 0 elsewhere."""
    values, places = logits.topk(top_k, -1)
    return torch.zeros_like(logits).scatter(-1, places, values.softmax(-1))
