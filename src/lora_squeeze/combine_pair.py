"""A trained adapter and the one that it was trained from: read to be subtracted.

PiSSA, OLoRA, CorDA and LoRA-GA subtract s B0 A0 from the base weights before training, so neither file is a change of
the original model; their difference s (B A - B0 A0) is.
"""

from __future__ import annotations

from pathlib import Path

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import mlx, peft
from lora_squeeze.formats.peft_config import read_config, subtracts
from lora_squeeze.hub import load, locate


def load_pair(trained: str | Path, initial: str | Path) -> tuple[Adapter, Adapter]:
    """Two adapters for `lora_squeeze.combine.subtract`, which may be of a kind that `load` refuses.

    Args:
        trained: folder or hub id.
        initial: of the adapter as it was before the training. That it is this one cannot be seen from the files.

    Returns:
        Both, lazily read.

    Raises:
        LoraSqueezeError: as `lora_squeeze.load`; or their initialisations changed the base weights in different ways.
    """
    paths = [locate(trained), locate(initial)]
    kinds = [_kind(path) for path in paths]
    if kinds[0] != kinds[1]:
        raise LoraSqueezeError(
            f"{trained} was initialised by {kinds[0] or 'no change of the base'}, {initial} by "
            f"{kinds[1] or 'no change of the base'}: their base weights differ, so that the difference is no change of "
            "one model; give the adapter that was saved before the training"
        )
    one, two = (peft.load(path, of_pair=True) if kinds[0] else load(path) for path in paths)
    return one, two


def _kind(path: Path) -> str | None:
    if path.is_file() or mlx.matches(path):
        return None
    return subtracts(read_config(path, of_pair=True))
