"""llama.cpp LoRA adapters: one GGUF file with pairs of tensors `<base tensor>.lora_a` and `.lora_b`.

docs/formats-gguf.md is the specification of what is read and written here. A module has the name of its tensor in the
base model's GGUF file, without ".weight": blk.3.attn_q. For some architectures the rows of that tensor stand in another
order than in the original model. That makes no difference to a squeeze: another order of the rows of dW is the same
order of the rows of B and of the truncation, so the order of the file is kept throughout.
"""

from __future__ import annotations

import math
import re
import struct
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Module, Progress, common_dtype
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.gguf_file import MAGIC, Entry, Field, GgufFile, alignment_of, header_bytes, write_gguf
from lora_squeeze.formats.history import HISTORY_KEY, header_strings, read_history, reserve_bytes
from lora_squeeze.formats.safetensors_header import check_shown, quoted
from lora_squeeze.formats.safetensors_io import read_regular
from lora_squeeze.formats.single_file import check_target, replace_file
from lora_squeeze.formats.streaming import check_finite
from lora_squeeze.lowrank import LowRank

ALPHA_KEY = "adapter.lora.alpha"
FILE_TYPE_KEY = "general.file_type"
STEPS_KEY = "lora_squeeze.history"
_FACTOR = re.compile(r"^(?P<stem>.+)\.lora_(?P<side>[ab])$")
_FLIPPED = "token_embd.weight"  # what llama.cpp asks for at the end of a name
_CARRIED = "_norm.weight"
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # llama_ftype, where all factors are of one kind


@dataclass(frozen=True)
class Layout:
    """Names of the two factors of a module; they are the same in the file that is written."""

    a_key: str
    b_key: str


@dataclass(frozen=True)
class GgufSource:
    """Reads the tensors of one GGUF adapter as updates."""

    file: GgufFile

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules; NaN and infinity are found when they are decomposed."""
        return [self._update(module) for module in modules]

    def _update(self, module: Module) -> LowRank:
        a, b = self.file.read(module.layout.a_key), self.file.read(module.layout.b_key)
        if a.dtype != b.dtype:  # a factor in q8_0 is read as float32, whatever it will be written as
            a, b = a.to(exact := common_dtype(a.dtype, b.dtype)), b.to(exact)
        if module.kind == "experts":
            return LowRank(
                b.reshape(module.copies, module.out_features, module.rank),
                a.reshape(module.copies, module.rank, module.in_features),
                module.scale,
            )
        B = b.reshape(module.out_features, module.rank)
        if module.kind == "embedding":
            return LowRank(B, a.reshape(module.in_features, module.rank).T, module.scale)
        return LowRank(B, a.reshape(module.rank, module.in_features), module.scale)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.file.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file."""
        return self.file.sha256()


def matches(path: Path) -> bool:
    """Whether this is a GGUF file, of an adapter or of a whole model; tells by its first bytes."""
    try:
        return path.is_file() and read_regular(path, len(MAGIC)) == MAGIC
    except (LoraSqueezeError, OSError, ValueError):
        return False


def load(path: Path) -> Adapter:
    """The adapter in a GGUF file. Reads the fields and the list of tensors; data comes later.

    Raises:
        LoraSqueezeError: a damaged file, one of another kind, or one that llama.cpp would read in another way.
    """
    file = GgufFile(path)
    try:
        alpha = _checked_alpha(file.fields)
        modules, extras, notes = _parse(file.tensors, alpha)
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{quoted(path)}: {error}") from None
    steps = file.fields.get(STEPS_KEY, Field.text("[]")).value
    top = max(module.rank for module in modules.values())
    return Adapter(
        modules=modules,
        extras=extras,
        source=GgufSource(file),
        format=GgufFormat(home=path.resolve()),
        config=file.fields,
        default_scale=alpha / top if alpha else 1.0,
        history=read_history({HISTORY_KEY: str(steps)}),
        notes=tuple(notes),
    )


