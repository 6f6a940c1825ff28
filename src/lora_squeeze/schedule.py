"""Ranks over training steps: Post-, Cont- and In-Squeeze as one schedule.

Stage i trains steps[i] optimiser steps at ranks[i]; between two stages every module is squeezed to the next rank. With
r the source rank, k the target rank and T all steps:

====  ======================  ==================  ==================================================================
mode  ranks                   steps               in words
====  ======================  ==================  ==================================================================
post  (r, k)                  (T, 0)              train at the source rank, squeeze after the last step
cont  (r, k)                  (T - n, n)          squeeze shortly before the end, train n steps on at the target rank
in    (r, r_1, ..., k)        (n_0, ..., n_K)     squeeze in several stages while training
====  ======================  ==================  ==================================================================

T always holds all steps, those after the last squeeze too: runs of the same T are comparable.

Defaults, with reasons:

- ranks "geometric", as many squeezes as halvings: every squeeze cuts off about the same share of the parameters.
- steps "proportional" to the rank, with min_steps 5 % of T: better than equal steps in squeezes of SmolLM2 from rank 64
  to 8 and 2 (records/2026-12-01-stages) and of a vision-language model to 16 ... 1 (records/2026-11-29-evidence); of
  MiniLM only at a low learning rate. Without a floor the low ranks get hardly any steps: of 10 000 from rank 64 to rank
  1 the last stage would get 79. The paper's floor for this variant is 200 of 10 000.
- last_steps of "cont": 5 % of T, a little less than the paper's 700 steps after 10 000.

LoRA-Squeeze (arXiv 2602.10993) gives the three modes and its floor. How it allots steps to stages is our reading of the
paper, not a quotation: proportional to the rank.
"""

from __future__ import annotations

import bisect
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from lora_squeeze.errors import LoraSqueezeError

LEARNING_RATES = ("continue", "restart", "rank", "restart-rank")  # across stages: see `training.learning_rate`
MODES: dict[str, tuple[str, ...]] = {  # mode -> the options that mean something in it
    "post": (),
    "cont": ("last_steps",),
    "in": ("ranks", "squeezes", "steps", "min_steps", "last_steps", "train_after_last"),
}
SPACINGS = ("geometric", "linear")
WEIGHTS: dict[str, Callable[[int], Fraction]] = {  # allotment -> weight of a stage of this rank
    "equal": lambda rank: Fraction(1),
    "proportional": lambda rank: Fraction(rank),
    "sqrt": lambda rank: Fraction(math.sqrt(rank)),
    "inverse": lambda rank: Fraction(1, rank),
}
CONT_SHARE = Fraction(5, 100)  # of all steps, after the squeeze of mode "cont"
FLOOR_SHARE = Fraction(5, 100)  # of all steps, for each stage of mode "in"


