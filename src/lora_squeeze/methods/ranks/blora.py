"""Bayesian-LoRA: gates choose each layer's rank, and the bits of its factors (arXiv 2406.13046, WANT at ICML 2024).

    dW = alpha / r Q(B) diag(Q(E)) Q(A),   A (r, in), E (r), B (out, r) trained

Each Q rounds to 2, 4, 8 or 16 bits, as its gates say; those of E also close components, always the last ones, so that
1 to r are left. `blora_gates` has the gates and quantisers. The penalty on the loss is the expected cost of the open
gates, through their gradients, which are added after clipping. Another paper's "BayesLoRA" is not this.

A training begins as a plain LoRA, E = 1 and B = 0 (`warmup`). Then the ranges of all quantisers are set to the largest
values seen; ranges and gates are trained with the rest, gates drawn once for each step. In eval mode, and in the last
steps of a training if `settle` says so, each gate is 0 or 1. The gates need learning rates of their own and no weight
decay, or they move too little to close:

    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-4))

Ours, where the authors do otherwise: they begin with A and B ~ N(0, 0.02) and E ~ N(0, 1), not with the base model's
function; they learn the coarsest step, here it is the logarithm of the range; and they also quantise base weight and
activations. Here the base stays as it is, and `activations` quantises the products with A, E and B alone.

As a plain LoRA: exact at the rank found for each layer, in floating-point numbers; the bits are known to `found` alone.
Quantised activations are no part of any LoRA: with `activations`, a merged or converted model is another one, and both
have to be measured. With distributed data parallel, set `find_unused_parameters`: the gates rest in the warm-up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site, register
from lora_squeeze.methods.control import Controller, controlled_by, deltas_of
from lora_squeeze.methods.ranks.blora_gates import WIDTHS, Quantizer
from lora_squeeze.methods.ranks.parts import add_gradient, lora_pair, steps_of

_FULL_BITS = 32  # of what is not quantised


@dataclass
class BloraConfig(AdapterConfig):
    """Configuration of Bayesian-LoRA.

    Args:
        r: rank with all gates open, the bound of what is found.
        alpha: default r, so that the scale is 1.
        penalty: weight of the expected cost in the loss: more of it, fewer bits and lower ranks. To be swept. The
            authors' option is 12, which outweighs the mean loss of most tasks and closes all gates that have the time.
        price: "const", every gate costs the same; "bit-operations", a gate up to b bits costs b times the share that
            its product has of the largest one of the model.
        bits: with all gates open; 4, 8 or 16.
        gates: logit of all gates at the start; at 6, each is open with a probability of 0.9995.
        warmup: first share of the steps, without quantisers; one step at least.
        settle: last share of the steps, with gates that are 0 or 1 as in eval mode and are not trained.
        activations: quantise the products with A, E and B too.
        gates_lr: learning rate of the gates' logits in `parameter_groups`; from 6, one needs about 7 / gates_lr steps
            of Adam to close.
        ranges_lr: of the logarithms of the ranges.
        quantised: written by the training once the warm-up is over; given, quantisers act from the start.
    """

    penalty: float = 0.01
    price: str = "const"
    bits: int = 16
    gates: float = 6.0
    warmup: float = 0.1
    settle: float = 0.0
    activations: bool = False
    gates_lr: float = 1e-2
    ranges_lr: float = 1e-2
    quantised: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty < 0:
            raise ValueError(f"penalty must be 0 or more, got {self.penalty}")
        if self.price not in ("const", "bit-operations"):
            raise ValueError(f"price must be const or bit-operations, got {self.price!r}")
        if self.bits not in WIDTHS:
            raise ValueError(f"bits must be 4, 8 or 16, got {self.bits}")
        if not (0 <= self.warmup and 0 <= self.settle and self.warmup + self.settle <= 1):
            raise ValueError(
                f"warmup and settle are shares of the training, together at most 1, got {self.warmup} and {self.settle}"
            )

    def own_settings(self, lr: float) -> dict[str, dict[str, Any]]:
        """Gates and ranges."""
        return {"q_(bits|ranks).*": {"lr": self.gates_lr}, "q_range.*": {"lr": self.ranges_lr}}


class BloraDelta(FactorDelta):
    """One layer; trained: A, E and B, and for the quantiser of each (q_...) its range and gates.

    Attributes:
        names: of the quantisers: those of A, E and B, and with `activations` those of the products with them.
        quantised: the quantisers act.
        noise: uniform numbers of the present step for each quantiser; without, the gates are those deployed.
    """

    seen: Tensor

    def __init__(self, site: Site, config: BloraConfig) -> None:
        super().__init__(site, config)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        self.B, self.A = lora_pair(site, config)
        self.E = nn.Parameter(torch.ones(config.r))
        self.quantised = config.quantised
        self.noise: dict[str, Tensor] = {}
        self.names = ["A", "E", "B", *(f"{name}_out" for name in "AEB" if config.activations)]
        for name in self.names:
            self.register_parameter(f"q_range_{name}", nn.Parameter(torch.zeros(1)))
            gates = torch.full((WIDTHS.index(config.bits) + 1,), config.gates)
            self.register_parameter(f"q_bits_{name}", nn.Parameter(gates))
        self.q_ranks = nn.Parameter(torch.full((config.r - 1,), config.gates)) if config.r > 1 else None
        if config.activations:
            self.register_buffer("seen", torch.zeros(3))
        if self.quantised:
            self.begin()

    def quantizer(self, name: str) -> Quantizer:
        """One of `names`, in its present state."""
        reach, bits = getattr(self, f"q_range_{name}"), getattr(self, f"q_bits_{name}")
        ranks = self.q_ranks if name == "E" else None
        return Quantizer(reach[0], bits, ranks, self.noise.get(name) if self.training else None)

    def gates(self, name: str) -> list[nn.Parameter]:
        """The trained logits of a quantiser."""
        bits: nn.Parameter = getattr(self, f"q_bits_{name}")
        return [bits] if name != "E" or self.q_ranks is None else [bits, self.q_ranks]

    @property
    def rank(self) -> int:  # type: ignore[override]
        """Components that the gates leave."""
        return self.quantizer("E").chosen_rank() if self.quantised else int(self.config.r)

    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """A, E and B, quantised once the warm-up is over."""
        if not self.quantised:
            return self.A, self.E, self.B
        A, E, B = (self.quantizer(name)(getattr(self, name)) for name in "AEB")
        return A, E, B

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, r) with E and the scale in it, zero in closed components, and A (r, in)."""
        A, E, B = self.parts()
        return self.scale * B * E, A

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """B (E * (A x)), each product quantised where activations are."""
        if not self.config.activations:
            return super().forward(x, base_output)
        A, E, B = self.parts()
        hidden = self._activation(0, functional.linear(x, A))
        hidden = self._activation(1, E * hidden)
        return self.scale * self._activation(2, functional.linear(hidden, B))

    def _activation(self, number: int, values: Tensor) -> Tensor:
        if self.quantised:
            return self.quantizer(f"{'AEB'[number]}_out")(values)
        if self.training:
            self.seen[number] = torch.maximum(self.seen[number], values.detach().abs().max())
        return values

    @torch.no_grad()
    def begin(self) -> None:
        """Let the quantisers act, with the ranges seen so far."""
        largest = {name: getattr(self, name).abs().max() for name in "AEB"}
        if self.config.activations:
            largest |= {f"{name}_out": top for name, top in zip("AEB", self.seen, strict=True)}
        for name, top in largest.items():
            # Where all is zero still, the range of A is one that training can correct.
            getattr(self, f"q_range_{name}").copy_(torch.where(top > 0, top, largest["A"]).log())
        self.quantised = True

    def multiplications(self, rank: int) -> dict[str, int]:
        """Of each product, for one row of the input."""
        return {"A": rank * self.site.in_features, "E": rank, "B": rank * self.site.out_features}


