"""The LoRA layers of a live model: find them, read their factors as updates, put others in their place.

A layer keeps its factors in shapes of its own. `rows` and `columns` bring a tensor shaped like A or B into matrices of
LowRank, `like_A` and `like_B` bring it back; gradients and optimiser states have the same shapes, go the same way.

==================  =========================  =====================================  ================================
layer               A                          B                                      matrices
==================  =========================  =====================================  ================================
linear              (r, in)                    (out, r)                               the same
embedding           (r, vocabulary)            (dim, r)                               the same
convolution         (r, in, *kernel)           (out, r / groups, 1, ...)              (groups, r / groups, in * kernel),
                                                                                      (groups, out / groups, r / groups)
parameter, experts  (E * r, in)                (out, r * E), experts fastest          (E, r, in), (E, out, r)
==================  =========================  =====================================  ================================
"""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_squeeze.adapter import Kind
from lora_squeeze.data_aware import TIED, base_name
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_config import check_kind
from lora_squeeze.lowrank import LowRank
from lora_squeeze.training.optimizer_state import full, like

# Variants with plain factors: an activated LoRA only begins later in the text, MiCA only freezes what it initialises.
_PLAIN_VARIANTS = {"ALoraLinearVariant", "MiCALinearVariant", "MiCAEmbeddingVariant"}


@dataclass(frozen=True, eq=False)
class LiveModule:
    """One LoRA layer of one adapter.

    Args:
        name: dotted path in the base model, as in reports and files.
        path: name of the layer in the live model.
        layer: PEFT's LoraLayer.
        adapter: name of the adapter.
        kind: of layer.
        copies: independent updates in one tensor: experts, or groups of a convolution.
        group: modules with the same group keep one common rank; None is a group of its own.
    """

    name: str
    path: str
    layer: Any
    adapter: str
    kind: Kind
    copies: int = 1
    group: str | None = None

    @property
    def A(self) -> nn.Parameter:
        """The parameter that holds A."""
        found: nn.Parameter = (
            self.layer.lora_embedding_A[self.adapter]
            if self.kind == "embedding"
            else self.layer.lora_A[self.adapter].weight
        )
        return found

    @property
    def B(self) -> nn.Parameter:
        """The parameter that holds B."""
        found: nn.Parameter = (
            self.layer.lora_embedding_B[self.adapter]
            if self.kind == "embedding"
            else self.layer.lora_B[self.adapter].weight
        )
        return found

    @property
    def scale(self) -> float:
        """s of dW = s B A."""
        return float(self.layer.scaling[self.adapter])

    @property
    def step(self) -> int:
        """Ranks counted by PEFT per rank of the update: the groups of a convolution."""
        return self.copies if self.kind == "conv" else 1

    @property
    def width(self) -> int:
        """Rank that the parameters have room for."""
        rows = self.A.shape[0]
        return rows // self.copies if self.kind in ("conv", "experts") else rows

    @property
    def cost(self) -> int:
        """Numbers in the factors per rank of the update."""
        return (self.A.numel() + self.B.numel()) // self.width

    def rank(self) -> int:
        """Rank in use: rows of A beyond it are zero, with their columns of B, after a squeeze that kept the shapes."""
        used = self.rows(full(self.A.detach())).ne(0).any(-1) | self.columns(full(self.B.detach())).ne(0).any(-2)
        used = used.reshape(-1, used.shape[-1]).any(0)
        return int(used.nonzero().max()) + 1 if bool(used.any()) else 1

    def update(self) -> LowRank:
        """The update, without the unused directions."""
        rank = self.rank()
        A, B = self.rows(full(self.A.detach())), self.columns(full(self.B.detach()))
        return LowRank(B[..., :rank], A[..., :rank, :], self.scale)

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of A's shape as (*copies, r, in)."""
        if self.kind == "conv":
            flat = tensor.flatten(1)
            return flat.unflatten(0, (self.copies, -1)) if self.copies > 1 else flat
        return tensor.unflatten(0, (self.copies, -1)) if self.kind == "experts" else tensor

    def columns(self, tensor: Tensor) -> Tensor:
        """A tensor of B's shape as (*copies, out, r)."""
        if self.kind == "conv":
            flat = tensor.flatten(1)
            return flat.unflatten(0, (self.copies, -1)) if self.copies > 1 else flat
        if self.kind == "experts":
            unpacked: Tensor = tensor.unflatten(1, (-1, self.copies))
            return unpacked.permute(2, 0, 1)
        return tensor

    def like_A(self, matrix: Tensor) -> Tensor:
        """The inverse of `rows`, for any rank."""
        if self.kind == "conv":
            return matrix.reshape(-1, *self.A.shape[1:])
        return matrix.reshape(-1, matrix.shape[-1])

    def like_B(self, matrix: Tensor) -> Tensor:
        """The inverse of `columns`, for any rank."""
        if self.kind == "conv":
            return matrix.reshape(-1, matrix.shape[-1], *self.B.shape[2:])
        return matrix.permute(1, 2, 0).reshape(matrix.shape[-2], -1) if self.kind == "experts" else matrix

    def put(self, A: nn.Parameter, B: nn.Parameter) -> None:
        """Make these the layer's factors, of whatever rank they have, and keep its scale."""
        if self.kind == "embedding":
            self.layer.lora_embedding_A[self.adapter] = A
            self.layer.lora_embedding_B[self.adapter] = B
        else:
            down, up = self.layer.lora_A[self.adapter], self.layer.lora_B[self.adapter]
            down.weight, up.weight = A, B
            outputs, inputs = (
                ("out_channels", "in_channels") if self.kind == "conv" else ("out_features", "in_features")
            )
            setattr(down, outputs, A.shape[0])
            setattr(up, inputs, B.shape[1] * self.step)
        rank = self.width * self.step
        self.layer.r[self.adapter] = rank
        self.layer.lora_alpha[self.adapter] = alpha_of(self.scale, rank, self.rslora)

    @property
    def rslora(self) -> bool:
        """Whether PEFT divides alpha by the root of the rank."""
        return bool(self.layer.use_rslora.get(self.adapter))


