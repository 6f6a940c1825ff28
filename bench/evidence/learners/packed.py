"""The examples of a batch as one sequence without padding, in which none sees another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEP = 16  # lengths are rounded up to this, so that there are few shapes


def pack(ids: Tensor, mask: Tensor, read: Tensor) -> dict[str, Any]:
    """What a causal language model of transformers is called with, for the logits at some places.

    Args:
        ids, mask: (examples, length); tokens of mask 0 are left out.
        read: (examples, length), whether the logits at this place are wanted; they come in the order of the places.

    Returns:
        One row of tokens with their positions, an additive mask (1, 1, tokens, tokens) and the places to read.
    """
    kept = mask.bool()
    count = int(kept.sum())
    fill = -count % STEP
    owner = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)[kept]
    owner = torch.cat([owner, owner.new_full((fill,), -1)])
    places = torch.arange(count + fill, device=ids.device)
    positions = torch.cat([(kept.cumsum(1) - 1)[kept], torch.arange(fill, device=ids.device)])
    sees = (owner.unsqueeze(1) == owner) & (places.unsqueeze(1) >= places)
    return {
        "input_ids": torch.cat([ids[kept], ids.new_zeros(fill)]).unsqueeze(0),
        "position_ids": positions.unsqueeze(0),
        "attention_mask": torch.zeros(sees.shape, device=ids.device).masked_fill(~sees, torch.finfo().min)[None, None],
        "logits_to_keep": read[kept].nonzero().squeeze(1),
    }
