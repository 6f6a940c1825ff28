"""README.md of an adapter folder: the source's card, with a section on what was done and how to load the result."""

from __future__ import annotations

import json

from lora_squeeze.adapter import Adapter
from lora_squeeze.formats.safetensors_header import printable

CARD_NAME = "README.md"
_TITLES = {"post-squeeze": "Squeezed", "merge": "Merged", "convert": "Converted", "rank-up": "Padded"}  # by last step
_BEGIN, _END = "<!-- lora-squeeze -->", "<!-- /lora-squeeze -->"


def model_card(adapter: Adapter, before: str) -> str:
    """The card of an adapter; a section written earlier by this tool is replaced, all else is kept.

    Args:
        adapter: what is being written.
        before: text of the source's card, empty if it has none.
    """
    before = _without_section(before)
    if not before:
        base = adapter.config.get("base_model_name_or_path") or ""
        front = {"library_name": "peft", "tags": ["lora", "lora-squeeze"], **({"base_model": base} if base else {})}
        lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
        before = "\n".join(["---", *lines, "---", "", "# LoRA adapter"])
    return f"{before}\n\n{_BEGIN}\n{_section(adapter)}\n{_END}\n"


def _last(adapter: Adapter) -> str:
    return str(adapter.history[-1].get("step")) if adapter.history else ""


def _without_section(card: str) -> str:
    """The card without the sections that this tool wrote; a search by parts, since `re` takes ages on blank lines."""
    kept: list[str] = []
    while True:
        begin = card.find(_BEGIN)
        end = card.find(_END, begin) if begin >= 0 else -1
        if end < 0:
            return "\n".join([*kept, card]).rstrip()
        kept.append(card[:begin].rstrip("\n"))
        card = card[end + len(_END) :].lstrip("\n")


def _section(adapter: Adapter) -> str:
    ranks = sorted({module.rank * module.step for module in adapter.modules.values()})
    shown = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    lines = [
        f"## {_TITLES.get(_last(adapter), 'Written')} with lora-squeeze",
        "",
        f"- rank: {shown} in {len(adapter.modules)} modules, scale (alpha / r) {adapter.default_scale:g} everywhere",
    ]
    if adapter.dropped:
        lines.append(f"- {len(adapter.dropped)} modules of the source are not in it")
    lines += [
        printable(f"- {step.get('step')}: {', '.join(f'{k} {v}' for k, v in step.items() if k != 'step')}")
        for step in adapter.history
    ]
    if _last(adapter) == "post-squeeze":
        lines += ["", "Truncated by singular values. Kept energy is not task quality: measure on the task."]
    return "\n".join(lines)
