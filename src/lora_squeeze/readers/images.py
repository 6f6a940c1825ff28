"""Rules of diffusers (run, 0.42.1), ComfyUI and sd-scripts (read): readers of adapters of image models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from lora_squeeze.formats.lycoris import PLAIN, TUCKER
from lora_squeeze.formats.peft_config import pattern_value
from lora_squeeze.readers.facts import DIFFUSERS, KOHYA, Facts, Pair
from lora_squeeze.readers.facts_single import COMPONENT, component_settings
from lora_squeeze.readers.peft import FIELDS, broken
from lora_squeeze.readers.rule import AGAIN, CONVERT, UNDORA, Asked, Hit, Reader, Rule, other_scales, some

_RUN = "diffusers 0.42.1, run: load_lora_weights of a pipeline with a UNet"
_COMFY = "ComfyUI, commits 0323d87 and 00728eb: comfy/weight_adapter/lora.py, LoRAAdapter; comfy/lora.py, load_lora"
_SCRIPTS = "sd-scripts, commit 02298e3: networks/lora.py"
_KOHYA_NAME = re.compile(r"^lora_(unet|te\d?)_")
_UNET_NAME = re.compile(
    r"^lora_(unet_((down|up|input|output)_blocks|mid(dle)?_block|time_|label_emb|conv_|out_)|te\d?_)"
)
_ATTENTION = re.compile(r"_to_(q|k|v|out_0)$")


def _component(pair: Pair) -> str:
    return pair.name.split("_")[1] if _KOHYA_NAME.match(pair.name) else pair.name.partition(".")[0]


def diffusers_scales(facts: Facts) -> dict[str, float]:
    """Scales of a kohya file in a pipeline with a UNet.

    The most frequent alpha of a component counts for all of its modules. Another one is honoured only where its name
    comes through the renaming: not in attention layers of the UNet, and in no layer of a text encoder.
    """
    if facts.format != KOHYA or not all(_UNET_NAME.match(pair.name) for pair in facts.pairs):
        return {}
    parts: dict[str, list[Pair]] = {}
    for pair in facts.pairs:
        parts.setdefault(_component(pair), []).append(pair)
    taken: dict[str, float] = {}
    for component, pairs in parts.items():
        alphas = [pair.alpha for pair in pairs if pair.alpha is not None]
        common = Counter(alphas).most_common(1)[0][0] if alphas else None
        for pair in pairs:
            own = component == "unet" and not _ATTENTION.search(pair.name) and pair.alpha is not None
            alpha = pair.alpha if own else common
            taken[pair.name] = 1.0 if alpha is None else alpha / pair.rank
    return taken


def comfy_scales(facts: Facts) -> dict[str, float]:
    """alpha / r with the module's own alpha, 1 without one; 0 is a number like others. The header is not read."""
    return {
        pair.name: 1.0 if pair.alpha is None else 0.0 if pair.alpha == 0 else pair.alpha / pair.rank
        for pair in facts.pairs
        if pair.form == PLAIN or pair.alpha == 0
    }


def _of_unet(facts: Facts) -> bool:
    return all(_UNET_NAME.match(pair.name) or re.match("unet|text_encoder", pair.name) for pair in facts.pairs)


def _foreign(facts: Facts) -> Iterable[str]:
    """Names that no component of a pipeline takes; one of them keeps kohya's names from being converted at all."""
    if all(_KOHYA_NAME.match(pair.name) or COMPONENT.match(pair.name) for pair in facts.pairs):
        return ()
    return [pair.name for pair in facts.pairs if not COMPONENT.match(pair.name)]


def _alpha_tensors(facts: Facts) -> Iterable[str]:
    return [
        pair.name
        for pair in facts.pairs
        if pair.alpha is not None and re.match(r"(unet|text_encoder(_\d)?)\.", pair.name)
    ]


def _without_settings(facts: Facts, asked: Asked) -> Hit | None:
    """Components that the header's settings leave out, though it has some."""
    gone = {_component(pair) for pair in facts.pairs if not component_settings(facts.config, _component(pair))}
    return Hit(tuple(sorted(gone))) if facts.config and gone else None


