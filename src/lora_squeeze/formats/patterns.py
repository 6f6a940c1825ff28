"""rank_pattern and alpha_pattern: the value of the first pattern that matches a module path, as PEFT looks it up.

PEFT tries `(.*\\.)?(PATTERN)$` one pattern after another. An adapter with a rank of its own in each module has as many
patterns as modules, and trying them all takes minutes for a thousand. Nearly all patterns are names, written plainly or
escaped, with `^` in front where they are the whole path; those are looked up in tables.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.expressions import MAX_LENGTH, Expression

# "^" for a whole path; then characters that stand for themselves, escaped ones, and dots, which stand for any.
_NAME = re.compile(r"(\^?)((?:[^\\^$*+?{}\[\]|()]|\\[^\w\n])*)", re.DOTALL)
_SIGN = re.compile(r"\\(.)|\.", re.DOTALL)
_MAX_EXPRESSIONS = 1000  # that are no names
_MAX_LOOKUPS = 20_000_000  # entries looked at for all paths together: a few seconds
_ANY = "\n"  # stands for any character; no path has it

Number = float | int


class Patterns(dict[str, Number]):
    """Pattern -> number, with the patterns prepared.

    Raises:
        LoraSqueezeError: a pattern is no regular expression, or the expressions are too long together.
    """

    def __init__(self, patterns: Mapping[str, Number]) -> None:
        super().__init__(patterns)
        self._values = list(patterns.values())
        # whole path or end of it -> length -> places of dots -> name -> positions in the file
        self._names: dict[bool, dict[int, dict[tuple[int, ...], dict[str, list[int]]]]] = {
            whole: defaultdict(lambda: defaultdict(lambda: defaultdict(list))) for whole in (True, False)
        }
        self._expressions: list[tuple[int, Expression]] = []
        self._lookups = length = 0
        for position, pattern in enumerate(patterns):
            if match := _NAME.fullmatch(pattern):
                self._add(position, whole=bool(match[1]), name=match[2])
                continue
            length += len(pattern)
            if length > MAX_LENGTH or len(self._expressions) == _MAX_EXPRESSIONS:
                raise LoraSqueezeError(
                    f"more than {_MAX_EXPRESSIONS} expressions, or {MAX_LENGTH} characters of them; write names in "
                    "their place"
                )
            Expression(pattern)  # by itself: a parenthesis too many would close one of ours
            self._expressions.append((position, Expression(rf"(.*\.)?({pattern})$")))

    def _add(self, position: int, *, whole: bool, name: str) -> None:
        letters = _SIGN.sub(lambda sign: sign[1] or _ANY, name)
        dots = tuple(i for i, letter in enumerate(letters) if letter == _ANY) if _ANY in letters else ()
        self._names[whole][len(letters)][dots][letters].append(position)

    def value(self, path: str, default: Number) -> Number:
        """The number of the first pattern that matches, else the default."""
        found = self._positions(path)
        return self._values[min(found)] if found else default

    def values_of(self, path: str) -> set[Number]:
        """The numbers of all patterns that match."""
        return {self._values[position] for position in self._positions(path)}

    def _positions(self, path: str) -> list[int]:
        found = list(self._named(path, whole=True))
        starts = [0, *(i + 1 for i, letter in enumerate(path) if letter == ".")]
        for start in starts:
            found += self._named(path[start:], whole=False)
        self._lookups += len(starts) + len(self._expressions)
        if self._lookups > _MAX_LOOKUPS:
            raise LoraSqueezeError("rank_pattern or alpha_pattern takes too long to look up; write names with escapes")
        return found + [p for p, expression in self._expressions if expression.matches(path, to_end=False)]

    def _named(self, name: str, *, whole: bool) -> Iterator[int]:
        """Positions of the patterns that are this name."""
        for dots, names in self._names[whole].get(len(name), {}).items():
            self._lookups += 1
            letters = name
            if dots:
                spelled = list(name)
                for i in dots:
                    spelled[i] = _ANY
                self._lookups += len(dots)
                letters = "".join(spelled)
            yield from names.get(letters, ())