def alpha_of(scale: float, rank: int, rslora: bool) -> float:
    """The lora_alpha with which PEFT computes this scale."""
    alpha = scale * (math.sqrt(rank) if rslora else rank)
    nearest = round(alpha)
    return nearest if abs(alpha - nearest) <= 1e-12 * abs(alpha) else alpha


def holder_of(model: nn.Module) -> Any:
    """The model with PEFT's configurations inside whatever wraps it.

    Raises:
        LoraSqueezeError: there is none.
    """
    for module in model.modules():
        if isinstance(getattr(module, "peft_config", None), Mapping):
            return module
    raise LoraSqueezeError(
        f"{type(model).__name__} has no LoRA adapter; make one with peft.get_peft_model(model, LoraConfig(r=64, ...))"
    )


def trained_adapters(model: nn.Module) -> list[str]:
    """The active adapters that are trained, of LoRA or another method, in PEFT's order.

    Raises:
        LoraSqueezeError: no adapter, or none that is trained.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    names = list(holder_of(model).peft_config)
    found = {
        name
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name in layer.active_adapters
        if any(p.requires_grad for p in _parameters(layer, name))
    }
    if not found:
        raise LoraSqueezeError(
            f"none of the adapters {', '.join(names)} is both active and trainable; call set_adapter, or name one"
        )
    return [name for name in names if name in found]


def only_adapter(model: nn.Module) -> str:
    """The one adapter that is active and trained.

    Raises:
        LoraSqueezeError: none, or several.
    """
    names = trained_adapters(model)
    if len(names) > 1:
        raise LoraSqueezeError(f"several adapters are trained: {', '.join(names)}; name one with adapter=")
    return names[0]


def _parameters(layer: Any, adapter: str) -> Iterator[nn.Parameter]:
    """All parameters that an adapter has in one of PEFT's layers."""
    for name in layer.adapter_layer_names:
        holder: Any = getattr(layer, name, {})
        if hasattr(holder, "keys") and adapter in holder:
            item = holder[adapter]
            yield from item.parameters() if isinstance(item, nn.Module) else [item]


def _factors(layer: Any, adapter: str) -> Iterator[nn.Parameter]:
    for holder in (layer.lora_A, layer.lora_B, layer.lora_embedding_A, layer.lora_embedding_B):
        if adapter in holder:
            item = holder[adapter]
            yield getattr(item, "weight", item)


def live_modules(model: nn.Module, adapter: str) -> list[LiveModule]:
    """The LoRA layers of one adapter, in the model's order.

    Raises:
        LoraSqueezeError: no such adapter, no layer of it, a variant whose factors are not the update, merged weights.
    """
    from peft.tuners.lora import LoraLayer

    configs = holder_of(model).peft_config
    if adapter not in configs:
        raise LoraSqueezeError(f"no adapter {adapter!r} in the model; it has {', '.join(map(repr, configs))}")
    check_config(configs[adapter])
    found = [
        _live(path, layer, adapter)
        for path, layer in model.named_modules(remove_duplicate=True)
        if isinstance(layer, LoraLayer) and any(True for _ in _factors(layer, adapter))
    ]
    if not found:
        raise LoraSqueezeError(f"adapter {adapter!r} has no LoRA layer in the model")
    return _grouped(found, bool(getattr(configs[adapter], "ensure_weight_tying", False)))


def check_config(config: Any) -> None:
    """Refuse an adapter whose factors are not the whole update, by the rules for files."""
    fields = {key: getattr(value, "value", value) for key, value in vars(config).items()}
    check_kind(fields)


