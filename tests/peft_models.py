"""Tiny models with real PEFT adapters, and the questions that the tests ask of them."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from peft.utils import load_peft_weights
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_squeeze
from lora_squeeze.adapter import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT and transformers say to each other while an adapter loads; nothing that an adapter's file can change.
_HARMLESS = (
    "LoRA adapter added to ConvNd layer with groups > 1",
    "`is_gradient_checkpointing` is deprecated",
    "You have requested `ensure_weight_tying`, but no tied modules",
)
# PEFT 0.21.2 looks for the patterns of parameters among the modules only; it uses them all the same.
_PARAMETER_PATTERNS = r"The following (rank|alpha)_pattern keys did not match any targeted module"


@dataclass(frozen=True)
class Case:
    """A model and the settings of its adapter.

    Args:
        base: builds the same base model on every call.
        config: arguments of LoraConfig.
        batch: input of the model: token ids, or a tensor for models of plain torch.
        rank: what the tests squeeze to.
        plain: the adapter is nothing but updates of weights, so that adding them to the base by hand is the model.
        prepare: changes the adapted model after its adapter is randomised.
    """

    base: Callable[[], nn.Module]
    config: dict[str, Any]
    batch: Callable[[], Tensor]
    rank: int = 2
    plain: bool = True
    prepare: Callable[[PeftModel], None] | None = None


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The model that `build` makes from seed 0, in eval mode; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def randomise(model: nn.Module, std: float = 0.2) -> None:
    """Every trainable tensor becomes random: B too, so that the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter) * std)


def adapted(case: Case, **changes: Any) -> PeftModel:
    """The base with a random adapter on it. PEFT's own warnings about training are not the subject here."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(2)
        model = get_peft_model(seeded(case.base), LoraConfig(**(case.config | changes)))
        randomise(model)
        if case.prepare:
            case.prepare(model)
    return model.eval()


def save(model: PeftModel, folder: Path, **options: Any) -> Path:
    """PEFT's own files."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder), **options)
    return folder


def reload(case: Case, folder: Path, **options: Any) -> PeftModel:
    """What PEFT makes of a folder on a fresh base, in float64.

    A warning fails the test (a missing key is one), and so does a key that finds no place in the model.
    """
    with warnings.catch_warnings():
        for message in _HARMLESS:
            warnings.filterwarnings("ignore", re.escape(message))
        if case.config.get("target_parameters"):
            warnings.filterwarnings("ignore", _PARAMETER_PATTERNS)
        model = PeftModel.from_pretrained(seeded(case.base), str(folder), **options)
    result = set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
    assert result.unexpected_keys == [], f"keys that PEFT does not know: {result.unexpected_keys}"
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.double()


def outputs(model: nn.Module, case: Case) -> Tensor:
    """The model's output on the case's batch: logits, or the tensor itself."""
    batch = case.batch()
    with torch.no_grad():
        found = model(batch.double() if batch.is_floating_point() else batch)
    return found if isinstance(found, Tensor) else found.logits


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """PEFT's LoRA layers by the name that reports give them."""
    found: dict[str, LoraLayer] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{name}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name] = module
    return found


def scales(model: nn.Module) -> set[float]:
    """The scales that PEFT uses in its layers."""
    return {layer.scaling["default"] for layer in layers(model).values()}


def groups_of(layer: LoraLayer) -> int:
    return getattr(layer.get_base_layer(), "groups", 1)


def delta(layer: LoraLayer) -> Tensor:
    """What PEFT adds to the weight of a layer, as matrices (copies, rows, columns)."""
    if (groups := groups_of(layer)) > 1:  # PEFT itself cannot: its forward is the definition
        A, B = (factors["default"].weight.detach().flatten(1) for factors in (layer.lora_A, layer.lora_B))
        return layer.scaling["default"] * B.unflatten(0, (groups, -1)) @ A.unflatten(0, (groups, -1))
    with torch.no_grad():
        dW = layer.get_delta_weight("default").double()
    if dW.dim() == 3 and isinstance(layer, ParamWrapper):
        return dW
    return dW.flatten(1).unsqueeze(0)


def deltas(model: nn.Module) -> dict[str, Tensor]:
    return {name: delta(layer) for name, layer in layers(model).items()}


def best(dW: Tensor, rank: int) -> Tensor:
    """The best approximation of each matrix, from the dense singular value decomposition."""
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    return U[..., :rank] * S[..., None, :rank] @ Vh[..., :rank, :]


def lost(dW: Tensor, rank: int) -> float:
    """Root of the sum of the squared singular values after `rank`, over all copies."""
    return math.sqrt(float(torch.linalg.svdvals(dW)[..., rank:].square().sum()))


def with_updates(case: Case, updates: dict[str, Tensor], source: PeftModel) -> nn.Module:
    """A fresh base, in float64, with updates added to its weights: what the adapter should amount to."""
    base = seeded(case.base).double()
    with torch.no_grad():
        for name, layer in layers(source).items():
            if isinstance(layer, ParamWrapper):
                target = base.get_parameter(name)
            elif isinstance(layer, MultiheadAttention):
                target = base.get_parameter(f"{name}.in_proj_weight")
            else:
                target = base.get_parameter(f"{name}.weight")
            target += updates[name].reshape(target.shape)
    return base


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return config


def write_config(folder: Path, **changes: Any) -> None:
    (folder / CONFIG).write_text(json.dumps(read_config(folder) | changes))


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS)


@dataclass(frozen=True)
class Loaded:
    """An adapter folder and what PEFT makes of it."""

    case: Case
    folder: Path
    adapter: Adapter
    model: PeftModel

    @property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)


WAYS: dict[str, dict[str, Any]] = {
    "keep": {"alpha": "keep"},
    "fold": {"alpha": "fold"},
    "mixed": {"allocate": "global", "min_rank": 1},
}


class Menagerie:
    """The source of every case, and its squeezed versions, made once and kept."""

    def __init__(self, cases: dict[str, Case], folder: Path) -> None:
        self.cases, self.folder = cases, folder
        self._made: dict[tuple[str, str], Loaded] = {}

    def source(self, name: str) -> Loaded:
        """What PEFT saves and loads again."""
        if (name, "source") not in self._made:
            case, folder = self.cases[name], self.folder / name / "source"
            save(adapted(case), folder)
            self._made[name, "source"] = Loaded(case, folder, lora_squeeze.load(folder), reload(case, folder))
        return self._made[name, "source"]

    def squeezed(self, name: str, way: str) -> Loaded:
        """The source at the case's rank, saved in one of WAYS and loaded by PEFT."""
        if (name, way) not in self._made:
            source, folder = self.source(name), self.folder / name / way
            small = source.adapter.squeeze(rank=source.case.rank, **WAYS[way])
            small.save(folder)
            self._made[name, way] = Loaded(source.case, folder, small, reload(source.case, folder))
        return self._made[name, way]
