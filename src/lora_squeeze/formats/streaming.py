"""How a safetensors file of an adapter is written, whatever the format: one batch of modules in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lora_squeeze.adapter import Adapter, Extra, Module, Progress, is_finite
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.history import header_strings, reserve_bytes
from lora_squeeze.formats.safetensors_header import header_json, layout
from lora_squeeze.formats.safetensors_io import TensorFileWriter
from lora_squeeze.lowrank import LowRank

Entries = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # key -> dtype and shape


def write_tensors(
    path: Path,
    adapter: Adapter,
    entries: Entries,
    stored: Callable[[Module, LowRank], Mapping[str, Tensor]],
    progress: Progress | None,
    *,
    carried: Callable[[Extra], tuple[str, Iterator[Tensor]]] | None = None,
    told: Adapter | None = None,
) -> None:
    """Write factors, carried tensors and header; the digest of the source is taken meanwhile.

    Args:
        path: the file, which must not exist.
        adapter: what is written.
        entries: every tensor of the file.
        stored: key -> tensor of one module, from its update.
        progress: called with (bytes done, bytes in all) after every batch of modules and every carried tensor.
        carried: key and numbers of a carried tensor; default as it is.
        told: the adapter whose strings and history go into the header; default this one.
    """
    told = told or adapter
    done, total = 0, adapter.lora_bytes + adapter.extra_bytes
    with ThreadPoolExecutor(1) as pool, TensorFileWriter(path, entries, reserve_bytes(told)) as writer:
        digest = pool.submit(adapter.source.digest)
        for batch in adapter.batches():
            for module, update in zip(batch, adapter.source.updates(batch), strict=True):
                for key, tensor in stored(module, update).items():
                    writer.write(key, tensor)
                done += module.size_bytes
            if progress:
                progress(done, total)
        for name, extra in adapter.extras.items():
            writer.write_pieces(*((name, adapter.pieces(name)) if carried is None else carried(extra)))
            done += extra.size_bytes
            if progress:
                progress(done, total)
        writer.close(header_strings(told, digest.result()))


def header_bound(told: Adapter, entries: Entries) -> int:
    """An upper bound of the bytes in front of the tensors, also after a squeeze to lower ranks."""
    # Lower ranks have no more digits; a dtype may be spelled with one letter more; the data begins at eight bytes.
    return 8 + len(header_json(layout(entries), {})) + len(entries) + reserve_bytes(told) + 8


def check_finite(module: Module, *factors: Tensor) -> None:
    """Refuse what no reader can use.

    Raises:
        LoraSqueezeError: NaN, infinity, or numbers that the dtype of the module does not hold.
    """
    for factor in factors:
        if not is_finite(factor):
            raise LoraSqueezeError(
                f"{module.name}: the factors hold NaN or infinity, or do not fit in {module.dtype}; ask for dtype "
                "float32 or bfloat16 if the source is sound"
            )
