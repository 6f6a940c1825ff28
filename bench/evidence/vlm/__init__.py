"""A small vision-language model, pre-trained here, whose language model is what LoRA is put on.

==========  =======================================================================
digits      real handwriting, split once
canvas      pictures: coloured digits in the cells of a 3 x 3 grid
model       LLaVA from a small SigLIP tower, a projector and SmolLM2
tower       first training: the tower names what it sees
projector   second training: the language model is told what the tower sees
recipe      all numbers of both
build       the weights, made once and kept in the cache
==========  =======================================================================

Image tokens go before a prompt, IMAGE_TOKENS of them for each picture. LoRA belongs on the layers of the language model
alone; the tower's projections have the same names, so PEFT is given a pattern:

    target_modules=r".*language_model.*\\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""

import hashlib
from functools import partial
from typing import Any

from bench.evidence.vlm.model import IMAGE_TOKENS as IMAGE_TOKENS
from bench.evidence.vlm.model import image_token_id as image_token_id
from bench.evidence.vlm.model import pixels as pixels
from bench.evidence.vlm.model import tiny_vlm as tiny_vlm
from bench.evidence.vlm.model import tower_config, with_language_model
from bench.evidence.vlm.recipe import RECIPE


def load_vlm() -> tuple[Any, Any]:
    """The model (float32, in evaluation mode) and SmolLM2's tokenizer; the weights are made first if they are missing.

    Raises:
        SystemExit, LoraSqueezeError: handwriting or language model is missing; says what to install.
    """
    from bench.evidence.vlm.build import WEIGHTS, built, read_weights  # here, since Python also runs it as a program

    folder = built(partial(print, flush=True))
    model, tokenizer = with_language_model(tower_config(**RECIPE.tower), RECIPE.seeing.seed)
    read_weights(model, folder / WEIGHTS)
    return model, tokenizer


def weights_origin() -> str:
    """What the weights are made from: language model and recipe."""
    from lora_squeeze.demo.model import find_model

    origin = find_model().origin
    return f"{origin}, vlm {RECIPE.tag(origin)}"


def weights_digest() -> str:
    """Tower and projector, which are made first if they are missing, by their SHA-256: processors round differently."""
    from bench.evidence.vlm.build import WEIGHTS, built

    return hashlib.sha256((built(partial(print, flush=True)) / WEIGHTS).read_bytes()).hexdigest()[:12]
