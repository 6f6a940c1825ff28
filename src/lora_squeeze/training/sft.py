"""Supervised fine-tuning with a squeeze in it, for people without a training script: a thin layer over TRL.

What TRL's SFTTrainer does is left to it: tokens, batches, loss, optimiser, checkpoints. Here are the checks before
anything is loaded, the squeeze (`SqueezeCallback`, or at once with `adapter`), and the folder that comes out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import peft
from lora_squeeze.formats.folder import check_target, replace_folder
from lora_squeeze.training.dataset import FORMS, PROMPT_FORMS, Data, load_data
from lora_squeeze.training.libraries import (
    PACKAGES,
    check_packages,
    checkpointing,
    first_line,
    open_adapter,
    open_model,
    open_tokenizer,
    quiet,
    random_state_put_back,
)
from lora_squeeze.training.sft_checkpoints import checkpoint_folder, last_checkpoint, remove_checkpoints
from lora_squeeze.training.sft_method import as_plain_lora, controller_callback, method_config, train_at_own_rates
from lora_squeeze.training.sft_settings import TrainSettings

TRAINING_NAME = "training.json"
_STUDENT = "default"  # PEFT's name for an adapter that is given none

Report = Callable[[int, int, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Trained:
    """What came out.

    Args:
        settings: what was asked.
        steps: optimiser steps in all.
        rank: the adapter's rank.
        squeezes: one entry per squeeze: step, rank, energy, parameters, seconds, loss right before and after.
        losses: step -> training loss, the mean since the entry before.
        evaluations: step -> loss of the evaluation examples.
        seconds: time taken by this run.
    """

    settings: TrainSettings
    steps: int
    rank: int
    squeezes: list[dict[str, Any]]
    losses: dict[int, float]
    evaluations: dict[int, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """What is written beside the adapter, with the versions of the libraries."""
        versions = {name: version(name) for name in ("lora-squeeze", "torch", *PACKAGES)}
        return {**asdict(self), "settings": self.settings.to_json(), "versions": versions}


def train(settings: TrainSettings, report: Report | None = None) -> Trained:
    """Train a LoRA that ends at the target rank, and write it as a plain PEFT adapter.

    Args:
        settings: see TrainSettings.
        report: called at every log with the steps done, all steps and what was logged.

    Returns:
        Ranks, losses and squeezes; they are in the output as training.json too. The output holds the adapter, PEFT's
        model card and the tokenizer as well.

    Raises:
        LoraSqueezeError: a request that cannot be met; nearly all are found before the model is loaded, all before the
            first step. Nothing is written then.

    Notes:
        One process and one device. For several, put `SqueezeCallback` into a script of your own.
        The global random generators of Python, NumPy and torch are used by TRL and put back afterwards.

    Example:
        >>> train(TrainSettings("my-model", "examples.jsonl", Path("adapter-r8")))  # doctest: +SKIP
    """
    start = time.perf_counter()
    _check_machine(settings)
    with quiet(), random_state_put_back():
        plan = _plan(settings)
        with checkpoint_folder(settings, keep=plan.checkpoint is not None):
            model, squeezes = _model(settings)
            trainer = _trainer(settings, plan, model, report)
            if settings.method is not None:
                train_at_own_rates(trainer, _STUDENT)
            trainer.train(resume_from_checkpoint=None if plan.checkpoint is None else str(plan.checkpoint))
            log = trainer.state.log_history
            plain = None if settings.method is None else as_plain_lora(settings, trainer, _STUDENT)
            if plain is not None:
                squeezes = [_told(plan.steps, plain)]
            trained = Trained(
                settings,
                plan.steps,
                _rank_of(trainer.model) if plain is None else plain.rank,
                squeezes if plan.callback is None else plan.callback.history,
                {entry["step"]: entry["loss"] for entry in log if "loss" in entry},
                {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry},
                round(time.perf_counter() - start, 3),
            )
            _save(trained, plan, trainer.model, plain)
    remove_checkpoints(settings)
    return trained


@dataclass(frozen=True)
class _Plan:
    """What is known before the model is loaded: nothing of it has changed a file."""

    checkpoint: Path | None
    source: Adapter | None
    data: Data
    held: Data | None
    steps: int
    callback: Any
    tokenizer: Any


def _plan(settings: TrainSettings) -> _Plan:
    check_target(settings.output.expanduser(), force=settings.force)
    checkpoint = last_checkpoint(settings)
    source = None if settings.adapter is None else _source(settings.adapter, settings.rank)
    forms, subset = PROMPT_FORMS if settings.distill else FORMS, settings.subset
    data = load_data(settings.data, split=settings.split, subset=subset, forms=forms)
    held = None
    if settings.eval_data is not None:
        held = load_data(settings.eval_data, split=settings.eval_split, subset=subset, forms=forms)
    steps = _steps(settings, len(data.rows))
    callback = _callback(settings, steps) if source is None and settings.method is None else None
    if settings.method is not None:
        method_config(settings, _targets(settings))
    tokenizer = open_tokenizer(settings.model, chat=data.chat or (held is not None and held.chat))
    return _Plan(checkpoint, source, data, held, steps, callback, tokenizer)


def _check_machine(settings: TrainSettings) -> None:
    check_packages("training")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise LoraSqueezeError("this trains in one process; for several, use SqueezeCallback in a script of your own")
    if not settings.cpu and torch.cuda.device_count() > 1:
        raise LoraSqueezeError("several GPUs are visible, and this uses one: choose it with CUDA_VISIBLE_DEVICES=0")
    if settings.report_to != "none":
        from transformers.integrations.integration_utils import get_available_reporting_integrations

        known = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
        for tracker in settings.report_to.split(","):
            if tracker not in known:
                raise LoraSqueezeError(f"no tracker {tracker!r} is installed; there are {', '.join(known) or 'none'}")


def _source(adapter: str, rank: int) -> Adapter:
    """The adapter to continue, by its configuration and header."""
    from lora_squeeze.hub import load

    source = load(adapter)
    if rank >= source.rank:
        raise LoraSqueezeError(f"{adapter} has rank {source.rank}: nothing to squeeze to rank {rank}; lower the rank")
    return source


def _steps(settings: TrainSettings, rows: int) -> int:
    if settings.steps is not None:
        return settings.steps
    per_epoch = math.ceil(math.ceil(rows / settings.batch_size) / settings.gradient_accumulation)
    return math.ceil((1.0 if settings.epochs is None else settings.epochs) * per_epoch)


def _callback(settings: TrainSettings, steps: int) -> Any:
    """The callback, with a schedule that fits the number of steps."""
    from lora_squeeze.adaptive import Adaptive
    from lora_squeeze.schedule import make_schedule
    from lora_squeeze.training.callback import SqueezeCallback

    mode = settings.mode or "in"
    schedule = {name: getattr(settings, name) for name in settings.changed(("squeezes", "last_steps", "energy"))}
    if mode == "in":
        schedule["steps"] = settings.stage_steps
    callback = SqueezeCallback(
        settings.rank,
        mode=mode,
        allocate=settings.allocate,  # type: ignore[arg-type]  # checked with the settings
        optimizer_state=settings.optimizer_state,
        learning_rate=settings.learning_rate_policy,
        data_aware=settings.data_aware,
        **schedule,
    )
    if mode == "adaptive":
        Adaptive(settings.rank, steps, **schedule)
    else:
        make_schedule(settings.first_rank, settings.rank, steps, mode=mode, **schedule)
    return callback


def _model(settings: TrainSettings) -> tuple[Any, list[dict[str, Any]]]:
    """The base model; with an adapter to continue, that on it and squeezed, and what the squeeze has done."""
    from lora_squeeze.runtime import choose_device, choose_precision
    from lora_squeeze.training.inplace import squeeze_

    device = choose_device("cpu" if settings.cpu else None)
    dtype = getattr(torch, settings.dtype or choose_precision(device))
    base = open_model(settings.model, device, dtype)
    if settings.adapter is None:
        return base, []
    model = open_adapter(base, settings.adapter, settings.model, trainable=True)
    done = squeeze_(model, settings.rank, allocate=settings.allocate)  # type: ignore[arg-type]
    told = ("rank", "energy", "parameters", "parameters_after", "seconds")
    return model, [{"step": 0, **{name: getattr(done, name) for name in told}}]


def _trainer(settings: TrainSettings, plan: _Plan, model: Any, report: Report | None) -> Any:
    """TRL's trainer, or ours for distillation, ready to train."""
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl.trainer.sft_trainer import SFTTrainer

    from lora_squeeze.training import distill

    make: Callable[..., Any] = SFTTrainer
    options: dict[str, Any] = {}
    rows: Any = plan.data.rows
    held: Any = plan.held and plan.held.rows
    if settings.distill:
        make, options = distill.DistillTrainer, {"temperature": settings.temperature}
        distill.add_teacher(model, str(settings.adapter))
        needed = plan.steps * settings.batch_size * settings.gradient_accumulation
        rows = _answered(settings, model, plan.tokenizer, plan.data, needed)
        held = plan.held and _answered(settings, model, plan.tokenizer, plan.held, len(held))
    elif settings.adapter is None:
        options["peft_config"] = (
            method_config(settings, _targets(settings))
            if settings.method is not None
            else LoraConfig(
                r=settings.first_rank,
                lora_alpha=2 * settings.first_rank if settings.alpha is None else settings.alpha,
                target_modules=_targets(settings),
                task_type="CAUSAL_LM",
            )
        )
    callbacks = [plan.callback, controller_callback(settings), report and _reporter(report, plan.steps)]
    try:
        trainer = make(
            model=model,
            args=_arguments(settings, plan.steps, model, measured=held is not None),
            train_dataset=rows,
            eval_dataset=held,
            processing_class=plan.tokenizer,
            callbacks=[item for item in callbacks if item is not None],
            **options,
        )
    except LoraSqueezeError:
        raise
    except ValueError as error:
        raise LoraSqueezeError(f"TRL refuses this training: {first_line(error)}") from error
    if not len(trainer.train_dataset):
        raise LoraSqueezeError(f"in no example does anything to learn begin within {settings.max_length} tokens")
    trainer.remove_callback(PrinterCallback)
    return trainer


