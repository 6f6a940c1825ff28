"""Plans as text: TOML or JSON, one line per module.

    format = 1
    adapter = "my-adapter"
    source_sha256 = "8a1f..."
    asked = { size = "10MB" }
    totals = { file_bytes = 9999212, parameters = 4993024, energy = 0.991, error = 0.0948 }

    [modules]
    "layers.0.q_proj" = { rank = 3, source_rank = 8, error = 0.1234, reason = "budget: energy per parameter" }

The keys of the head are the fields of `Plan`. By hand, `default_rank = 8` may stand for all modules that are left
out, and a bare number for the braces. Names stand in quotes. A key that is not known is refused, so that no slip of
the pen passes for a plan.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_squeeze.dials import LARGEST
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.plan import Plan, PlanRow

FORMAT = 1
_MAX_BYTES = 10**7
_HEAD: dict[str, tuple[type, ...]] = {
    "adapter": (str,),
    "source_sha256": (str,),
    "dtype": (str,),
    "default_rank": (int,),
    "asked": (dict,),
    "totals": (dict,),
}
_ROW: dict[str, tuple[type, ...]] = {
    "rank": (int,),
    "source_rank": (int,),
    "error": (int, float),
    "loss_increase": (int, float),
    "reason": (str,),
}
_COMMENT = """\
# A plan of lora-squeeze: squeeze --plan obeys it. The ranks may be edited; rank = 0 takes a module out of the adapter.
# Errors and totals are what was predicted when the plan was made: they are not read.
"""


def save(plan: Plan, path: Path, *, force: bool) -> None:
    """Write a plan; see `Plan.save`."""
    write_whole(path, to_json(plan) if path.suffix == ".json" else to_toml(plan), force=force)


def load(path: Path) -> Plan:
    """Read a plan; see `Plan.load`."""
    try:
        text = _read(path)
        is_json = path.suffix == ".json"
        found = json.loads(text, object_pairs_hook=_unique) if is_json else tomllib.loads(text)
        _check_numbers(found)
    except (OSError, ValueError, RecursionError) as error:  # both parsers raise kinds of ValueError
        raise LoraSqueezeError(f"{path}: no readable TOML, or JSON in a .json file ({error})") from None
    try:
        return _plan(found)
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{path}: {error}") from None


def _read(path: Path) -> str:
    """The text of a plan; never waits on a pipe, or reads a device or a file that fills the memory."""
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")
    with path.open("rb") as file:
        raw = file.read(_MAX_BYTES + 1)
    if len(raw) > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES} bytes")
    return raw.decode("utf-8")


def _check_numbers(found: Any) -> None:
    """Refuse whole numbers that can be read, in hexadecimal, but not be written: Python limits the digits."""
    if isinstance(found, int) and abs(found) > LARGEST:
        raise ValueError("a number of more than 64 bits")
    for value in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
        _check_numbers(value)


def to_toml(plan: Plan) -> str:
    """The plan as TOML."""
    head = "".join(f"{key} = {_toml(value)}\n" for key, value in _head(plan).items())
    rows = "".join(f"{_toml(name)} = {_toml(_fields(row))}\n" for name, row in plan.modules.items())
    return f"{_COMMENT}{head}\n[modules]\n{rows}"


def to_json(plan: Plan) -> str:
    """The plan as JSON."""
    head = "".join(f"  {_text(key)}: {_text(value)},\n" for key, value in _head(plan).items())
    rows = ",\n".join(f"    {_text(name)}: {_text(_fields(row))}" for name, row in plan.modules.items())
    return f'{{\n{head}  "modules": {{\n{rows}\n  }}\n}}\n'


def _head(plan: Plan) -> dict[str, Any]:
    """What stands above the modules; what is not known is left out."""
    values = {name: getattr(plan, name) for name in _HEAD}
    known = {name: value for name, value in values.items() if value is not None and value != {}}
    return {"format": FORMAT, **known}


def _fields(row: PlanRow) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in _ROW}
    return {name: value for name, value in values.items() if value is not None and value != ""}


def _text(value: Any) -> str:
    """JSON of one line. Characters beyond ASCII stay: TOML has no surrogate pairs."""
    return json.dumps(dict(value) if isinstance(value, Mapping) else value, ensure_ascii=False)


def _toml(value: Any) -> str:
    """Strings, numbers and lists of TOML are those of JSON, but for DEL, which has to be escaped."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, float):
        return repr(float(value))  # NumPy's own repr names the type
    return _text(value).replace("\x7f", "\\u007f")


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two equal keys the second would silently win otherwise, as it does not in TOML."""
    result = dict(pairs)
    if len(result) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise ValueError(f"the key {next(key for key, count in counts.items() if count > 1)!r:.80} occurs twice")
    return result


def _plan(found: Any) -> Plan:
    if not isinstance(found, dict) or "format" not in found:
        raise LoraSqueezeError(f"no plan: expected a line format = {FORMAT} at the top")
    if found["format"] != FORMAT or isinstance(found["format"], bool):
        raise LoraSqueezeError(
            f"the plan has format {found['format']!r:.80}, this version reads {FORMAT}; make the plan again"
        )
    head = {key: value for key, value in found.items() if key not in ("format", "modules")}
    _check(head, _HEAD, "")
    for table in ("asked", "totals"):
        for key, value in head.get(table, {}).items():
            if not isinstance(value, (int, float, str, list)):
                raise LoraSqueezeError(
                    f"{table}: {repr(key)[1:-1]:.80} must be a number, text or a list, got {value!r:.80}"
                )
    modules = found.get("modules", {})
    if not isinstance(modules, dict):
        raise LoraSqueezeError(f"modules must be a table of module names, got {modules!r:.80}")
    return Plan({name: _row(name, value) for name, value in modules.items()}, **head)


def _row(name: str, value: Any) -> PlanRow:
    if not isinstance(value, dict):
        value = {"rank": value}
    hint = "" if "rank" in value else " (a module name with dots stands in quotes)"
    _check(value, _ROW, f"module {name!r:.80}: ", hint)
    if "rank" not in value:
        raise LoraSqueezeError(f"module {name!r:.80}: no rank")
    if value["rank"] < 0:
        raise LoraSqueezeError(f"module {name!r:.80}: rank must be a whole number from 0, got {value['rank']}")
    return PlanRow(**value)


def _check(values: Mapping[str, Any], known: Mapping[str, tuple[type, ...]], where: str, hint: str = "") -> None:
    """Refuse keys that are not known, and values of other types; in Python a truth value is a whole number too."""
    for key, value in values.items():
        if key not in known:
            raise LoraSqueezeError(f"{where}unknown key {key!r:.80}{hint}; known are {', '.join(known)}")
        if not isinstance(value, known[key]) or isinstance(value, bool):
            kind = {str: "text", int: "a whole number", float: "a number", dict: "a table"}[known[key][-1]]
            raise LoraSqueezeError(f"{where}{key} must be {kind}, got {value!r:.80}")


def check_target(path: Path, *, force: bool) -> None:
    """Refuse a file that `write_whole` would refuse."""
    if os.path.lexists(path) and not force:
        raise LoraSqueezeError(f"{path} exists already and nothing was written; replace it with --force (force=True)")
    if path.is_dir():
        raise LoraSqueezeError(f"{path} is a folder; name a file")


def write_whole(path: Path, text: str, *, force: bool) -> None:
    """Write a small text file, all or nothing.

    Raises:
        LoraSqueezeError: it exists and `force` is not given, or the system refuses.
    """
    check_target(path, force=force)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.lora-squeeze")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="utf-8")
            os.replace(draft, path)
        finally:
            with suppress(FileNotFoundError):
                draft.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraSqueezeError(f"{path} cannot be written: {reason}") from error