def _checked_alpha(fields: Mapping[str, Field]) -> float:
    """alpha of the file, 0 where it has none; refuses what is no LoRA adapter."""

    def text(key: str) -> object:
        return fields[key].value if key in fields else "missing"

    if text("general.type") != "adapter":
        raise LoraSqueezeError(
            f"general.type is {quoted(text('general.type'))}, not 'adapter': this is a whole model or something else; "
            "name the file that convert_lora_to_gguf.py wrote"
        )
    if text("adapter.type") != "lora":
        raise LoraSqueezeError(f"adapter.type is {quoted(text('adapter.type'))}; only 'lora' is squeezed")
    field = fields.get(ALPHA_KEY, Field.float32(0.0))
    if not field.is_float32 or not math.isfinite(field.value):
        raise LoraSqueezeError(
            f"{ALPHA_KEY} is {field.value!r:.80}; llama.cpp takes a finite number of type float32: convert the adapter "
            "again"
        )
    return float(field.value)


def _parse(tensors: Mapping[str, Entry], alpha: float) -> tuple[dict[str, Module], dict[str, Extra], list[str]]:
    """Modules, carried tensors and notes."""
    check_shown(tensors)
    factors: dict[str, dict[str, str]] = defaultdict(dict)
    extras: dict[str, Extra] = {}
    for key, entry in tensors.items():
        if match := _FACTOR.match(key):
            factors[match["stem"]][match["side"]] = key
        else:
            extras[key] = _extra(key, entry)
    if not factors:
        raise LoraSqueezeError(
            f"no LoRA factors among {len(tensors)} tensors; expected names such as 'blk.0.attn_q.weight.lora_a'"
        )
    modules: dict[str, Module] = {}
    for stem, keys in factors.items():
        module = _module(stem, keys, tensors, alpha)
        if module.name in modules:
            raise LoraSqueezeError(f"two modules have the name {quoted(module.name)}")
        modules[module.name] = module
    notes = []
    if any(tensors[key].encoding.dtype is None for keys in factors.values() for key in keys.values()):
        notes.append(
            "factors in q8_0 are read exactly and written as float16 (float32 beside another kind), whose rounding is "
            "far below that of q8_0"
        )
    if any(module.kind == "embedding" for module in modules.values()):
        notes.append("token_embd: llama.cpp aborts on it where the base model has no output tensor (tied embeddings)")
    if extras:
        notes.append(f"{len(extras)} norm tensors are carried along; llama.cpp does not apply them")
    return modules, extras, notes


def _extra(key: str, entry: Entry) -> Extra:
    dtype = entry.encoding.dtype
    if not key.endswith(_CARRIED) or dtype is None:
        raise LoraSqueezeError(
            f"{quoted(key)} ({entry.encoding.name}) is no factor of a LoRA, and llama.cpp does not load a file that "
            "holds it; convert the adapter again without it"
        )
    return Extra(key, dtype, entry.shape, "other", "a trained norm weight; llama.cpp does not apply it")


def _module(stem: str, keys: Mapping[str, str], tensors: Mapping[str, Entry], alpha: float) -> Module:
    if len(keys) != 2:
        raise LoraSqueezeError(
            f"orphan factor {quoted(next(iter(keys.values())))}: its partner is not in the file; the file is "
            "incomplete: get it again"
        )
    entries = tensors[keys["a"]], tensors[keys["b"]]
    # Leading dimensions of 1 may be left out in the file.
    dims = max(2, *(len(entry.shape) for entry in entries))
    a, b = ((1,) * (dims - len(entry.shape)) + entry.shape for entry in entries)
    # Eight bits and a float16 scale per block: float16 is the next larger kind that is written.
    a_dtype, b_dtype = (entry.encoding.dtype or torch.float16 for entry in entries)
    dtype = common_dtype(a_dtype, b_dtype)
    rank = b[-1]
    scale = alpha / rank if alpha and rank else 1.0
    name = stem.removesuffix(".weight")
    module = Module(name, rank, scale, dtype, b[-2], a[-1], layout=Layout(keys["a"], keys["b"]))
    wrong = f"factors of {quoted(stem)} do not fit: lora_a is {list(a)}, lora_b is {list(b)}"
    if 0 in a + b:
        raise LoraSqueezeError(f"{wrong}: one is empty; convert the adapter again")
    if stem.endswith(_FLIPPED):
        if dims != 2 or a[1] != rank:
            raise LoraSqueezeError(f"{wrong}; expected (vocabulary, r) and (dim, r) for the token embedding")
        return replace(module, in_features=a[0], kind="embedding")
    if dims > 3 or a[-2] != rank or a[:-2] != b[:-2]:
        raise LoraSqueezeError(f"{wrong}; expected (r, in) and (out, r), with the experts in front where there are any")
    return module if dims == 2 else replace(module, copies=a[0], kind="experts")


