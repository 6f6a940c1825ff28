"""How much each member counts: a TOML or JSON file of name and weight, such as its share of the requests."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.find import listed


def load_weights(path: Path) -> dict[str, float]:
    """Read a file of weights: JSON if its name ends with .json, else TOML.

    Raises:
        LoraSqueezeError: no readable file, or a weight that is no number above 0.
    """
    try:
        text = path.read_text(encoding="utf-8")
        found: Any = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # both parsers raise kinds of ValueError
        raise LoraSqueezeError(f"{path}: no readable TOML, or JSON in a .json file ({error})") from None
    if not isinstance(found, dict):
        raise LoraSqueezeError(f"{path}: expected names and weights, found {found!r:.80}")
    for name, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise LoraSqueezeError(
                f"{path}: the weight of {name!r} must be a number above 0, found {value!r:.80} (a name with dots or "
                "slashes stands in quotes)"
            )
    return {name: float(value) for name, value in found.items()}


def complete(weights: Mapping[str, float], members: Collection[str], skipped: Collection[str] = ()) -> dict[str, float]:
    """The weight of every member; 1 where none is given.

    Args:
        weights: as given.
        members: names of the members.
        skipped: names that may have a weight, though they are left out.

    Raises:
        LoraSqueezeError: a name that no member has, or a weight that is not above 0.
    """
    unknown = [repr(name) for name in weights if name not in members and name not in skipped]
    if unknown:
        raise LoraSqueezeError(f"there are weights for {listed(unknown)}, but the members are {listed(members)}")
    bad = [name for name, value in weights.items() if not 0 < value < math.inf]
    if bad:
        raise LoraSqueezeError(f"the weight of {bad[0]!r} must be a number above 0, found {weights[bad[0]]}")
    return {name: float(weights.get(name, 1.0)) for name in members}