@dataclass(frozen=True)
class Schedule:
    """Which rank is trained for how many optimiser steps.

    Args:
        ranks: r_0 > r_1 > ... > r_K >= 1, the source rank first, the target rank last; at least two.
        steps: n_0, ..., n_K, each at least 1; the last may be 0, then the last squeeze comes after the last step.

    Raises:
        LoraSqueezeError: ranks or steps that break these rules.

    Example:
        >>> schedule = Schedule((16, 8, 4), (50, 30, 20))
        >>> schedule.total_steps, schedule.boundaries
        (100, (50, 80))
        >>> [schedule.rank_after(step) for step in (0, 49, 50, 79, 80, 100)]
        [16, 16, 8, 8, 4, 4]
    """

    ranks: tuple[int, ...]
    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.ranks) < 2 or len(self.ranks) != len(self.steps):
            raise LoraSqueezeError(
                f"a schedule needs two or more stages with a rank and a number of steps each: "
                f"ranks {_text(self.ranks)}, steps {_text(self.steps)}"
            )
        if self.ranks[-1] < 1 or any(low >= high for high, low in itertools.pairwise(self.ranks)):
            raise LoraSqueezeError(f"ranks must fall from stage to stage and be at least 1, got {_text(self.ranks)}")
        if min(self.steps[:-1]) < 1 or self.steps[-1] < 0:
            raise LoraSqueezeError(
                f"every stage needs at least 1 step, only the last may have 0, got {_text(self.steps)}"
            )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the whole training."""
        return sum(self.steps)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Finished steps after which the squeeze to ranks[i + 1] happens, one number per squeeze, rising."""
        return tuple(itertools.accumulate(self.steps[:-1]))

    def stage_after(self, step: int) -> int:
        """The stage that holds once `step` steps are finished, after the squeeze due then, if any.

        Args:
            step: finished optimiser steps, from 0; beyond the last step, the last stage holds.
        """
        if step < 0:
            raise LoraSqueezeError(f"finished steps count from 0, got {step}")
        return bisect.bisect_right(self.boundaries, step)

    def rank_after(self, step: int) -> int:
        """The rank that holds once `step` steps are finished, see `stage_after`."""
        return self.ranks[self.stage_after(step)]

    def to_json(self) -> dict[str, list[int]]:
        """Plain data for a checkpoint; `from_json` reads it."""
        return {"ranks": list(self.ranks), "steps": list(self.steps)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schedule:
        """The schedule that `to_json` wrote.

        Raises:
            LoraSqueezeError: other keys, values that are no lists of whole numbers, or an impossible schedule.
        """
        if set(data) != {"ranks", "steps"}:
            raise LoraSqueezeError(f"a schedule has the keys ranks and steps, found {', '.join(data) or 'none'}")
        return cls(_whole("ranks", data["ranks"]), _whole("steps", data["steps"]))


def make_schedule(
    source_rank: int,
    target_rank: int,
    total_steps: int,
    *,
    mode: str = "in",
    ranks: str | Sequence[int] = "geometric",
    squeezes: int | None = None,
    steps: str | Sequence[int] = "proportional",
    min_steps: int | None = None,
    last_steps: int | None = None,
    train_after_last: bool = True,
) -> Schedule:
    """The schedule from one rank to another.

        geometric   r_i = round(r_0 (r_K / r_0)^(i / K))        linear   r_i = round(r_0 + (r_K - r_0) i / K)

    both pushed apart where rounding makes two of them equal, and n_i proportional to the weight of r_i.

    Args:
        source_rank: rank at the start.
        target_rank: rank at the end, below the source rank.
        total_steps: optimiser steps of the whole training, those after the last squeeze included.
        mode: "in", "cont" or "post". An option that differs from its default and means nothing in the mode is refused:
            "post" has none, "cont" has last_steps, "in" has them all.
        ranks: "geometric", "linear", or the ranks after the source rank, ending at the target rank.
        squeezes: how many; default the number of halvings from source to target, rounded up, for both spacings.
        steps: weights of the stages: "proportional" (r_i), "equal" (1), "sqrt" (square root of r_i), "inverse"
            (1 / r_i); or the steps of every stage, the first at the source rank, with the sum total_steps.
        min_steps: fewest steps of a stage. What is missing there is taken from the others in proportion. Default: 5 %
            of total_steps, at least 1, or what there is for each stage if that is less.
        last_steps: steps at the target rank, of total_steps; the other stages share the rest. Default: a share like the
            others; for "cont" 5 % of total_steps, at least 1.
        train_after_last: False squeezes to the target rank after the last step, and the other stages share all steps.

    Returns:
        A schedule whose steps sum to total_steps exactly: largest remainders are rounded up, the earlier stage first.

    Raises:
        LoraSqueezeError: nothing to squeeze, a schedule longer than the training, or options that contradict.

    Notes:
        The weights are exact fractions (for "sqrt", of the rounded root): the same on every machine. On the paper and
        on what is our reading of it, see the top of this module.

    Example:
        >>> make_schedule(64, 8, 1000)
        Schedule(ranks=(64, 32, 16, 8), steps=(533, 267, 133, 67))
        >>> make_schedule(64, 8, 1000, min_steps=100)
        Schedule(ranks=(64, 32, 16, 8), steps=(514, 257, 129, 100))
        >>> make_schedule(64, 8, 1000, steps="equal")
        Schedule(ranks=(64, 32, 16, 8), steps=(250, 250, 250, 250))
        >>> make_schedule(64, 8, 1000, mode="cont")
        Schedule(ranks=(64, 8), steps=(950, 50))
    """
    changed = {
        "ranks": ranks != "geometric",
        "squeezes": squeezes is not None,
        "steps": steps != "proportional",
        "min_steps": min_steps is not None,
        "last_steps": last_steps is not None,
        "train_after_last": train_after_last is not True,
    }
    _check_options(mode, [name for name, differs in changed.items() if differs])
    _check_ends(source_rank, target_rank, total_steps)
    if last_steps is not None and last_steps < 1:
        raise LoraSqueezeError(
            f"last_steps must be at least 1, got {last_steps}: without training at the target rank, "
            f"use mode 'post' or train_after_last=False"
        )
    if mode == "post":
        return Schedule((source_rank, target_rank), (total_steps, 0))
    if mode == "cont":
        last_steps = max(1, round(total_steps * CONT_SHARE)) if last_steps is None else last_steps
    path = (source_rank, target_rank) if mode == "cont" else _path(source_rank, target_rank, ranks, squeezes)
    if isinstance(steps, str):
        return Schedule(path, _allotted(path, total_steps, steps, min_steps, last_steps, train_after_last))
    extra = [name for name in ("min_steps", "last_steps", "train_after_last") if changed[name]]
    if extra:
        raise LoraSqueezeError(f"{extra[0]} contradicts explicit steps, which say it already: leave one of them out")
    return Schedule(path, _given_steps(path, total_steps, steps))


def _check_options(mode: str, changed: Sequence[str]) -> None:
    if mode not in MODES:
        raise LoraSqueezeError(f"unknown mode {mode!r}: choose one of {', '.join(MODES)}")
    for name in changed:
        if name not in MODES[mode]:
            others = " or ".join(repr(other) for other, options in MODES.items() if name in options)
            raise LoraSqueezeError(f"{name} is no option of mode {mode!r}: leave it out, or use mode {others}")


def _check_ends(source: int, target: int, total: int) -> None:
    if target < 1 or total < 1:
        raise LoraSqueezeError(f"target rank and total steps must be at least 1, got rank {target} and {total} steps")
    if target == source:
        raise LoraSqueezeError(
            f"nothing to squeeze: source and target rank are both {source}; choose a lower target rank, or train "
            f"without a schedule"
        )
    if target > source:
        raise LoraSqueezeError(
            f"target rank {target} is above source rank {source}: choose a target below {source}, or train at a source "
            f"rank above {target}"
        )


def _path(source: int, target: int, ranks: str | Sequence[int], squeezes: int | None) -> tuple[int, ...]:
    """The ranks of all stages, strictly falling."""
    if not isinstance(ranks, str):
        return _given_path(source, target, ranks, squeezes)
    if ranks not in SPACINGS:
        raise LoraSqueezeError(f"unknown ranks {ranks!r}: choose {' or '.join(SPACINGS)}, or list the ranks")
    halvings = next(n for n in itertools.count(1) if target << n >= source)
    count = halvings if squeezes is None else squeezes
    if not 1 <= count <= source - target:
        raise LoraSqueezeError(
            f"squeezes must be from 1 to {source - target} between rank {source} and rank {target}, got {count}"
        )
    if ranks == "linear":
        path = [round(source - Fraction(i * (source - target), count)) for i in range(count + 1)]
    else:
        path = [round(source * (target / source) ** (i / count)) for i in range(count + 1)]
    # The gaps shrink towards the target: where two ranks round to one, steps of one rank lead from there to the target.
    return tuple(max(rank, target + count - i) for i, rank in enumerate(path))


def _given_path(source: int, target: int, ranks: Sequence[int], squeezes: int | None) -> tuple[int, ...]:
    if squeezes is not None:
        raise LoraSqueezeError("squeezes contradicts explicit ranks, which say it already: leave one of them out")
    path = (source, *_whole("ranks", ranks))
    if path[-1] != target or any(low >= high for high, low in itertools.pairwise(path)):
        raise LoraSqueezeError(
            f"ranks must list the ranks after the source rank {source}, falling, the last one the target rank "
            f"{target}, got {_text(ranks)}"
        )
    return path


def _given_steps(path: Sequence[int], total: int, steps: Sequence[int]) -> tuple[int, ...]:
    whole = _whole("steps", steps)
    if len(whole) != len(path):
        raise LoraSqueezeError(
            f"steps must list one number for each of the {len(path)} ranks {_text(path)}, got {len(whole)}"
        )
    if sum(whole) != total:
        raise LoraSqueezeError(f"steps must sum to the {total} steps of the training, got {sum(whole)}")
    return whole


def _allotted(
    path: Sequence[int], total: int, steps: str, min_steps: int | None, last_steps: int | None, train_after_last: bool
) -> tuple[int, ...]:
    """The steps of all stages by weight; the last one may have its own number."""
    if steps not in WEIGHTS:
        raise LoraSqueezeError(f"unknown steps {steps!r}: choose one of {', '.join(WEIGHTS)}, or list the steps")
    if min_steps is not None and min_steps < 1:
        raise LoraSqueezeError(f"min_steps must be at least 1, got {min_steps}")
    if last_steps is not None and not train_after_last:
        raise LoraSqueezeError(f"last_steps {last_steps} contradicts train_after_last=False: leave one of them out")
    if last_steps is not None and min_steps is not None and last_steps < min_steps:
        raise LoraSqueezeError(f"last_steps {last_steps} is below min_steps {min_steps}: raise it or lower min_steps")
    last = last_steps if train_after_last else 0
    weights = [WEIGHTS[steps](rank) for rank in (path if last is None else path[:-1])]
    rest = total - (last or 0)
    least = max(1, min(round(total * FLOOR_SHARE), rest // len(weights))) if min_steps is None else min_steps
    _check_length(total, len(weights), least, last or 0)
    return (*_shares(weights, rest, least), *(() if last is None else (last,)))


def _check_length(total: int, stages: int, min_steps: int, last: int) -> None:
    """Refuse a schedule longer than the training; `last` steps are taken before the stages share the rest."""
    least = stages * min_steps + last
    if total >= least:
        return
    possible = (total - last) // stages
    raise LoraSqueezeError(
        f"the schedule is longer than the training: {stages} x {min_steps} (min_steps)"
        + (f" + {last} after the last squeeze" if last else "")
        + f" = {least} steps, the training has {total}; train longer"
        + (", or plan fewer squeezes" if stages > 1 else "")
        + (f", or set min_steps to at most {possible}" if possible >= 1 else "")
        + (", or lower last_steps" if last > 1 else "")
    )


def _shares(weights: Sequence[Fraction], total: int, least: int) -> list[int]:
    """Whole shares of the total by weight, each at least `least`, with exactly this sum (largest remainder)."""
    shares = [least] * len(weights)
    free = list(range(len(weights)))
    while True:
        rest, weight = total - least * (len(weights) - len(free)), sum(weights[i] for i in free)
        quotas = {i: rest * weights[i] / weight for i in free}
        above = [i for i in free if quotas[i] >= least]
        if len(above) == len(free):
            break
        free = above  # never empty, since the total is enough for all
    for i, quota in quotas.items():
        shares[i] = math.floor(quota)
    by_remainder = sorted(free, key=lambda i: (shares[i] - quotas[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def _whole(name: str, values: Any) -> tuple[int, ...]:
    try:
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise LoraSqueezeError(f"{name} must be a list of whole numbers, got {values!r}") from None


def _text(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
