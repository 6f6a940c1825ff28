"""Batches, losses and dense covariances, for the tests of statistics."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pytest
import torch
from peft_cases import CASES, VOCABULARY
from peft_models import Case
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.moments import Moments
from lora_squeeze.training.live import LiveModule, live_modules
from lora_squeeze.training.statistics import Statistics

WITH_ROWS = [
    "linear", "conv1d of gpt2", "convolutions", "grouped convolution", "embedding", "activated", "rslora", "mica",
    "negative alpha", "tied embedding and head",
]  # fmt: skip
# Without queries: that of a first token has no effect, since the softmax is over one key. Its gradient is zero or
# rounding, so whether it counts as a row is a matter of luck.
STEADY = replace(
    CASES["linear"],
    config=CASES["linear"].config | {"target_modules": ["v_proj", "o_proj", "down_proj"]},
)
Batch = dict[str, Tensor]


def loss_of(model: nn.Module, case: Case) -> Tensor:
    """A mean over the rows of the batch."""
    batch = case.batch()
    found = model(batch)
    return (found if isinstance(found, Tensor) else found.logits).square().mean()


def examples(*lengths: int, seed: int = 0, padding: int = 0) -> Batch:
    """Token sequences of these lengths, padded at the end, with labels for all but the padding."""
    width = max(lengths)
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    real = functional.pad(torch.arange(width) < torch.tensor(lengths)[:, None], (0, padding))
    ids = torch.where(real, functional.pad(ids, (0, padding)), 0)
    return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.where(real, ids, -100)}


def halves(batch: Batch) -> Iterator[Batch]:
    n = len(batch["input_ids"]) // 2
    for part in (slice(0, n), slice(n, None)):
        yield {key: tensor[part] for key, tensor in batch.items()}


def inputs_as_rows(module: LiveModule, x: Tensor) -> Tensor:
    """The rows x such that the branch is s B A x: tokens, patches, or one-hot rows of the vocabulary."""
    if module.kind == "embedding":
        scale = getattr(module.layer.get_base_layer(), "embed_scale", torch.ones(()))
        return functional.one_hot(x.flatten(), module.A.shape[1]).double() * scale
    if module.kind == "conv":
        conv = module.layer.get_base_layer()
        x = functional.pad(x, [p for padding in reversed(conv.padding) for p in (padding, padding)])
        for i, (kernel, stride) in enumerate(zip(conv.kernel_size, conv.stride, strict=True)):
            x = x.unfold(2 + i, kernel, stride)
        positions = len(conv.kernel_size)
        x = x.movedim(1, 1 + positions).flatten(1 + positions)
    return x.reshape(-1, x.shape[-1]).double()


def outputs_as_rows(module: LiveModule, g: Tensor) -> Tensor:
    g = g.movedim(1, -1) if module.kind == "conv" else g
    return g.reshape(-1, g.shape[-1]).double()


class Dense:
    """The dense covariances E[x x^T] and E[g g^T] of each layer, from its input and the gradient of its output."""

    def __init__(self, model: nn.Module) -> None:
        self.rows: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self.modules = {module.path: module for module in live_modules(model, "default")}
        for module in self.modules.values():
            module.layer.register_forward_hook(self._watch(module))

    def _watch(self, module: LiveModule) -> Callable[..., None]:
        def forward(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()
            output.register_hook(lambda g: self.rows[module.path].append((x, g.detach())))

        return forward

    def moments(self, path: str) -> tuple[Tensor, Tensor, int]:
        """A E[x x^T] A^T, B^T E[(n g)(n g)^T] B and n, over the rows where the branch gets a gradient."""
        module = self.modules[path]
        pieces = [(inputs_as_rows(module, x), outputs_as_rows(module, g)) for x, g in self.rows[path]]
        x, g = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        A, B = module.rows(module.A.detach()).double(), module.columns(module.B.detach()).double()
        A, B = (t if t.ndim == 3 else t[None] for t in (A, B))
        per_copy = g.unflatten(-1, (len(B), -1)).transpose(0, 1)  # groups of a convolution
        seen = ((per_copy @ B) != 0).any(-1).any(0)
        x, per_copy, n = x[seen], per_copy[:, seen], int(seen.sum())
        C_x, F_y = x.T @ x / n, per_copy.mT @ per_copy * n
        return (A @ C_x @ A.mT).squeeze(0), (B.mT @ F_y @ B).squeeze(0), n


def same(found: Tensor, expected: Tensor, room: float = 1e-5) -> bool:
    return found.shape == expected.shape and bool(
        ((found.double() - expected.double()).abs() <= room * expected.double().abs().max()).all()
    )


def alike(left: Mapping[str, Moments], right: Mapping[str, Moments], room: float = 1e-5) -> bool:
    """The same layers, and the same moments up to rounding."""
    return left.keys() == right.keys() and all(
        same(left[path].C, right[path].C, room)
        and same(left[path].F, right[path].F, room)
        and left[path].rows == pytest.approx(right[path].rows)
        for path in left
    )


def one_step(model: nn.Module, *batches: Batch, statistics: Statistics | None = None) -> dict[str, Moments]:
    """Moments of one step over these micro-batches, each with its share of the mean loss."""
    statistics = statistics or Statistics(model, "default")
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    statistics.step()
    statistics.close()
    return statistics.moments()