@dataclass(frozen=True)
class GgufFormat:
    """Writes an adapter as a GGUF file.

    Args:
        home: the file or folder that the adapter is read from: never written to, whatever `force` says.
    """

    name: str = "gguf"
    home: Path | None = None

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse the source itself, and what cannot be replaced."""
        check_target(path, force=force, home=self.home)

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write fields and tensors; one batch of modules is in memory at a time."""
        self.check_target(path, force=force)
        steps = header_strings(adapter, adapter.source.digest())[HISTORY_KEY]
        fields = {**_fields(adapter), STEPS_KEY: Field.text(steps)}
        with replace_file(path, force=force) as draft:
            write_gguf(draft, fields, _entries(adapter), _data(adapter, progress))

    def overhead_bytes(self, adapter: Adapter) -> int:
        """Fields, names, shapes and padding: an upper bound of what is no number of a tensor."""
        entries = {name: (torch.float32, shape) for name, (_, shape) in _entries(adapter).items()}
        fields = {**_fields(adapter), STEPS_KEY: Field.text("")}
        padding = (len(entries) + 1) * alignment_of(fields)
        return len(header_bytes(fields, entries)) + reserve_bytes(adapter) + padding


def write_alpha(adapter: Adapter) -> float:
    """The number that is written as alpha, such that llama.cpp's alpha / r of each tensor is the scale of its module.

    0 where there is none: then llama.cpp takes a scale of 1, and the scales are multiplied into the factors.
    """
    alphas = set()
    for module in adapter.modules.values():
        try:
            alphas.add(struct.unpack("<f", struct.pack("<f", module.scale * module.rank))[0])
        except OverflowError:
            return 0.0
    alpha = float(alphas.pop()) if len(alphas) == 1 else 0.0
    return alpha if abs(alpha) >= torch.finfo(torch.float32).tiny else 0.0  # below it digits are lost


def _data(adapter: Adapter, progress: Progress | None) -> Iterator[Tensor]:
    """The numbers of the file in order."""
    fold = write_alpha(adapter) == 0.0
    done, total = 0, adapter.lora_bytes + adapter.extra_bytes
    for batch in adapter.batches():
        for module, update in zip(batch, adapter.source.updates(batch), strict=True):
            yield from _stored(module, update.with_scale(1.0 if fold else update.scale, module.dtype))
            done += module.size_bytes
        if progress:
            progress(done, total)
    for name, extra in adapter.extras.items():
        yield from adapter.pieces(name)
        done += extra.size_bytes
        if progress:
            progress(done, total)


def _stored(module: Module, update: LowRank) -> tuple[Tensor, Tensor]:
    """The factors as the file has them."""
    check_finite(module, update.A, update.B)
    return (update.A.T if module.kind == "embedding" else update.A), update.B


def _entries(adapter: Adapter) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor in the new file."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in adapter.modules.values():
        rank, stack = module.rank, (module.copies,) if module.kind == "experts" else ()
        a = (module.in_features, rank) if module.kind == "embedding" else (*stack, rank, module.in_features)
        entries[module.layout.a_key] = module.dtype, a
        entries[module.layout.b_key] = module.dtype, (*stack, module.out_features, rank)
    return entries | {name: (extra.dtype, extra.shape) for name, extra in adapter.extras.items()}


def _fields(adapter: Adapter) -> dict[str, Field]:
    """The fields as read, with the new alpha and, where all factors have one dtype, the new file type."""
    fields: dict[str, Field] = {**adapter.config, ALPHA_KEY: Field.float32(write_alpha(adapter))}
    dtypes = {module.dtype for module in adapter.modules.values()}
    if FILE_TYPE_KEY in fields and len(dtypes) == 1 and (dtype := dtypes.pop()) in _FILE_TYPES:
        fields[FILE_TYPE_KEY] = Field.uint32(_FILE_TYPES[dtype])
    return fields
