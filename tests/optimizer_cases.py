"""What the tests of optimiser state share: every optimiser that is listed, and a toy that it trains."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import pytest
import torch
from factor_cases import orthonormal
from torch import Tensor, nn

from lora_squeeze.training.optimizer_state import Change, carried_state, exchange

OUT, IN, RANK, SAMPLES = 6, 5, 4, 8
BEFORE, AFTER = 8, 5  # steps before and after an exchange; RAdam needs more than five for its second moment


class Lion(torch.optim.Optimizer):
    """The sign update with one average, as the packages that call their class Lion write it."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(average.lerp(p.grad, 0.1).sign(), alpha=group["lr"])
                average.lerp_(p.grad, 0.01)


@dataclass(frozen=True)
class Case:
    """An optimiser: where its class is, its arguments, and how its state keeps averages of gradients."""

    module: str
    name: str
    arguments: dict[str, Any]
    first: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-6  # of the trajectory after an exact change, relative to the way gone

    def make(self, parameters: Iterable[Any], **changed: Any) -> torch.optim.Optimizer:
        kind = Lion if self.module == __name__ else getattr(import_module(self.module), self.name)
        optimizer: torch.optim.Optimizer = kind(parameters, **{"lr": 0.02, **self.arguments, **changed})
        if hasattr(optimizer, "train"):
            optimizer.train()
        return optimizer


def adam(name: str, **arguments: Any) -> Case:
    return Case("torch.optim", name, arguments, ("exp_avg",))


def bnb(name: str, tolerance: float = 1e-4, **arguments: Any) -> Case:
    return Case("bitsandbytes.optim", name, arguments, ("state1",), torch.float32, tolerance)


# bitsandbytes codes small tensors too with min_8bit_size=1. A signed code has no exact opposite: hence the tolerance.
CASES = {
    "Adam": adam("Adam"),
    "Adam, amsgrad": adam("Adam", amsgrad=True),
    "AdamW": adam("AdamW", weight_decay=0.1),
    "AdamW, foreach": adam("AdamW", weight_decay=0.1, foreach=True),
    "AdamW, fused": adam("AdamW", weight_decay=0.1, fused=True),
    "NAdam": adam("NAdam"),
    "RAdam": adam("RAdam"),
    "SGD": Case("torch.optim", "SGD", {}),
    "SGD, momentum": Case("torch.optim", "SGD", {"momentum": 0.9}, ("momentum_buffer",)),
    "SGD, Nesterov": Case(
        "torch.optim", "SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}, ("momentum_buffer",)
    ),
    "Adafactor of torch": Case("torch.optim", "Adafactor", {}),
    "Adafactor": Case("transformers.optimization", "Adafactor", {"relative_step": False}),
    "Adafactor, momentum": Case("transformers.optimization", "Adafactor", {"relative_step": False, "beta1": 0.9}),
    "Lion": Case(__name__, "Lion", {"weight_decay": 0.1}, ("exp_avg",)),
    "schedule-free AdamW": Case("schedulefree", "AdamWScheduleFree", {"weight_decay": 0.1}),
    "schedule-free AdamW, loop": Case("schedulefree", "AdamWScheduleFree", {"foreach": False}),
    "schedule-free RAdam": Case("schedulefree", "RAdamScheduleFree", {}),
    "schedule-free SGD": Case("schedulefree", "SGDScheduleFree", {}),
    "bitsandbytes Adam": bnb("Adam"),
    "bitsandbytes AdamW": bnb("AdamW", weight_decay=0.1),
    "bitsandbytes Lion": bnb("Lion"),
    "bitsandbytes AdamW 8-bit": bnb("AdamW8bit", 0.1, min_8bit_size=1),
    "bitsandbytes paged AdamW 8-bit": bnb("PagedAdamW8bit", 0.1, min_8bit_size=1),
    "bitsandbytes Lion 8-bit": bnb("Lion8bit", 0.3, min_8bit_size=1),
}
COUNTED_BY_GROUP = [name for name in CASES if name.startswith(("schedule-free AdamW", "schedule-free RAdam"))]
CODED = [name for name in CASES if name.endswith("8-bit")]


