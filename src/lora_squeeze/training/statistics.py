"""What the truncation wants to know about the data, collected while the model trains or in a short pass over examples.

A LoRA branch computes h = A x forward and gets dL/dh = s B^T g backward, one row of each per token (or position of a
convolution). Both pass by anyway, so two r x r products per layer give the moments of `lora_squeeze.moments`:

    C = mean of h h^T        F = n * sum of (B^T g)(B^T g)^T

over the n rows of a step whose gradient is not zero: padding and rows that the loss never sees drop out of both. L is
the mean loss of the step, so the gradient of one row's own loss is n g: hence the factor n. Steps are averaged, each
with the same weight or with weights that fade.

Where the update is not a branch with rows, nothing is seen: experts in one parameter and nn.MultiheadAttention compute
with the whole weight. Dropout on x is seen as the branch sees it.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.moments import Moments
from lora_squeeze.training.live import LiveModule, is_sharded, live_modules


class _Sums(NamedTuple):
    """Sums over the rows of a step, or over steps; float32, on the device of the layer.

    Args:
        C: (copies, r, r), sum of h h^T; over steps, of their C.
        F: (copies, r, r), sum of (B^T g)(B^T g)^T; over steps, of their F.
        rows: (), rows with a gradient.
        steps: (), over steps, those that had such rows; else unused.
    """

    C: Tensor
    F: Tensor
    rows: Tensor
    steps: Tensor

    @classmethod
    def zero(cls, copies: int, rank: int, device: torch.device) -> _Sums:
        shapes = ((copies, rank, rank), (copies, rank, rank), (), ())
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    @classmethod
    def stacked(cls, sums: Iterable[_Sums]) -> _Sums:
        return cls(*(torch.stack(tensors) for tensors in zip(*sums, strict=True)))


class Statistics:
    """Running moments of every LoRA layer of one adapter, from the activations and gradients of its own branches.

    Attach it before the first step (before the first call where torch.compile is used), and call `step` after every
    optimiser step, before the factors change shape.

    Args:
        model: a PEFT model, or what wraps one; keys are the names of its layers in `model.named_modules()`.
        adapter: name of the adapter.
        decay: weight of a recorded step relative to the next one, in (0, 1]; 0.95 remembers about 20 steps, 1 is the
            plain mean of all. Small where the factors still move fast: C and F belong to the factors of their step.
        every: record one step in this many, at least 1.

    Raises:
        LoraSqueezeError: a number out of range, or an adapter that cannot be squeezed.

    Notes:
        Costs 4 r^2 operations per row and layer beside the 6 r (in + out) of the branch itself, in float32, and no
        synchronisation with the device. Every forward pass with gradients between two calls of `step` counts once,
        with any kind of gradient checkpointing; the non-reentrant one would free the r numbers per row and layer that
        are kept until backward. A row whose gradient is rounding instead of zero counts as a row.

    Example:
        >>> statistics = Statistics(peft_model, "default")  # doctest: +SKIP
        >>> loss.backward(); optimizer.step(); statistics.step()  # doctest: +SKIP
        >>> squeeze_(peft_model, rank=8, moments=statistics.moments())  # doctest: +SKIP
    """

    def __init__(self, model: nn.Module, adapter: str, *, decay: float = 0.95, every: int = 1) -> None:
        if not 0 < decay <= 1 or every < 1:
            raise LoraSqueezeError(f"decay must be in (0, 1] and every at least 1, got {decay} and {every}")
        self.decay, self.every = decay, every
        self._step, self._paused = 0, False
        found = live_modules(model, adapter)
        self._modules = {module.path: module for module in found if module.kind != "experts"}
        self._experts = [module.path for module in found if module.kind == "experts"]
        self._ranks: dict[str, int] = {}  # ranks in use, looked up at the first step: loading may change them before
        self._current: dict[str, _Sums] = {}
        self._running: dict[str, _Sums] = {}
        self._handles: list[RemovableHandle] = []
        self._attach()

    @property
    def unseen(self) -> list[str]:
        """Layers about which nothing is known so far: without rows of their own, never called, or with B still zero."""
        seen = self.moments()
        return [path for path in (*self._modules, *self._experts) if path not in seen]

    def step(self, loss_scale: float = 1.0) -> None:
        """One optimiser step is done: fold its sums into the running means. A step with NaN or infinity is left out.

        Args:
            loss_scale: what the loss was multiplied by before backward, as by a gradient scaler for float16.

        Raises:
            LoraSqueezeError: a layer has a lower rank than before; `map` was not called after a squeeze.
        """
        alike: dict[tuple[Any, ...], list[str]] = defaultdict(list)
        for path, sums in self._current.items():
            width, rank = sums.C.shape[-1], self._rank(path)
            if width < rank:
                raise LoraSqueezeError(
                    f"{path}: statistics of rank {rank} meet a layer of rank {width}; call map() after a squeeze"
                )
            alike[sums.C.shape, rank, sums.C.device].append(path)
        for (_, rank, device), paths in alike.items():  # together: most of the time would go into calls
            new = _Sums.stacked([self._current[path] for path in paths])
            total = _Sums.stacked([self._running_of(path, device) for path in paths])
            # A squeeze that kept the shapes of the parameters leaves directions of zeros behind the first ones.
            rows = new.rows[:, None, None, None]
            C = new.C[..., :rank, :rank] / rows.clamp_min(1)
            F = new.F[..., :rank, :rank] * rows / loss_scale**2
            good = (new.rows > 0) & (C.sum((1, 2, 3)) + F.sum((1, 2, 3))).isfinite()
            added = _Sums(C, F, new.rows, torch.ones_like(new.steps))
            folded = [
                torch.where(good.reshape(-1, *[1] * (item.dim() - 1)), item, 0.0).add_(old, alpha=self.decay).unbind()
                for old, item in zip(total, added, strict=True)
            ]
            self._running.update(zip(paths, (_Sums(*parts) for parts in zip(*folded, strict=True)), strict=True))
        self._current = {}
        self._step += 1

    def moments(self) -> dict[str, Moments]:
        """Name of the layer -> its moments, of the layers that were seen. Call it after `step`.

        `rows` counts the rows of faded steps in part; after `synchronise`, it is the mean over the processes.
        """
        found = {}
        for path, module in self._modules.items():
            sums = self._running.get(path)
            if sums is not None and float(sums.steps) > 0:
                C, F = sums.C / sums.steps, sums.F / sums.steps
                if module.copies == 1:
                    C, F = C[0], F[0]
                found[path] = Moments(C, F, float(sums.rows))
        return found

    def map(self, maps: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Go over to the factors B' = B P and A' = R A of a squeeze: C' = R C R^T, F' = P^T F P. Exact.

        Args:
            maps: name of the layer -> (P, R), (*copies, r, k) and (*copies, k, r); layers that kept their factors and
                layers without statistics may be missing or there.

        Raises:
            LoraSqueezeError: a layer that the model does not have, or maps from another rank. Nothing is changed then.
        """
        new, ranks = {}, {}
        for path, (P, R) in maps.items():
            if path not in self._modules and path not in self._experts:
                raise LoraSqueezeError(f"no LoRA layer {path!r} in the statistics; map layers by their full names")
            if path not in self._ranks:
                continue
            if P.shape[-2] != self._ranks[path]:
                raise LoraSqueezeError(
                    f"{path}: maps of rank {P.shape[-2]} meet statistics of rank {self._ranks[path]}"
                )
            ranks[path] = P.shape[-1]
            if (sums := self._running.get(path)) is not None:
                mapped = Moments(sums.C, sums.F, 0.0).mapped(*(t.reshape(-1, *t.shape[-2:]) for t in (P, R)))
                new[path] = _Sums(mapped.C, mapped.F, sums.rows, sums.steps)
        self._running.update(new)
        self._ranks.update(ranks)
        self._current = {}
        if self._handles:
            self._attach()  # a squeeze may have put new modules in place

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Nothing is recorded of forward passes inside: the loss before and after a squeeze, an evaluation."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def synchronise(self) -> None:
        """Average the running sums over the processes of torch.distributed; all of them must call it. Alone, nothing.

        Data-parallel processes see different rows; after this, all of them squeeze alike.
        """
        if not (self._modules and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        sums = [self._running_of(path, module.A.device) for path, module in self._modules.items()]
        tensors = [tensor for item in sums for tensor in item]
        flat = torch.cat([tensor.reshape(-1).to(tensors[0].device) for tensor in tensors])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(mean.reshape(tensor.shape))

    def state_dict(self) -> dict[str, Any]:
        """The running sums as plain tensors and numbers, for a checkpoint. Call it after `step`."""
        layers = {
            path: {name: tensor.cpu().clone() for name, tensor in sums._asdict().items()}
            for path, sums in self._running.items()
        }
        return {"step": self._step, "ranks": dict(self._ranks), "layers": layers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was called. The model must have the layers and ranks of that moment.

        Raises:
            LoraSqueezeError: a layer or a rank that the model does not have. Nothing is changed then.
        """
        for path, rank in state["ranks"].items():
            if path not in self._modules:
                raise LoraSqueezeError(f"the checkpoint's statistics have a layer {path!r}, the model does not")
            room = self._modules[path].width
            if rank > room:
                raise LoraSqueezeError(f"{path}: the checkpoint's statistics have rank {rank}, the model has {room}")
        self._running = {
            path: _Sums(**{name: tensor.to(self._modules[path].A.device, copy=True) for name, tensor in sums.items()})
            for path, sums in state["layers"].items()
        }
        self._ranks, self._current, self._step = dict(state["ranks"]), {}, int(state["step"])

    def fits(self, state: Mapping[str, Any]) -> bool:
        """Whether the layers have the ranks now that they had when `state_dict` gave this."""
        return all(
            path in self._modules and self._modules[path].rank() == rank for path, rank in state["ranks"].items()
        )

    def drop_misfits(self) -> None:
        """Forget layers that have another rank than their statistics: the model was loaded without these."""
        if not self._ranks:
            return
        ranks = {path: module.rank() for path, module in self._modules.items()}
        misfits = [path for path in self._running if self._ranks[path] != ranks[path]]
        if misfits:
            warnings.warn(
                f"{len(misfits)} layers have another rank than their statistics, {misfits[0]} {ranks[misfits[0]]} "
                f"instead of {self._ranks[misfits[0]]}: they are squeezed without; load the statistics with the model",
                stacklevel=2,
            )
        self._running = {path: sums for path, sums in self._running.items() if path not in misfits}
        self._ranks = ranks

    def close(self) -> None:
        """Remove the hooks; what was collected stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _attach(self) -> None:
        self.close()
        for module in self._modules.values():
            embedding = module.kind == "embedding"
            holder = module.layer if embedding else module.layer.lora_A[module.adapter]
            hook = torch.compiler.disable((_embedding_hook if embedding else _branch_hook)(self, module))
            self._handles.append(holder.register_forward_hook(hook, with_kwargs=True))

    def _rank(self, path: str) -> int:
        if not self._ranks:  # all at once: reading a sharded factor is a collective operation
            self._ranks = {name: module.rank() for name, module in self._modules.items()}
        return self._ranks[path]

    def _running_of(self, path: str, device: torch.device) -> _Sums:
        if path not in self._running:
            self._running[path] = _Sums.zero(self._modules[path].copies, self._rank(path), device)
        return self._running[path]

    def _listens(self) -> bool:
        return not self._paused and self._step % self.every == 0 and torch.is_grad_enabled()

    def _add(self, path: str, h: Tensor, g: Tensor, scale: float = 1.0) -> None:
        """Rows of A x and of scale * B^T g, (..., copies * r) each."""
        copies = self._modules[path].copies
        seen = (g != 0).any(-1, keepdim=True)
        h = torch.where(seen, h, 0).reshape(-1, copies, h.shape[-1] // copies).float().transpose(0, 1)
        g = (g.float() / scale).reshape(-1, copies, g.shape[-1] // copies).transpose(0, 1)
        if path not in self._current:
            self._current[path] = _Sums.zero(copies, h.shape[-1], h.device)
        sums = self._current[path]
        sums.C.baddbmm_(h.mT, h)  # in place: autocast lets it be
        sums.F.baddbmm_(g.mT, g)
        sums.rows.add_(seen.sum())


def has_rows(module: LiveModule) -> bool:
    """Whether rows of its own pass by a layer; where they do not, nothing will ever be known about it."""
    in_attention = type(module.layer).__name__ == "MultiheadAttention" or module.path.endswith(".base_layer.out_proj")
    hidden = in_attention or module.kind == "experts" or (module.kind == "embedding" and is_sharded([module]))
    return not hidden


def _branch_hook(statistics: Statistics, module: LiveModule) -> Callable[..., None]:
    """Forward hook of lora_A, whose output is h.

    The hook of the gradient does all the work: of a forward pass and its recomputation, only one gets a gradient.
    """

    def forward(branch: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        scale = module.scale
        if not (statistics._listens() and output.requires_grad and scale):
            return
        channels = 1 - module.A.dim()  # last for a linear layer, before the positions of a convolution
        h = output.detach().movedim(channels, -1)
        output.register_hook(lambda grad: statistics._add(module.path, h, grad.detach().movedim(channels, -1), scale))

    return forward


def _embedding_hook(statistics: Statistics, module: LiveModule) -> Callable[..., None]:
    """Forward hook of an embedding: its factors are bare parameters, so h is looked up and B^T g multiplied out."""

    def forward(layer: Any, args: Any, kwargs: Any, output: Tensor) -> None:
        runs = module.adapter in layer.active_adapters and not (layer.disable_adapters or layer.merged)
        # With adapter_names, other rows of the batch belong to other adapters; a share of a factor looks nothing up.
        runs = runs and not kwargs.get("adapter_names") and not is_sharded([module])
        if not (statistics._listens() and output.requires_grad and runs):
            return
        h = functional.embedding(args[0], module.A.detach().mT)
        embed_scale = layer._get_embed_scale()  # some models multiply the output of the embedding, and of the branch
        B = module.B.detach() if embed_scale is None else module.B.detach() * embed_scale.to(module.B)
        output.register_hook(lambda grad: statistics._add(module.path, h, grad.detach().to(B) @ B))

    return forward
