"""One weight of a base model, a folder with safetensors or a live model, as the matrix that updates are added to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_squeeze.adapter import Module
from lora_squeeze.base_figures import Weights
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.dense_keys import HEADS, INPUTS, path_of
from lora_squeeze.formats.safetensors_header import quoted

Base = Weights | nn.Module


def weight(base: Base, name: str, *, only_shape: bool = False) -> Tensor:
    """The weight of one module of the base model.

    Args:
        base: weights on disk, or a model.
        name: dotted path of the module.
        only_shape: nothing is read; a tensor without numbers, on the device "meta".

    Raises:
        LoraSqueezeError: no such module, or it is stored quantised.
    """
    if isinstance(base, nn.Module):
        try:
            found = base.get_submodule(name).weight
        except AttributeError:
            found = None
        if not isinstance(found, Tensor):
            raise LoraSqueezeError(f"{name}: the base model given has no such weight; give the one it was trained on")
        found = found.detach().to("meta") if only_shape else found.detach().cpu()
        where = type(base).__name__
    else:
        # A head around the model adds the first part of a path, or the file leaves it out.
        paths = (name, name.partition(".")[2], f"model.{name}")
        key = next((f"{path}.weight" for path in paths if f"{path}.weight" in base.facts), None)
        if key is None and name.rpartition(".")[2] in HEADS:  # files leave out a head that is tied to the embedding
            tied = [each for each in base.facts if path_of(each).rpartition(".")[2] in INPUTS]
            key = tied[0] if len(tied) == 1 else None
        if key is None:
            raise LoraSqueezeError(f"{name}: {base.name} has no such weight; give the base model it was trained on")
        dtype, shape = base.facts[key]
        where = base.name
        if only_shape:
            found = torch.empty(shape, dtype=dtype, device="meta")
        else:
            found = torch.cat(list(base.pieces(key))).reshape(shape)
    if not found.is_floating_point() or found.element_size() == 1:
        raise LoraSqueezeError(
            f"{name}: stored as {str(found.dtype).removeprefix('torch.')} in {quoted(where)} (quantised); give the "
            "base model in 16 or 32 bits"
        )
    return found


def oriented(found: Tensor, module: Module, turned: bool) -> Tensor:
    """A weight as the matrix that the module's update is added to.

    Args:
        found: the weight.
        module: whose sizes it must have.
        turned: a linear weight is (in, out).

    Raises:
        LoraSqueezeError: it has other sizes.
    """
    matrix = found.flatten(1) if module.kind == "conv" else found
    if module.kind == "embedding" or (module.kind == "linear" and turned):
        matrix = matrix.mT
    if matrix.shape != (module.out_features, module.in_features):
        raise LoraSqueezeError(
            f"{module.name}: the base weight is {list(found.shape)}, the update "
            f"{[module.out_features, module.in_features]}; give the base model that the adapter was trained on"
        )
    return matrix
