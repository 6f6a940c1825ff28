"""Loading a checkpoint of another rank into a live model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from lora_squeeze.training.commit import make_room
from lora_squeeze.training.live import holder_of, is_sharded, live_modules
from lora_squeeze.training.other_method import is_other


def follow_loaded_ranks(model: nn.Module, adapter: str, optimizer: Callable[[], Any]) -> RemovableHandle:
    """Let the model's LoRA layers take the rank of whatever state dict is loaded into it.

    A run that is resumed builds its model at the source rank, while the checkpoint has the rank of its stage; the same
    holds for the best checkpoint at the end of training. All ways of loading (PEFT's load_adapter, the Trainer,
    load_state_dict) pass through here. The scale stays, as it does in a squeeze. A copy of the model does so too, for
    itself alone.

    Args:
        model: the model, wrapped or not.
        adapter: whose layers.
        optimizer: gives the optimiser that holds the layers' parameters, or None.

    Returns:
        A handle; its `remove()` ends this.
    """
    holder: nn.Module = holder_of(model)

    def make_room_for(module: nn.Module, state_dict: dict[str, Any], prefix: str, *unused: object) -> None:
        if is_other(module, adapter):
            return
        modules = live_modules(module, adapter)
        if is_sharded(modules):
            return  # sharded parameters keep their shape, in checkpoints too
        ranks = {}
        for live in modules:
            key = f"{prefix}{live.path}." + (
                f"lora_embedding_A.{adapter}" if live.kind == "embedding" else f"lora_A.{adapter}.weight"
            )
            if key in state_dict:
                ranks[live.name] = live.step * (state_dict[key].shape[0] // live.copies)
        make_room(module, ranks, optimizer=optimizer() if module is holder else None, adapter=adapter)

    handle: RemovableHandle = holder.register_load_state_dict_pre_hook(make_room_for)
    return handle
