"""Keys and shapes of a kohya or LyCORIS file: from tensors to modules. Of the data, only the alphas are read.

A key is the module's name, which stays as it is, and a suffix that says which tensor of the module it is. kohya's names
are paths in which every "." has become "_"; that cannot be undone without a list of the model's modules, and a squeeze
does not need it.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from lora_squeeze.adapter import Extra, Kind, Module, common_dtype
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import lycoris
from lora_squeeze.formats.lycoris import FULL, PLAIN, Facts
from lora_squeeze.formats.peft_keys import Shapes
from lora_squeeze.formats.safetensors_header import check_shown, quoted

ALPHA = "alpha"
_MAX_ALPHA = 1e100  # squares of scales are formed
_MAX_FORMED = 2**31  # numbers of B and A of one module that are computed; a full-rank 16384 x 53248 has half of it
_SUFFIXES = {  # of A and B, as ComfyUI looks for them
    ".lora_down.weight": ".lora_up.weight",
    "_lora.down.weight": "_lora.up.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora.up.weight",
    ".lora_A": ".lora_B",
    ".lora_linear_layer.down.weight": ".lora_linear_layer.up.weight",
    ".lora_A.default.weight": ".lora_B.default.weight",
}
_ROLES = (
    {down: "down" for down in _SUFFIXES}
    | {up: "up" for up in _SUFFIXES.values()}
    | {".lora_mid.weight": "mid", f".{ALPHA}": ALPHA}
    | {f".{role}": role for role in lycoris.ROLES - {"down", "up", "mid"}}
)
_KEY = re.compile(f"^(?P<name>.+)(?P<suffix>{'|'.join(re.escape(suffix) for suffix in _ROLES)})$")
_NEEDS_BASE = "the change of the weight depends on the base weight: merge it into the base model"
_REFUSED = {  # ends of keys
    r"\.dora_scale|[._]lora_magnitude_vector(\.weight)?": (
        f"DoRA rescales base weight and update together, and {_NEEDS_BASE}, or train without it (weight_decompose)"
    ),
    r"\.(a1|a2|b1|b2|bm)\.weight": f"GLoRA: {_NEEDS_BASE}",
    r"\.(oft_blocks|oft_diag|oft_R(\.weight)?)": f"OFT and BOFT rotate the base weight: {_NEEDS_BASE}",
    r"\.on_input": f"IA3 scales rows or columns of the base weight: {_NEEDS_BASE}",
    r"\.(lambda_layer|[pq]_layer\.weight)": f"T-LoRA stores its start beside the factors: {_NEEDS_BASE}",
    r"\.lora_(down|up)\.\d+\.weight": (
        "factors of a layer that sd-scripts splits while it trains: save the adapter with sd-scripts, which joins them"
    ),
    r"\.scalar": "a trained factor in front of the update, whose place differs between versions: save it with LyCORIS",
}
_REFUSALS = [(re.compile(f"({end})$"), reason) for end, reason in _REFUSED.items()]
_UNKNOWN = re.compile(r"[._]lora\.|\.(lora|hada|lokr)_")
_CONV_NAME = re.compile(r"conv|(in|out)_layers_\d|skip_connection|proj_(in|out)$|_op$")
_EXTRAS = {
    "diff_b": ("bias", "a difference of the layer's bias; ComfyUI adds it, sd-scripts and LyCORIS do not for a LoRA"),
    "w_norm": ("other", "a difference of a norm's weight"),
    "b_norm": ("other", "a difference of a norm's bias"),
    "diff": ("other", "a difference of a vector, such as a norm's weight"),
    "set_weight": ("module to save", "takes the place of the base model's tensor"),
    "reshape_weight": ("other", "the shape that ComfyUI pads the base weight to before it adds the update"),
    ALPHA: ("other", "belongs to a vector; no reader uses it"),
}


@dataclass(frozen=True)
class Alpha:
    """An alpha as it stands in the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    value: float


@dataclass(frozen=True)
class Layout:
    """How one module stands in the file that was read, and in the one to be written.

    Args:
        form: of the update, see `lycoris`.
        keys: (role, key) of its tensors as read.
        down_key, up_key: keys of A and B to be written.
        ones: trailing dimensions of B to be written.
        alpha: None where the file has none.
        rank, scale: of the module as read.
    """

    form: str
    keys: tuple[tuple[str, str], ...]
    down_key: str
    up_key: str
    ones: tuple[int, ...]
    alpha: Alpha | None
    rank: int
    scale: float


def role_of(key: str) -> tuple[str, str] | None:
    """Name of the module and role of the tensor; None for one that is no part of an update."""
    match = _KEY.match(key)
    return None if match is None else (match["name"], _ROLES[match["suffix"]])


