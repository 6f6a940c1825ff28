"""mlx-lm adapters: a folder with adapter_config.json (fine_tune_type, lora_parameters) and adapters.safetensors.

docs/formats-mlx.md is the specification of what is read and written here. The format has one rank and one scale for all
modules: on reading they are put into one group, so that a squeeze finds one rank for all of them; ranks that differ
nevertheless are filled up with zeros on writing.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_squeeze.adapter import Adapter, Extra, Kind, Module, Progress, common_dtype
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.folder import check_target, replace_folder
from lora_squeeze.formats.history import read_history
from lora_squeeze.formats.model_card import CARD_NAME, model_card
from lora_squeeze.formats.peft import beside
from lora_squeeze.formats.peft_config import CONFIG_NAME, is_number, read_json
from lora_squeeze.formats.peft_keys import Shapes
from lora_squeeze.formats.safetensors_header import check_shown, quoted
from lora_squeeze.formats.safetensors_io import TensorFile
from lora_squeeze.formats.streaming import header_bound, write_tensors
from lora_squeeze.lowrank import LowRank

WEIGHTS_NAME = "adapters.safetensors"
OWNED = (CONFIG_NAME, WEIGHTS_NAME)
GROUP = "all: mlx-lm has one rank for all modules"
_FACTOR = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[ab])$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|tok_embeddings|word_embeddings|embedding|embeddings|embed_in|wte)$")
_PLAIN = "train it with fine_tune_type 'lora'"
_WRITTEN = (torch.float32, torch.float16, torch.bfloat16)
_REFUSED_TYPES = {
    "dora": (
        "DoRA: its magnitude vector rescales base weight and update together, a change of full rank that depends on "
        f"the base. Way out: merge it into the model with mlx_lm.fuse, or {_PLAIN}"
    ),
    "full": f"the file holds whole weights: there are no factors to squeeze. Way out: {_PLAIN}",
}


@dataclass(frozen=True)
class Layout:
    """Keys of the two factors of a module; they are the same in the file that is written."""

    a_key: str
    b_key: str


@dataclass(frozen=True)
class MlxSource:
    """Reads the tensors of one adapters.safetensors as updates."""

    file: TensorFile

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules; NaN and infinity are found when they are decomposed."""
        return [self._update(module) for module in modules]

    def _update(self, module: Module) -> LowRank:
        a, b = (self.file.read(key).to(module.dtype) for key in (module.layout.a_key, module.layout.b_key))
        if module.kind == "experts":
            return LowRank(b, a, module.scale)
        return LowRank(b.T, a.T, module.scale)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.file.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file."""
        return self.file.sha256()


def matches(path: Path) -> bool:
    """Whether this is the folder of an mlx-lm adapter, or its weights or configuration file; tells by the latter."""
    if path.is_file() and path.name not in OWNED:
        return False
    try:
        config = read_json(_folder(path) / CONFIG_NAME)
    except LoraSqueezeError:
        return False
    return (
        isinstance(config, dict)
        and "peft_type" not in config
        and ("fine_tune_type" in config or "lora_parameters" in config)
    )


def load(path: Path) -> Adapter:
    """The adapter in a folder, or the one that a weights file belongs to. Reads configuration and header only.

    Raises:
        LoraSqueezeError: a missing or damaged file, or a kind of adapter that cannot be squeezed soundly.
    """
    folder = _folder(path)
    config = _read_config(folder)
    if not (folder / WEIGHTS_NAME).exists():
        raise LoraSqueezeError(f"{folder}: no {WEIGHTS_NAME}; the adapter is incomplete")
    file = TensorFile(folder / WEIGHTS_NAME)
    parameters = config["lora_parameters"]
    try:
        shapes = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        modules, extras, notes = _parse(shapes, parameters["rank"], float(parameters["scale"]))
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{folder}: {error}") from None
    companions, strange = beside(folder, (CARD_NAME,))
    return Adapter(
        modules=modules,
        extras=extras,
        source=MlxSource(file),
        format=MlxFormat(home=folder.resolve()),
        config=config,
        default_scale=float(parameters["scale"]),
        metadata=dict(file.metadata),
        history=read_history(file.metadata),
        companions=companions,
        notes=(*notes, *strange),
    )


def _folder(path: Path) -> Path:
    return path.parent if path.is_file() else path


def _read_config(folder: Path) -> dict[str, Any]:
    """The configuration, checked to be one of a plain LoRA."""
    path = folder / CONFIG_NAME
    config = read_json(path)
    try:
        _check_config(config)
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{path}: {error}") from None
    found: dict[str, Any] = config
    return found


def _check_config(config: Any) -> None:
    if not isinstance(config, dict):
        raise LoraSqueezeError(f"expected an object, found {type(config).__name__}")
    kind = "dora" if config.get("use_dora") else config.get("fine_tune_type", "lora")
    if kind != "lora":
        reason = _REFUSED_TYPES.get(str(kind), f"this kind is not known here. Way out: {_PLAIN}")
        raise LoraSqueezeError(f"fine_tune_type {quoted(kind)} cannot be squeezed: {reason}")
    parameters = config.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise LoraSqueezeError(f"lora_parameters must be an object with rank and scale, found {parameters!r:.80}")
    rank, scale, alpha = parameters.get("rank"), parameters.get("scale"), parameters.get("alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank < 2**31:
        raise LoraSqueezeError(f"lora_parameters: rank must be a whole number from 1, found {rank!r:.80}")
    if not is_number(scale):
        raise LoraSqueezeError(f"lora_parameters: scale must be a finite number, found {scale!r:.80}")
    if alpha is not None and alpha != rank:
        raise LoraSqueezeError(
            f"lora_parameters: alpha is {alpha!r:.80} beside rank {rank} and scale {scale}: early versions of mlx-lm "
            "multiplied scale by alpha / rank, later ones do not read alpha; set scale to the factor that was in "
            "force in training and remove alpha"
        )


def _parse(shapes: Shapes, rank: int, scale: float) -> tuple[dict[str, Module], dict[str, Extra], list[str]]:
    """Modules, carried tensors and notes of a weights file; `rank` and `scale` as configured."""
    check_shown(shapes)
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    for key in shapes:
        if match := _FACTOR.match(key):
            factors[match["path"]][match["side"]] = key
    if not factors:
        raise LoraSqueezeError(
            f"no LoRA factors among {len(shapes)} tensors (the first is {quoted(next(iter(shapes)))}); expected keys "
            "such as 'model.layers.0.self_attn.q_proj.lora_a'"
        )
    extras = {key: _extra(key, shapes, factors) for key in shapes if not _FACTOR.match(key)}
    modules = {path: _module(path, keys, shapes, rank, scale) for path, keys in factors.items()}
    notes = ["mlx-lm has one rank for all modules: a squeeze gives all of them the largest rank that one of them needs"]
    notes += [
        f"{module.name}: the configuration says rank {rank}, the tensors have {module.rank}; the tensors are used, and "
        "filled up with zeros to the largest rank on writing"
        for module in modules.values()
        if module.rank != rank
    ]
    if extras:
        notes.append(
            f"{quoted(next(iter(extras)))}: no factor of a LoRA; it is carried along, but mlx-lm loads such tensors in "
            "versions that do not check the names (0.32 does)"
        )
    return modules, extras, notes


def _module(path: str, keys: dict[str, str], shapes: Shapes, rank: int, scale: float) -> Module:
    if len(keys) != 2:
        raise LoraSqueezeError(
            f"orphan factor {quoted(next(iter(keys.values())))}: its partner for module {quoted(path)} is not in the "
            "file; the file is incomplete: get it again"
        )
    (a_dtype, a), (b_dtype, b) = shapes[keys["a"]], shapes[keys["b"]]
    for key, dtype, shape in ((keys["a"], a_dtype, a), (keys["b"], b_dtype, b)):
        if not dtype.is_floating_point:
            raise LoraSqueezeError(f"{quoted(key)} has dtype {dtype}; quantised factors are not read: save them plain")
        if 0 in shape:
            raise LoraSqueezeError(f"{quoted(key)} has shape {list(shape)}: it is empty; save the adapter again")
    found = f"factors of {quoted(path)}: {quoted(keys['a'])} is {list(a)}, {quoted(keys['b'])} is {list(b)}"
    dtype = common_dtype(a_dtype, b_dtype)
    module = Module(path, 1, scale, dtype, 1, 1, group=GROUP, floor=1, layout=Layout(keys["a"], keys["b"]))
    if len(a) == len(b) == 3:
        if a[0] != b[0] or a[1] != b[2]:
            raise LoraSqueezeError(f"{found}; expected (experts, r, in) and (experts, out, r)")
        return replace(module, rank=a[1], out_features=b[1], in_features=a[2], copies=a[0], kind="experts")
    if len(a) == len(b) == 2:
        if a[0] == b[1] and (a[1] != b[0] or a[0] == rank != a[1]):
            raise LoraSqueezeError(
                f"{found}: transposed as in PEFT, mlx-lm would compute another function; convert the adapter, do not "
                "rename it"
            )
        if a[1] == b[0]:
            kind: Kind = "embedding" if _EMBEDDING.search(path) else "linear"
            return replace(module, rank=a[1], out_features=b[1], in_features=a[0], kind=kind)
    raise LoraSqueezeError(f"{found}; expected (in, r) and (r, out)")


def _extra(key: str, shapes: Shapes, factors: Mapping[str, Any]) -> Extra:
    """A tensor beside the factors: mlx-lm loads it in place of the base model's."""
    path, _, leaf = key.rpartition(".")
    if leaf == "m" and path in factors:
        raise LoraSqueezeError(f"{quoted(key)} cannot be squeezed: {_REFUSED_TYPES['dora']}")
    if ".lora_" in f".{key}":
        raise LoraSqueezeError(
            f"{quoted(key)} is no tensor that a plain mlx-lm LoRA has; its meaning is not known here"
        )
    kind = "bias" if leaf == "bias" else "embedding" if _EMBEDDING.search(path) else "module to save"
    dtype, shape = shapes[key]
    return Extra(key, dtype, shape, kind, "trained in full beside the LoRA; it takes the place of the base model's")


