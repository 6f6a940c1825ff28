"""Queryable LoRA: a core between A and B that each block of layers queries from shared memory (arXiv 2605.08423, 2026).

    y = W x + b + s B_l M_b(x) A_l x,  M_b(x) = sum_j a_j M_j,  s = alpha / r

The atoms M_j (r, r), j = 1 ... K, are common to all layers; A_l (r, in) and B_l (out, r) are each layer's own. Layers
go together in blocks of `block_layers`. The first one of a block to see the input routes it, token by token:

    u_b = mean of h = A_l x over the tokens up to this one
    v_b = Wd u_b,  s_b = sum over earlier blocks c of softmax_c(q0 . v_c / sqrt(d)) v_c
    q_b = Wu norm(u_b) + Ws s_b + We e + bias,  z_j = q_b . k_j / sqrt(d) + prior log softmax_j(e . t_j / temperature)
    a = softmax over the top_k largest z, 0 elsewhere

so M_b has at most the norm of the largest atom. e is the embedding of an instruction, see `instructed`; without one its
terms are left out. Trained: A_l, B_l and, once for all layers, M, keys k (K, d), Wu, Wd (d, r), Ws (d, d), q0 and bias
(d), and with text_dim We (d, text_dim) and t (K, text_dim). A is drawn as LoRA's, B begins at 0, M_j at I + 0.02 noise.

We know the paper's abstract and public summaries: shared r x r atoms, routing by blocks from the low-rank state and an
attention over earlier blocks, top-k convex weights, a prior from language on the logits. All else is our reading.

The update depends on the input: it cannot be merged and is no LoRA. `fix_routes` puts the mean of M_b over data in its
place: then, and with one atom always, it is a plain LoRA, exact at rank r. Decoding with a cache, the default of
`generate`, sees the last token alone: but with pool="token" it is refused, so give use_cache=False. In a model with
encoder and decoder adapt one of the two. Gradient checkpointing works with use_reentrant=False. Not with a single
block: nothing is earlier, and Wd, Ws, q0 are not used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register
from lora_squeeze.methods.adapters.queryable_routing import (
    ClearAtEntry,
    Context,
    Route,
    convex,
    pooled,
    with_gradient,
)
from lora_squeeze.methods.modes import evaluating

_POOLS = ("causal", "token", "mean")
_NOISE = 0.02


@dataclass
class QueryableConfig(AdapterConfig):
    """Configuration of Queryable LoRA.

    Args:
        r: rank, and the size of the atoms; 2 or more, since a state of one number has no direction.
        alpha: the scale is alpha / r; default r.
        atoms: K. With one there is no routing, and the update is a plain LoRA's.
        top_k: atoms that a token uses; 2 or more, since a single weight is 1 and trains no router.
        query_dim: d, of queries and keys.
        block_layers: adapted linear layers that go together, in the order in which the model lists them.
        pool: the state of a token is the mean over the tokens up to it ("causal"), its own ("token", the one for
            decoding with a cache), or the mean over all ("mean", which shows a decoder its future). Padding counts.
        text_dim: width of embedded instructions; 0: there are none.
        prior: strength of what the instruction says of the atoms.
        temperature: of that prior; a lower one makes it sharper.
        fixed: set by `fix_routes`: the cores are stored, and nothing is routed.
    """

    atoms: int = 8
    top_k: int = 2
    query_dim: int = 16
    block_layers: int = 4
    pool: str = "causal"
    text_dim: int = 0
    prior: float = 0.5
    temperature: float = 1.0
    fixed: bool = False

    @property
    def static(self) -> bool:
        """Whether the update is the same for all inputs."""
        return self.fixed or self.atoms == 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("atoms", "query_dim", "block_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {getattr(self, name)}")
        if not self.static and self.r < 2:
            raise ValueError(f"r must be 2 or more, got {self.r}")
        if not self.static and not 2 <= self.top_k <= self.atoms:
            raise ValueError(f"top_k must be from 2 to atoms, got {self.top_k} of {self.atoms}")
        if self.pool not in _POOLS:
            raise ValueError(f"pool must be one of {', '.join(_POOLS)}, got {self.pool!r}")
        if self.text_dim < 0 or self.prior < 0 or self.temperature <= 0:
            raise ValueError(
                "text_dim and prior must be 0 or more and temperature above 0, got "
                f"{self.text_dim}, {self.prior} and {self.temperature}"
            )


class QueryableDelta(FactorDelta):
    """One layer; trained: A (r, in), B (out, r), and in the first layer what is common to all."""

    core: Tensor

    def __init__(self, site: Site, config: QueryableConfig) -> None:
        super().__init__(site, config)
        self.rank = min(config.r, site.in_features, site.out_features)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.A = nn.Parameter(_uniform((config.r, site.in_features)))
        B = torch.zeros(site.out_features, config.r)
        self.B = nn.Parameter(B if config.init_weights else torch.randn(B.shape))
        if config.fixed:
            self.register_buffer("core", torch.eye(config.r))
            return
        # In a tuple, so that the first layer is no part of the others.
        self._common: tuple[QueryableDelta, Context] = self.share("common", lambda: (self, Context()))
        self.layer = self.context.join()
        if self.memory is self:
            self._make_memory()
            site.shared["model"]().register_forward_pre_hook(ClearAtEntry(self.context), with_kwargs=True)

    @property
    def memory(self) -> QueryableDelta:
        """The layer that has the common parameters."""
        return self._common[0]

    @property
    def context(self) -> Context:
        """The routes of the last forward pass."""
        return self._common[1]

    @property
    def block(self) -> int:
        """Number of the layer's block."""
        return int(self.layer // self.config.block_layers)

    def _make_memory(self) -> None:
        config = self.config
        K, r, d, text = config.atoms, config.r, config.query_dim, config.text_dim
        self.atoms = nn.Parameter(torch.eye(r) + _NOISE * torch.randn(K, r, r))
        if K == 1:
            return
        self.keys = nn.Parameter(torch.randn(K, d) / math.sqrt(d))
        self.of_state = nn.Parameter(_uniform((d, r)))
        self.of_depth = nn.Parameter(_uniform((d, d)))
        self.query_bias = nn.Parameter(torch.zeros(d))
        self.depth_value = nn.Parameter(_uniform((d, r)))
        self.depth_query = nn.Parameter(torch.randn(d) / math.sqrt(d))
        if text:
            self.of_text = nn.Parameter(_uniform((d, text)))
            self.text_keys = nn.Parameter(torch.randn(K, text) / math.sqrt(text))

    def factors(self) -> tuple[Tensor, Tensor]:
        """s B M (out, r) and A (r, in), where M is fixed.

        Raises:
            LoraSqueezeError: it is not.
        """
        if not self.config.static:
            raise LoraSqueezeError(
                f"{self.site.name}: the update of a Queryable LoRA depends on the input, token by token, and is no "
                "change of a weight; put its mean over your data in its place first: "
                "lora_squeeze.methods.adapters.queryable_lora.fix_routes(model, batches)"
            )
        core = self.frozen("core") if self.config.fixed else self.memory.atoms[0].to(self.A)
        return self.scale * (self.B @ core), self.A

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """s B M_b(x) A x."""
        if self.config.static:
            return super().forward(x, base_output)
        h = functional.linear(x, self.A)
        each = torch.einsum("kij,...j->...ki", self.memory.atoms.to(h), h)
        mixed = (self.routed(h).to(h)[..., None] * each).sum(-2)
        return functional.linear(mixed, self.scale * self.B)

    def routed(self, h: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch K"]:
        """Each token's weights of the atoms, which the first layer of the block to be reached computes.

        Raises:
            LoraSqueezeError: earlier tokens are in a cache alone, and the state is a mean over them.
        """
        if self.context.continues and self.config.pool != "token":
            raise LoraSqueezeError(
                f'{self.site.name}: a Queryable LoRA with pool="{self.config.pool}" is routed by all tokens and cannot '
                'go on from a cache of the earlier ones; give use_cache=False, train with pool="token", or put its '
                "mean over your data in its place: "
                "lora_squeeze.methods.adapters.queryable_lora.fix_routes(model, batches)"
            )
        key = self.block, tuple(h.shape[:-1])
        found = self.context.routes.get(key)
        if found is not None and found.layer != self.layer:
            return with_gradient(found.weights, self.A.requires_grad)
        with torch.autocast(h.device.type, enabled=False):
            earlier = [with_gradient(value, self.A.requires_grad) for value in self.context.earlier(key)]
            state = pooled(h.to(self.memory.keys), self.config.pool)
            value = functional.linear(state, self.memory.depth_value)
            route = Route(self.layer, value, convex(self._logits(state, earlier), self.config.top_k))
        self.context.keep(key, route)
        return route.weights

    def _logits(self, state: Tensor, earlier: list[Tensor]) -> Tensor:
        """Of the atoms (..., K), by state, earlier blocks and instruction."""
        config, memory = self.config, self.memory
        normed = functional.layer_norm(state, state.shape[-1:])
        query = functional.linear(normed, memory.of_state, memory.query_bias)
        if earlier:
            values = torch.stack(earlier, -2)  # (..., blocks, d)
            share = (values @ memory.depth_query / math.sqrt(config.query_dim)).softmax(-1)
            query = query + functional.linear((share[..., None] * values).sum(-2), memory.of_depth)
        told = self._told(state)
        if told is not None:
            query = query + functional.linear(told, memory.of_text)
        logits = query @ memory.keys.T / math.sqrt(config.query_dim)
        if told is not None:
            logits = logits + config.prior * (told @ memory.text_keys.T / config.temperature).log_softmax(-1)
        return logits

    def _told(self, state: Tensor) -> Tensor | None:
        """The instruction, to be added to numbers of each token."""
        told = self.context.instruction
        if told is None or told.dim() == 1:
            return told if told is None else told.to(state)
        if len(told) not in (1, len(state)):
            raise LoraSqueezeError(
                f"{self.site.name}: there are {len(told)} instructions for a batch of {len(state)}; give one, or one "
                "for each"
            )
        return told.to(state).reshape(len(told), *(1,) * (state.dim() - 2), -1)


def _uniform(shape: tuple[int, int]) -> Tensor:
    return (torch.rand(shape) * 2 - 1) / math.sqrt(shape[1])


def _deltas(model: nn.Module, adapter: str) -> list[QueryableDelta]:
    layers = [getattr(module, "deltas", {}) for module in model.modules()]
    found = [deltas[adapter] for deltas in layers if adapter in deltas]
    queryable = [delta for delta in found if isinstance(delta, QueryableDelta)]
    if not queryable:
        raise LoraSqueezeError(f"the model has no Queryable LoRA {adapter!r}; make one with get_peft_model")
    return queryable


@contextmanager
def instructed(model: nn.Module, embedding: Tensor, adapter: str = "default") -> Iterator[None]:
    """Let an instruction bias the choice of atoms while this lasts.

    Args:
        model: with the adapter.
        embedding: of the instruction (text_dim), or one for each of the batch (batch, text_dim), from any text encoder.
        adapter: its name.

    Raises:
        LoraSqueezeError: the adapter is not made for instructions of this width.

    Example:
        >>> with instructed(model, embedding):  # doctest: +SKIP
        ...     model(**batch).loss.backward()
    """
    first = _deltas(model, adapter)[0]
    width = 0 if first.config.static else first.config.text_dim
    if not width or embedding.dim() not in (1, 2) or embedding.shape[-1] != width:
        raise LoraSqueezeError(
            f"the adapter {adapter!r} takes instructions of text_dim {width}, got one of {tuple(embedding.shape)}"
        )
    context = first.context
    before, context.instruction = context.instruction, embedding
    try:
        yield
    finally:
        context.instruction = before


def routes(model: nn.Module, adapter: str = "default") -> list[Tensor]:
    """The weights of the atoms in the last forward pass: (..., K) for each block, in the order of the pass.

    Where they are the same for all tokens, nothing is routed apart: a sign that the atoms have collapsed.
    """
    first = _deltas(model, adapter)[0]
    return [] if first.config.static else [route.weights.detach() for route in first.context.routes.values()]


@torch.no_grad()
def fix_routes(model: nn.Module, batches: Iterable[Any], adapter: str = "default") -> None:
    """Put the mean of each block's core over data in the place of its routing: a plain LoRA of rank r from here on.

    Args:
        model: with the trained adapter, which is active; the common parameters are taken out of it.
        batches: what the model is called with, a mapping of arguments or one tensor. Tokens that an `attention_mask`
            leaves out are not counted.
        adapter: its name.

    Raises:
        LoraSqueezeError: the batches do not reach all blocks.

    Notes:
        One forward pass for each batch. The function changes wherever tokens are routed apart; measure what it costs.

    Example:
        >>> fix_routes(model, loader)  # doctest: +SKIP
        >>> model.save_pretrained("fixed")  # doctest: +SKIP
    """
    deltas = _deltas(model, adapter)
    if deltas[0].config.static:
        return
    memory, means = deltas[0].memory, _mean_weights(model, batches, deltas[0].context)
    missing = {delta.block for delta in deltas} - set(means)
    if missing:
        raise LoraSqueezeError(
            f"no batch reaches block {min(missing)} of the adapter {adapter!r}; activate it and give batches"
        )
    for delta in deltas:
        core = torch.einsum("k,kij->ij", means[delta.block].to(memory.atoms), memory.atoms)
        delta.register_buffer("core", core.to(delta.A.device, torch.float32))
        delta.config.fixed = True
    for name in {name for name, _ in memory.named_parameters()} - {"A", "B"}:
        delattr(memory, name)


def _mean_weights(model: nn.Module, batches: Iterable[Any], context: Context) -> dict[int, Tensor]:
    """Block -> mean weights of the atoms (K)."""
    seen: dict[int, list[Tensor]] = {}
    for batch in batches:
        with evaluating(model):
            model(**batch) if isinstance(batch, Mapping) else model(batch)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        for (block, shape), route in context.routes.items():
            counted = torch.ones(shape) if mask is None or mask.shape != shape else mask
            weights = route.weights[counted.bool()].double()
            one = torch.ones(1, device=weights.device, dtype=weights.dtype)
            seen.setdefault(block, []).append(torch.cat([weights.sum(0), len(weights) * one]))
    totals = {block: torch.stack(parts).sum(0) for block, parts in seen.items()}
    return {block: total[:-1] / total[-1] for block, total in totals.items()}


register("queryable", QueryableConfig, QueryableDelta)