def _settings_rank(facts: Facts) -> Iterable[str]:
    for pair in facts.pairs:
        component, _, path = pair.name.partition(".")
        settings = component_settings(facts.config, component)
        if settings and pattern_value(settings.get("rank_pattern"), path, settings.get("r", 8)) != pair.rank:
            yield pair.name


def _settings_fields(facts: Facts) -> Iterable[str]:
    return [key for key in facts.config if key.partition(".")[2] not in FIELDS]


def _forms(facts: Facts) -> Iterable[str]:
    return [pair.name for pair in facts.pairs if pair.form != PLAIN] if _of_unet(facts) else ()


def _mixed_without_alpha(facts: Facts) -> Iterable[str]:
    bare = [pair for pair in facts.pairs if pair.alpha is None]
    return [pair.name for pair in bare] if not facts.config and len({pair.rank for pair in bare}) > 1 else ()


def _other_models(facts: Facts) -> Iterable[str]:
    return () if _of_unet(facts) else [pair.name for pair in facts.pairs]


def _by_rows(facts: Facts) -> Iterable[str]:
    """Magnitudes of output rows; ComfyUI takes all for those of input columns."""
    return [key for key in facts.magnitudes if key.endswith(".dora_scale") and facts.shapes[key][:1] != (1,)]


def _vectors(facts: Facts) -> Iterable[str]:
    return [key for key in facts.magnitudes if not key.endswith(".dora_scale")]


def _other_spelling(facts: Facts) -> Iterable[str]:
    return [
        pair.name
        for pair in facts.pairs
        if pair.form == PLAIN
        and (f"{pair.name}.lora_down.weight" not in facts.shapes or not _KOHYA_NAME.match(pair.name))
    ]


DIFFUSERS_READER = Reader(
    key="diffusers",
    name="diffusers",
    version="0.42.1",
    formats=(DIFFUSERS, KOHYA),
    source=_RUN,
    rules=(
        broken("diffusers"),
        Rule(
            "diffusers-form",
            "refused",
            "updates that are no plain LoRA stop the conversion of kohya's names",
            _RUN,
            some(_forms),
            CONVERT,
        ),
        Rule(
            "diffusers-keys",
            "refused",
            "keys that are not of a LoRA stop it",
            _RUN,
            some(lambda facts: [*facts.strange, *(k for k, kind in facts.extras.items() if kind != "lora bias")]),
            AGAIN,
        ),
        Rule(
            "diffusers-half",
            "refused",
            "the partner of these factors is not in the file",
            _RUN,
            some(lambda facts: facts.orphans),
            AGAIN,
            (KOHYA,),
        ),
        Rule(
            "diffusers-alpha",
            "refused",
            'an alpha tensor beside names of diffusers stops it: it wants "lora" in every key',
            _RUN,
            some(_alpha_tensors),
            CONVERT,
        ),
        Rule(
            "diffusers-component",
            "refused",
            "the settings in the header have none for these components",
            _RUN,
            _without_settings,
            CONVERT,
            (DIFFUSERS,),
        ),
        Rule(
            "diffusers-fields",
            "refused",
            "the settings in the header have fields that LoraConfig has not",
            _RUN,
            some(_settings_fields),
            CONVERT,
            (DIFFUSERS,),
        ),
        Rule(
            "diffusers-rank",
            "refused",
            "the settings in the header give these modules another rank",
            _RUN,
            some(_settings_rank),
            CONVERT,
            (DIFFUSERS,),
        ),
        Rule(
            "diffusers-orphan",
            "ignored",
            "the partner of these factors is not in the file: it is warned of and left at its start",
            _RUN,
            some(lambda facts: facts.orphans),
            AGAIN,
            (DIFFUSERS,),
        ),
        Rule(
            "diffusers-names",
            "ignored",
            "these names belong to no component of a pipeline with a UNet: nothing of them is loaded",
            _RUN,
            some(_foreign),
            CONVERT,
        ),
        Rule(
            "diffusers-scale",
            "scale",
            "the most frequent alpha counts for all attention layers and text encoders: {worst} gets the scale "
            "{taken}, meant is {meant} (x {factor})",
            f"{_RUN}; utils/peft_utils.py, get_peft_kwargs",
            other_scales(diffusers_scales),
            CONVERT,
        ),
        Rule(
            "diffusers-dora-scale",
            "ignored",
            "DoRA's dora_scale is filtered out with a warning",
            _RUN,
            some(lambda facts: facts.magnitudes),
            UNDORA,
            (KOHYA,),
        ),
        Rule(
            "diffusers-older",
            "note",
            "versions from before pull request 14409 (August 2026) scale mixed ranks without alphas by the first of "
            "them",
            "diffusers pull request 14409",
            some(_mixed_without_alpha),
        ),
        Rule(
            "diffusers-other",
            "note",
            "the pipelines of other models than UNets convert names and alphas by code of their own, which was not run",
            "diffusers 0.42.1: loaders/lora_conversion_utils.py",
            some(_other_models),
        ),
    ),
)

