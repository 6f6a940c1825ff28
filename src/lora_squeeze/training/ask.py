"""Ask a model in memory: a short pass over examples for the moments of its adapter, and for the slope of the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.moments import Moments
from lora_squeeze.training.live import LiveModule, live_modules, tied_pairs
from lora_squeeze.training.statistics import Statistics


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    adapter: str | None = None,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
) -> dict[str, Moments]:
    """The moments of a trained adapter, from a few batches of examples such as it was trained on.

    Every batch is one forward and one backward pass in eval mode; batches count alike. Nothing of the model changes,
    and the global random generator is not used.

    Args:
        model: a PEFT model; its adapter must be active and may be frozen.
        batches: what the loss takes; by default dicts of tensors, labels among them, which are moved to the model's
            device. Eval mode turns off the gradient checkpointing of transformers, so keep batches small.
        adapter: name of the adapter; default the active one.
        loss: loss(model, batch) -> mean loss of the rows of a batch; default model(**batch).loss.

    Returns:
        Name of the layer -> Moments, as `Statistics.moments`, with the slope of the mean loss: layers without rows of
        their own are missing.

    Raises:
        LoraSqueezeError: no batch, no loss, an adapter that is not active or cannot be squeezed.
    """
    name = _active(model, adapter)
    measure = loss or _own_loss
    count, slopes = 0, dict[str, Any]()
    modules = live_modules(model, name)
    shared = {path for pair in tied_pairs(modules).items() for path in pair}  # their gradients are sums over both
    seen = [module for module in modules if module.kind != "experts" and module.name not in shared]
    with ExitStack() as restored:
        restored.enter_context(_frozen(model, modules))
        statistics = Statistics(model, name, decay=1.0)
        restored.callback(statistics.close)
        for count, batch in enumerate(batches, 1):  # noqa: B007 (asked for after the loop)
            value = measure(model, batch)
            if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                raise LoraSqueezeError("the loss must be one number with a gradient; is the adapter part of the model?")
            value.backward()
            statistics.step()
            for module in seen:
                if (grad := module.A.grad) is not None:
                    slopes[module.path] = slopes.get(module.path, 0.0) + _slope(module, grad)
            model.zero_grad(set_to_none=True)
    if not count:
        raise LoraSqueezeError("there is no batch to calibrate with; give at least one")
    moments = statistics.moments()
    return {
        path: replace(item, slope=slopes[path] / count) if path in slopes else item for path, item in moments.items()
    }


def _slope(module: LiveModule, grad: Tensor) -> Tensor:
    """dL/dM of s B M A at M = I: dL/dA = s B^T (dL/dW), so it is dL/dA A^T. In float32, on the device of the layer."""
    return module.rows(grad).float() @ module.rows(module.A.detach()).float().mT


def _active(model: nn.Module, adapter: str | None) -> str:
    """The adapter meant: active in some layer, and the only one unless it is named."""
    from peft.tuners.lora import LoraLayer

    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and not layer.disable_adapters]
    active: dict[str, None] = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    if adapter is None and len(active) == 1:
        return next(iter(active))
    if adapter is None or adapter not in active:
        asked = "the adapter to calibrate" if adapter is None else f"adapter {adapter!r}"
        names = ", ".join(map(repr, active)) or "none"
        raise LoraSqueezeError(f"{asked} must be active; active: {names}. Call set_adapter(), or name one")
    return adapter


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise LoraSqueezeError(f"a batch must be a dict of tensors, got {type(batch).__name__}; or give loss=")
    device = next(model.parameters()).device
    moved = {key: item.to(device) if isinstance(item, Tensor) else item for key, item in batch.items()}
    found = getattr(model(**moved), "loss", None)
    if not isinstance(found, Tensor):
        raise LoraSqueezeError("the model returned no loss; put labels into the batches, or give loss=")
    return found


@contextmanager
def _frozen(model: nn.Module, modules: Iterable[LiveModule]) -> Iterator[None]:
    """Eval mode, gradients for the factors A alone; afterwards all modes, flags and gradients as they were."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _, _ in flags:
            parameter.grad = None
            parameter.requires_grad_(False)
        for lora in modules:
            lora.A.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, trained, grad in flags:
            parameter.requires_grad_(trained)
            parameter.grad = grad
