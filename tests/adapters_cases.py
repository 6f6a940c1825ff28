"""The parameterisations on tiny models, and the questions that the tests ask of all of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

import lora_squeeze.methods.adapters
import lora_squeeze.methods.ranks  # noqa: F401 (both register their methods)
from lora_squeeze.methods.adapters.tera import split

Count = Callable[[int, int], int]  # in_features, out_features -> trained numbers of one layer


@dataclass(frozen=True)
class Method:
    """One method with settings small enough for a tiny model.

    Args:
        name: as registered.
        count: trained numbers of a layer with in_features and out_features.
        settings: of its configuration, beside the targets.
        rank: bound of the rank of dW, as a function of in_features and out_features; None: none below full rank.
        identity: a fresh adapter leaves the model's function as it is, to this relative error (0: bit by bit).
        float64: the layer computes in float64 where its parameters are float64.
        static: the update is the same for all inputs; where it is not, it must not be merged or converted.
        once: trained numbers that the layers have in common.
        draws: some of what it freezes is drawn.
        waits: how the names of those trained numbers begin that rest until the method's controller calls them.
    """

    name: str
    count: Count
    settings: dict[str, Any] = field(default_factory=dict)
    rank: Count | None = None
    identity: float | None = 0.0
    waits: str | None = None
    static: bool = True
    once: int = 0
    draws: bool = False

    def config(self, **more: Any) -> PeftConfig:
        """A configuration for the two kinds of layers that the tiny models have."""
        made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(self.name.upper())]
        return made(**{"target_modules": ["wide", "tall"], **self.settings, **more})


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("nola", lambda i, o: 2 * 12, {"r": 3, "bases": 12}, rank=lambda i, o: 3, draws=True),
        Method("blocklora", lambda i, o: 2 * i + 4 * o, {"r": 4, "alpha": 6}, rank=lambda i, o: 2),
        Method("hydra", lambda i, o: 2 * (i + o) + 6 * o, {"r": 2, "r_sequential": 3, "alpha": 3}, rank=lambda i, o: 5),
        Method("wara", lambda i, o: i + o, {"r": 2, "wavelet": "db2"}, rank=lambda i, o: 4),
        Method("queryable", lambda i, o: 3 * (i + o),
               {"r": 3, "atoms": 4, "top_k": 3, "query_dim": 5, "block_layers": 1}, rank=lambda i, o: 3, static=False,
               once=4 * 9 + 4 * 5 + 2 * 5 * 3 + 5 * 5 + 2 * 5),
        Method("tera", lambda i, o: sum(split(i, 3)) + sum(split(o, 3)), draws=True),
        Method("loldu", lambda i, o: 5, {"r": 5, "alpha": 5}, rank=lambda i, o: 5),
        Method("svfit", lambda i, o: 5, {"r": 5}, rank=lambda i, o: 5),
        Method("loraxs", lambda i, o: 9, {"r": 3}, rank=lambda i, o: 3, identity=1e-3),
        Method("paca", lambda i, o: 3 * o, {"r": 3, "alpha": 6}, rank=lambda i, o: 3, draws=True),
        Method("snella", lambda i, o: 4 * (i + o) + 3, {"r": 4, "sparsity": 0.5}, identity=None),
        Method("lift", lambda i, o: 2 * (i + o), {"r": 2, "filter_rank": 2}),
        Method("sara", lambda i, o: i * o // 4, {"fraction": 0.25}),
        Method("randloraranks", lambda i, o: 4 * (3 + 12), {"r": 3, "together": 2}, rank=lambda i, o: 6, draws=True),
        Method("projlora", lambda i, o: 12, {"r": 3, "length": 48}, rank=lambda i, o: 3, identity=None, draws=True),
        Method("dylora", lambda i, o: 3 * (i + o), {"r": 3, "alpha": 6}, rank=lambda i, o: 3),
        Method("matryoshka", lambda i, o: 4 * (i + o), {"r": 4}, rank=lambda i, o: 4),
        Method("sora", lambda i, o: 3 * (i + o) + 3, {"r": 3, "alpha": 6}, rank=lambda i, o: 3),
        Method("trp", lambda i, o: i * o),
        Method("maestro", lambda i, o: 3 * (i + o), {"r": 3, "alpha": 6}, rank=lambda i, o: 3),
        Method("blora", lambda i, o: 3 * (i + o) + 3 + 3 * (1 + 3) + 2, {"r": 3, "alpha": 6}, rank=lambda i, o: 3,
               waits="q_"),
        Method("diffora", lambda i, o: 3 * (i + o) + 1, {"r": 3, "alpha": 6}, rank=lambda i, o: 3),
    )
}  # fmt: skip
IN, HIDDEN = 12, 20  # "wide" is (20, 12), "tall" is (12, 20)


class Net(nn.Module):
    """Two linear layers of different shapes, twice, with a nonlinearity between."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(), _Block()])
        self.head = nn.Linear(IN, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, IN) -> (batch, tokens, 3)."""
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(x)
        return found


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(IN, HIDDEN)
        self.tall = nn.Linear(HIDDEN, IN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.tall(torch.tanh(self.wide(x)))
        return found


@contextmanager
def drawn_from(seed: int) -> Any:
    """A seeded global generator for a block, and the old one afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def net(dtype: torch.dtype = torch.float32) -> Net:
    """The same net on every call."""
    with drawn_from(0):
        return Net().to(dtype).eval()


class Inside(nn.Module):
    """The net, with all its modules under other names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x)
        return found


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    """The same input on every call, with more rows than any layer is wide."""
    return torch.randn(4, 8, IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(method: Method, base: nn.Module | None = None, *, trained: bool = False, **settings: Any) -> Any:
    """A PEFT model; `trained`: its parameters are moved, so that the update is nothing special."""
    options = settings.pop("options", {})
    with drawn_from(0):
        model = get_peft_model(net() if base is None else base, method.config(**settings), **options)
    if trained:
        shake(model)
    return model.eval()


def shake(model: nn.Module, adapter: str = "default", seed: int = 2) -> None:
    """Move every trained number of an adapter, so that the outputs change by about as much as they are."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"_delta.{adapter}." in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += 0.5 * noise.to(parameter.dtype) * parameter.data.std(correction=0).clamp(min=0.2)


def layers(model: nn.Module) -> dict[str, Any]:
    """The method's layers by name."""
    return {name: m for name, m in model.named_modules() if hasattr(m, "get_delta_weight")}
