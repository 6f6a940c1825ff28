"""Keys and shapes of a diffusers file: from tensors to modules. Of the data, only the alphas are read.

A module's name is its component in the pipeline and its path there, in today's spelling. What the factors of one module
may look like is as in PEFT, which diffusers loads them with.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.adapter import Extra, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import peft_keys
from lora_squeeze.formats.diffusers_header import TEXT_MODEL, Settings
from lora_squeeze.formats.peft_keys import Shapes
from lora_squeeze.formats.safetensors_header import quoted

COMPONENTS = (
    "unet", "transformer", "transformer_2", "transformer_ref", "text_encoder", "text_encoder_2", "text_encoder_3",
    "prior", "decoder", "connectors", "text_conditioner",
)  # fmt: skip
_LANGUAGE_MODEL = re.compile(r"^transformer\.(h\.\d|wte\.|word_embeddings\.|blocks\.\d+\.attn\.Wqkv\.)")
_UNET_BEFORE_COMPONENTS = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_OLD_ATTENTION = re.compile(r"\.to_(?P<what>q|k|v|out)_lora\.(?P<side>down|up)\.weight$")
_OLD = re.compile(r"\.lora(_linear_layer)?\.(?P<side>down|up)\.weight$")
_KEY = re.compile(r"^(?P<path>.+)\.(?P<role>lora_A\.weight|lora_B\.weight|lora_B\.bias|alpha)$")
_CLIP = re.compile(r"^encoder\.layers\.\d+\.(self_attn|mlp)\.")
_ATTENTION = (".q_proj", ".k_proj", ".v_proj", ".out_proj")
_FACTORS = ("lora_A.weight", "lora_B.weight")
_SIDES = {"down": "A", "up": "B"}
_DORA = re.compile(r"[._](lora_magnitude_vector|dora_scale)(\.|$)")
_UNKNOWN = re.compile(r"[._]lora[._]|\.(hada|lokr)_")


@dataclass(frozen=True)
class Layout:
    """How one module stands in the file that was read, and in the one to be written.

    Args:
        component: "" in a file of one model.
        path: in the component.
        a_key, b_key: keys of the factors as read; "" where the module comes from another format.
        dtypes: of A and B as read.
        alpha: key, dtype and shape of its alpha as read.
    """

    component: str
    path: str
    a_key: str = ""
    b_key: str = ""
    dtypes: tuple[torch.dtype, ...] = ()
    alpha: tuple[str, torch.dtype, tuple[int, ...]] | None = None

    def key(self, end: str) -> str:
        """Key of a tensor of this module in today's spelling."""
        return f"{module_name(self.component, self.path)}.{end}"


def module_name(component: str, path: str) -> str:
    """Component and path; the path alone in a file of one model."""
    return f"{component}.{path}" if component else path


def component_of(name: str) -> str | None:
    """The component of a pipeline that a name begins with; None also for language models with a "transformer"."""
    first = name.partition(".")[0]
    return first if first in COMPONENTS and not _LANGUAGE_MODEL.match(name) else None


def is_ours(keys: Iterable[str]) -> bool:
    """Whether one of the keys is a factor in a component of a pipeline; for a file without diffusers' own header."""
    return any(
        (match := _KEY.match(today(key))) is not None
        and match["role"] in _FACTORS
        and (component_of(key) or _UNET_BEFORE_COMPONENTS.search(key))
        for key in keys
    )


def today(key: str) -> str:
    """The key as diffusers writes it today."""
    text_encoder = key.startswith("text_encoder")

    def attention(match: re.Match[str]) -> str:
        what, side = match["what"], _SIDES[match["side"]]
        layer = f"{what}_proj" if text_encoder else f"to_{what}"
        return f".{layer}{'.0' if layer == 'to_out' else ''}.lora_{side}.weight"

    key = _OLD_ATTENTION.sub(attention, key.replace(".processor.", "."))
    return _OLD.sub(lambda match: f".lora_{_SIDES[match['side']]}.weight", key)


def today_path(component: str, path: str) -> str:
    """The path as every version of diffusers loads it: CLIP's with the "text_model" that transformers 5 leaves out."""
    return TEXT_MODEL + path if component.startswith("text_encoder") and _CLIP.match(path) else path


