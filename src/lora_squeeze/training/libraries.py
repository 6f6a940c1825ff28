"""The libraries that training and calibration stand on: are they there, what they load, and keeping them quiet."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import torch

from lora_squeeze.errors import LoraSqueezeError

PACKAGES = ("accelerate", "datasets", "peft", "transformers", "trl")


def check_packages(work: str) -> None:
    """Refuse where one of them is not installed.

    Args:
        work: what needs them, for the message.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise LoraSqueezeError(f"{work} needs {' and '.join(missing)}: pip install 'lora-squeeze[train]'")


def open_tokenizer(model: str, chat: bool) -> Any:
    """The model's tokenizer, with a token for padding.

    Args:
        model: folder or hub id.
        chat: whether a chat template is needed.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise LoraSqueezeError(
            f"{model}: no model with a tokenizer here or on the hub ({first_line(error)})"
        ) from error
    if tokenizer.eos_token is None:
        raise LoraSqueezeError(f"{model}: its tokenizer has no end-of-text token, so no example can end; set eos_token")
    if chat and tokenizer.chat_template is None:
        raise LoraSqueezeError(f"{model}: the data are messages, but its tokenizer has no chat template; use texts")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def open_model(model: str, device: torch.device, dtype: torch.dtype) -> Any:
    """A language model of a folder or of the hub, on its device."""
    from transformers import AutoModelForCausalLM

    try:
        base: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        return base.to(device)
    except (OSError, ValueError) as error:
        raise LoraSqueezeError(f"{model}: no language model to be loaded ({first_line(error)})") from error


def open_adapter(base: Any, adapter: str, model: str, *, trainable: bool) -> Any:
    """PEFT's model of a base model and an adapter of it."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base, adapter, is_trainable=trainable)
    except (RuntimeError, ValueError) as error:
        raise LoraSqueezeError(f"{adapter} does not fit {model} ({first_line(error)})") from error


def checkpointing(on: bool) -> dict[str, Any]:
    """The option of a trainer's arguments, by the name that transformers 5.23 gives it; the old one warns there."""
    from trl.trainer.sft_config import SFTConfig

    names = {field.name for field in fields(SFTConfig)}
    return {"activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing": on}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars of datasets where nobody would see them move."""
    import datasets  # type: ignore[import-untyped]

    from lora_squeeze.runtime import quiet_libraries

    shown = not sys.stderr.isatty() and datasets.utils.is_progress_bar_enabled()
    if shown:
        datasets.disable_progress_bars()
    try:
        with quiet_libraries():
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def random_state_put_back() -> Iterator[None]:
    """TRL and PEFT draw from the global generators; afterwards they are as they were."""
    import numpy

    python, arrays = random.getstate(), numpy.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


def first_line(error: Exception) -> str:
    """The first line of what another library says."""
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.300}"