def _live(path: str, layer: Any, adapter: str) -> LiveModule:
    from peft.tuners.lora.layer import Embedding, ParamWrapper, _ConvNd

    name = base_name(path)
    variant = getattr(layer, "lora_variant", {}).get(adapter)
    if variant is not None and type(variant).__name__ not in _PLAIN_VARIANTS:
        raise LoraSqueezeError(f"{name}: {type(variant).__name__} cannot be squeezed as a plain LoRA")
    if layer.merged:
        raise LoraSqueezeError(f"{name}: adapters are merged into the base weights; call unmerge_adapter() first")
    if isinstance(layer, ParamWrapper):
        experts: int = vars(layer)["num_experts"]
        return LiveModule(f"{name}.{layer.parameter_name}", path, layer, adapter, "experts", experts)
    if isinstance(layer, _ConvNd):
        groups: Any = layer.get_base_layer().groups
        return LiveModule(name, path, layer, adapter, "conv", groups)
    return LiveModule(name, path, layer, adapter, "embedding" if isinstance(layer, Embedding) else "linear")


def _grouped(modules: list[LiveModule], tied: bool) -> list[LiveModule]:
    """Mark the modules that must keep one rank, because PEFT gives them one when it loads the file."""
    siblings = Counter(base_name(m.path) for m in modules if m.kind == "experts")
    groups: dict[str, str] = {}
    for module in modules:
        base = base_name(module.path)
        if module.kind == "experts" and siblings[base] > 1:
            groups[module.name] = f"parameters of {base}"
        if module.path.endswith(".base_layer.out_proj"):
            outer = base.removesuffix(".out_proj")
            groups[module.name] = groups[outer] = f"attention {outer}"
    if tied:
        heads = _sharing(modules)
        groups.update({module.name: TIED for pair in heads for module in pair})
    return [replace(m, group=groups[m.name]) if m.name in groups else m for m in modules]


def _sharing(modules: Sequence[LiveModule]) -> list[tuple[LiveModule, LiveModule]]:
    """Pairs whose factors lie in the same memory, each the transpose of the other: tied embedding and output head."""
    owners = {m.A.data_ptr(): m for m in modules if m.kind == "embedding" and m.A.data_ptr()}  # 0: an empty shard
    return [(owners[m.B.data_ptr()], m) for m in modules if m.kind != "embedding" and m.B.data_ptr() in owners]


def tied_pairs(modules: Sequence[LiveModule]) -> dict[str, str]:
    """Name of an output head -> name of the embedding whose transposed factors it uses."""
    return {head.name: embedding.name for embedding, head in _sharing(modules)}


def sync_config(model: nn.Module, adapter: str, modules: Iterable[LiveModule]) -> None:
    """Bring the configuration up to date with the layers, so that what PEFT saves is loaded with the same scales.

    r is the largest rank: a server compares it with its limit. Modules that differ have one anchored pattern each,
    since PEFT takes the first pattern that matches the end of a path.
    """
    configs = holder_of(model).peft_config
    configs[adapter] = config = copy.copy(configs[adapter])  # PEFT keeps the user's object, which may serve again
    modules = list(modules)
    ranks = {m.name: m.width * m.step for m in modules}
    top = max(ranks.values())
    scale = Counter(m.scale for m in modules).most_common(1)[0][0]
    rslora = bool(config.use_rslora)
    alpha = alpha_of(scale, top, rslora)
    looked_up = [m for m in modules if not m.path.endswith(".base_layer.out_proj")]
    config.r, config.lora_alpha = top, alpha
    if isinstance(config.init_lora_weights, str):
        # Done. Run again on loading it would cost time, or fail at an odd rank.
        config.init_lora_weights, config.eva_config = True, None
    config.rank_pattern = {pattern(m): ranks[m.name] for m in looked_up if ranks[m.name] != top}
    config.alpha_pattern = {
        pattern(m): own for m in looked_up if (own := alpha_of(m.scale, ranks[m.name], rslora)) != alpha
    }


def pattern(module: LiveModule) -> str:
    """Regular expression that matches this module's path and no other."""
    return f"^{re.escape(module.name)}"


def resized(module: LiveModule, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Zero factors of another rank, on the same device and of the same dtype: room for what is about to be loaded."""
    A, B = module.rows(module.A.detach()), module.columns(module.B.detach())
    new_A = module.like_A(A.new_zeros((*A.shape[:-2], rank, A.shape[-1])))
    new_B = module.like_B(B.new_zeros((*B.shape[:-1], rank)))
    return (
        nn.Parameter(new_A, requires_grad=module.A.requires_grad),
        nn.Parameter(new_B, requires_grad=module.B.requires_grad),
    )


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Products inside keep the precision of what is multiplied, also where the training runs under autocast."""
    with ExitStack() as stack:
        for kind in {parameter.device.type for parameter in model.parameters()}:
            if torch.amp.is_autocast_available(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def is_sharded(modules: Iterable[LiveModule]) -> bool:
    """Whether any factor is a distributed tensor (FSDP2, tensor parallel)."""
    return any(hasattr(m.A, "full_tensor") or hasattr(m.B, "full_tensor") for m in modules)


def write(parameter: nn.Parameter, value: Tensor) -> None:
    """Overwrite a parameter in place; a sharded one gets its share."""
    with torch.no_grad():
        parameter.copy_(like(value, parameter))