def _targets(settings: TrainSettings) -> str | list[str]:
    names = [name.strip() for name in settings.targets.split(",")]
    return names[0] if names == ["all-linear"] else names


def _answered(settings: TrainSettings, model: Any, tokenizer: Any, data: Data, needed: int) -> Any:
    """Texts as they are; prompts with the teacher's answers, as many as the training will read."""
    from datasets import Dataset  # type: ignore[import-untyped]

    from lora_squeeze.training.distill import complete_prompts, prompts_of

    if data.form == ("text",):
        return data.rows
    rows = data.rows.shuffle(seed=settings.seed).select(range(needed)) if needed < len(data.rows) else data.rows
    limits = {"new_tokens": settings.generate, "max_length": settings.max_length, "batch_size": settings.batch_size}
    return Dataset.from_list(complete_prompts(model, tokenizer, prompts_of(rows, data.form), **limits))


def _arguments(settings: TrainSettings, steps: int, model: Any, measured: bool) -> Any:
    from trl.trainer.sft_config import SFTConfig

    tenth = max(1, steps // 10)
    return SFTConfig(
        **checkpointing(settings.gradient_checkpointing),
        output_dir=str(settings.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.peak_rate,
        lr_scheduler_type="cosine",
        warmup_steps=settings.warmup,  # below 1, this is a share
        max_length=settings.max_length,
        bf16=model.dtype == torch.bfloat16,
        use_cpu=model.device.type == "cpu",
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="steps" if measured else "no",
        eval_steps=tenth,
        save_strategy="no" if settings.save_steps == 0 else "steps",
        save_steps=settings.save_steps or tenth,
        save_total_limit=2,
        logging_steps=max(1, steps // 100),
        report_to=settings.report_to.split(","),
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
    )


def _reporter(report: Report, steps: int) -> Any:
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            report(state.global_step, steps, dict(logs or {}))

    return Reporter()


def _rank_of(model: Any) -> int:
    from lora_squeeze.training.live import live_modules

    return max(module.rank() * module.step for module in live_modules(model, _STUDENT))


def _told(step: int, plain: Adapter) -> dict[str, Any]:
    """The squeeze of another method's update, in the words of the others."""
    return {"step": step, "rank": plain.rank, "energy": plain.report.energy}


def _save(trained: Trained, plan: _Plan, model: Any, plain: Adapter | None) -> None:
    """The output, whole or not at all."""
    settings = trained.settings
    # Only an adapter that brought full embeddings has them to save. PEFT would ask the hub whether they have grown.
    extras = {} if plan.source is None else plan.source.extras
    embeddings = any(extra.kind == "embedding" for extra in extras.values())
    owned = (*peft.OWNED, *peft.COMPANIONS, TRAINING_NAME)
    with replace_folder(settings.output.expanduser(), force=settings.force, owned=owned) as folder:
        if plain is None:
            model.save_pretrained(folder, selected_adapters=[_STUDENT], save_embedding_layers=embeddings)
        else:
            plain.save(settings.checkpoints / "plain", force=True)
            shutil.copytree(settings.checkpoints / "plain", folder, dirs_exist_ok=True)
        plan.tokenizer.save_pretrained(folder)
        (folder / TRAINING_NAME).write_text(json.dumps(trained.to_json(), indent=2) + "\n", encoding="utf-8")
