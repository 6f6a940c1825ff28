"""The weight of every adapter in a sum, for all modules or by module name.

One number per adapter, or a table from patterns to such lists, in Python or in a file (TOML, or JSON with the same
keys):

    default = [0.7, 0.5]
    "*.layers.[0-9].*" = [1.0, 0.0]
    "*.mlp.*" = 0.3

A pattern is that of file names: `*` is anything, dots included, `?` one character, `[0-9]` one of these. The first that
matches the whole name of a module counts; `default` is for all others. A single number is for every adapter.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Real
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError

DEFAULT = "default"
ByModule = Mapping[str, float | Sequence[float]]


def parse_weights(text: str) -> list[float] | dict[str, Any]:
    """Weights as the command line takes them: "0.7,0.5,-0.2", or the name of a .toml or .json file.

    Raises:
        LoraSqueezeError: not numbers, or no readable file.
    """
    if not text.endswith((".toml", ".json")):
        try:
            return [float(part) for part in text.split(",")]
        except ValueError:
            raise LoraSqueezeError(
                f"weights {text!r} are not understood; write numbers such as 0.7,0.5,-0.2, or name a .toml or .json "
                "file"
            ) from None
    try:
        whole = Path(text).read_text(encoding="utf-8")
        found = json.loads(whole) if text.endswith(".json") else tomllib.loads(whole)
    except (OSError, ValueError, RecursionError) as error:  # both parsers raise kinds of ValueError
        raise LoraSqueezeError(f"{text}: no readable TOML, or JSON in a .json file ({error})") from None
    if not isinstance(found, dict):
        raise LoraSqueezeError(f"{text}: expected a table of patterns and weights, found {type(found).__name__}")
    return found


def weights_by_module(
    weights: Sequence[float] | ByModule | None, count: int, names: Iterable[str]
) -> dict[str, tuple[float, ...]]:
    """Module name -> one weight per adapter.

    Args:
        weights: one number per adapter; or patterns and numbers, see the module; None: 1 for each.
        count: number of adapters.
        names: all modules of all adapters.

    Raises:
        LoraSqueezeError: another number of weights, no finite number, all zero, a pattern that matches nothing, a
            module that nothing matches.
    """
    if not isinstance(weights, Mapping):
        row = _row("weights", [1.0] * count if weights is None else weights, count)
        found = dict.fromkeys(names, row)
    else:
        rows = {pattern: _row(f"weights of {pattern!r}", value, count) for pattern, value in weights.items()}
        found = _matched(rows, list(names))
    if not any(weight for row in found.values() for weight in row):
        raise LoraSqueezeError("all weights are zero, which leaves nothing to add; give at least one other number")
    return found


def _row(what: str, value: Any, count: int) -> tuple[float, ...]:
    value = value.tolist() if hasattr(value, "tolist") else value  # of NumPy and torch
    numbers = [value] * count if isinstance(value, Real) else value
    if not isinstance(numbers, list | tuple) or not all(map(_finite, numbers)):
        raise LoraSqueezeError(f"{what} must be finite numbers, one per adapter, got {value!r:.80}")
    if len(numbers) != count:
        raise LoraSqueezeError(f"{what}: {len(numbers)} numbers for {count} adapters; give one per adapter")
    return tuple(map(float, numbers))


def _finite(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of float64
        return False


def _matched(rows: Mapping[str, tuple[float, ...]], names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    patterns = [pattern for pattern in rows if pattern != DEFAULT]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise LoraSqueezeError(
                f"weights of {pattern!r}: no module has such a name; names are like {names[0]!r}, and * stands for any "
                "characters"
            )
    found = {}
    for name in names:
        pattern = next((pattern for pattern in patterns if fnmatchcase(name, pattern)), DEFAULT)
        if pattern not in rows:
            raise LoraSqueezeError(
                f"no weights for module {name!r}: no pattern matches it; add {DEFAULT} for the others"
            )
        found[name] = rows[pattern]
    return found
