"""A model with a method, its optimiser and controller, and one step of them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.costs.methods import Method
from bench.evidence import tasks
from bench.evidence.data import Data
from bench.evidence.learners.base import Batch, Learner
from lora_squeeze.methods.control import controller_for

STEPS = 1000  # of the training that a controller is told of
RATE = 1e-4
EXAMPLES, PROMPT_TOKENS, ANSWER_TOKENS = 8, 28, 4


def task() -> Data:
    """Reviews, in examples of 32 tokens."""
    return replace(tasks.load("sentiment"), prompt_tokens=PROMPT_TOKENS, answer_tokens=ANSWER_TOKENS)


def batch(learner: Learner) -> Batch:
    """The one batch of all steps."""
    data = task()
    return learner.batches(data, learner.usable(data, data.train)[:EXAMPLES], EXAMPLES)[0]


class Training:
    """One method at work on a learner's model, which it has for itself.

    Args:
        learner: of `bench.evidence.learners`, which has no other adapter at the time.
        method: what is trained.
        rank_one: numbers of a LoRA of rank 1 on this model.
    """

    def __init__(self, learner: Learner, method: Method, rank_one: int) -> None:
        self.learner, self.batch = learner, batch(learner)
        self.model: Any = learner.attach(method.config(learner, rank_one), task(), 0)
        if method.on_model is not None:
            method.on_model(self.model)
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
        self.controller = controller_for(self.model, STEPS, self.optimizer)

    def forward(self) -> Tensor:
        """The loss."""
        self.controller.before_forward()
        return self.learner.loss(self.model, self.batch)

    def step(self) -> None:
        """Forward, backward, optimiser, and what the method does around them."""
        self.forward().backward()
        self.controller.before_step()
        self.optimizer.step()
        self.controller.after_step()
        self.optimizer.zero_grad()

    def trained(self) -> Iterator[nn.Parameter]:
        """Parameters of the method; a new head, which every method trains, is none of them."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and "modules_to_save" not in name:
                yield parameter

    def numbers(self) -> int:
        """Trained, as it is now."""
        return sum(p.numel() for p in self.trained())

    def state_bytes(self) -> int:
        """Of what the optimiser keeps for the method's parameters: moments and step counts."""
        kept = (self.optimizer.state.get(p, {}).values() for p in self.trained())
        return sum(t.numel() * t.element_size() for values in kept for t in values if isinstance(t, Tensor))

    def frozen_bytes(self) -> int:
        """Of what the method keeps in memory, neither trained nor of the base model: bases, masks, indices."""
        own = [m for m in self.model.modules() if hasattr(m, "get_delta_weight")]
        base = {id(t) for m in own for t in _tensors(m.get_base_layer())}
        found = {id(t): t for m in own for t in _tensors(m) if id(t) not in base and not t.requires_grad}
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found.values()}.values())

    def file_bytes(self) -> int:
        """Of the saved adapter's tensors."""
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
    # PEFT's layers keep some frozen tensors in dictionaries that are no modules.
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, dict):
                yield from (t for t in value.values() if isinstance(t, Tensor))
