"""What a task is: examples of question and answer, split once and for all."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

Item = TypeVar("Item")
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One question with its only right answer.

    Args:
        prompt: what the model reads. A language model goes on writing after it, so it ends without a space, often in a
            sign such as "=" or ":".
        answer: what it has to write, without a leading space; for a classification, the name of the class.
        image: picture that goes before the prompt, unsigned bytes of shape (3, height, width), for vision-language
            tasks.
    """

    prompt: str
    answer: str
    image: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Data:
    """A task.

    Args:
        name: of the task, as in the rows of results.
        source: where the examples come from: package with version, file, and how they are made from it.
        train: examples to learn from.
        validation: examples that learning rates are chosen on.
        test: examples that results are reported on, of no use before.
        classes: the names of all classes, where every answer is one of a few; an encoder needs them.
        prompt_tokens, answer_tokens: room for a prompt and for an answer with its end, in tokens of SmolLM2. Examples
            that need more are passed over, the same ones in every run.
    """

    name: str
    source: str
    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    classes: tuple[str, ...] = ()
    prompt_tokens: int = 16
    answer_tokens: int = 8


def place(key: Hashable, salt: str = "") -> float:
    """A number in [0, 1) that depends on the key alone: neither the order of a source nor its other entries move it."""
    digest = hashlib.sha256(f"{salt}:{key}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def split(items: Iterable[tuple[Hashable, Item]], salt: str) -> dict[str, list[Item]]:
    """Items by part, 80 % "train", 10 % "validation", 10 % "test", each in the order of a hash of its key.

    Args:
        items: key and item; items of one key (a word, say, or a photograph) stay on one side.
        salt: the name of the task, so that tasks of one source are cut differently.
    """
    found: dict[str, list[Item]] = {part: [] for part in PARTS}
    for where, _, item in sorted(((place(key, salt), i, item) for i, (key, item) in enumerate(items))):
        found["train" if where < 0.8 else "validation" if where < 0.9 else "test"].append(item)
    return found