def parse(
    shapes: Shapes, read: Callable[[str], Tensor], settings: Mapping[str, Settings] | None
) -> tuple[dict[str, Module], dict[str, Extra], list[str]]:
    """Modules, carried tensors and notes of a file.

    Args:
        shapes: key -> (dtype, shape) of every tensor, in file order.
        read: reads one tensor; asked for the alphas only.
        settings: component -> what the header says; None without such a header.

    Raises:
        LoraSqueezeError: an orphan, factors that do not fit, an update that is no plain LoRA, alphas that readers of
            diffusers disagree on, an unknown key.
    """
    found, rest = _sorted(shapes, bare=settings is not None and "" in settings)
    if not any(role in keys for keys in found.values() for role in _FACTORS):
        raise LoraSqueezeError(
            f"no LoRA factors among {len(shapes)} tensors (the first is {quoted(next(iter(shapes)))}); expected keys "
            "such as 'unet.....to_q.lora_A.weight'"
        )
    _check_alphas(found, settings)
    modules: dict[str, Module] = {}
    extras: dict[str, Extra] = {}
    notes: list[str] = []
    for (component, path), keys in found.items():
        module, bias, told = _module(component, path, keys, shapes, read, settings)
        if module.name in modules:
            raise LoraSqueezeError(f"two modules have the name {quoted(module.name)}")
        modules[module.name] = module
        extras |= bias
        notes += told
    extras |= {key: _extra(key, shapes) for key in rest}
    return with_floors(modules), extras, notes + _notes(modules, extras, settings)


def _sorted(shapes: Shapes, *, bare: bool) -> tuple[dict[tuple[str, str], dict[str, str]], list[str]]:
    """(Component, path) -> role -> key, and the keys of other tensors; `bare`: the file is of one model."""
    found: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    rest: list[str] = []
    for key in shapes:
        if _DORA.search(key):
            raise LoraSqueezeError(
                f"{quoted(key)} belongs to DoRA, whose magnitude rescales base weight and update together; merge it "
                "into the base model (fuse_lora), or train a plain LoRA"
            )
        match = _KEY.match(today(key))
        if match is None:
            rest.append(key)
            continue
        component, path = _place(key, match["path"], bare)
        keys = found[component, path]
        if match["role"] in keys:
            raise LoraSqueezeError(f"{quoted(key)} and {quoted(keys[match['role']])} are the same tensor; keep one")
        keys[match["role"]] = key
    return found, rest


def _place(key: str, path: str, bare: bool) -> tuple[str, str]:
    if bare:
        return "", path
    component = component_of(path)
    if component is not None:
        return component, path.removeprefix(f"{component}.")
    if _UNET_BEFORE_COMPONENTS.search(key):
        return "unet", path
    raise LoraSqueezeError(
        f"{quoted(key)} begins with no component of a pipeline ({', '.join(COMPONENTS[:5])}, ...), so diffusers does "
        "not load it; put the component in front of the keys"
    )


def _check_alphas(found: Mapping[tuple[str, str], Mapping[str, str]], settings: Mapping[str, Settings] | None) -> None:
    """Refuse alphas that are not the whole story."""
    by_component: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for (component, _), keys in found.items():
        by_component[component].append(keys)
    for modules in by_component.values():
        with_alpha = [keys["alpha"] for keys in modules if "alpha" in keys]
        if with_alpha and settings is not None:
            raise LoraSqueezeError(
                f"{quoted(with_alpha[0])}: the header has scales too, and diffusers refuses such a file; remove one"
            )
        if with_alpha and len(with_alpha) < len(modules):
            other = next(next(iter(keys.values())) for keys in modules if "alpha" not in keys)
            raise LoraSqueezeError(
                f"{quoted(with_alpha[0])} is there, but there is no alpha for {quoted(other)}: diffusers takes that of "
                "another module, other readers a scale of 1; write one for every module"
            )


