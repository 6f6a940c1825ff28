"""Names of layers in kohya, ComfyUI and LyCORIS files, by architecture.

A name is a path with "_" for ".", which cannot be undone by itself; a map is made forward, from all layers of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.kohya_maps.dit import flux, sd3
from lora_squeeze.formats.kohya_maps.layer import Architecture, Component
from lora_squeeze.formats.kohya_maps.text import clip, t5
from lora_squeeze.formats.kohya_maps.unet import unet_layers
from lora_squeeze.formats.safetensors_header import quoted

_SD1_LAYERS, _SD2_LAYERS = (
    unet_layers((320, 640, 1280, 1280), (1, 1, 1, 0), 1, sizes=False, linear=linear) for linear in (False, True)
)
_SDXL_LAYERS = unet_layers((320, 640, 1280), (0, 2, 10), 10, sizes=True, linear=True)
_UNET = (("lora_unet_",), ("diffusion_model.",), ("lora_unet_", "lycoris_"))
_TRANSFORMER = (("lora_unet_",), ("diffusion_model.",), ("lora_transformer_", "lycoris_"))
_FIRST = ("lora_te1_", "lora_te_")  # readers take both for the first text encoder


def _comfy(name: str) -> tuple[str]:
    return (f"text_encoders.{name}.transformer.",)


ARCHITECTURES: Mapping[str, Architecture] = {
    each.name: each
    for each in (
        Architecture(
            "sd1",
            (
                Component("unet", _SD1_LAYERS, *_UNET, by_target=True),
                Component("text_encoder", clip(12), _FIRST[::-1], _comfy("clip_l")),
            ),
        ),
        Architecture(
            "sd2",
            (
                Component("unet", _SD2_LAYERS, *_UNET, by_target=True),
                Component("text_encoder", clip(23), _FIRST[::-1], _comfy("clip_h")),
            ),
        ),
        Architecture(
            "sdxl",
            (
                Component("unet", _SDXL_LAYERS, *_UNET),
                Component("text_encoder", clip(12), _FIRST, _comfy("clip_l")),
                Component("text_encoder_2", clip(32, projection=True), ("lora_te2_",), _comfy("clip_g")),
            ),
        ),
        Architecture(
            "sd3",
            (
                Component("transformer", sd3(38, 13), *_TRANSFORMER),
                Component("text_encoder", clip(12, projection=True), _FIRST, _comfy("clip_l")),
                Component("text_encoder_2", clip(32, projection=True), ("lora_te2_",), _comfy("clip_g")),
                Component("text_encoder_3", t5(24), ("lora_te3_",), _comfy("t5xxl")),
            ),
        ),
        Architecture(
            "flux",
            (
                Component("transformer", flux(19, 38), *_TRANSFORMER),
                Component("text_encoder", clip(12), _FIRST, _comfy("clip_l")),
                # The first releases of sd-scripts for Flux wrote lora_te2_, which ComfyUI does not know.
                Component("text_encoder_2", t5(24), ("lora_te3_", "lora_te2_"), _comfy("t5xxl")),
            ),
        ),
    )
}


def choose(
    names: Iterable[str], architecture: str | None, table: Callable[[Architecture], Mapping[str, Any]]
) -> Mapping[str, Any]:
    """The entries of the one architecture that has all of these names, by name.

    Args:
        names: to look up.
        architecture: where it is known: one of ARCHITECTURES.
        table: of an architecture; name -> entry.

    Returns:
        name -> entry. Where several architectures have all names and the same entries for them, theirs.

    Raises:
        LoraSqueezeError: no architecture has all names, or several have them with different entries.
    """
    names = list(names)
    (first, chosen), *others = fitting(names, architecture, table).items()
    for key, entries in others:
        name = next((name for name in names if entries[name] != chosen[name]), None)
        if name is not None:
            raise LoraSqueezeError(
                f"{quoted(name)} is a layer of {first} and of {key}, with another meaning; say which it is with "
                f"architecture={first!r} or {key!r} (--architecture)"
            )
    return chosen


def fitting(
    names: Iterable[str], architecture: str | None, table: Callable[[Architecture], Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """The entries of every architecture that has all of these names. Arguments as for `choose`.

    Raises:
        LoraSqueezeError: no architecture has them all.
    """
    names = list(names)
    if architecture is not None and architecture not in ARCHITECTURES:
        raise LoraSqueezeError(f"unknown architecture {quoted(architecture)}: choose one of {', '.join(ARCHITECTURES)}")
    tried = {key: table(each) for key, each in ARCHITECTURES.items() if architecture in (None, key)}
    missing = {key: [name for name in names if name not in entries] for key, entries in tried.items()}
    found: dict[str, Mapping[str, Any]] = {
        key: {name: tried[key][name] for name in names} for key, absent in missing.items() if not absent
    }
    if not found:
        nearest = min(missing, key=lambda key: len(missing[key]))
        raise LoraSqueezeError(
            f"{quoted(missing[nearest][0])} is no layer of {' or '.join(tried)} ({len(missing[nearest])} of "
            f"{len(names)} names are not of {nearest}, which has most of them); other architectures are not known here"
        )
    return found
