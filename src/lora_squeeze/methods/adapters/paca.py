"""PaCA: some input columns of each weight are trained, nothing is added beside it (arXiv 2503.01905, ICLR 2025).

    W_eff[:, I] = W[:, I] + alpha / r D,  all other columns as they are,  so  dW = alpha / r D S

D (out, r) is trained and begins at 0; I are r distinct columns, drawn at random for each layer; S (r, in) has a one at
(k, I_k) and zeros elsewhere. The authors train P = r / alpha W_eff[:, I] in the place of D: the same update, but the
base model's function at the start only up to rounding.

A layer is one product, y = W_eff x + b: the columns are written into W, multiplied, and put back bit by bit, in the
forward and in the backward pass alike. For the backward pass x[..., I] is kept, r numbers for each token, where a LoRA
keeps all of x. I is stored beside D: drawn anew by another version, it would change the model without a word. What
else shares the input, as q, k and v do or a norm, may keep x for reasons of its own.

The sum of W[:, I] and the update is rounded to the dtype of W in every pass, as it is in the merged model. Where W is
quantised, is trained itself, or its layer does more than multiply (hooks, another tuner), and with dropout or several
active adapters, the update is a second product beside the base layer; that keeps as little.

As a plain LoRA: exact at rank r, with A = S. Not for two threads that run one model at once, where each would find the
columns of the other: merge the update before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters.engine import AdapterConfig, Delta, Site, register

_SELECTIONS = ("random", "largest", "smallest")


@dataclass
class PacaConfig(AdapterConfig):
    """Configuration of PaCA.

    Args:
        r: columns of each layer. A layer has r out trained numbers, a LoRA r (in + out): the authors take twice the r
            of a LoRA for as many. They train LLaMA2-7B with 16 and LLaMA3-8B with 64.
        alpha: the step of the weight is alpha / r times that of D under Adam, its square under SGD; nothing else
            depends on it. Default r, so that the scale is 1; the authors have 64 at r 16.
        dropout: of the inputs of the update. Above 0, the layer needs a second, small product.
        columns: "random", or those of W with the "largest" or "smallest" norm. The paper is said to find
            random as good; that is unsure.
    """

    columns: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.columns not in _SELECTIONS:
            raise ValueError(f"columns must be one of {', '.join(_SELECTIONS)}, got {self.columns!r}")


class PacaDelta(Delta):
    """One layer; trained: D (out, r)."""

    columns: Tensor

    def __init__(self, site: Site, config: PacaConfig) -> None:
        super().__init__(site, config)
        if config.r > site.in_features:
            raise ValueError(
                f"{site.name}: r is {config.r}, and the weight has {site.in_features} columns; lower r or leave the "
                "layer out of target_modules"
            )
        self.rank = config.r
        self.replaces = not config.dropout
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.D = nn.Parameter(torch.zeros(site.out_features, config.r))
        if not config.init_weights:
            self.D.data = torch.randn(self.D.shape) / site.in_features**0.5
        self.register_buffer("columns", _selected(site, config))

    def weight(self) -> Float[Tensor, "out in"]:
        """dW, zero outside the chosen columns."""
        empty = self.D.new_zeros(self.site.out_features, self.site.in_features)
        update: Tensor = empty.index_add(1, self.columns, self.scale * self.D)
        return update

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """dW x, from the chosen inputs alone."""
        return functional.linear(x[..., self.columns], self.scale * self.D)

    def replaced(self, x: Tensor, base: nn.Module) -> Tensor:
        """W_eff x + b in one product."""
        layer: Any = base
        if not only_multiplies(layer):
            output: Tensor = layer(x)
            update: Tensor = self(x.to(self.dtype), output)
            return output + update.to(output.dtype)
        product: Any = _Product
        weight = layer.weight.T if _is_turned(layer) else layer.weight
        result: Tensor = product.apply(x, x[..., self.columns], self.D, layer.bias, weight, self.columns, self.scale)
        return result

    def merge_into(self, weight: Float[Tensor, "out in"]) -> Any:
        """Write the columns, and return what puts the old ones back."""
        before = _write(weight, self.columns, self.scale * self.D)
        return partial(_put_back, self.columns, before)


def _put_back(columns: Tensor, before: Tensor, merged: Tensor) -> None:
    merged.index_copy_(1, columns, before.to(merged))


class _Product(torch.autograd.Function):
    """y = W_eff x + b, keeping the chosen inputs alone.

    The chosen inputs are an argument of their own, whose gradient is part of that of x: so the graph reaches x from
    them when a gradient is differentiated again.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chosen: Tensor, D: Tensor, bias: Tensor | None, weight: Tensor, columns: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        ctx.scale = scale
        ctx.save_for_backward(chosen if ctx.needs_input_grad[2] else None, D, weight, columns)
        with _written(weight, columns, scale * D) as effective:
            return functional.linear(x, effective, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (upstream,) = gradients
        chosen, D, weight, columns = ctx.saved_tensors
        to_x, _, to_D, to_bias, *_ = ctx.needs_input_grad
        of_x = of_D = of_bias = None
        if to_x and torch.is_grad_enabled():  # to be differentiated again: nothing may be written in place
            of_x = upstream @ weight.to(upstream.dtype)
            of_x = of_x.index_add(-1, columns, upstream @ (ctx.scale * D).to(upstream.dtype))
        elif to_x:
            with _written(weight, columns, ctx.scale * D) as effective:
                of_x = upstream @ effective.to(upstream.dtype)
        rows = upstream.reshape(-1, upstream.shape[-1])
        if to_D:
            of_D = ctx.scale * (rows.T @ chosen.reshape(-1, chosen.shape[-1]).to(rows.dtype))
        if to_bias:
            of_bias = rows.sum(0)
        return of_x, None, of_D, of_bias, None, None, None


@contextmanager
def _written(weight: Tensor, columns: Tensor, change: Tensor) -> Iterator[Tensor]:
    """The weight with changed columns for a while.

    Written through an alias whose writes autograd does not count: it need not know of them, since all is as before
    when anybody else looks.
    """
    alias = weight.data
    before = _write(alias, columns, change)
    try:
        yield alias
    finally:
        alias.index_copy_(1, columns, before)


@torch.no_grad()
def _write(
    weight: Float[Tensor, "out in"], columns: Int[Tensor, " r"], change: Float[Tensor, "out r"]
) -> Float[Tensor, "out r"]:
    """Add to columns in place; returns what they were."""
    before = weight.index_select(1, columns)
    weight.index_copy_(1, columns, (before + change).to(weight.dtype))
    return before


def _selected(site: Site, config: PacaConfig) -> Tensor:
    if config.columns == "random":
        return torch.randperm(site.in_features, generator=site.generator(config.seed, "columns"))[: config.r]
    norms = site.base_weight().float().norm(dim=0)
    found: Tensor = norms.topk(config.r, largest=config.columns == "largest").indices
    return found.cpu()


def _is_turned(layer: Any) -> bool:
    return type(layer).__name__ == "Conv1D"


def only_multiplies(layer: Any) -> bool:
    """Whether a layer's output is W x + b of a frozen plain weight, and nobody listens."""
    if type(layer).forward is not nn.Linear.forward and not _is_turned(layer):
        return False
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    hooked = any(hooks) or "forward" in vars(layer)
    return type(layer.weight) is nn.Parameter and not layer.weight.requires_grad and not hooked


register("paca", PacaConfig, PacaDelta)
