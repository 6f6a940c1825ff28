"""The arms: what is done to reach a rank.

======================  =============================================================================================
method                  an adapter of rank k
======================  =============================================================================================
direct                  trained at rank k; at the source rank it is the source of the following
post                    the source, squeezed after training
post-data               the same in the metric of inputs and gradients, from a few training batches
plan                    the source, a rank for each module by energy, at the parameters of the uniform rank k
plan-data               the same by predicted loss, in the metric of the data
cont                    post, then 5 % more steps at rank k
cont-data               post-data, then 5 % more steps
in-equal                trained from the source rank to rank k in halvings, equal steps at each rank
in-proportional         the same with steps proportional to the rank, but at least 2 % of all at each
in-equal-rising         in-equal, its learning rate times sqrt(source rank / rank)
in-proportional-rising  in-proportional, the same
in-adaptive             squeezed while training when the spectrum allows it, a rank for each module
======================  =============================================================================================

All have equal steps, the 5 % of cont apart. The floor of in-proportional is the share that LoRA-Squeeze's own floor,
200 steps, has of 10 000.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_squeeze.adaptive import Adaptive
from lora_squeeze.schedule import CONT_SHARE, Schedule, make_schedule

SOURCE = "direct"
FLOOR_SHARE = 0.02


def _equal(source: int, rank: int, steps: int) -> Schedule:
    return make_schedule(source, rank, steps)


def _proportional(source: int, rank: int, steps: int) -> Schedule:
    return make_schedule(source, rank, steps, steps="proportional", min_steps=max(1, round(FLOOR_SHARE * steps)))


SCHEDULES: dict[str, Callable[[int, int, int], Schedule | Adaptive]] = {  # source rank, target rank, steps
    "in-equal": _equal,
    "in-proportional": _proportional,
    "in-equal-rising": _equal,
    "in-proportional-rising": _proportional,
    "in-adaptive": lambda source, rank, steps: Adaptive(rank=rank, total_steps=steps),
}
RISING = {"in-equal-rising", "in-proportional-rising"}
SQUEEZES: dict[str, dict[str, Any]] = {  # data: whether in the metric of the data
    "post": {"data": False, "allocate": "uniform"},
    "post-data": {"data": True, "allocate": "uniform"},
    "plan": {"data": False, "allocate": "global"},
    "plan-data": {"data": True, "allocate": "global"},
}
CONTINUED = {"cont": "post", "cont-data": "post-data"}
METHODS = (SOURCE, *SQUEEZES, *CONTINUED, *SCHEDULES)
DEFAULT_METHODS = ("direct", "post", "post-data", "plan", "plan-data", "cont", "in-equal", "in-proportional")
TRAINED = (SOURCE, *CONTINUED, *SCHEDULES)  # they have a learning rate of their own


def more_steps(steps: int) -> int:
    """Steps of cont after the squeeze."""
    return max(1, round(steps * CONT_SHARE))


def how(method: str) -> dict[str, Any]:
    """The squeeze that a method begins with."""
    return SQUEEZES[CONTINUED.get(method, method)]


def from_source(method: str) -> bool:
    """Whether the method begins with the finished source."""
    return method in SQUEEZES or method in CONTINUED
