"""`train` with another method than LoRA: its configuration, and the plain LoRA that its update becomes."""

from __future__ import annotations

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.training.sft_settings import TrainSettings

_FOLDER = "trained-method"
_FIXING_BATCHES = 32


def method_config(settings: TrainSettings, targets: str | list[str]) -> Any:
    """PEFT's configuration of the method that was asked for.

    Args:
        settings: `method` is a name of `lora_squeeze.methods.CATALOGUE`, or of PEFT.
        targets: target_modules.

    Raises:
        LoraSqueezeError: no such method, one that changes no weights, options that it does not have or refuses.
    """
    import lora_squeeze.methods.adapters
    import lora_squeeze.methods.ranks  # noqa: F401 (both register their methods with PEFT)
    from lora_squeeze.formats.peft_methods import row_of

    name = str(settings.method)
    kinds = _kinds()
    if name.lower() not in kinds:
        raise LoraSqueezeError(f"no method {name!r}; `lora-squeeze methods` lists them, PEFT has {', '.join(kinds)}")
    made = kinds[name.lower()]
    row = row_of({"peft_type": name.upper()})
    if row.route == "impossible":
        raise LoraSqueezeError(f"{row.name} cannot become a LoRA: {row.why}")
    defaults = {field.name: field.default for field in dataclasses.fields(made)}
    known = set(defaults)
    given = {"target_modules": targets, "task_type": "CAUSAL_LM", **_options(settings.method_options)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise LoraSqueezeError(f"{row.name} has no option {unknown[0]!r}; there are {', '.join(sorted(known))}")
    if "r" in known and (defaults["r"] is not None or settings.source_rank is not None):  # None: all of them
        given.setdefault("r", settings.first_rank)
    for option in ("alpha", "lora_alpha"):
        if settings.alpha is not None and option in known:
            given.setdefault(option, settings.alpha)
    try:
        return made(**given)
    except (ValueError, TypeError) as error:
        raise LoraSqueezeError(f"{row.name}: {str(error).splitlines()[0]}") from error


def _kinds() -> dict[str, Any]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return {str(getattr(kind, "value", kind)).lower(): made for kind, made in PEFT_TYPE_TO_CONFIG_MAPPING.items()}


def _options(text: str | None) -> dict[str, Any]:
    """ "bases=512,keep_bases=false" as a dict; values are JSON where they can be read as such, else text."""
    found: dict[str, Any] = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, value = part.partition("=")
        if not equals:
            raise LoraSqueezeError(f"method_options must read name=value,name=value, got {part!r}")
        try:
            found[name.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[name.strip()] = value.strip()
    return found


def controller_callback(settings: TrainSettings) -> Any:
    """What the method does around the optimiser's steps."""
    from lora_squeeze.methods.callback import ControllerCallback

    return None if settings.method is None else ControllerCallback()


def train_at_own_rates(trainer: Any, adapter: str) -> None:
    """Give the trainer an optimiser with the learning rates that the method asks for."""
    from lora_squeeze.methods.control import parameter_groups

    args = trainer.args
    groups = parameter_groups(trainer.model, args.learning_rate, weight_decay=args.weight_decay, adapter=adapter)
    if len(groups) > 1:
        kind, options = trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        trainer.optimizer = kind(groups, **options)


def as_plain_lora(settings: TrainSettings, trainer: Any, adapter: str) -> Adapter:
    """The trained update as a plain LoRA at the target rank, lazily: its files stay beside the checkpoints.

    An update that depends on the input is fixed first, at its mean over the first training batches.

    Raises:
        LoraSqueezeError: the method's update cannot be read as a LoRA.
    """
    from lora_squeeze.sources import open_source

    model = trainer.model
    if not getattr(model.peft_config[adapter], "static", True):
        from lora_squeeze.methods.adapters.queryable_lora import fix_routes

        fix_routes(model, islice(trainer.get_train_dataloader(), _FIXING_BATCHES), adapter)
    folder = settings.checkpoints / _FOLDER
    model.save_pretrained(folder, selected_adapters=[adapter], save_embedding_layers=False)
    found = open_source(folder, base=_base(settings))
    return found.squeeze(rank=settings.rank)


def _base(settings: TrainSettings) -> str:
    path = Path(settings.model).expanduser()
    return str(path) if path.exists() else settings.model
