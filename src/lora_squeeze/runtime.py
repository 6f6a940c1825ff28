"""What a training run meets: the device, its number formats, and libraries that talk too much."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lora_squeeze.errors import LoraSqueezeError


def choose_device(asked: str | None) -> torch.device:
    """The device asked for, else the best there is: CUDA, Apple's MPS, CPU.

    Raises:
        LoraSqueezeError: the name is no device, or this machine or this build of torch has none of that kind.
    """
    if asked is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(asked)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise LoraSqueezeError(
            f"device {asked!r} cannot be used: {reason}; take cpu, cuda or mps, or leave the option out"
        ) from error
    return device


def choose_precision(device: torch.device) -> str:
    """ "bfloat16" where the hardware multiplies it faster, else "float32".

    A processor without bfloat16 instructions emulates them, more than ten times slower than float32. With those of
    AVX-512 alone, without AMX, a training step of SmolLM2 took 1.4 to 1.5 times as long as in float32 on one of Intel's
    and half as long on one of AMD's (records/2026-11-30-bfloat16-on-processors), so there the maker decides.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        faster = ["amx_bf16", "bf16"]
        if str(capabilities.get("cpu_name", "")).startswith("AMD"):
            faster.append("avx512_bf16")
        if any(capabilities.get(name) for name in faster):
            return "bfloat16"
    return "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Products in that number format; the weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the progress bars of transformers, which would cut through ours, and one notice to PEFT's authors."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging  # its functions carry no annotations
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
