"""diffusers adapters: one safetensors file of a pipeline's components, as `save_lora_weights` writes it.

docs/formats-diffusers.md is the specification of what is read and written here. What is written has a scale of 1 in
every module, which is what readers take that look at the tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Module, Progress
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.diffusers_header import read_settings, write_settings
from lora_squeeze.formats.diffusers_keys import Layout, is_mixed, is_ours, parse
from lora_squeeze.formats.history import read_history
from lora_squeeze.formats.kohya import DIFFUSERS_KEY, STALE
from lora_squeeze.formats.peft import PeftSource, factor_shapes
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.formats.safetensors_io import TensorFile
from lora_squeeze.formats.single_file import check_target, replace_file
from lora_squeeze.formats.streaming import check_finite, header_bound, write_tensors
from lora_squeeze.lowrank import LowRank

Entries = dict[str, tuple[torch.dtype, tuple[int, ...]]]
ALPHA_KEY = "alpha"  # in the header: the pipeline of MiniMax-H3 divides it by each rank, all others ignore it


def matches(path: Path) -> bool:
    """Whether this is a safetensors file of diffusers; tells by its header."""
    try:
        if not path.is_file():
            return False
        with TensorFile(path) as file:
            return DIFFUSERS_KEY in file.metadata or is_ours(file.entries)
    except (LoraSqueezeError, OSError, ValueError):
        return False


def load(path: Path) -> Adapter:
    """The adapter in a file. Reads the header and, where there are any, the alphas; the other tensors come later.

    Raises:
        LoraSqueezeError: a damaged file, or a kind of adapter that cannot be squeezed soundly.
    """
    file = TensorFile(path)
    try:
        shapes = {name: (entry.dtype, entry.shape) for name, entry in file.entries.items()}
        settings = read_settings(file.metadata)
        modules, extras, notes = parse(shapes, file.read, settings)
        if settings is None:
            _check_header_alpha(file.metadata, modules.values())
    except LoraSqueezeError as error:
        raise LoraSqueezeError(f"{quoted(path)}: {error}") from None
    return Adapter(
        modules=modules,
        extras=extras,
        source=PeftSource(file),
        format=DiffusersFormat(home=path.resolve()),
        metadata=dict(file.metadata),
        history=read_history(file.metadata),
        notes=tuple(notes),
    )


def _check_header_alpha(metadata: Mapping[str, str], modules: Iterable[Module]) -> None:
    """Refuse an alpha in the header that gives one pipeline another scale than all others."""
    try:
        alpha = float(metadata.get(ALPHA_KEY, "none"))
    except ValueError:
        return
    for module in modules:
        if module.layout.component.startswith("transformer") and not module.layout.alpha and alpha != module.rank:
            raise LoraSqueezeError(
                f"the header has alpha {alpha:g} and {module.name} has rank {module.rank}: MiniMax-H3's pipeline "
                "scales with their ratio, all other readers with 1; multiply it into the factors and remove the entry"
            )


@dataclass(frozen=True)
class DiffusersFormat:
    """Writes an adapter as one safetensors file that `load_lora_weights` reads.

    Args:
        home: the file or folder that the adapter is read from: never written to, whatever `force` says.
    """

    name: str = "diffusers"
    home: Path | None = None

    def check_target(self, path: Path, *, force: bool) -> None:
        """Refuse the source itself, and what cannot be replaced."""
        check_target(path, force=force, home=self.home)

    def save(self, adapter: Adapter, path: Path, *, force: bool, progress: Progress | None) -> None:
        """Write the file; one batch of modules is in memory at a time."""
        self.check_target(path, force=force)
        with replace_file(path, force=force) as draft:
            _write(adapter, draft, progress)

    def overhead_bytes(self, adapter: Adapter) -> int:
        """Header, settings and alphas: an upper bound of what is no number of a factor or a carried tensor."""
        copy = _is_copy(adapter)
        entries = _entries(adapter, copy=copy) | (_alphas(adapter) if copy else {})
        return header_bound(_with_settings(adapter, longest=True), entries) + 8 * len(adapter.modules)


def _write(adapter: Adapter, path: Path, progress: Progress | None) -> None:
    copy = _is_copy(adapter)
    entries = _entries(adapter, copy=copy) | (_alphas(adapter) if copy else {})

    def stored(module: Module, update: LowRank) -> dict[str, Tensor]:
        alpha = module.layout.alpha if copy else None
        beside = {} if alpha is None else {alpha[0]: torch.cat(list(adapter.source.pieces(alpha[0]))).reshape(alpha[2])}
        return _stored(module, update, copy=copy) | beside

    def carried(extra: Extra) -> tuple[str, Iterator[Tensor]]:
        return _extra_key(adapter, extra, copy=copy), _extra_pieces(adapter, extra, copy=copy)

    told = adapter if copy else _with_settings(adapter)
    write_tensors(path, adapter, entries, stored, progress, carried=carried, told=told)


def _is_copy(adapter: Adapter) -> bool:
    """Whether nothing was done to the adapter since it was read: then keys, dtypes, alphas and settings stay."""
    return (
        all(module.layout.a_key for module in adapter.modules.values())
        and not adapter.dropped
        and adapter.history == read_history(adapter.metadata)
    )


def _keys(module: Module, *, copy: bool) -> tuple[str, str]:
    found: Layout = module.layout
    return (found.a_key, found.b_key) if copy else (found.key("lora_A.weight"), found.key("lora_B.weight"))


def _entries(adapter: Adapter, *, copy: bool) -> Entries:
    """Key, dtype and shape of every factor and carried tensor in the new file."""
    entries: Entries = {}
    for module in adapter.modules.values():
        dtypes = module.layout.dtypes if copy else (module.dtype, module.dtype)
        entries |= dict(zip(_keys(module, copy=copy), zip(dtypes, factor_shapes(module), strict=True), strict=True))
    for extra in adapter.extras.values():
        entries[_extra_key(adapter, extra, copy=copy)] = (extra.dtype, extra.shape)
    return entries


def _alphas(adapter: Adapter) -> Entries:
    """Key, dtype and shape of every alpha as read."""
    found = [module.layout.alpha for module in adapter.modules.values() if module.layout.alpha is not None]
    return {key: (dtype, shape) for key, dtype, shape in found}


def _stored(module: Module, update: LowRank, *, copy: bool) -> dict[str, Tensor]:
    """A and B as the file has them: as read, or with the scale multiplied into B."""
    whole = update if copy else update.with_scale(1.0, module.dtype)
    dtypes = module.layout.dtypes if copy else (module.dtype, module.dtype)
    stored = {}
    for key, factor, dtype, shape in zip(
        _keys(module, copy=copy), (whole.A, whole.B), dtypes, factor_shapes(module), strict=True
    ):
        check_finite(module, factor)
        stored[key] = factor.to(dtype).reshape(shape)
    return stored


def _extra_key(adapter: Adapter, extra: Extra, *, copy: bool) -> str:
    if copy or extra.module is None:
        return extra.name
    found: Layout = adapter.modules[extra.module].layout
    return found.key("lora_B.bias")


def _extra_pieces(adapter: Adapter, extra: Extra, *, copy: bool) -> Iterator[Tensor]:
    """The numbers of a carried tensor; the bias of a B is multiplied with the scale that its module had."""
    pieces = adapter.pieces(extra.name)
    scale = 1.0 if copy or extra.module is None else adapter.modules[extra.module].scale
    return pieces if scale == 1 else ((piece.double() * scale).to(piece.dtype) for piece in pieces)


def _with_settings(adapter: Adapter, *, longest: bool = False) -> Adapter:
    """The adapter with the header's settings for its new ranks, where they are needed or the source had some.

    Without them diffusers takes the common rank of a component for alpha, a scale of 1, in all versions.
    """
    modules = adapter.modules.values()
    stale = (DIFFUSERS_KEY, ALPHA_KEY, *STALE)
    strings = {key: value for key, value in adapter.metadata.items() if key not in stale}
    if longest or DIFFUSERS_KEY in adapter.metadata or is_mixed(modules):
        ranks: dict[str, dict[str, int]] = {}
        for module in modules:
            ranks.setdefault(module.layout.component, {})[module.layout.path] = module.rank * module.step
        biased = {adapter.modules[e.module].layout.component for e in adapter.extras.values() if e.module is not None}
        strings[DIFFUSERS_KEY] = write_settings(adapter.metadata, ranks, biased, longest=longest)
    return replace(adapter, metadata=strings)
