"""Find an adapter's files and describe them. Headers, configurations and alphas are read, no other numbers."""

from __future__ import annotations

import os
from pathlib import Path

from lora_squeeze.formats import gguf_lora, mlx, peft
from lora_squeeze.hub import locate
from lora_squeeze.readers.facts import Facts
from lora_squeeze.readers.facts_folder import mlx_facts, peft_facts
from lora_squeeze.readers.facts_single import gguf_facts, image_facts

PIPELINE_NAME = "pytorch_lora_weights.safetensors"  # what diffusers writes into a folder


def read_facts(adapter: str | os.PathLike[str], *, subfolder: str | None = None, revision: str | None = None) -> Facts:
    """Describe an adapter.

    Args:
        adapter: as for `hub.load`.
        subfolder: folder inside it.
        revision: branch, tag or commit on the hub.

    Raises:
        LoraSqueezeError: nothing there, or a file that nobody can read.
    """
    path = _find(adapter, subfolder, revision)
    if path.is_dir():
        return mlx_facts(path) if mlx.matches(path) else peft_facts(path)
    return gguf_facts(path) if gguf_lora.matches(path) else image_facts(path)


def _find(adapter: str | os.PathLike[str], subfolder: str | None, revision: str | None) -> Path:
    """The folder or the file; a safetensors file is taken as it is, for a file that no reader takes is an answer."""
    path = Path(adapter).expanduser()
    here = path / (subfolder or "")
    if not (here / peft.CONFIG_NAME).exists() and (here / PIPELINE_NAME).exists():
        return here / PIPELINE_NAME
    if path.is_file() and path.suffix == ".safetensors" and path.name not in (peft.WEIGHTS_NAME, mlx.WEIGHTS_NAME):
        return path
    return locate(adapter, subfolder=subfolder, revision=revision)