def is_ours(keys: Iterable[str]) -> bool:
    """Whether one of the keys belongs to an update that is read or refused by name here, and none is PEFT's."""
    keys = list(keys)
    roles = [found[1] for key in keys if (found := role_of(key))]
    known = any(role != ALPHA for role in roles) or any(_refusal(key) for key in keys)
    return known and not any(key.startswith("base_model.") for key in keys)


def _refusal(key: str) -> str | None:
    return next((reason for pattern, reason in _REFUSALS if pattern.search(key)), None)


def parse(shapes: Shapes, read: Callable[[str], Tensor]) -> tuple[dict[str, Module], dict[str, Extra], list[str]]:
    """Modules, carried tensors and notes of a file.

    Args:
        shapes: key -> (dtype, shape) of every tensor, in file order.
        read: reads one tensor; asked for the alphas only.

    Raises:
        LoraSqueezeError: an orphan, tensors that do not fit, an update that depends on the base weight, an unknown key.
    """
    check_shown(shapes)
    found, rest = _sorted(shapes)
    if not found:
        raise LoraSqueezeError(
            f"no LoRA factors among {len(shapes)} tensors (the first is {quoted(next(iter(shapes)))}); expected keys "
            "such as 'lora_unet_..._to_q.lora_down.weight'"
        )
    modules = {name: _module(name, keys, shapes, read) for name, keys in found.items()}
    extras = {key: _extra(key, shapes, modules) for key in rest}
    beside = {key.removesuffix(".lora_B.bias").removesuffix(f".{key.rpartition('.')[2]}") for key in rest}
    modules = {name: replace(m, floor=1) if name in beside else m for name, m in modules.items()}
    return modules, extras, _notes(modules, extras)


def _sorted(shapes: Shapes) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module -> role -> key, and the keys of other tensors."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    rest: list[str] = []
    for key, (_, shape) in shapes.items():
        if reason := _refusal(key):
            raise LoraSqueezeError(f"{quoted(key)}: {reason}")
        place = role_of(key)
        if place is None or (place[1] == "diff" and len(shape) < 2):
            rest.append(key)
            continue
        name, role = place
        if role in found[name]:
            raise LoraSqueezeError(f"{quoted(key)} and {quoted(found[name][role])} are the same tensor; keep one")
        found[name][role] = key
    vectors = {key.rpartition(".")[0] for key in rest}
    for name in [name for name, keys in found.items() if set(keys) == {ALPHA} and name in vectors]:
        rest.append(found.pop(name)[ALPHA])
    return found, rest


def _module(name: str, keys: dict[str, str], shapes: Shapes, read: Callable[[str], Tensor]) -> Module:
    parts = {role: key for role, key in keys.items() if role != ALPHA}
    form = lycoris.form_of(parts)
    if form is None:
        raise LoraSqueezeError(
            f"module {quoted(name)} has {', '.join(quoted(key) for key in keys.values())}: orphans, or parts of "
            "several updates; the file is incomplete or mixed: get it again"
        )
    found = _facts(name, form, parts, shapes)
    alpha = _alpha(keys[ALPHA], shapes, read) if ALPHA in keys else None
    scale = _scale(name, found, alpha)
    layout = Layout(
        form=form,
        keys=tuple(parts.items()),
        down_key=parts["down"] if form == PLAIN else f"{name}.lora_down.weight",
        up_key=parts["up"] if form == PLAIN else f"{name}.lora_up.weight",
        ones=shapes[parts["up"]][1][2:] if form == PLAIN else tuple(1 for _ in found.kernel),
        alpha=alpha,
        rank=found.rank,
        scale=scale,
    )
    dtype = reduce(common_dtype, dict.fromkeys(shapes[key][0] for key in parts.values()))
    kind: Kind = "conv" if found.kernel else "linear"
    module = Module(
        name,
        found.rank,
        scale,
        dtype,
        found.out_features,
        found.in_features,
        kind=kind,
        kernel=found.kernel,
        layout=layout,
    )
    # Products are formed in at least float32, whatever the file stores.
    return module if form == PLAIN else replace(module, source_bytes=module.parameters * inner_dtype(dtype).itemsize)


def _facts(name: str, form: str, parts: Mapping[str, str], shapes: Shapes) -> Facts:
    """Sizes of an update, after a look at its tensors."""
    if "up" in parts:
        _check_spelling(name, parts)
    for key in parts.values():
        dtype, shape = shapes[key]
        if not dtype.is_floating_point:
            raise LoraSqueezeError(f"{quoted(key)} has dtype {dtype}; quantised factors are not read: save them plain")
        if 0 in shape:
            raise LoraSqueezeError(f"{quoted(key)} has shape {list(shape)}: it is empty; save the adapter again")
    found = lycoris.facts(form, {role: shapes[key][1] for role, key in parts.items()})
    if found is None:
        listed = ", ".join(f"{quoted(key)} is {list(shapes[key][1])}" for key in parts.values())
        raise LoraSqueezeError(f"tensors of {quoted(name)} do not fit as those of a {form}: {listed}")
    if form != PLAIN and (size := found.rank * (found.out_features + found.in_features)) > _MAX_FORMED:
        raise LoraSqueezeError(
            f"{quoted(name)} is a {form} for a matrix of {found.out_features} x {found.in_features}: as plain factors "
            f"it takes {size} numbers, up to {_MAX_FORMED} are formed; no model has such a layer"
        )
    return found


