"""The statistics of a calibration in a file, so that plans and squeezes need no model: three matrices a module.

    <module>.C    float32 (*copies, r, r), E[(A x)(A x)^T]
    <module>.F    float32 (*copies, r, r), E[(B^T g)(B^T g)^T]
    <module>.K    float32 (*copies, r, r), the slope of the loss: gradient with respect to M in s B M A

The header has one entry "calibration", JSON with the format's version, the digest of the adapter's weights file, the
loss, what it was measured on, and the number of rows seen by each module. Statistics hold in the coordinates of one
adapter's factors: with another one, even of the same shape, they mean nothing, and are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.adapter import Adapter
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_io import TensorFile, TensorFileWriter
from lora_squeeze.formats.single_file import replace_file
from lora_squeeze.moments import Moments

FORMAT = 1
KEY = "calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """What examples say about an adapter.

    Args:
        moments: module -> moments, in the coordinates of the adapter's factors.
        loss: mean loss of the examples with the adapter as it is.
        examples: number of examples.
        data, base: what they were, and the model.
        source_sha256: digest of the adapter's weights file.
    """

    moments: Mapping[str, Moments]
    loss: float
    examples: int
    data: str
    base: str
    source_sha256: str | None

    def check(self, adapter: Adapter) -> None:
        """Refuse another adapter than the one that was calibrated.

        Raises:
            LoraSqueezeError: the digests of the weights differ.
        """
        found = adapter.source.digest()
        if found != self.source_sha256:
            raise LoraSqueezeError(
                f"the statistics are of another adapter (sha256 {str(self.source_sha256)[:12]}, this one has "
                f"{str(found)[:12]}); calibrate this one"
            )

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the statistics, all or nothing.

        Raises:
            LoraSqueezeError: the file exists and `force` is not given, or it cannot be written.
        """
        matrices = {
            f"{name}.{key}": matrix.float()
            for name, m in self.moments.items()
            for key, matrix in (("C", m.C), ("F", m.F), ("K", m.slope))
            if matrix is not None
        }
        facts = {"format": FORMAT, **{name: getattr(self, name) for name in _FACTS}}
        header = {KEY: json.dumps({**facts, "rows": {name: m.rows for name, m in self.moments.items()}})}
        entries = {key: (torch.float32, tuple(matrix.shape)) for key, matrix in matrices.items()}
        with (
            replace_file(Path(path).expanduser(), force=force) as draft,
            TensorFileWriter(draft, entries, len(json.dumps(header))) as file,
        ):
            for key, matrix in matrices.items():
                file.write(key, matrix.cpu())
            file.close(header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read statistics.

        Raises:
            LoraSqueezeError: no such file, another kind of file or of another version, matrices missing.
        """
        with TensorFile(Path(path).expanduser()) as file:
            try:
                facts = json.loads(file.metadata[KEY])
                rows = facts.pop("rows")
                if facts.pop("format") != FORMAT:
                    raise ValueError("another version")
                moments = {
                    name: Moments(
                        file.read(f"{name}.C"),
                        file.read(f"{name}.F"),
                        float(count),
                        file.read(f"{name}.K") if f"{name}.K" in file.entries else None,
                    )
                    for name, count in rows.items()
                }
                return cls(moments, **{name: kind(facts[name]) for name, kind in _FACTS.items()})
            except LoraSqueezeError as error:
                raise LoraSqueezeError(f"{path}: {error}") from None
            except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError):
                raise LoraSqueezeError(
                    f"{path}: no statistics of a calibration of this version; make them with lora-squeeze calibrate"
                ) from None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


_FACTS: dict[str, Any] = {"loss": float, "examples": int, "data": str, "base": str, "source_sha256": _text}
