"""What a conversion can begin with: an adapter of any kind, a trained adapter and its start, or a fine-tuned model."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lora_squeeze.adapter import Adapter
from lora_squeeze.base_model import open_base
from lora_squeeze.combine import subtract, summed
from lora_squeeze.combine_pair import load_pair
from lora_squeeze.conversion import in_format
from lora_squeeze.data_aware import TIED
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.dense_keys import is_vocabulary
from lora_squeeze.formats.dense_parts import Vocabulary
from lora_squeeze.formats.peft_config import CONFIG_NAME, check_kind, read_json
from lora_squeeze.hub import load, locate

if TYPE_CHECKING:
    from lora_squeeze.base_model import BaseModel

_MODEL_CONFIG = "config.json"


def open_source(
    source: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    initial: str | os.PathLike[str] | None = None,
    rank: int | None = None,
    vocabulary: Vocabulary | None = None,
    carry: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
) -> Adapter:
    """Read what `lora_squeeze.convert` takes.

    Args:
        source: an adapter as for `lora_squeeze.load`, the folder of a PEFT adapter of another method, or the folder of
            a fine-tuned model.
        base: the base model's folder or hub id. A fine-tuned model is compared with it; methods that rescale or rotate
            the base weight, such as DoRA or OFT, need it.
        initial: the adapter as it was before the training, for PiSSA, OLoRA, CorDA and LoRA-GA, which change the base
            weights at the start. The result has twice the rank.
        rank: the largest rank that will be asked of a fine-tuned model, or of layers carried whole. More
            directions than that are looked for, at least 128; bounds of energy and error find no rank beyond.
        vocabulary: of a fine-tuned model, what becomes of changed embeddings and output heads: "leave" them as in the
            base (default), "lora" makes them modules, "carry" keeps the whole tensors. Of an adapter that carries
            such layers whole: "carry" (default), or "lora", with the base model.
        carry: of a fine-tuned model, keep what no LoRA holds, changed norms and biases, as whole tensors.
        subfolder, revision: of the source, as for `lora_squeeze.load`.

    Returns:
        A lazy Adapter.

    Raises:
        LoraSqueezeError: as `lora_squeeze.load`; a base model that is needed and not given.
    """
    if initial is not None:
        if vocabulary is not None or carry:
            raise LoraSqueezeError("vocabulary and carry (--vocabulary, --carry) are not for an adapter and its start")
        return subtract(*load_pair(locate(source, subfolder=subfolder, revision=revision), Path(initial)))
    path = Path(source).expanduser()
    if path.is_dir() and not subfolder and (path / _MODEL_CONFIG).is_file() and not (path / CONFIG_NAME).exists():
        return _extracted(path, base, rank, vocabulary or "leave", carry)
    if vocabulary == "leave" or carry:
        raise LoraSqueezeError(
            f"{source} is no fine-tuned model: vocabulary 'leave' and carry (--carry) are for these; what an adapter "
            "carries is left out by --without-extras"
        )
    place = locate(source, subfolder=subfolder, revision=revision)
    if place.is_dir() and _is_other_method(place):
        from lora_squeeze.formats import peft_methods

        adapter = peft_methods.load(place, base=_opened(base))
    else:
        adapter = load(place)
    return adapter if vocabulary != "lora" else _with_layers(adapter, base, rank)


def _is_other_method(folder: Path) -> bool:
    """Whether this is a PEFT adapter that is no plain LoRA. One that changed its base at the start needs that start."""
    try:
        config = read_json(folder / CONFIG_NAME)
    except LoraSqueezeError:  # the reader of the format says what is wrong with it
        return False
    if not isinstance(config, dict) or "peft_type" not in config:
        return False
    try:
        check_kind({**config, "init_lora_weights": True})
    except LoraSqueezeError:
        return True
    return False


def _opened(base: str | os.PathLike[str] | None) -> BaseModel | None:
    return None if base is None or Path(base).expanduser().is_file() else open_base(base)


def _with_layers(adapter: Adapter, base: str | os.PathLike[str] | None, rank: int | None) -> Adapter:
    """The adapter with modules in the place of layers that it carries whole."""
    from lora_squeeze.formats import dense_carried

    if base is None:
        raise LoraSqueezeError(
            "how the layers that the adapter carries differ from the base model's, only that tells: name it with "
            "base= (--base)"
        )
    bare, layers = dense_carried.split(adapter, open_base(base), _looked_for(rank))
    if layers is None:
        return bare
    both = [bare, in_format(layers, bare.format.name)]
    tied = any(module.group == TIED for module in layers.modules.values())
    if bare.config.get("ensure_weight_tying") or (tied and not any(map(is_vocabulary, bare.modules))):
        both = [replace(part, config={**part.config, "ensure_weight_tying": True}) for part in both]
    whole = summed(both, extras_from=1)
    return replace(whole, notes=(*bare.notes, *whole.notes), history=(*bare.history, {"step": "layers to modules"}))


def _looked_for(rank: int | None) -> int:
    """Directions of a whole matrix, beyond what is kept, for its accuracy."""
    from lora_squeeze.formats import dense

    return max(dense.MAX_RANK, (rank or 0) * 5 // 4)


def _extracted(
    tuned: Path, base: str | os.PathLike[str] | None, rank: int | None, vocabulary: Vocabulary, carry: bool
) -> Adapter:
    """The difference of two models."""
    from lora_squeeze.formats import dense

    if base is None:
        raise LoraSqueezeError(
            f"{tuned} is a whole model, no adapter: name the model that it was tuned from with base= (--base), and the "
            "difference is extracted"
        )
    return dense.extract(tuned, base, max_rank=_looked_for(rank), vocabulary=vocabulary, carry=carry)
