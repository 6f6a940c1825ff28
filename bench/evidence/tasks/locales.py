"""Dates and names of countries in other languages, from the Unicode locale data (package Babel)."""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Iterable

from bench.evidence.data import PARTS, Data, Example, place, split
from bench.evidence.tasks.packages import installed

LANGUAGES = ("de", "es", "fr", "it", "nl", "pl", "pt", "sv")
# for countries, which are few
MORE_LANGUAGES = ("cs", "da", "et", "fi", "hr", "hu", "id", "lt", "lv", "nb", "ro", "sk", "sl", "sq", "tr")
NO_COUNTRIES = {"EU", "EZ", "QO", "UN", "XA", "XB", "ZZ"}  # unions, remainders, and codes for tests of software
FIRST, DAYS, EACH = datetime.date(1900, 1, 1), 73_000, 600


def dates() -> Data:
    """A date as it is written in full to ISO 8601: 600 days from 1900 on in each language.

    Split by the text, as Spanish and Portuguese share some months.
    """
    unique = {text: day.isoformat() for day, text in _dates()}
    parts = split(((text, Example(f"{text} =", answer)) for text, answer in unique.items()), "dates")
    source = f"{installed('Babel')}, format_date(day, 'long') in {', '.join(LANGUAGES)}"
    return Data("dates", source, *(parts[p] for p in PARTS), prompt_tokens=15, answer_tokens=12)


def countries() -> Data:
    """A country's name in another language to English, where the two differ.

    Split by the name without accents and signs: a country may be known from another language, its name is new. "Kuba"
    and "Küba" are one name.
    """
    parts = split(((plain(name), Example(f"{name} =", answer)) for name, answer in _countries()), "countries")
    source = f"{installed('Babel')}, territories in {', '.join((*LANGUAGES, *MORE_LANGUAGES))}"
    return Data("countries", source, *(parts[p] for p in PARTS), prompt_tokens=13, answer_tokens=8)


def plain(name: str) -> str:
    """A name in small letters and digits alone, without accents."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", name.casefold()) if sign.isalnum())


def _dates() -> Iterable[tuple[datetime.date, str]]:
    installed("Babel")
    from babel.dates import format_date

    for lang in LANGUAGES:
        for i in range(EACH):
            day = FIRST + datetime.timedelta(days=int(place(i, lang) * DAYS))
            yield day, format_date(day, "long", locale=lang)


def _countries() -> Iterable[tuple[str, str]]:
    """Name and English name; a name that stands for two countries ("Kongo") is left out."""
    installed("Babel")
    from babel import Locale

    english = {
        code: name
        for code, name in Locale("en").territories.items()
        if code.isalpha() and code not in NO_COUNTRIES  # those in digits are continents
    }
    meant: dict[str, set[str]] = {}
    for lang in (*LANGUAGES, *MORE_LANGUAGES):
        for code, name in sorted(Locale(lang).territories.items()):
            if code in english:
                meant.setdefault(name, set()).add(english[code])
    for name, answers in meant.items():
        if len(answers) == 1 and name not in answers:
            yield name, answers.pop()
