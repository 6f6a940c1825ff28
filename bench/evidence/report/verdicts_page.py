"""Verdicts as Markdown: one table of outcomes, then each claim with its rule and the figures that decide."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from bench.evidence.report import verdicts
from bench.evidence.report.results import ACCURACY, LEARNED, Measure, Results, labels
from bench.evidence.report.verdicts import CLAIMS, UNMEASURED, Verdict, all_verdicts
from bench.tables import table

_WORDS = {ACCURACY: "accuracy", LEARNED: "loss"}


def verdicts_page(models: Sequence[Results]) -> str:
    """The whole page."""
    found = _asked({label: list(all_verdicts(results)) for label, results in zip(labels(models), models, strict=True)})
    parts = ["# Verdicts", "By accuracy / by loss; claims with one answer are judged by loss alone.", _overview(found)]
    parts += [
        text for label, results in zip(labels(models), models, strict=True) for text in _uncounted(label, results)
    ]
    parts += ["## How it is judged", _doc(verdicts)[1]]
    for letter, claim in CLAIMS.items():
        title, rule = _doc(claim)
        parts += [f"## {title}", rule]
        for model, all_of_it in found.items():
            parts += [text for v in all_of_it if v.claim[0] == letter for text in _details(model, v)]
    return "\n\n".join(parts) + "\n"


def _asked(found: dict[str, list[Verdict]]) -> dict[str, list[Verdict]]:
    """Without the forms of a claim that no model has measured, if another form of it is measured."""
    measured = {verdict.claim for all_of_it in found.values() for verdict in all_of_it if verdict.outcome != UNMEASURED}
    letters = {claim[0] for claim in measured}
    return {
        model: [v for v in all_of_it if v.claim in measured or v.claim[0] not in letters]
        for model, all_of_it in found.items()
    }


def _overview(found: dict[str, list[Verdict]]) -> str:
    claims = dict.fromkeys(verdict.claim for all_of_it in found.values() for verdict in all_of_it)
    rows = []
    for claim in claims:
        cells = []
        for all_of_it in found.values():
            outcomes = {v.measure: v.outcome for v in all_of_it if v.claim == claim}
            cells.append(" / ".join(dict.fromkeys(outcomes.values()) if _unmeasured(outcomes) else outcomes.values()))
        title, _ = _doc(CLAIMS[claim[0]])
        rows.append([f"{title.split(';')[0]}{claim[1:]}", *cells])
    return table(["claim", *found], rows)


def _uncounted(label: str, results: Results) -> Iterator[str]:
    for measure, word in _WORDS.items():
        rest = sorted(set(results.tasks) - set(results.learned(measure)))
        if rest:
            yield f"{label}, tasks that do not count by {word}, since the source learns too little: {', '.join(rest)}."


def _doc(of: object) -> tuple[str, str]:
    """First line of a docstring without its full stop, and the rest."""
    title, rest = (inspect.getdoc(of) or "").split("\n\n", 1)
    return title.removesuffix("."), rest


def _unmeasured(outcomes: dict[Measure, str]) -> bool:
    return set(outcomes.values()) == {UNMEASURED}


def _details(model: str, verdict: Verdict) -> list[str]:
    form = verdict.claim[1:].removeprefix(", ")
    head = ", ".join([model, *([form] if form else []), f"by {_WORDS[verdict.measure]}"])
    if verdict.outcome == UNMEASURED:
        return [f"**{head}: {verdict.outcome}.**"]
    tasks = f"{verdict.tasks} task{'s' * (verdict.tasks != 1)}, {verdict.runs} run{'s' * (verdict.runs != 1)} an arm"
    unit = verdict.measure.title
    return [
        f"**{head}: {verdict.outcome}** ({tasks}). {verdict.because[:1].upper()}{verdict.because[1:]}. In {unit}:",
        table(verdict.head, verdict.rows),
    ]
