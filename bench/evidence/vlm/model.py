"""The model: transformers' LLaVA with a small SigLIP tower, a projector of two layers and SmolLM2 behind them.

A picture of 48 x 48 pixels is nine patches of 16 x 16, each of which becomes one token. SigLIP has no class token, and
the last layer's patches are all kept. The token that stands for a patch in a text is one that SmolLM2's tokenizer has
for other purposes, so the vocabulary stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.evidence.vlm.canvas import CELL, CELLS, COLOURS, SIDE

IMAGE_TOKENS = len(CELLS)
_IMAGE_TOKEN = "<repo_name>"
_END = "<|im_end|>"
_OTHER = "<other>"


def image_token_id(tokenizer: Any) -> int:
    """The token that stands for one patch; IMAGE_TOKENS of them go before a prompt."""
    found: int = tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN)
    return found


def pixels(images: Sequence[Tensor]) -> Tensor:
    """Pictures as the tower wants them.

    Args:
        images: unsigned bytes, each of shape (3, 48, 48).

    Returns:
        Numbers from -1 to 1, shape (pictures, 3, 48, 48).
    """
    return torch.stack(list(images)).float() / 127.5 - 1


def tower_config(**sizes: Any) -> Any:
    """Configuration of a SigLIP tower for pictures of this size."""
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(image_size=SIDE, patch_size=CELL, vision_use_head=False, **sizes)


def assemble(tower: Any, text: Any, image_token: int, seed: int) -> Any:
    """A LLaVA with random weights, float32 and in evaluation mode; attention is eager, the fastest on short sequences.

    Args:
        tower: configuration of the tower.
        text: configuration of the language model.
        image_token: see `image_token_id`.
        seed: of the weights; the global generator is not touched.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made_by: Any = LlavaForConditionalGeneration
        return made_by._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def with_language_model(tower: Any, seed: int) -> tuple[Any, Any]:
    """A LLaVA that speaks with SmolLM2, and its tokenizer; tower and projector are random."""
    from lora_squeeze.demo.model import find_model, load_model

    causal, tokenizer = load_model(find_model(), torch.device("cpu"))
    model = assemble(tower, causal.config, image_token_id(tokenizer), seed)
    model.model.language_model.load_state_dict(causal.model.state_dict())
    return model, tokenizer


def parts(model: Any) -> dict[str, nn.Module]:
    """What is trained here: tower and projector, by the prefix of their weights in a file."""
    return {"vision_tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}


def tiny_vlm() -> tuple[Any, Any]:
    """The same with two layers of width 32, random, and a tokenizer of a few words: for tests in milliseconds."""
    from transformers import LlamaConfig

    tokenizer = _tiny_tokenizer()
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    end = tokenizer.eos_token_id
    text = LlamaConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=end, eos_token_id=end,
        bos_token_id=None, **sizes,
    )  # fmt: skip
    return assemble(tower_config(**sizes), text, image_token_id(tokenizer), seed=0), tokenizer


def _tiny_tokenizer() -> Any:
    """One token for a word with the space before it, for a digit, a space or a sign, as SmolLM2 cuts such texts."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = dict.fromkeys(word for name in (*CELLS, *COLOURS) for word in name.split())
    words |= dict.fromkeys(("equal", "even", "odd"))
    pieces = [_END, _IMAGE_TOKEN, _OTHER, " ", ",", ":", *"0123456789", *(f" {word}" for word in words)]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=_OTHER))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|."), behavior="isolated")
    made_by: Any = PreTrainedTokenizerFast
    return made_by(
        tokenizer_object=tokenizer,
        eos_token=_END,
        pad_token=_END,
        unk_token=_OTHER,
        extra_special_tokens=[_IMAGE_TOKEN],
    )
