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
in-equal-restart        the same, the curve of the learning rate beginning anew at each rank
in-equal-rising         in-equal, its learning rate times sqrt(source rank / rank)
in-equal-restart-rising both: beginning anew at each rank, and higher
in-proportional         in-equal with steps proportional to the rank, but at least 5 % of all at each
in-proportional-...     with restart, rising or both, as above
in-adaptive             squeezed while training when the spectrum allows it, a rank for each module
======================  =============================================================================================

All have equal steps, the 5 % of cont apart. The curve of the learning rate ends at zero: without a restart, the low
ranks are trained at little of it. The floor of in-proportional gives every rank what cont has. LoRA-Squeeze's own
floor, 200 of 10 000 steps, would be 2 of 100 here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_squeeze.adaptive import Adaptive
from lora_squeeze.schedule import CONT_SHARE, Schedule, make_schedule

SOURCE = "direct"


def _equal(source: int, rank: int, steps: int) -> Schedule:
    return make_schedule(source, rank, steps, steps="equal")


_STEPS = {"in-equal": _equal, "in-proportional": make_schedule}
_RATES = {  # arm's ending -> `Squeezer`'s learning_rate
    "": "continue", "-restart": "restart", "-rising": "rank", "-restart-rising": "restart-rank",
}  # fmt: skip
SCHEDULES: dict[str, Callable[[int, int, int], Schedule | Adaptive]] = {  # source rank, target rank, steps
    **{arm + ending: schedule for arm, schedule in _STEPS.items() for ending in _RATES},
    "in-adaptive": lambda source, rank, steps: Adaptive(rank=rank, total_steps=steps),
}
LEARNING_RATES = {arm + ending: policy for arm in _STEPS for ending, policy in _RATES.items()}
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
