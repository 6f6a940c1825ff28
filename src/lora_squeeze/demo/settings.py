"""How much is trained and measured, and on which device."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from lora_squeeze.errors import LoraSqueezeError


@dataclass(frozen=True)
class Settings:
    """What decides the trained adapter; an adapter trained with the same settings need not be trained again.

    Args:
        model: which base model, as `BaseModel.origin` names it.
        seed: of the split, the order of the words and the initial factors.
        steps: optimiser steps.
        batch: words per step.
        rank: source rank.
        alpha: PEFT's lora_alpha, so the scale is alpha / rank.
        learning_rate: highest value, after the warm-up.
        warmup: share of the steps in which the learning rate rises from 0.
        precision: number format of the products, "float32" or "bfloat16".
    """

    model: str
    seed: int
    steps: int
    batch: int = 20
    rank: int = 64
    alpha: int = 128
    learning_rate: float = 5e-4
    warmup: float = 0.1
    precision: str = "float32"


@dataclass(frozen=True)
class Budget:
    """Default number of optimiser steps and number of held-out words that are measured."""

    steps: int
    held_out: int


FULL = Budget(steps=80, held_out=200)
QUICK = Budget(steps=20, held_out=50)


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
    """ "bfloat16" where the hardware multiplies it, else "float32".

    A processor without bfloat16 instructions emulates them, more than ten times slower than float32.
    """
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if device.type == "cpu":
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        if any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16")):
            return "bfloat16"
    return "float32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[None]:
    """Products in that number format; the weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
