"""What a conversion can begin with: an adapter of any kind, a trained adapter and its start, or a fine-tuned model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lora_squeeze.adapter import Adapter
from lora_squeeze.base_model import open_base
from lora_squeeze.combine import subtract
from lora_squeeze.combine_pair import load_pair
from lora_squeeze.errors import LoraSqueezeError
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
        rank: the largest rank that will be asked of a fine-tuned model. More directions than that are looked for, at
            least 128; bounds of energy and error find no rank beyond.
        vocabulary: of a fine-tuned model, what becomes of changed embeddings and output heads: "leave" them as in the
            base (default), "lora" makes them modules, "carry" keeps the whole tensors.
        carry: of a fine-tuned model, keep what no LoRA holds, changed norms and biases, as whole tensors.
        subfolder, revision: of the source, as for `lora_squeeze.load`.

    Returns:
        A lazy Adapter.

    Raises:
        LoraSqueezeError: as `lora_squeeze.load`; a base model that is needed and not given.
    """
    if initial is not None:
        return subtract(*load_pair(locate(source, subfolder=subfolder, revision=revision), Path(initial)))
    path = Path(source).expanduser()
    if path.is_dir() and not subfolder and (path / _MODEL_CONFIG).is_file() and not (path / CONFIG_NAME).exists():
        return _extracted(path, base, rank, vocabulary or "leave", carry)
    if vocabulary is not None or carry:
        raise LoraSqueezeError(
            f"{source} is no fine-tuned model: vocabulary and carry (--vocabulary, --carry) are for these"
        )
    place = locate(source, subfolder=subfolder, revision=revision)
    if place.is_dir() and _is_other_method(place):
        from lora_squeeze.formats import peft_methods

        return peft_methods.load(place, base=_opened(base))
    return load(place)


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
    looked_for = max(dense.MAX_RANK, (rank or 0) * 5 // 4)  # beyond what is kept, for its accuracy
    return dense.extract(tuned, base, max_rank=looked_for, vocabulary=vocabulary, carry=carry)
