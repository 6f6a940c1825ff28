"""The learning rate across squeezes: one curve over all, one for each stage, or one that rises as ranks fall."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from lora_squeeze.adaptive import Adaptive
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.schedule import LEARNING_RATES, Schedule


def follow_stages(policy: str, scheduler: Any, schedule: Schedule | Adaptive) -> None:
    """Make a scheduler go by the stages of a schedule.

        "continue"  factor(step) = curve(step): nothing changes
        "restart"   factor(step) = curve((step - first step of the stage) * total steps / steps of the stage)
        "rank"      factor(step) = curve(step) * sqrt(first rank / rank of the stage)

    "restart" runs the whole curve, warm-up included, once per stage, compressed to the stage's length.

    Args:
        policy: one of these, `schedule.LEARNING_RATES`.
        scheduler: a LambdaLR; accelerate's wrapper will do. Its functions are replaced by ones that can be pickled no
            worse than before, and its state keeps its form.
        schedule: one with stages of known length.

    Raises:
        LoraSqueezeError: another policy; but for "continue", no scheduler, another kind of scheduler, or an adaptive
            schedule.
    """
    if policy not in LEARNING_RATES:
        raise LoraSqueezeError(f"learning_rate must be one of {', '.join(LEARNING_RATES)}, got {policy!r}")
    if policy == "continue":
        return
    if isinstance(schedule, Adaptive):
        raise LoraSqueezeError(f"learning_rate={policy!r} needs stages of known length; an adaptive schedule has none")
    inner = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(inner, LambdaLR):
        raise LoraSqueezeError(
            f"learning_rate={policy!r} needs a LambdaLR scheduler, got {type(inner).__name__}; use "
            "learning_rate='continue', or change the scheduler of your own"
        )
    change = _restarted if policy == "restart" else _risen
    inner.lr_lambdas = [change(curve, schedule) for curve in inner.lr_lambdas]


def _risen(curve: Callable[[int], float], schedule: Schedule) -> Callable[[int], float]:
    def factor(step: int) -> float:
        stage = schedule.stage_after(min(step, schedule.total_steps))
        return curve(step) * math.sqrt(schedule.ranks[0] / schedule.ranks[stage])

    return factor


def _restarted(curve: Callable[[int], float], schedule: Schedule) -> Callable[[int], float]:
    starts = (0, *schedule.boundaries)
    total = schedule.total_steps

    def factor(step: int) -> float:
        stage = schedule.stage_after(min(step, total))
        length = schedule.steps[stage]
        return curve((step - starts[stage]) * total // length if length else total)

    return factor