COMFYUI = Reader(
    key="comfyui",
    name="ComfyUI",
    version="commit 0323d87",
    formats=(KOHYA, DIFFUSERS),
    source=_COMFY,
    rules=(
        broken("comfyui"),
        Rule(
            "comfyui-half",
            "refused",
            "the partner of these factors is not in the file",
            _COMFY,
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "comfyui-scale",
            "scale",
            "it takes alpha / r with the module's own alpha tensor, 1 without one and 0 for 0; the header is not read: "
            "{worst} gets {taken}, meant is {meant} (x {factor})",
            _COMFY,
            other_scales(comfy_scales),
            CONVERT,
        ),
        Rule(
            "comfyui-dora",
            "ignored",
            "it takes every dora_scale for one of input columns; these are of output rows",
            _COMFY,
            some(_by_rows),
            UNDORA,
        ),
        Rule(
            "comfyui-magnitude",
            "ignored",
            "it looks for dora_scale; magnitude vectors under other names are passed over",
            _COMFY,
            some(_vectors),
            UNDORA,
        ),
        Rule(
            "comfyui-keys",
            "ignored",
            "keys that it does not know are passed over with a warning",
            _COMFY,
            some(lambda facts: (*facts.extras_of("lora bias"), *facts.strange)),
            AGAIN,
        ),
    ),
)

SD_SCRIPTS = Reader(
    key="sd-scripts",
    name="sd-scripts",
    version="commit 02298e3",
    formats=(KOHYA,),
    source=_SCRIPTS,
    rules=(
        broken("sd-scripts"),
        Rule(
            "sd-scripts-tucker",
            "refused",
            "a Tucker convolution's factors do not fit the layers that it makes",
            f"{_SCRIPTS}, LoRANetwork.load_weights",
            some(lambda facts: [pair.name for pair in facts.pairs if pair.form == TUCKER]),
            CONVERT,
        ),
        Rule(
            "sd-scripts-names",
            "ignored",
            "only keys such as lora_unet_<name>.lora_down.weight are looked for",
            f"{_SCRIPTS}, create_network_from_weights",
            some(_other_spelling),
            CONVERT,
        ),
        Rule(
            "sd-scripts-form",
            "ignored",
            "updates that are no plain LoRA are passed over; its LyCORIS module reads them",
            f"{_SCRIPTS}, create_network_from_weights",
            some(lambda facts: [pair.name for pair in facts.pairs if pair.form not in (PLAIN, TUCKER)]),
            CONVERT,
        ),
        Rule(
            "sd-scripts-dora",
            "ignored",
            "DoRA's magnitude vectors are passed over",
            f"{_SCRIPTS}, LoRANetwork.load_weights",
            some(lambda facts: facts.magnitudes),
            UNDORA,
        ),
        Rule(
            "sd-scripts-orphan",
            "ignored",
            "the partner of these factors is not in the file: the module does nothing",
            f"{_SCRIPTS}, LoRANetwork.load_weights",
            some(lambda facts: facts.orphans),
            AGAIN,
        ),
        Rule(
            "sd-scripts-beside",
            "ignored",
            "tensors beside the factors are passed over",
            f"{_SCRIPTS}, LoRANetwork.load_weights",
            some(lambda facts: (*facts.extras, *facts.strange)),
            AGAIN,
        ),
    ),
)
