"""The learning rate across squeezes: one curve over all or one for each stage, level or rising as ranks fall."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from lora_squeeze.adaptive import Adaptive
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.schedule import LEARNING_RATES, Schedule

_FOLLOWS = "_follows"  # attribute of our functions: the policy, and what it looks at of the schedule


def follow_stages(policy: str, scheduler: Any, schedule: Schedule | Adaptive) -> None:
    """Make a scheduler go by the stages of a schedule.

        "continue"  factor(step) = curve(step): nothing changes
        "restart"   factor(step) = curve((step - first step of the stage) * total steps / steps of the stage)
        "rank"      factor(step) = curve(step) * sqrt(first rank / rank of the stage)
        "restart-rank"  both: the factor of "restart" times this root

    "restart" runs the whole curve, warm-up included, once per stage, compressed to the stage's length. Steps are those
    of the optimiser, of which accelerate's wrapper makes several of the scheduler where there are several processes.

    Where the scheduler follows the same stages already, as it does for another adapter or after an interruption, it is
    left alone.

    Args:
        policy: one of these, `schedule.LEARNING_RATES`.
        scheduler: a LambdaLR; accelerate's wrapper will do. Its functions are replaced by ones that can be pickled no
            worse than before, and its state keeps its form.
        schedule: one with stages of known length.

    Raises:
        LoraSqueezeError: another policy; but for "continue", no scheduler, another kind of scheduler, one that follows
            another schedule, or an adaptive schedule.
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
    stages = (policy, schedule.steps, () if policy == "restart" else schedule.ranks)
    followed = {getattr(curve, _FOLLOWS, None) for curve in inner.lr_lambdas} - {None}
    if followed == {stages}:
        return
    if followed:
        raise LoraSqueezeError(
            f"the scheduler follows another schedule already, and learning_rate={policy!r} needs it for itself: use a "
            "scheduler for each schedule, or learning_rate='continue'"
        )
    pace = _pace(scheduler)
    if policy != "rank":
        inner.lr_lambdas = [_restarted(curve, schedule, pace) for curve in inner.lr_lambdas]
    if policy != "restart":
        inner.lr_lambdas = [_risen(curve, schedule, pace) for curve in inner.lr_lambdas]
    for factor in inner.lr_lambdas:
        setattr(factor, _FOLLOWS, stages)


def _pace(scheduler: Any) -> int:
    """How many steps a scheduler takes for one of the optimiser."""
    if not getattr(scheduler, "step_with_optimizer", False) or scheduler.split_batches:
        return 1
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]

    processes: int = AcceleratorState().num_processes
    return processes


def _risen(curve: Callable[[int], float], schedule: Schedule, pace: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        stage = schedule.stage_after(min(step // pace, schedule.total_steps))
        return curve(step) * math.sqrt(schedule.ranks[0] / schedule.ranks[stage])

    return factor


def _restarted(curve: Callable[[int], float], schedule: Schedule, pace: int) -> Callable[[int], float]:
    starts = (0, *schedule.boundaries)
    total = schedule.total_steps

    def factor(step: int) -> float:
        stage = schedule.stage_after(min(step // pace, total))
        length = schedule.steps[stage]
        return curve((step - starts[stage] * pace) * total // length if length else total * pace)

    return factor