def each(names: Iterable[str] = CASES) -> Any:
    return pytest.mark.parametrize("case", [pytest.param(CASES[name], id=name) for name in names])


# --- a toy problem, and what a change of coordinates does to it ------------------------------------------------------


@dataclass
class Toy:
    """Factors B and A that learn a matrix, with their optimiser."""

    B: nn.Parameter
    A: nn.Parameter
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(cls, case: Case, out: int = OUT, inp: int = IN, **changed: Any) -> "Toy":
        g = torch.Generator().manual_seed(1)
        B, A = (
            nn.Parameter(torch.randn(*s, generator=g, dtype=torch.float64).to(case.dtype))
            for s in ((out, RANK), (RANK, inp))
        )
        return cls(B, A, case.make([B, A], **changed))

    def gradients(self, number: int) -> None:
        """Gradients of the loss on batch `number`."""
        g = torch.Generator().manual_seed(100 + number)
        out, inp = self.B.shape[0], self.A.shape[1]
        X, Y = (torch.randn(n, SAMPLES, generator=g, dtype=torch.float64).to(self.B.dtype) for n in (inp, out))
        self.optimizer.zero_grad()
        (self.B @ (self.A @ X) - Y).square().mean().backward()

    def train(self, start: int, steps: int) -> "Toy":
        for number in range(start, start + steps):
            self.gradients(number)
            self.optimizer.step()
        return self

    def states(self, P: Tensor, R: Tensor, policy: str = "transport") -> dict[nn.Parameter, dict[str, Any]]:
        B, A = self.values(P, R)
        return {
            self.B: carried_state(self.optimizer, self.B, B, change_of_B(P, R), policy),
            self.A: carried_state(self.optimizer, self.A, A, change_of_A(P, R), policy),
        }

    def values(self, P: Tensor, R: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.B @ P.to(self.B), R.to(self.A) @ self.A

    def squeeze(self, P: Tensor, R: Tensor, policy: str = "transport") -> Callable[[], None]:
        """B' = B P and A' = R A in new parameters."""
        states = self.states(P, R, policy)
        old = self.B, self.A
        self.B, self.A = (nn.Parameter(value) for value in self.values(P, R))
        undo = exchange(self.optimizer, dict(zip(old, (self.B, self.A), strict=True)), states)

        def back() -> None:
            undo()
            self.B, self.A = old

        return back

    def rotate(self, P: Tensor, R: Tensor) -> Callable[[], None]:
        """The same in the parameters as they are; the way back is that of the optimiser only."""
        states, values = self.states(P, R), self.values(P, R)
        for parameter, value in zip((self.B, self.A), values, strict=True):
            parameter.data.copy_(value)
        return exchange(self.optimizer, {self.B: self.B, self.A: self.A}, states)


def change_of_B(P: Tensor, R: Tensor) -> Change:
    return Change(lambda t: t @ R.T.to(t), lambda t: t @ R.T.square().to(t), lambda t: t @ P.to(t))


def change_of_A(P: Tensor, R: Tensor) -> Change:
    return Change(lambda t: P.T.to(t) @ t, lambda t: P.T.square().to(t) @ t, lambda t: R.to(t) @ t)


def rotation(k: int = RANK) -> tuple[Tensor, Tensor]:
    """P (r, k) with orthonormal columns, and its left inverse."""
    P = orthonormal(RANK, RANK, torch.Generator().manual_seed(2))[:, :k]
    return P, P.T


def signed_permutation() -> tuple[Tensor, Tensor]:
    P = torch.eye(RANK, dtype=torch.float64)[[2, 0, 3, 1]] * torch.tensor([1.0, -1.0, -1.0, 1.0])
    return P, P.T


def with_zero_tail(k: int) -> tuple[Tensor, Tensor]:
    """The first k directions of a rotation, and zeros in the places of the others."""
    P = rotation()[0] * (torch.arange(RANK) < k)
    return P, P.T


def same(left: Any, right: Any) -> bool:
    """Equal bit for bit, in type and in order, at any depth."""
    if isinstance(left, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return type(left) is type(right) and left == right


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}
