"""kohya, ComfyUI and LyCORIS adapters: one safetensors file with the factors and an alpha of every module.

docs/formats-kohya.md is the specification of what is read and written here. What is written is always plain LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Module, Progress
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import lycoris
from lora_squeeze.formats.borrowed import Borrowed, Origin
from lora_squeeze.formats.history import read_history
from lora_squeeze.formats.kohya_keys import ALPHA, Alpha, Layout, inner_dtype, is_ours, parse
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.formats.safetensors_io import TensorFile
from lora_squeeze.formats.single_file import check_target, replace_file
from lora_squeeze.formats.streaming import check_finite, header_bound, write_tensors
from lora_squeeze.lowrank import LowRank

DIFFUSERS_KEY = "lora_adapter_metadata"  # a header with it has the scales; the tensors do not
RANK_KEY, ALPHA_KEY = "ss_network_dim", "ss_network_alpha"
_LAST = "lora_unet_final_layer_"
_TRANSFORMERS = (*(f"lora_unet_{part}_blocks_" for part in ("double", "single", "joint")), _LAST)  # Flux, SD3
MIXED = "Dynamic"  # what sd-scripts writes for ranks that differ
STALE = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")  # of the tensors that were read


@dataclass(frozen=True)
class KohyaSource:
    """Reads the tensors of one file as updates."""

    file: TensorFile

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules; NaN and infinity are found when they are decomposed."""
        return [self._update(module) for module in modules]

    def _update(self, module: Module) -> LowRank:
        form, keys = module.layout.form, module.layout.keys
        if form == lycoris.PLAIN:
            pair = {role: self.file.read(key).to(module.dtype).flatten(1) for role, key in keys}
            return LowRank(pair["up"], pair["down"], module.scale)
        B, A = lycoris.factors(form, {role: self.file.read(key).double() for role, key in keys})
        return LowRank(B, A, module.scale).to(inner_dtype(module.dtype))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.file.pieces(name)

    def digest(self) -> str | None:
        """sha256 of the file."""
        return self.file.sha256()


def matches(path: Path) -> bool:
    """Whether this is a safetensors file with keys of kohya, ComfyUI or LyCORIS; tells by its header."""
    try:
        if not path.is_file():
            return False
        with TensorFile(path) as file:
            return DIFFUSERS_KEY not in file.metadata and is_ours(file.entries)
    except (LoraSqueezeError, OSError, ValueError):
        return False


