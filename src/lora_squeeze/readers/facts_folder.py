"""Facts of folders: PEFT's and mlx-lm's."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lora_squeeze.adapter import Kind
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import mlx, peft
from lora_squeeze.formats.peft_config import check_numbers, is_number, read_json
from lora_squeeze.formats.peft_keys import PREFIX, Shapes, parse
from lora_squeeze.formats.safetensors_io import TensorFile
from lora_squeeze.readers.facts import MLX, PEFT, Facts, Pair, pair_of

_FACTOR = re.compile(r"^(?P<path>.+)\.(?P<what>lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?P<rest>(?:\.[^.]+)*)$")
_MLX_FACTOR = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[ab])$")
_MAGNITUDE = "lora_magnitude_vector"
_STRANGE = re.compile(r"\.lora_(?!A|B|embedding_|magnitude_vector)|\.(hada|lokr)_|\.lora_E")


def peft_facts(folder: Path) -> Facts:
    """Facts of a PEFT folder.

    Raises:
        LoraSqueezeError: no configuration or weights, or files that nobody can read.
    """
    config = read_object(folder / peft.CONFIG_NAME)
    shapes = _weights(folder)
    keys, orphans, adapters = _sorted(shapes)
    magnitudes = tuple(key for key in shapes if _MAGNITUDE in key)
    strange = tuple(key for key in shapes if _STRANGE.search(key))
    left_out = {*orphans, *magnitudes, *strange}
    pairs: tuple[Pair, ...] = ()
    extras: Mapping[str, str] = {}
    damage = ""
    lora = config.get("peft_type", "LORA") == "LORA"
    if lora and keys:
        try:
            check_numbers(config)
            clean = {key: shapes[key] for key in shapes if key not in left_out and (key in keys or not _factor(key))}
            modules, found, _ = parse(clean, config)
            pairs = tuple(pair_of(module, module.layout.path) for module in modules.values())
            extras = {key: extra.kind for key, extra in found.items()}
        except LoraSqueezeError as error:
            damage = str(error)
    elif lora and not orphans:
        damage = f"no pair of LoRA factors among {len(shapes)} tensors"
    return Facts(
        path=folder,
        format=PEFT,
        shapes={key: shape for key, (_, shape) in shapes.items()},
        config=config,
        pairs=pairs,
        orphans=orphans,
        magnitudes=magnitudes,
        strange=strange,
        extras=extras,
        adapters=adapters,
        companions=tuple(name for name in peft.COMPANIONS if (folder / name).is_file()),
        damage=damage,
    )


def _weights(folder: Path) -> Shapes:
    """Key -> dtype and shape of the weights file."""
    if (folder / peft.WEIGHTS_NAME).exists():
        with TensorFile(folder / peft.WEIGHTS_NAME) as file:
            return {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
    if (folder / peft.PICKLE_NAME).exists():
        return peft.PickleFile(folder / peft.PICKLE_NAME).shapes
    raise LoraSqueezeError(f"{folder}: no {peft.WEIGHTS_NAME} and no {peft.PICKLE_NAME}; the adapter is incomplete")


def _factor(key: str) -> re.Match[str] | None:
    """The parts of a factor's key; None for the bias of B and for what is no factor."""
    match = _FACTOR.match(key)
    return None if match is None or match["rest"].endswith(".bias") else match


def _sorted(keys: Iterable[str]) -> tuple[set[str], tuple[str, ...], tuple[str, ...]]:
    """Keys of the pairs of one adapter, keys without a partner, and the names of all adapters."""
    named: dict[str, dict[str, dict[str, str]]] = defaultdict(lambda: defaultdict(dict))
    biases: list[tuple[str, str]] = []
    for key in keys:
        if match := _factor(key):
            name = match["rest"].removesuffix(".weight").removeprefix(".")
            named[name][match["path"].removeprefix(PREFIX)][match["what"]] = key
        elif match := _FACTOR.match(key):
            biases.append((match["path"].removeprefix(PREFIX), key))
    if not named:
        return set(), tuple(key for _, key in biases), ()
    chosen = next((name for name in ("", "default") if name in named), next(iter(named)))
    pairs: set[str] = set()
    orphans: list[str] = []
    whole: set[str] = set()
    for path, sides in named[chosen].items():
        if set(sides) in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
            pairs.update(sides.values())
            whole.add(path)
        else:
            orphans += sides.values()
    orphans += [key for path, key in biases if path not in whole]
    return pairs, tuple(orphans), (chosen, *(name for name in named if name != chosen))


def mlx_facts(folder: Path) -> Facts:
    """Facts of an mlx-lm folder.

    Raises:
        LoraSqueezeError: no weights, or files that nobody can read.
    """
    folder = folder.parent if folder.is_file() else folder
    config = read_object(folder / peft.CONFIG_NAME)
    if not (folder / mlx.WEIGHTS_NAME).exists():
        raise LoraSqueezeError(f"{folder}: no {mlx.WEIGHTS_NAME}; the adapter is incomplete")
    with TensorFile(folder / mlx.WEIGHTS_NAME) as file:
        shapes = {name: entry.shape for name, entry in file.entries.items()}
    parameters = config.get("lora_parameters")
    told = parameters.get("scale") if isinstance(parameters, dict) else None
    scale = float(told) if isinstance(told, int | float) and is_number(told) else 1.0
    sides: dict[str, dict[str, str]] = defaultdict(dict)
    for key in shapes:
        if match := _MLX_FACTOR.match(key):
            sides[match["path"]][match["side"]] = key
    magnitudes = tuple(f"{path}.m" for path in sides if f"{path}.m" in shapes)
    orphans = tuple(key for keys in sides.values() if len(keys) == 1 for key in keys.values())
    pairs, damage = [], "" if sides else f"no pair of LoRA factors among {len(shapes)} tensors"
    for path, keys in sides.items():
        a, b = (shapes.get(keys.get(side, ""), ()) for side in "ab")
        if len(keys) == 2 and len(a) >= 2 and len(b) >= 2:
            kind: Kind = "experts" if len(a) == 3 else "linear"
            rank = a[-2] if kind == "experts" else a[-1]
            pairs.append(Pair(path, path, rank, scale, kind))
        elif len(keys) == 2:
            damage = damage or f"factors of {path} are {list(a)} and {list(b)}: no matrices"
    factors = {key for keys in sides.values() for key in keys.values()}
    return Facts(
        path=folder,
        format=MLX,
        shapes=shapes,
        config=config,
        pairs=tuple(pairs),
        orphans=orphans,
        magnitudes=magnitudes,
        extras={key: "other" for key in shapes if key not in factors and key not in magnitudes},
        damage=damage,
    )


def read_object(path: Path) -> dict[str, Any]:
    """A configuration as it stands.

    Raises:
        LoraSqueezeError: missing, not JSON, or no object.
    """
    if not path.exists():
        raise LoraSqueezeError(f"{path.parent}: no {path.name}; is this the folder of a PEFT or mlx-lm adapter?")
    config = read_json(path)
    if not isinstance(config, dict):
        raise LoraSqueezeError(f"{path}: expected an object, found {type(config).__name__}")
    return config
