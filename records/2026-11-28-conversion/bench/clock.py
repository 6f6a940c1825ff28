"""Timing of several arms side by side: in turns, so that what disturbs the machine disturbs all of them."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Samples:
    """Seconds per call of one arm.

    Args:
        wall: by the clock on the wall.
        cpu: spent by all threads of the process.
        calls: calls per sample, so that a sample is long enough to be timed.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    calls: int = 1

    @property
    def seconds(self) -> float:
        """Median on the wall."""
        return statistics.median(self.wall)

    @property
    def cpu_seconds(self) -> float:
        """Median over all threads."""
        return statistics.median(self.cpu)

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile on the wall."""
        if len(self.wall) == 1:
            return self.wall[0], self.wall[0]
        low, _, high = statistics.quantiles(self.wall, n=4, method="inclusive")
        return low, high

    def to_json(self) -> dict[str, Any]:
        """Samples and what is made of them."""
        return {**asdict(self), "median": self.seconds, "quartiles": self.quartiles, "cpu_median": self.cpu_seconds}


@dataclass(frozen=True)
class Arm:
    """One way to do the work.

    Args:
        run: does it once.
        repeats: samples wanted; slow arms can do with fewer than the others.
        prepare: run before every sample, not timed.
        warm_up: run once before the first sample, which also tells how many calls make a sample of `least` seconds.
        least: seconds that a sample should take.
    """

    run: Callable[[], object]
    repeats: int
    prepare: Callable[[], object] | None = None
    warm_up: bool = True
    least: float = 0.05


def in_turns(arms: Mapping[str, Arm]) -> dict[str, Samples]:
    """Time all arms in rounds; each round begins with another arm, and an arm that has its repeats sits out."""
    found = {name: Samples() for name in arms}
    for name, arm in arms.items():
        if arm.warm_up:
            first, _ = _timed(arm, 1)
            found[name].calls = max(1, math.ceil(arm.least / first))
    names = list(arms)
    for turn in range(max(arm.repeats for arm in arms.values())):
        start = turn % len(names)
        for name in names[start:] + names[:start]:
            if turn >= arms[name].repeats:
                continue
            wall, cpu = _timed(arms[name], found[name].calls)
            found[name].wall.append(wall)
            found[name].cpu.append(cpu)
    return found


def _timed(arm: Arm, calls: int) -> tuple[float, float]:
    """Seconds per call, on the wall and of all threads."""
    if arm.prepare:
        arm.prepare()
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        arm.run()
    return (time.perf_counter() - wall) / calls, (time.process_time() - cpu) / calls
