"""The trained adapter in the output folder: is it there, was it trained as asked, write it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_squeeze.demo.settings import Settings
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.folder import replace_folder

WEIGHTS = "adapter_model.safetensors"
SOURCE = "source"
_SETTINGS = "demo.json"
_OWNED = ("README.md", "adapter_config.json", WEIGHTS, _SETTINGS)


def check_output(output: Path, force: bool) -> None:
    """Refuse, before anything is trained, a folder that holds something other than a demonstration.

    Raises:
        LoraSqueezeError: `output` is a file, or a folder with other content and `force` is false.
    """
    if output.exists() and not output.is_dir():
        raise LoraSqueezeError(f"the demo writes a folder, but {output} is a file; choose another --output")
    if output.is_dir() and any(output.iterdir()) and _stored(output) is None and not force:
        raise LoraSqueezeError(
            f"{output} is not empty and was not written by the demo; choose another --output, "
            "or --force to write into it"
        )


def is_trained(output: Path, settings: Settings, force: bool) -> bool:
    """Whether the folder holds a source adapter that was trained with these settings and is to be used again.

    Raises:
        LoraSqueezeError: it was trained with other settings and `force` is false.
    """
    stored = _stored(output)
    if stored is None or force:
        return False
    asked = asdict(settings)
    other = [f"{key} {stored.get(key)} (asked: {value})" for key, value in asked.items() if stored.get(key) != value]
    if other:
        raise LoraSqueezeError(
            f"{output} holds a demo with {', '.join(other)}; choose another --output, or --force to train anew there"
        )
    return True


def save_source(model: Any, settings: Settings, output: Path) -> None:
    """Write the adapter of a PEFT model and how it was trained, both or neither.

    The embeddings are not trained, so PEFT need not ask the hub whether they have grown.
    """
    with replace_folder(output / SOURCE, force=True, owned=_OWNED) as folder:
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / _SETTINGS).write_text(json.dumps(asdict(settings), indent=2) + "\n", encoding="utf-8")


def _stored(output: Path) -> dict[str, Any] | None:
    try:
        stored = json.loads((output / SOURCE / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) and (output / SOURCE / WEIGHTS).is_file() else None