def _module(
    component: str,
    path: str,
    keys: Mapping[str, str],
    shapes: Shapes,
    read: Callable[[str], Tensor],
    settings: Mapping[str, Settings] | None,
) -> tuple[Module, dict[str, Extra], list[str]]:
    """One module, the bias of its B, and notes: as PEFT reads it with these settings."""
    if not set(keys) & set(_FACTORS):
        raise LoraSqueezeError(
            f"orphan {quoted(next(iter(keys.values())))}: there are no factors for it in the file; get the file again"
        )
    proper = today_path(component, path)
    alpha = keys.get("alpha")
    roles = {f"{path}.{role}": key for role, key in keys.items() if role != "alpha"}
    named = {new: shapes[key] for new, key in roles.items()}
    rank = next((shape[0] for new, (_, shape) in named.items() if new.endswith("lora_A.weight") and shape), 1) or 1
    config: dict[str, Any] = {"r": rank, "lora_alpha": rank if alpha is None else _alpha(alpha, shapes, read)}
    if settings is not None and component in settings:
        config = settings[component].of_module(list(dict.fromkeys([path, proper, path.removeprefix(TEXT_MODEL)])))
    try:
        modules, biases, notes = peft_keys.parse(named, config)
    except LoraSqueezeError as error:
        text = str(error)
        for new, key in roles.items():
            text = text.replace(quoted(new), quoted(key))
        raise LoraSqueezeError(text) from None
    (module,) = modules.values()
    a_key, b_key = (keys[role] for role in _FACTORS)
    layout = Layout(
        component,
        proper,
        a_key,
        b_key,
        (shapes[a_key][0], shapes[b_key][0]),
        None if alpha is None else (alpha, *shapes[alpha]),
    )
    name = module_name(component, proper)
    # PEFT ties experts' modules by their names, which says nothing in a diffusion model.
    module = replace(module, name=name, group=None, floor=max(int(bool(biases)), int(module.copies > 1)), layout=layout)
    extras = {roles[new]: replace(extra, name=roles[new], module=name) for new, extra in biases.items()}
    return module, extras, [module_name(component, note) for note in notes]


def _alpha(key: str, shapes: Shapes, read: Callable[[str], Tensor]) -> float:
    dtype, shape = shapes[key]
    if math.prod(shape) != 1 or dtype == torch.bool:
        raise LoraSqueezeError(
            f"{quoted(key)} is {dtype} of shape {list(shape)}, not one number; save the adapter again"
        )
    value = float(read(key).double())
    if not math.isfinite(value):
        raise LoraSqueezeError(f"{quoted(key)} is {value}; alpha must be a finite number: use an earlier checkpoint")
    return value


def _extra(key: str, shapes: Shapes) -> Extra:
    if _UNKNOWN.search(key):
        raise LoraSqueezeError(
            f"{quoted(key)} is no tensor of a plain LoRA of diffusers, or in a spelling that it does not read; its "
            "meaning is not clear"
        )
    dtype, shape = shapes[key]
    return Extra(key, dtype, shape, "other", "no tensor of a LoRA; only pipelines that look for it load such a file")


def with_floors(modules: Mapping[str, Module]) -> dict[str, Module]:
    """Modules that must not leave: diffusers tells a text encoder's keys by those of its attention layers."""
    others = {
        m.layout.component
        for m in modules.values()
        if m.layout.component.startswith("text_encoder") and not m.name.endswith(_ATTENTION)
    }
    return {
        name: replace(m, floor=1) if m.layout.component in others and name.endswith(_ATTENTION) else m
        for name, m in modules.items()
    }


def is_mixed(modules: Iterable[Module]) -> bool:
    """Whether ranks differ within a component, or a convolution has groups, which diffusers cannot tell from shapes."""
    ranks: dict[str, int] = {}
    return any(m.step > 1 or ranks.setdefault(m.layout.component, m.rank * m.step) != m.rank * m.step for m in modules)


def _notes(
    modules: Mapping[str, Module], extras: Mapping[str, Extra], settings: Mapping[str, Settings] | None
) -> list[str]:
    notes = []
    first = next(iter(modules.values()))
    if settings is None and first.layout.alpha is not None:
        notes.append(
            "scales are in alpha tensors, which few pipelines of diffusers load (Flux does); a squeeze writes none"
        )
    elif settings is None and is_mixed(modules.values()):
        notes.append("ranks differ and the header has no scales: diffusers before 0.40 takes wrong ones for this file")
    if settings is not None:
        missing = dict.fromkeys(m.layout.component for m in modules.values() if m.layout.component not in settings)
        notes += [
            f"the header has settings, but none for {component}: scale 1 is used, as in diffusers before 0.34; later "
            "versions do not load it; a squeeze writes some"
            for component in missing
        ]
    if any(extra.kind == "other" for extra in extras.values()):
        notes.append(
            "the file has tensors that are no LoRA: most pipelines of diffusers refuse it, some ignore them, and Flux "
            "takes those of norms"
        )
    return notes
