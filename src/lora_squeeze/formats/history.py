"""What was done to an adapter, in the strings of its file's header."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from lora_squeeze.adapter import Adapter

HISTORY_KEY = "lora_squeeze"
_STEP_BYTES = 2048  # room in the header for one more step


def read_history(metadata: Mapping[str, str]) -> tuple[Mapping[str, Any], ...]:
    """The steps in a header, oldest first; none where they cannot be read."""
    try:
        steps = json.loads(metadata.get(HISTORY_KEY, "[]"))
    except (ValueError, RecursionError):
        return ()
    return tuple(step for step in steps if isinstance(step, dict)) if isinstance(steps, list) else ()


def header_strings(adapter: Adapter, digest: str | None) -> dict[str, str]:
    """The header's strings: those of the source, and the steps done, the last with the digest of its input file."""
    *earlier, last = adapter.history or ({"step": "copy"},)
    last = {**last, "source_sha256": digest, "lora_squeeze": version("lora-squeeze")}
    return {**adapter.metadata, HISTORY_KEY: json.dumps([*earlier, last], sort_keys=True)}


def reserve_bytes(adapter: Adapter) -> int:
    """Bytes to keep free in a header for `header_strings`, whose digest is known only at the end."""
    kept = sum(len(json.dumps([key, value])) for key, value in adapter.metadata.items())
    return kept + 2 * len(json.dumps(list(adapter.history))) + _STEP_BYTES
