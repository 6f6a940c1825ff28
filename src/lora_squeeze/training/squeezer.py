"""Squeezer: squeezes a live model on schedule, in a plain PyTorch or accelerate loop.

One call per optimiser step does all of it:

    squeezer = Squeezer(model, optimizer, make_schedule(64, 8, total_steps=1000))
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
    squeezer.finish()
    model.save_pretrained("adapter-r8")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from lora_squeeze.adaptive import Adaptive
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.control import end_control
from lora_squeeze.methods.modes import evaluating
from lora_squeeze.moments import Moments, predicted_increase
from lora_squeeze.post_squeeze import decomposed
from lora_squeeze.ranks import Allocation, Limits, Unit, check_together, choose, price
from lora_squeeze.schedule import Schedule
from lora_squeeze.training.commit import compact, make_room
from lora_squeeze.training.inplace import Squeezed, agreed, check_request, processes, squeeze_
from lora_squeeze.training.learning_rate import follow_stages
from lora_squeeze.training.live import LiveModule, holder_of, live_modules, only_adapter, without_autocast
from lora_squeeze.training.live_ranks import grouped, loss_curve, units_of
from lora_squeeze.training.other_method import STATISTICS, AnyModule, is_other, modules_of
from lora_squeeze.training.resume import follow_loaded_ranks
from lora_squeeze.training.statistics import Statistics, has_rows

_AT_WORK: WeakValueDictionary[tuple[int, str], Squeezer] = WeakValueDictionary()  # by model and adapter


class Squeezer:
    """Squeezes one adapter of a live PEFT model when its schedule says so.

    An adapter of another method than LoRA becomes a LoRA at the first squeeze, see `other_method`. A Squeezer that an
    interrupted run has left with the same adapter is closed.

    Args:
        model: a PEFT model, or a transformers model with an adapter; wrapped by DDP, FSDP2 or torch.compile or not.
        optimizer: the optimiser that trains it; accelerate's wrapper will do.
        schedule: `make_schedule(...)`, or `Adaptive(...)` to squeeze when the spectrum allows it.
        adapter: name of the adapter; default the one that is active and trained.
        allocate: "uniform" gives every module the schedule's rank; "global" spends the parameters of that rank where
            they keep the most energy or, with `data_aware`, where the predicted increase of the loss is lowest.
        optimizer_state: "transport" carries moments into the new coordinates, "reset" begins anew.
        learning_rate: "continue" leaves the curve alone; "restart" runs the whole curve once per stage; "rank"
            multiplies it by sqrt(source rank / rank); "restart-rank" does both. The last three need `scheduler`.
        scheduler: a torch LambdaLR (all schedulers of transformers by name but reduce_lr_on_plateau are).
        data_aware: collect statistics of inputs and gradients while training and truncate in their metric.
        in_place: "replace", "mask" or "auto", as in `squeeze_`.
        loss: called without arguments, without gradients and in eval mode, right before and after each squeeze; its
            values are recorded as the loss jump, the mean over the processes; none where it returns None.
        state: the `state_dict` of an interrupted run, to go on from; the same as `load_state_dict` afterwards, which
            a model that has its later rank already would not reach.

    Raises:
        LoraSqueezeError: the schedule does not begin at the adapter's rank, an adapter that cannot be squeezed, an
            optimiser whose state is not known, a bound on the loss with layers that have no statistics. Nothing has
            changed then.

    Attributes:
        history: one entry per squeeze: step, ranks, energy, parameters, seconds, loss before and after.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        schedule: Schedule | Adaptive,
        *,
        adapter: str | None = None,
        allocate: Allocation = "uniform",
        optimizer_state: str = "transport",
        learning_rate: str = "continue",
        scheduler: Any = None,
        data_aware: bool = False,
        in_place: str = "auto",
        loss: Callable[[], Tensor | None] | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        check_together(allocate)
        self.model, self.optimizer, self.schedule = model, optimizer, schedule
        self.adapter = only_adapter(model) if adapter is None else adapter
        self.optimizer_state, self.in_place, self.loss = optimizer_state, in_place, loss
        self.allocate = allocate
        self.steps_done = 0
        self.history: list[dict[str, Any]] = []
        modules = modules_of(model, self.adapter)
        check_request(modules, optimizer, optimizer_state, in_place)
        self._device = next(modules[0].layer.parameters()).device
        if state is None:
            self._check_schedule(modules)
        else:
            self._check_state(state)
        self.budgets = _budgets(modules, schedule) if state is None else [int(number) for number in state["budgets"]]
        wants_loss = isinstance(schedule, Adaptive) and schedule.loss is not None
        if (data_aware or wants_loss) and is_other(model, self.adapter):
            raise LoraSqueezeError(STATISTICS)
        if wants_loss and (hidden := [m.name for m in modules if isinstance(m, LiveModule) and not has_rows(m)]):
            raise LoraSqueezeError(
                f"{hidden[0]}: the loss increase cannot be predicted for this layer; bound the energy instead"
            )
        follow_stages(learning_rate, scheduler, schedule)
        key = id(holder_of(model)), self.adapter
        if (before := _AT_WORK.get(key)) is not None:
            before.close()
        _AT_WORK[key] = self
        self.data_aware = data_aware
        self.statistics = Statistics(model, self.adapter) if data_aware or wants_loss else None
        self._following = follow_loaded_ranks(model, self.adapter, lambda: self.optimizer)
        if state is not None:
            self.load_state_dict(state)

    @property
    def rank(self) -> int:
        """The largest rank of any module now, as PEFT counts it."""
        return max(m.rank() * m.step for m in modules_of(self.model, self.adapter))

    @property
    def target_rank(self) -> int:
        """The rank at the end."""
        return self.schedule.rank if isinstance(self.schedule, Adaptive) else self.schedule.ranks[-1]

    def step(self, loss_scale: float | None = None) -> Squeezed | None:
        """One optimiser step is done: squeeze if it is time. Call it after optimizer.step().

        Args:
            loss_scale: what the loss was multiplied by before backward, for the statistics: with a GradScaler of your
                own, its get_scale() before its update(). Default: that of accelerate's optimiser, or 1.

        Returns:
            What was done; None where it is not time.
        """
        self.steps_done += 1
        if self.statistics is not None:
            scaler = getattr(self.optimizer, "scaler", None)  # accelerate's, for float16
            if loss_scale is None:
                loss_scale = 1.0 if scaler is None else float(scaler.get_scale())
            self.statistics.step(loss_scale)
        if isinstance(self.schedule, Adaptive):
            ranks = self._adaptive_ranks(self.schedule) if self.schedule.due(self.steps_done) else None
            return None if ranks is None else self._squeeze(ranks=ranks)
        stage = self.schedule.stage_after(self.steps_done)
        return None if stage == self.schedule.stage_after(self.steps_done - 1) else self._squeeze_to(stage)

    def finish(self) -> Squeezed | None:
        """Training is over, early or as planned: squeeze what is still above the target, make all parameters small.

        Returns:
            What was done; None where the target had been reached.
        """
        done = self._squeeze_to(-1) if self._above_target() else None
        compact(self.model, optimizer=self.optimizer, adapter=self.adapter, optimizer_state=self.optimizer_state)
        self.close()
        return done

    def close(self) -> None:
        """Remove all hooks from the model."""
        self._following.remove()
        if self.statistics is not None:
            self.statistics.close()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs beside model and optimiser: plain numbers, texts and tensors."""
        state = self.plain_state()
        if self.statistics is not None:
            state["statistics"] = self.statistics.state_dict()
        return state

    def plain_state(self) -> dict[str, Any]:
        """The state without the statistics, ready for JSON."""
        modules = modules_of(self.model, self.adapter)
        return {
            "steps_done": self.steps_done,
            "schedule": _described(self.schedule),
            "ranks": {m.name: m.width * m.step for m in modules},
            "budgets": self.budgets,
            "history": [dict(entry) for entry in self.history],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint. The model's layers take the checkpoint's ranks; load model and optimiser next.

        Raises:
            LoraSqueezeError: the checkpoint was written under another schedule, or after an adapter of another method
                had become a LoRA.
        """
        self._check_state(state)
        if not is_other(self.model, self.adapter):
            make_room(self.model, state["ranks"], optimizer=self.optimizer, adapter=self.adapter)
        self.steps_done, self.budgets = int(state["steps_done"]), [int(number) for number in state["budgets"]]
        self.history = [dict(entry) for entry in state["history"]]
        if self.statistics is not None and "statistics" in state:
            self.statistics.load_state_dict(state["statistics"])

    def _check_state(self, state: Mapping[str, Any]) -> None:
        mine, theirs = _described(self.schedule), dict(state["schedule"])
        changed = [
            key for key in sorted(mine.keys() | theirs.keys()) if _plain(mine.get(key)) != _plain(theirs.get(key))
        ]
        if changed:
            told = "; ".join(f"{key} was {theirs.get(key)} and is {mine.get(key)}" for key in changed)
            raise LoraSqueezeError(
                f"the checkpoint was trained under another schedule: {told}; go on with the same settings and the same "
                "number of steps, or begin anew"
            )
        if is_other(self.model, self.adapter) and state["history"]:
            raise LoraSqueezeError(
                f"in this checkpoint the adapter {self.adapter!r} is a LoRA already; make the model from it: "
                "PeftModel.from_pretrained(base_model, checkpoint, is_trainable=True)"
            )

    def _squeeze_to(self, stage: int) -> Squeezed:
        if is_other(self.model, self.adapter):  # its method may have found lower ranks than the schedule's
            end_control(holder_of(self.model), self.adapter)
        if isinstance(self.schedule, Schedule) and self.allocate == "uniform":
            return self._squeeze(rank=min(self.schedule.ranks[stage], self.rank))
        allocate = self.schedule.allocate if isinstance(self.schedule, Adaptive) else self.allocate
        return self._squeeze(params=self.budgets[stage], allocate=allocate)

    def _squeeze(self, **how: Any) -> Squeezed:
        before = self._loss()
        with without_autocast(self.model):
            done, predicted = self._squeezed(**how)
        after = self._loss()
        entry = {
            "step": self.steps_done,
            "rank": done.rank,
            "lowest_rank": min(done.ranks.values()),
            "energy": done.energy,
            "parameters": done.parameters,
            "parameters_after": done.parameters_after,
            "seconds": done.seconds,
        }
        if predicted is not None:
            entry["loss_predicted"] = predicted
        if before is not None and after is not None:
            entry |= {"loss_before": before, "loss_after": after}
        self.history.append(entry)
        return done

    def _squeezed(self, **how: Any) -> tuple[Squeezed, float | None]:
        """What was done, and the increase of the loss predicted for it where statistics tell one."""
        moments: dict[str, Moments] = {}
        if self.statistics is not None:
            self.statistics.drop_misfits()
            self.statistics.synchronise()
            moments = self.statistics.moments()
        scales = {m.path: m.scale for m in modules_of(self.model, self.adapter) if isinstance(m, LiveModule)}
        done = squeeze_(
            self.model,
            optimizer=self.optimizer,
            adapter=self.adapter,
            optimizer_state=self.optimizer_state,
            moments=moments if self.data_aware else None,
            in_place=self.in_place,
            **how,
        )
        if self.statistics is not None:
            self.statistics.map(done.maps)
        if not moments:
            return done, None
        known = [path for path in done.maps if path in moments]
        increases = [predicted_increase(moments[path], scales[path], *done.maps[path]) for path in known]
        return done, sum(float(increase.sum()) for increase in increases)

    def _correction(self) -> float:
        """How many times larger than predicted the loss jump was at worst, at least 1.

        The prediction takes modules as independent, and they are not: it is too small, by a factor that depends on the
        task and grows with the rank.
        """
        told = [e for e in self.history if "loss_after" in e and e.get("loss_predicted", 0) > 0]
        return max([1.0, *(float((e["loss_after"] - e["loss_before"]) / e["loss_predicted"]) for e in told)])

    def _loss(self) -> float | None:
        if self.loss is None:
            return None
        quiet = self.statistics.pause() if self.statistics is not None else nullcontext()
        with quiet, evaluating(self.model), torch.no_grad():
            found = self.loss()
        return _over_processes(None if found is None else float(found), self._device)

    def _adaptive_ranks(self, schedule: Adaptive) -> dict[str, int] | None:
        modules = modules_of(self.model, self.adapter)
        if schedule.met(_bare(modules), self.budgets[-1]):
            return None
        with without_autocast(self.model):
            return self._chosen_ranks(schedule, modules)

    def _chosen_ranks(self, schedule: Adaptive, modules: Sequence[AnyModule]) -> dict[str, int] | None:
        updates = [module.update() for module in modules]
        spectra = [item.S for item in decomposed([module.name for module in modules], updates)]
        units = units_of(modules, [update.rank for update in updates], spectra)
        curves = None
        if schedule.loss is not None and self.statistics is not None:
            self.statistics.synchronise()
            moments, factor = self.statistics.moments(), self._correction()
            trained = [m for unit, members in units if not _still(unit) for m in members]
            if moments and all(m.path in moments for m in trained):
                curves = [[factor * loss for loss in _loss_curve(unit, members, moments)] for unit, members in units]
            elif self.steps_done < schedule.deadline_step:
                return None
            else:  # no gradient has come past the B of a layer so far: there is nothing to predict its loss from
                schedule = replace(schedule, loss=None)
        found = schedule.choose(self.steps_done, [unit for unit, _ in units], self.budgets[-1], curves)
        chosen = agreed(found or [0] * len(units), self._device)
        if not any(chosen):
            return None
        return {m.name: k * m.step for k, (_, members) in zip(chosen, units, strict=True) for m in members}

    def _check_schedule(self, modules: Sequence[AnyModule]) -> None:
        top = max(m.width * m.step for m in modules)
        if isinstance(self.schedule, Adaptive):
            if self.schedule.rank > top:
                raise LoraSqueezeError(f"target rank {self.schedule.rank} is above the adapter's rank {top}")
        elif top != self.schedule.ranks[0]:
            raise LoraSqueezeError(
                f"the schedule begins at rank {self.schedule.ranks[0]}, but the adapter has rank {top}; train it with "
                f"LoraConfig(r={self.schedule.ranks[0]}), or make the schedule from {top}"
            )

    def _above_target(self) -> bool:
        if is_other(self.model, self.adapter):
            return True
        modules = live_modules(self.model, self.adapter)
        if isinstance(self.schedule, Schedule) and self.allocate == "uniform":
            return any(m.rank() > max(1, self.target_rank // m.step) for m in modules)
        return sum(m.cost * m.rank() for m in modules) > self.budgets[-1]


def _bare(modules: Sequence[AnyModule]) -> list[Unit]:
    """What shares a rank, with present ranks and costs but without spectra."""
    return [
        Unit(name, max(m.rank() for m in members), [], sum(m.cost for m in members), 1, max(m.step for m in members))
        for name, members in grouped(modules).items()
    ]


def _budgets(modules: Sequence[AnyModule], schedule: Schedule | Adaptive) -> list[int]:
    """Numbers in all factors at each rank of the schedule, taken at the source ranks: later these are gone."""
    units = _bare(modules)
    if isinstance(schedule, Adaptive):
        return [schedule.budget(units)]
    return [price(units, choose(units, "rank", rank, "uniform", Limits(1))) for rank in schedule.ranks]


def _over_processes(value: float | None, device: torch.device) -> float | None:
    """The mean over the processes that have a value: all must decide alike by it."""
    if processes() == 1:
        return value
    told = torch.tensor([value or 0.0, value is not None], dtype=torch.float64, device=device)
    torch.distributed.all_reduce(told)
    total, count = told.tolist()
    return total / count if count else None


def _loss_curve(unit: Unit, members: Sequence[AnyModule], moments: Mapping[str, Moments]) -> list[float]:
    """Predicted increase of the loss at each rank; none where the update is still zero, seen or not."""
    return [0.0] * (unit.rank + 1) if _still(unit) else loss_curve(members, moments)


def _still(unit: Unit) -> bool:
    """Whether an update is zero so far."""
    return not any(map(any, unit.values))


def _described(schedule: Schedule | Adaptive) -> dict[str, Any]:
    return schedule.to_json() if isinstance(schedule, Schedule) else {"kind": "adaptive", **asdict(schedule)}


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