def load(path: Path) -> Adapter:
    """The adapter in a file. Reads the header and the alphas; the other tensors come later.

    Raises:
        LoraSqueezeError: a damaged file, or a kind of adapter that cannot be squeezed soundly.
    """
    file = TensorFile(path)
    try:
        if DIFFUSERS_KEY in file.metadata:
            raise LoraSqueezeError(
                f"its header has {DIFFUSERS_KEY}: diffusers takes the scales from there and kohya's readers do not; "
                "load it as a diffusers adapter"
            )
        shapes = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        modules, extras, notes = parse(shapes, file.read)
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{quoted(path)}: {error}") from None
    scales = {module.scale for module in modules.values()}
    return Adapter(
        modules=modules,
        extras=extras,
        source=KohyaSource(file),
        format=KohyaFormat(home=path.resolve()),
        default_scale=scale if len(scales) == 1 and (scale := next(iter(scales))) > 0 else 1.0,
        metadata=dict(file.metadata),
        history=read_history(file.metadata),
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class KohyaFormat:
    """Writes an adapter as one safetensors file of plain LoRA factors.

    Args:
        home: the file or folder that the adapter is read from: never written to, whatever `force` says.
    """

    name: str = "kohya"
    home: Path | None = None

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse the source itself, and what cannot be replaced."""
        check_target(path, force=force, home=self.home)

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write the file; one batch of modules is in memory at a time."""
        self.check_target(path, force=force)
        with replace_file(path, force=force) as draft:
            _write(portable(adapter), draft, progress)

    def overhead_bytes(self, adapter: Adapter) -> int:
        """Header, metadata and alphas: an upper bound of what is no number of a factor or a carried tensor."""
        # An alpha has eight bytes at most.
        return header_bound(adapter, _entries(adapter, alphas=True)) + 8 * len(adapter.modules)


def _write(adapter: Adapter, path: Path, progress: Progress | None) -> None:
    entries = _entries(adapter, alphas=not _as_read(adapter))

    def stored(module: Module, update: LowRank) -> dict[str, Tensor]:
        return {key: tensor for key, tensor in _stored(module, update).items() if key in entries}

    told = replace(adapter, metadata=_strings(adapter))
    write_tensors(path, adapter, entries, stored, progress, told=told)


def _as_read(adapter: Adapter) -> bool:
    """Whether all modules stand in the new file as in the one that was read: then it gets the same keys.

    Otherwise every module gets an alpha: LyCORIS loads no module without one.
    """
    return all(
        module.layout.form == lycoris.PLAIN and (module.rank, module.scale) == (module.layout.rank, module.layout.scale)
        for module in adapter.modules.values()
    )


def anew(adapter: Adapter) -> Adapter:
    """The adapter such that nothing of it is written as it was read: every module gets the alpha of `portable`."""
    modules = {name: replace(m, layout=replace(m.layout, rank=0)) for name, m in adapter.modules.items()}
    return replace(
        adapter,
        modules=modules,
        source=Borrowed(adapter, {name: Origin(name) for name in modules}, {key: key for key in adapter.extras}),
    )


def portable(adapter: Adapter) -> Adapter:
    """The same updates with scales whose alphas every reader takes for what they are.

    diffusers 0.42 gives modules of a UNet whose alphas differ the alpha that most of them have, and does not look at
    those of Flux's last layer. So there is one alpha, with the rest multiplied into B on writing, which rounds nothing
    where ranks differ by powers of two; in a file of Flux or SD3, whose other alphas it reads, alpha = r in the last
    layer. What is written as it was read stays so.
    """
    if _as_read(adapter):
        return adapter
    modules = adapter.modules.values()
    if any(name.startswith(_TRANSFORMERS) for name in adapter.modules):
        scales = {m.name: 1.0 if m.name.startswith(_LAST) else m.scale for m in modules}
    else:
        alphas = [module.scale * module.rank for module in modules]
        alpha = max(alphas)
        if alpha <= 0 or not math.isclose(min(alphas), alpha, rel_tol=1e-12):  # alpha / r * r is not always alpha
            alpha = adapter.default_scale * max(module.rank for module in modules)
        scales = {module.name: alpha / module.rank for module in modules}
    return replace(
        adapter,
        modules={name: replace(m, scale=scales[name]) for name, m in adapter.modules.items()},
        source=Borrowed(
            adapter, {name: Origin(name) for name in adapter.modules}, {key: key for key in adapter.extras}
        ),
    )


def _shapes(module: Module) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of A and B in the new file."""
    layout: Layout = module.layout
    columns = module.in_features // math.prod(module.kernel)
    return {
        layout.down_key: (module.rank, columns, *module.kernel),
        layout.up_key: (module.out_features, module.rank, *layout.ones),
    }


def _entries(adapter: Adapter, *, alphas: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Key, dtype and shape of every tensor in the new file; `alphas`: of every module, else as in the file read."""
    entries: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for module in adapter.modules.values():
        entries |= {key: (module.dtype, shape) for key, shape in _shapes(module).items()}
        if alphas or module.layout.alpha is not None:
            alpha = write_alpha(module)
            entries[f"{module.name}.{ALPHA}"] = alpha.dtype, alpha.shape
    return entries | {name: (extra.dtype, extra.shape) for name, extra in adapter.extras.items()}


def write_alpha(module: Module) -> Alpha:
    """The alpha that is written: that which was read where it still holds, else scale * rank. It is never 0.

    Its dtype is that of the source, or a wider one that holds the number to seven digits.
    """
    read: Alpha | None = module.layout.alpha
    if read and read.value / module.rank == module.scale:
        return read
    # A scale below 0 stays only in an alpha that is written as it was read.
    value, shape = (module.scale if module.scale > 0 else 1.0) * module.rank, read.shape if read else ()
    for dtype in ([read.dtype] if read else []) + [torch.float32, torch.float64]:
        stored = float(torch.tensor(value, dtype=dtype).double())
        if math.isclose(stored, value, rel_tol=1e-7):
            break
    return Alpha(dtype, shape, stored)


def _stored(module: Module, update: LowRank) -> dict[str, Tensor]:
    """The tensors of one module as the file has them, with the scale that readers make of the alpha."""
    alpha = write_alpha(module)
    update = update.with_scale(alpha.value / module.rank, module.dtype)
    check_finite(module, update.A, update.B)
    (down, down_shape), (up, up_shape) = _shapes(module).items()
    return {
        down: update.A.reshape(down_shape),
        up: update.B.reshape(up_shape),
        f"{module.name}.{ALPHA}": torch.full(alpha.shape, alpha.value, dtype=alpha.dtype),
    }


def _strings(adapter: Adapter) -> dict[str, str]:
    """The header's strings as read, without the hashes of other tensors and with the new rank and alpha."""
    strings = {key: value for key, value in adapter.metadata.items() if key not in STALE}
    if _as_read(adapter):
        return strings
    ranks = {module.rank for module in adapter.modules.values()}
    alphas = {write_alpha(module).value for module in adapter.modules.values()}
    for key, numbers in ((RANK_KEY, ranks), (ALPHA_KEY, alphas)):
        if key in strings:
            strings[key] = f"{float(numbers.pop()):.9g}" if len(numbers) == 1 else MIXED
    return strings
