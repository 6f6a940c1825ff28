"""Numbers in words, in six languages (package num2words, LGPL: asked for by this measurement alone)."""

from __future__ import annotations

from collections.abc import Iterable

from bench.evidence.data import PARTS, Data, Example, split
from bench.evidence.tasks.packages import installed

LANGUAGES = ("de", "en", "es", "fr", "it", "pt")
HIGHEST = 1000


def number_words() -> Data:
    """ "de 37 =" to "siebenunddreißig": 0 to 999, split by language and number."""
    parts = split(((f"{lang} {n}", Example(f"{lang} {n} =", text)) for lang, n, text in _all()), "number-words")
    return Data("number-words", _source(), *(parts[p] for p in PARTS), prompt_tokens=6, answer_tokens=13)


def words_numbers() -> Data:
    """ "siebenunddreißig =" to "37": 0 to 999, split by the words, which two languages may share."""
    unique = {text: n for _, n, text in _all()}
    parts = split(((text, Example(f"{text} =", str(n))) for text, n in unique.items()), "words-numbers")
    return Data("words-numbers", _source(), *(parts[p] for p in PARTS), prompt_tokens=15, answer_tokens=5)


def _source() -> str:
    return f"{installed('num2words')}, 0 to {HIGHEST - 1} in {', '.join(LANGUAGES)}"


def _all() -> Iterable[tuple[str, int, str]]:
    installed("num2words")
    from num2words import num2words

    for lang in LANGUAGES:
        for n in range(HIGHEST):
            yield lang, n, num2words(n, lang=lang)
