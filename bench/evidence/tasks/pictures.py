"""Ten questions about pictures of handwritten digits, for a vision-language model.

==================  ==================================  ============  ==============================================
task                on the picture                      prompt        answer
==================  ==================================  ============  ==============================================
picture-digit       one digit                           digit:        the digit
picture-parity      one digit                           parity:       even, odd
picture-count       one to six digits                   count:        how many
picture-compare     one on the left, one on the right   larger:       left, right, equal
picture-sum         two digits                          sum:          their sum
picture-difference  two digits                          minus:        larger minus smaller
picture-colour      three digits in different colours   caption:      the colour of the first in reading order
picture-place       one digit                           where:        its cell, such as "top left"
picture-binding     three digits in different colours   caption: red  the digit of that colour
picture-row         three digits in one row             row:          the digits from left to right
==================  ==================================  ============  ==============================================

What is not said is drawn by lot: cells, colours, ground, who wrote the digits. Answers that are classes are equally
likely. Pictures of a part hold handwriting of that part alone, the same split as in pre-training (bench/evidence/vlm).
The prompts of picture-colour and picture-binding begin as a caption does in pre-training, which the frozen model knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import Random

from bench.evidence.data import PARTS, Data, Example
from bench.evidence.vlm.canvas import CELLS, COLOURS, GRID, Mark, Scene, draw
from bench.evidence.vlm.digits import digits_source, handwriting

COUNTS = {"train": 3200, "validation": 512, "test": 512}
_DIGITS = tuple(str(digit) for digit in range(10))
_LEFT, _RIGHT = CELLS.index("left"), CELLS.index("right")


@dataclass(frozen=True)
class Question:
    """What stands on a picture, and what is asked."""

    scene: Scene
    prompt: str
    answer: str


def ask_digit(lots: Random) -> Question:
    """One digit: which?"""
    digit = lots.randrange(10)
    return Question(_scattered(lots, [digit]), "digit:", str(digit))


def ask_parity(lots: Random) -> Question:
    """One digit: even or odd?"""
    digit = lots.randrange(10)
    return Question(_scattered(lots, [digit]), "parity:", "odd" if digit % 2 else "even")


def ask_count(lots: Random) -> Question:
    """How many digits?"""
    count = lots.randint(1, 6)
    return Question(_scattered(lots, [lots.randrange(10) for _ in range(count)]), "count:", str(count))


def ask_compare(lots: Random) -> Question:
    """Left and right: on which side is the larger digit?"""
    answer = lots.choice(("left", "right", "equal"))
    small, large = sorted(lots.sample(range(10), 2))
    left, right = {"left": (large, small), "right": (small, large), "equal": (small, small)}[answer]
    scene = (Mark(_LEFT, left, _colour(lots)), Mark(_RIGHT, right, _colour(lots)))
    return Question(scene, "larger:", answer)


def ask_sum(lots: Random) -> Question:
    """Two digits: their sum."""
    digits = [lots.randrange(10), lots.randrange(10)]
    return Question(_scattered(lots, digits), "sum:", str(sum(digits)))


def ask_difference(lots: Random) -> Question:
    """Two digits: the larger one minus the smaller one."""
    difference = lots.randrange(10)
    small = lots.randrange(10 - difference)
    digits = [small, small + difference]
    return Question(_scattered(lots, digits), "minus:", str(difference))


def ask_colour(lots: Random) -> Question:
    """Three digits in different colours: the colour of the first in reading order."""
    scene = _colourful(lots)
    return Question(scene, "caption:", min(scene).colour)


def ask_place(lots: Random) -> Question:
    """One digit: its cell."""
    scene = _scattered(lots, [lots.randrange(10)])
    return Question(scene, "where:", CELLS[scene[0].cell])


def ask_binding(lots: Random) -> Question:
    """Three digits in different colours: the one in a given colour."""
    scene = _colourful(lots)
    return Question(scene, f"caption: {scene[0].colour}", str(scene[0].digit))


def ask_row(lots: Random) -> Question:
    """Three digits in one row, from left to right."""
    row = lots.randrange(GRID)
    scene = tuple(Mark(row * GRID + k, lots.randrange(10), _colour(lots)) for k in range(GRID))
    return Question(scene, "row:", "".join(str(mark.digit) for mark in scene))


def _scattered(lots: Random, digits: list[int]) -> Scene:
    """Digits in cells and colours by lot."""
    cells = lots.sample(range(len(CELLS)), len(digits))
    return tuple(Mark(cell, digit, _colour(lots)) for cell, digit in zip(cells, digits, strict=True))


def _colourful(lots: Random) -> Scene:
    """Three digits in different colours."""
    cells, colours = lots.sample(range(len(CELLS)), 3), lots.sample(tuple(COLOURS), 3)
    return tuple(Mark(cell, lots.randrange(10), colour) for cell, colour in zip(cells, colours, strict=True))


def _colour(lots: Random) -> str:
    return lots.choice(tuple(COLOURS))


@dataclass(frozen=True)
class Kind:
    """A kind of question.

    Args:
        ask: makes one.
        prompt_tokens, answer_tokens: room for a prompt, and for an answer with its end.
        classes: all answers, if they are few.
    """

    ask: Callable[[Random], Question]
    prompt_tokens: int
    answer_tokens: int
    classes: tuple[str, ...] = ()


KINDS = {
    "picture-digit": Kind(ask_digit, 2, 3, _DIGITS),
    "picture-parity": Kind(ask_parity, 3, 2, ("even", "odd")),
    "picture-count": Kind(ask_count, 2, 3, _DIGITS[1:7]),
    "picture-compare": Kind(ask_compare, 3, 2, ("left", "right", "equal")),
    "picture-sum": Kind(ask_sum, 2, 4),
    "picture-difference": Kind(ask_difference, 2, 3, _DIGITS),
    "picture-colour": Kind(ask_colour, 2, 2, tuple(COLOURS)),
    "picture-place": Kind(ask_place, 2, 3, CELLS),
    "picture-binding": Kind(ask_binding, 3, 3, _DIGITS),
    "picture-row": Kind(ask_row, 2, 5),
}


def questions(name: str, part: str) -> list[Question]:
    """The questions of one part of a task, the same at every call."""
    lots = Random(f"{name} {part}")
    return [KINDS[name].ask(lots) for _ in range(COUNTS[part])]


def make(name: str) -> Data:
    """A task with its pictures.

    Raises:
        SystemExit: the package with the digits is missing; says which.

    Notes:
        About two seconds, and 30 MB of pictures.
    """
    kind, writing = KINDS[name], handwriting()
    examples = {}
    for part in PARTS:
        asked = questions(name, part)
        seed = Random(f"{name} {part} pictures").getrandbits(32)
        pictures = draw([question.scene for question in asked], writing[part], seed)
        examples[part] = [
            Example(question.prompt, question.answer, picture)
            for question, picture in zip(asked, pictures, strict=True)
        ]
    return Data(
        name=name,
        source=f"{digits_source()}; digits in colour on 48 x 48 pixels, drawn by bench/evidence/tasks/pictures.py",
        **examples,
        classes=kind.classes,
        prompt_tokens=kind.prompt_tokens,
        answer_tokens=kind.answer_tokens,
    )


PICTURES: dict[str, Callable[[], Data]] = {name: partial(make, name) for name in KINDS}
