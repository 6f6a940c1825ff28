"""One method beside the LoRA that comes nearest in trained numbers: one row.

Times are those that the one thread has spent: what a quiet machine's clock would show, other work on it left out.
"""

from __future__ import annotations

import gc
import statistics
from typing import Any

from bench.clock import Arm, in_turns
from bench.costs.methods import Method, lora
from bench.costs.saved import Saved, saved_bytes
from bench.costs.training import Training
from bench.evidence.learners import learner
from bench.evidence.learners.base import Learner

WARM = 4  # steps before the first that is timed; the short phases of `methods` end in them
ROUNDS = {"minilm": 31, "smollm2": 9, "tiny": 5}

Row = dict[str, Any]


class Bench:
    """A model twice, once for the LoRA; the LoRA of one method is used for the next if the rank is the same.

    Args:
        model: of `bench.evidence.learners`.
    """

    def __init__(self, model: str) -> None:
        kind = type(learner(model))
        self.model = model
        self.mine: Learner = kind()
        self.others: Learner = kind()
        self.rank_one = Training(self.others, lora(1), 0).numbers()
        self.beside: tuple[int, Training] | None = None
        gc.freeze()  # the libraries' many objects need not be gone through before each timed step

    def row(self, method: Method, rounds: int | None = None) -> Row:
        """Everything that is measured of a method and its LoRA."""
        ours = Training(self.mine, method, self.rank_one)
        for _ in range(WARM):
            ours.step()
        rank = max(1, round(ours.numbers() / self.rank_one))
        theirs = self._lora(rank)
        repeats = rounds or ROUNDS[self.model]
        arms = {"ours": ours, "lora": theirs}
        times = in_turns({name: Arm(arm.step, repeats, least=0.0) for name, arm in arms.items()})
        mine, beside = times["ours"], times["lora"]
        ratios = [a / b for a, b in zip(mine.cpu, beside.cpu, strict=True)]
        found = {
            "method": method.label, "peft_type": method.kind, "settings": dict(method.settings), "lora_rank": rank,
            "seconds": mine.cpu_seconds, "lora_seconds": beside.cpu_seconds,
            "wall_seconds": mine.seconds, "lora_wall_seconds": beside.seconds,
            "ratio": mine.cpu_seconds / beside.cpu_seconds,
            "ratio_quartiles": statistics.quantiles(ratios, n=4, method="inclusive")[::2],
            **_sizes(ours),
            **{f"lora_{name}": value for name, value in _sizes(theirs).items()},
        }  # fmt: skip
        if method.rare is not None:  # last, since it moves the training in time
            ours.controller.steps_done = method.rare.before
            took = in_turns({"ours": Arm(ours.step, 1, warm_up=False)})["ours"].cpu_seconds
            found["rare"] = {"every": method.rare.every, "seconds": max(0.0, took - mine.cpu_seconds)}
        del ours
        gc.collect()
        return found

    def _lora(self, rank: int) -> Training:
        if self.beside is None or self.beside[0] != rank:
            self.beside = None
            self.beside = rank, Training(self.others, lora(rank), self.rank_one)
            for _ in range(WARM):
                self.beside[1].step()
        return self.beside[1]


def _sizes(training: Training) -> dict[str, int]:
    kept: Saved = saved_bytes(training.model, training.forward)
    return {
        "numbers": training.numbers(), "saved_bytes": kept.activations, "saved_in_layers_bytes": kept.layers,
        "copies_bytes": kept.copies, "state_bytes": training.state_bytes(), "frozen_bytes": training.frozen_bytes(),
        "file_bytes": training.file_bytes(),
    }  # fmt: skip