@dataclass(frozen=True)
class MlxFormat:
    """Writes an adapter as an mlx-lm folder.

    Args:
        home: the folder that the adapter is read from: never written to, whatever `force` says.
    """

    name: str = "mlx"
    home: Path | None = None

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse the source's own folder, and what cannot be replaced."""
        if self.home is not None and path.resolve() == self.home:
            raise LoraSqueezeError(f"{quoted(path)} is the folder that the adapter is read from; choose another output")
        check_target(path, force=force)

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write configuration and weights, and the model card if there is one; one batch of modules is in memory."""
        self.check_target(path, force=force)
        for module in adapter.modules.values():
            if module.dtype not in _WRITTEN:
                raise LoraSqueezeError(
                    f"{module.name}: MLX cannot read factors of {module.dtype}; ask for dtype float16 (--dtype float16)"
                )
        with replace_folder(path, force=force, owned=OWNED) as staging:
            _write_weights(adapter, staging / WEIGHTS_NAME, progress)
            (staging / CONFIG_NAME).write_text(json.dumps(_config(adapter), indent=4, sort_keys=True) + "\n")
            for card in adapter.companions:
                try:
                    text = card.read_text(encoding="utf-8")
                except (OSError, UnicodeDecodeError) as error:
                    raise LoraSqueezeError(f"{quoted(card)}: cannot be copied ({error})") from error
                (staging / CARD_NAME).write_text(model_card(adapter, text), encoding="utf-8", errors="replace")

    def overhead_bytes(self, adapter: Adapter) -> int:
        """Header, metadata and the zeros of ranks below the largest: an upper bound of what is no number of a factor.

        Notes:
            For modules of one group, as `load` gives them, no zeros are needed and a budget of bytes holds exactly.
        """
        padding = sum(
            (adapter.rank - module.rank) * module.parameters_per_rank * module.dtype.itemsize
            for module in adapter.modules.values()
        )
        return header_bound(adapter, _entries(adapter)) + padding


def _write_weights(adapter: Adapter, path: Path, progress: Progress | None) -> None:
    """Write the tensors, all with one rank and one scale."""
    scale, rank = _scale(adapter), adapter.rank

    def stored(module: Module, update: LowRank) -> dict[str, Tensor]:
        return _stored(module, update.with_scale(scale), rank)

    write_tensors(path, adapter, _entries(adapter), stored, progress)


def _entries(adapter: Adapter) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor in the new file."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    rank = adapter.rank
    for module in adapter.modules.values():
        out, columns = module.out_features, module.in_features
        experts = module.kind == "experts"
        a = (module.copies, rank, columns) if experts else (columns, rank)
        b = (module.copies, out, rank) if experts else (rank, out)
        entries |= {module.layout.a_key: (module.dtype, a), module.layout.b_key: (module.dtype, b)}
    return entries | {name: (extra.dtype, extra.shape) for name, extra in adapter.extras.items()}


def _stored(module: Module, update: LowRank, rank: int) -> dict[str, Tensor]:
    """The factors as the file has them, with zeros up to the common rank."""
    missing = rank - update.rank
    A, B = pad(update.A, (0, 0, 0, missing)), pad(update.B, (0, missing))
    a, b = (A, B) if module.kind == "experts" else (A.T, B.T)
    return {module.layout.a_key: a, module.layout.b_key: b}


def _scale(adapter: Adapter) -> float:
    """The one scale that is written for all modules."""
    return adapter.default_scale if adapter.default_scale > 0 else 1.0


def _config(adapter: Adapter) -> dict[str, Any]:
    """The configuration as read, with the new rank and scale."""
    before = adapter.config.get("lora_parameters", {})
    new = {"dropout": 0.0, **before, "rank": adapter.rank, "scale": _scale(adapter)}
    if "alpha" in before:  # equal to the rank, so that versions that read it multiply by 1
        new["alpha"] = adapter.rank
    return {"fine_tune_type": "lora", **adapter.config, "lora_parameters": new}