class BloraController(Controller):
    """Draws gates, adds the gradient of their cost, and ends the warm-up."""

    deltas: dict[str, BloraDelta]

    def _before_forward(self) -> None:
        """Draw the gates of the step."""
        quantizers = [(delta, name) for delta in self.deltas.values() for name in delta.names]
        self._finish()
        if not self._draws:
            return
        sizes = [sum(map(len, delta.gates(name))) for delta, name in quantizers]
        drawn = torch.rand(sum(sizes), generator=self.generator(), dtype=torch.float32, device="cpu")
        drawn = drawn.to(quantizers[0][0].A.device)
        for (delta, name), noise in zip(quantizers, drawn.split(sizes), strict=True):
            delta.noise[name] = noise

    def _before_step(self) -> None:
        """Add the gradient of the cost to that of the gates."""
        if not (self._draws and self.config.penalty):
            return
        largest = max(max(d.multiplications(self.config.r).values()) for d in self.deltas.values())
        costs, gates = [], []
        for delta in self.deltas.values():
            sizes = delta.multiplications(self.config.r)
            for name in delta.names:
                share = sizes[name[0]] / largest
                prices = {b: b * share if self.config.price == "bit-operations" else 1.0 for b in (2, *WIDTHS)}
                costs.append(delta.quantizer(name).cost(prices))
                gates += delta.gates(name)
        add_gradient(self.config.penalty * torch.stack(costs).sum(), gates)

    def _after_step(self) -> None:
        """Begin to quantise when the warm-up is over."""
        super()._after_step()
        if not self.config.quantised and self.steps_done >= max(1, steps_of(self.config.warmup, self.total_steps)):
            for delta in self.deltas.values():
                if self.config.activations and torch.distributed.is_available() and torch.distributed.is_initialized():
                    torch.distributed.all_reduce(delta.seen, torch.distributed.ReduceOp.MAX)
                delta.begin()
            self.config.quantised = True

    def _finish(self) -> None:
        """Gates as they are deployed, in training mode too."""
        for delta in self.deltas.values():
            delta.noise = {}

    def state_dict(self) -> dict[str, Any]:
        """Whether the warm-up is over."""
        return {**super().state_dict(), "quantised": self.config.quantised}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on in the warm-up or after it."""
        super().load_state_dict(state)
        self.config.quantised = bool(state["quantised"])
        for delta in self.deltas.values():
            delta.quantised = self.config.quantised

    @property
    def _draws(self) -> bool:
        unsettled = self.steps_done < steps_of(1 - self.config.settle, self.total_steps)
        return bool(self.config.quantised) and unsettled


@dataclass(frozen=True)
class Found:
    """What the gates of one layer chose.

    Args:
        rank: components that are left.
        bits: of "A", "E" and "B", and of "A_out" and so on where activations are quantised.
        bit_operations: for one row of the input: multiplications times the bits of both numbers, over its products.
        of_lora: the same for a LoRA of rank r in 32 bits.
    """

    rank: int
    bits: dict[str, int]
    bit_operations: int
    of_lora: int


def found(model: nn.Module, adapter: str = "default") -> dict[str, Found]:
    """Name of the layer -> rank, bits and bit operations of its update, with the gates that are deployed."""
    chosen = {}
    for name, delta in deltas_of(model, adapter).items():
        rank, full = delta.rank, delta.multiplications(delta.config.r)
        bits = {key: delta.quantizer(key).chosen_bits() if delta.quantised else _FULL_BITS for key in delta.names}
        inputs = {"A": _FULL_BITS, "E": bits.get("A_out", _FULL_BITS), "B": bits.get("E_out", _FULL_BITS)}
        products = delta.multiplications(rank)
        chosen[name] = Found(
            rank=rank,
            bits=bits,
            bit_operations=sum(products[key] * bits[key] * inputs[key] for key in "AEB"),
            of_lora=(full["A"] + full["B"]) * _FULL_BITS**2,
        )
    return chosen


register("blora", BloraConfig, BloraDelta)
controlled_by("blora", BloraController)
