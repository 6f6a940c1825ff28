"""A vision-language model: the picture's tokens stand before the prompt; tower and projector stay frozen."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.evidence.data import Data, Example
from bench.evidence.learners.base import Batch
from bench.evidence.learners.causal import SmolLM2
from bench.evidence.vlm import IMAGE_TOKENS, image_token_id, load_vlm, pixels, tiny_vlm, weights_digest, weights_origin


class Vision(SmolLM2):
    """A small tower, pre-trained here, and SmolLM2; see bench/evidence/vlm."""

    name = "vlm"
    targets: Any = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

    @property
    def weights(self) -> str:
        """See `Learner`."""
        return weights_origin()

    @property
    def build(self) -> str | None:
        """See `Learner`."""
        return weights_digest()

    def _load(self) -> Any:
        return load_vlm()[0]

    def base_folder(self) -> Path | None:
        """See `Learner`."""
        return None

    @cached_property
    def _tokenizer(self) -> Any:
        return load_vlm()[1]

    def _parts(self, example: Example) -> tuple[list[int], list[int]]:
        prompt, answer = super()._parts(example)
        return [image_token_id(self._tokenizer)] * IMAGE_TOKENS + prompt, answer

    def _room(self, data: Data) -> int:
        return IMAGE_TOKENS + data.prompt_tokens

    def _batch(self, data: Data, examples: Sequence[Example]) -> Batch:
        images = [example.image for example in examples if example.image is not None]
        if len(images) < len(examples):
            raise SystemExit(f"the task {data.name} has examples without a picture: a text model learns those")
        return {**super()._batch(data, examples), "pixels": pixels(images).to(self.device)}

    def _packed(self, model: Any) -> bool:
        """Never: pictures belong to rows."""
        return False

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """See `Learner`."""
        return {**super().inputs(batch), "pixel_values": batch["pixels"]}


class TinyVision(Vision):
    """The same with random weights, for tests."""

    name = "tiny-vlm"
    device = torch.device("cpu")
    weights = "random"
    build = None

    def _load(self) -> Any:
        return tiny_vlm()[0]

    @cached_property
    def _tokenizer(self) -> Any:
        return tiny_vlm()[1]