def inner_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that factors are handed on in where they are computed from tensors of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_spelling(name: str, parts: Mapping[str, str]) -> None:
    down, up = (next(s for s in _ROLES if parts[role] == name + s) for role in ("down", "up"))
    if _SUFFIXES[down] != up or ("mid" in parts and down != ".lora_down.weight"):
        raise LoraSqueezeError(
            f"{', '.join(quoted(key) for key in parts.values())} are spelled in two ways, and readers do not take them "
            "for parts of one update; rename one of them"
        )


def _alpha(key: str, shapes: Shapes, read: Callable[[str], Tensor]) -> Alpha:
    dtype, shape = shapes[key]
    if math.prod(shape) != 1 or dtype == torch.bool:
        raise LoraSqueezeError(
            f"{quoted(key)} is {dtype} of shape {list(shape)}, not one number; save the adapter again"
        )
    value = float(read(key).double())
    if not abs(value) < _MAX_ALPHA:
        raise LoraSqueezeError(f"{quoted(key)} is {value}; alpha must be a finite number: use an earlier checkpoint")
    return Alpha(dtype, shape, value)


def _scale(name: str, found: Facts, alpha: Alpha | None) -> float:
    """alpha / r; 1 without an alpha, with an alpha of 0, and where the update has no r."""
    if alpha is None or alpha.value == 0 or not found.dims:
        return 1.0
    if len(found.dims) > 1:
        raise LoraSqueezeError(
            f"{quoted(name)}: its two matrices have ranks {found.dims[0]} and {found.dims[1]}; ComfyUI divides alpha "
            "by the second, LyCORIS by the first; train it with one rank for both"
        )
    return alpha.value / found.dims[0]


def _extra(key: str, shapes: Shapes, modules: Mapping[str, Module]) -> Extra:
    """A tensor beside the updates."""
    dtype, shape = shapes[key]
    owner = modules.get(key.removesuffix(".lora_B.bias"))
    if owner is not None and key.endswith(".lora_B.bias"):
        if owner.scale != 1:
            raise LoraSqueezeError(
                f"{quoted(key)}: diffusers multiplies it with alpha / r = {owner.scale:g}, ComfyUI does not; save the "
                "adapter with alpha = r"
            )
        return Extra(key, dtype, shape, "bias", "B has a bias; readers add it as it is, since the scale is 1")
    if _UNKNOWN.search(key):
        raise LoraSqueezeError(
            f"{quoted(key)} is no tensor that is known of a LoRA or of LyCORIS; its meaning is not clear"
        )
    kind, cause = _EXTRAS.get(key.rpartition(".")[2], ("other", "no tensor of an update; carried along unchanged"))
    return Extra(key, dtype, shape, kind, cause)


def _may_be_flat(module: Module) -> bool:
    """Whether the update is a matrix and the name is one that models have for convolutions too."""
    return module.layout.form != PLAIN and not module.kernel and _CONV_NAME.search(module.name) is not None


def _notes(modules: Mapping[str, Module], extras: Mapping[str, Extra]) -> list[str]:
    forms = Counter(module.layout.form for module in modules.values())
    notes = [
        f"{count} modules are {form}: written as plain LoRA, their exact rank is up to "
        f"{max(m.rank for m in modules.values() if m.layout.form == form)}"
        for form, count in forms.items()
        if form != PLAIN
    ]
    if forms[FULL]:
        notes.append("a full difference has full rank in general: the energy kept says what a squeeze costs")
    zero = [m.name for m in modules.values() if m.layout.alpha is not None and m.layout.alpha.value == 0]
    if zero:
        notes.append(
            f"alpha is 0 in {len(zero)} modules ({quoted(zero[0])}): read as a scale of 1, as sd-scripts and LyCORIS "
            "do; ComfyUI takes the scale for 0. It is written as the rank, on which all of them agree"
        )
    flat = [m.name for m in modules.values() if _may_be_flat(m)]
    if flat:
        notes.append(
            f"{quoted(flat[0])} may be a convolution, whose kernel is not in the file: a kohya file gets its factors "
            "as matrices, which ComfyUI takes for both; sd-scripts and LyCORIS stop with an error if it is one"
        )
    if any(extra.kind == "bias" for extra in extras.values()):
        notes.append(
            "bias differences are carried along: ComfyUI adds them, sd-scripts and LyCORIS do not beside a LoRA"
        )
    return notes
