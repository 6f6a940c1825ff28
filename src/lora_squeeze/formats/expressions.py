"""Regular expressions of configurations, matched in a time that the length of name and expression bounds.

Why not `re`: it backtracks. `(a+)+$` against thirty letters takes minutes, and the expressions of a configuration come
with the adapter, that is from anywhere. Here all positions that a part can end at are followed at once, as the bits of
one integer, so no part is tried twice. Which names match is the same; an expression that cannot be matched in this way
(a back-reference, a conditional, possessive or atomic) is refused.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import quoted

MAX_LENGTH = 100_000  # characters of an expression; the parser takes about a microsecond for each
_MAX_STEPS = 8_000_000  # of one expression against all names: about two seconds
_MAX_DEPTH = 100
_CLASS = {"CATEGORY_DIGIT": r"\d", "CATEGORY_NOT_DIGIT": r"\D", "CATEGORY_SPACE": r"\s", "CATEGORY_NOT_SPACE": r"\S",
          "CATEGORY_WORD": r"\w", "CATEGORY_NOT_WORD": r"\W"}  # fmt: skip
_parser: Any = importlib.import_module("re._parser")  # no stub has it


class _Text:
    """One name, and the positions already found in it by the parts that look at no other."""

    def __init__(self, text: str) -> None:
        self.text, self.end = text, 1 << len(text)
        self.everywhere = (self.end << 1) - 1
        self.weight = 1 + len(text) // 512
        self.steps = 0
        self.places: dict[int, int] = {}

    def where(self, part: int, test: Callable[[str], object]) -> int:
        """Positions of the characters that pass the test."""
        if part not in self.places:
            good = {char for char in set(self.text) if test(char)}
            self.steps += len(self.text)
            self.places[part] = sum(1 << i for i, char in enumerate(self.text) if char in good)
        return self.places[part]

    def starts(self, part: int, word: str) -> int:
        """Positions where the word begins."""
        if part not in self.places:
            found, at = 0, self.text.find(word)
            while at >= 0:
                found |= 1 << at
                self.steps += 1
                at = self.text.find(word, at + 1)
            self.places[part] = found
        return self.places[part]


# From a set of positions to the set of positions after (back: before) the part.
_Part = Callable[[int, _Text, bool], int]


class Expression:
    """A regular expression.

    Args:
        pattern: in the syntax of `re`.

    Raises:
        LoraSqueezeError: `re` does not take it, or it is too long, too deep or of a kind that is not matched here.
    """

    def __init__(self, pattern: str) -> None:
        if len(pattern) > MAX_LENGTH:
            raise LoraSqueezeError(f"an expression of {len(pattern)} characters; up to {MAX_LENGTH} are read")
        try:
            parsed = _parser.parse(pattern)
            self._part = _Reader(parsed.state.flags).sequence(parsed, 0)
        except LoraSqueezeError:
            raise
        except (re.error, OverflowError, RecursionError) as error:
            raise LoraSqueezeError(
                f"{quoted(pattern)} is not a regular expression ({quoted(error).strip(chr(34) + chr(39))})"
            ) from None
        self._pattern, self._steps = pattern, 0

    def matches(self, text: str, *, to_end: bool = True) -> bool:
        """Whether it matches from the start of the text, as `re.fullmatch`; without `to_end` as `re.match`.

        Raises:
            LoraSqueezeError: all texts together took too many steps.
        """
        seen = _Text(text)
        reached = self._part(1, seen, False)
        self._steps += seen.steps
        if self._steps > _MAX_STEPS:
            raise LoraSqueezeError(
                f"the expression {quoted(self._pattern)} takes too long to match; write a simpler one, or names"
            )
        return bool(reached & seen.end if to_end else reached)


class _Reader:
    """Makes the parts of one parsed expression."""

    def __init__(self, flags: int) -> None:
        self._flags, self._count = flags, 0

    def sequence(self, nodes: Any, depth: int) -> _Part:
        if depth > _MAX_DEPTH:
            raise LoraSqueezeError(f"an expression nested more than {_MAX_DEPTH} deep; write a simpler one")
        parts: list[_Part] = []
        for literal, run in groupby(nodes, key=lambda node: str(node[0]) == "LITERAL" and not self._flags & re.I):
            if literal:
                self._count += 1
                parts.append(_word(self._count, "".join(chr(value) for _, value in run)))
            else:
                parts += [self._part(str(op), value, depth + 1) for op, value in run]
        return parts[0] if len(parts) == 1 else _sequence(parts)

    def _part(self, op: str, value: Any, depth: int) -> _Part:
        self._count += 1
        number = self._count
        if op in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return _character(number, re.compile(_spelled(op, value), self._flags & ~re.VERBOSE).match)
        if op == "BRANCH":
            return _branch([self.sequence(nodes, depth) for nodes in value[1]])
        if op in ("MAX_REPEAT", "MIN_REPEAT"):
            return _repeat(self.sequence(value[2], depth), int(value[0]), int(value[1]))
        if op == "SUBPATTERN":
            _, added, removed, nodes = value
            before = self._flags
            self._flags = (before | added) & ~removed
            part = self.sequence(nodes, depth)
            self._flags = before
            return part
        if op in ("ASSERT", "ASSERT_NOT"):
            return _look(number, self.sequence(value[1], depth), value[0] > 0, op == "ASSERT")
        if op == "AT":
            return _at(number, str(value))
        raise LoraSqueezeError(f"an expression with a {op.lower().replace('_', ' ')}; write it without one, or names")


def _spelled(op: str, value: Any) -> str:
    """An expression for one character."""
    if op == "ANY":
        return "."
    if op != "IN":
        return f"[{'^' if op == 'NOT_LITERAL' else ''}{re.escape(chr(value))}]"
    items = [(str(kind), item) for kind, item in value]
    negated = "^" if items[0][0] == "NEGATE" else ""
    text = ""
    for kind, item in items[1:] if negated else items:
        if kind == "LITERAL":
            text += re.escape(chr(item))
        elif kind == "RANGE":
            text += f"{re.escape(chr(item[0]))}-{re.escape(chr(item[1]))}"
        else:
            text += _CLASS[str(item)]
    return f"[{negated}{text}]"


def _character(number: int, test: Callable[[str], object]) -> _Part:
    def part(at: int, text: _Text, back: bool) -> int:
        text.steps += text.weight
        where = text.where(number, test)
        return (at >> 1) & where if back else (at & where) << 1

    return part


def _word(number: int, word: str) -> _Part:
    """Characters that stand for themselves."""

    def part(at: int, text: _Text, back: bool) -> int:
        text.steps += text.weight
        where = text.starts(number, word)
        return (at >> len(word)) & where if back else (at & where) << len(word)

    return part


def _sequence(parts: Sequence[_Part]) -> _Part:
    def part(at: int, text: _Text, back: bool) -> int:
        for each in reversed(parts) if back else parts:
            if not at:
                break
            at = each(at, text, back)
        return at

    return part


def _branch(parts: Sequence[_Part]) -> _Part:
    def part(at: int, text: _Text, back: bool) -> int:
        reached = 0
        for each in parts:
            reached |= each(at, text, back)
        return reached

    return part


def _repeat(each: _Part, least: int, most: int) -> _Part:
    def part(at: int, text: _Text, back: bool) -> int:
        # Of more rounds than there are characters some move nothing, and as many more or fewer may be done.
        rounds = len(text.text) + 1
        for _ in range(min(least, rounds)):
            text.steps += text.weight
            before, at = at, each(at, text, back)
            if at in (0, before):
                break
        reached = new = at
        for _ in range(min(most - least, rounds)):
            text.steps += text.weight
            new = each(new, text, back) & ~reached
            if not new:
                break
            reached |= new
        return reached

    return part


def _look(number: int, inner: _Part, ahead: bool, wanted: bool) -> _Part:
    def part(at: int, text: _Text, back: bool) -> int:
        if number not in text.places:
            text.places[number] = inner(text.everywhere, text, ahead)
        found = text.places[number]
        return at & found if wanted else at & ~found

    return part


def _at(number: int, kind: str) -> _Part:
    """A place; names hold no line ends, which `$` and `^` would look for elsewhere."""

    def part(at: int, text: _Text, back: bool) -> int:
        if kind.startswith("AT_BEGINNING"):
            return at & 1
        if kind.startswith("AT_END"):
            return at & text.end
        words = text.where(number, re.compile(r"\w").match)
        edges = words ^ (words << 1)
        return at & edges if "NON" not in kind else at & ~edges & text.everywhere

    return part
