"""How much is trained and measured."""

from dataclasses import dataclass


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
