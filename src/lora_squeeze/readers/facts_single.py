"""Facts of single files: GGUF, diffusers, kohya and LyCORIS."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Kind
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import kohya_keys, lycoris
from lora_squeeze.formats.gguf_file import GgufFile
from lora_squeeze.formats.gguf_lora import ALPHA_KEY
from lora_squeeze.formats.kohya import DIFFUSERS_KEY
from lora_squeeze.formats.kohya_keys import ALPHA, role_of
from lora_squeeze.formats.peft_config import check_numbers, scale_of
from lora_squeeze.formats.safetensors_io import TensorFile
from lora_squeeze.readers.facts import DIFFUSERS, GGUF, KOHYA, Facts, Pair, pair_of

COMPONENT = re.compile(r"^(unet|transformer(_2)?|text_encoder(_\d)?|prior|controlnet)\.")
_GGUF_FACTOR = re.compile(r"^(?P<stem>.+)\.lora_(?P<side>[ab])$")
_MAGNITUDE = re.compile(r"(\.dora_scale|[._]lora_magnitude_vector(\.weight)?)$")
_BESIDE = {  # last parts of keys -> kind
    "diff_b": "bias difference",
    "w_norm": "norm difference",
    "b_norm": "norm difference",
    "set_weight": "module to save",
    "reshape_weight": "other",
}


def gguf_facts(path: Path) -> Facts:
    """Facts of a GGUF file.

    Raises:
        LoraSqueezeError: a damaged file.
    """
    file = GgufFile(path)
    config = {key: field.value for key, field in file.fields.items()}
    value = config.get(ALPHA_KEY)
    alpha = float(value) if isinstance(value, int | float) else 0.0
    shapes = {name: entry.shape for name, entry in file.tensors.items()}
    stems: dict[str, dict[str, str]] = defaultdict(dict)
    for key in shapes:
        if match := _GGUF_FACTOR.match(key):
            stems[match["stem"]][match["side"]] = key
    pairs = []
    for stem, sides in stems.items():
        if len(sides) == 2 and shapes[sides["b"]] and (rank := shapes[sides["b"]][-1]):
            stacked = len(shapes[sides["b"]]) == 3
            kind: Kind = "embedding" if stem.endswith("token_embd.weight") else "experts" if stacked else "linear"
            name = stem.removesuffix(".weight")
            pairs.append(Pair(name, stem, rank, alpha / rank if alpha else 1.0, kind, alpha))
    factors = {key for sides in stems.values() for key in sides.values()}
    return Facts(
        path=path,
        format=GGUF,
        shapes=shapes,
        config=config,
        pairs=tuple(pairs),
        orphans=tuple(key for sides in stems.values() if len(sides) == 1 for key in sides.values()),
        extras={key: "norm" for key in shapes if key.endswith("_norm.weight")},
        strange=tuple(key for key in shapes if key not in factors and not key.endswith("_norm.weight")),
        damage="" if stems else f"no pair of LoRA factors among {len(shapes)} tensors",
    )


def image_facts(path: Path) -> Facts:
    """Facts of a safetensors file of an image model.

    Raises:
        LoraSqueezeError: a damaged file, or a header whose settings are not JSON.
    """
    with TensorFile(path) as file:
        entries = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        names, orphans, rest = _sorted({name: shape for name, (_, shape) in entries.items()})
        damage = "" if names or orphans else f"no pair of LoRA factors among {len(entries)} tensors"
        pairs: tuple[Pair, ...] = ()
        settings = _settings(path, file.metadata)
        try:
            modules, _, _ = kohya_keys.parse({key: entries[key] for key in names}, file.read) if names else ({}, {}, [])
            pairs = tuple(
                pair_of(m, m.name, m.layout.alpha and m.layout.alpha.value, m.layout.form) for m in modules.values()
            )
            pairs = pairs if settings is None else tuple(_described(pair, settings) for pair in pairs)
        except LoraSqueezeError as error:
            damage = str(error)
    ours = settings is not None or (bool(pairs) and all(COMPONENT.match(pair.name) for pair in pairs))
    return Facts(
        path=path,
        format=DIFFUSERS if ours else KOHYA,
        shapes={name: shape for name, (_, shape) in entries.items()},
        config={} if settings is None else settings,
        pairs=pairs,
        orphans=orphans,
        magnitudes=tuple(key for key in rest if _MAGNITUDE.search(key)),
        extras={key: kind for key in rest if (kind := _kind(key))},
        strange=tuple(key for key in rest if not _MAGNITUDE.search(key) and not _kind(key)),
        damage=damage,
    )


def _kind(key: str) -> str | None:
    return "lora bias" if key.endswith(".lora_B.bias") else _BESIDE.get(key.rpartition(".")[2])


def _sorted(shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], tuple[str, ...], list[str]]:
    """Keys of whole updates, of parts without the others, and of everything else."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    rest: list[str] = []
    for key, shape in shapes.items():
        place = role_of(key)
        if place is None or place[1] in found[place[0]] or (place[1] == "diff" and len(shape) < 2):
            rest.append(key)
        else:
            found[place[0]][place[1]] = key
    whole: list[str] = []
    orphans: list[str] = []
    for roles in found.values():
        parts = set(roles) - {ALPHA}
        if lycoris.form_of(parts) is not None:
            whole += roles.values()
        elif parts:
            orphans += roles.values()
        else:
            rest += roles.values()
    return whole, tuple(orphans), rest


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The settings that diffusers puts into the header; None where there are none."""
    text = metadata.get(DIFFUSERS_KEY)
    if not text:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LoraSqueezeError(f"{path}: {DIFFUSERS_KEY} in its header is not JSON ({error}); save it again") from None
    if not isinstance(settings, dict):
        raise LoraSqueezeError(f"{path}: {DIFFUSERS_KEY} in its header is no JSON object; save it again")
    return settings


def component_settings(settings: Mapping[str, Any], component: str) -> dict[str, Any]:
    """Arguments of LoraConfig for one component of a pipeline."""
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in settings.items() if key.startswith(prefix)}


def _described(pair: Pair, settings: Mapping[str, Any]) -> Pair:
    """The pair with the scale of the header's settings."""
    component, _, path = pair.name.partition(".")
    config = component_settings(settings, component)
    check_numbers(config)
    return replace(pair, scale=scale_of(config, path, pair.rank)) if config else pair
