"""Real handwriting: the digits of scikit-learn, 8 x 8 pixels, split once for pre-training and tasks alike.

The package is looked at and not imported: only its file of digits is read, so it can be installed without SciPy.
"""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from bench.evidence.data import split

SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"  # of the file, the same in all releases
_WHITE = 16  # the file counts ink from 0 to 16


@dataclass(frozen=True)
class Handwriting:
    """Digits of one part.

    Args:
        images: ink from 0 to 1, shape (count, 8, 8), all images of one digit after those of the digit before.
        labels: the digit of each image.
    """

    images: Tensor
    labels: Tensor


def digits_file() -> Path:
    """The file of scikit-learn.

    Raises:
        SystemExit: the package is not installed, or its file is another one; says what to do.
    """
    spec = find_spec("sklearn")
    for folder in (spec and spec.submodule_search_locations) or []:
        path = Path(folder, "datasets", "data", "digits.csv.gz")
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no file"
        if found != SHA256:
            raise SystemExit(f"{path}: expected sha256 {SHA256}, found {found}: install scikit-learn anew")
        return path
    raise SystemExit("pictures are drawn with the digits of scikit-learn: pip install --no-deps scikit-learn")


def digits_source() -> str:
    """Package, version and file of the digits."""
    return f"scikit-learn {version('scikit-learn')}, datasets/data/digits.csv.gz"


@cache
def handwriting() -> dict[str, Handwriting]:
    """Digits by part: "train", "validation", "test". Equal images stay on one side."""
    lines = gzip.decompress(digits_file().read_bytes()).decode().split()
    return divided([[int(float(value)) for value in line.split(",")] for line in lines])


def divided(rows: list[list[int]]) -> dict[str, Handwriting]:
    """Rows of 64 pixels and a label, by part."""
    parts = split(((tuple(row[:-1]), row) for row in rows), "digits")
    found = {}
    for part, kept in parts.items():
        table = torch.tensor(sorted(kept, key=lambda row: row[-1]))  # stable: within a digit the order of the split
        found[part] = Handwriting(table[:, :-1].view(-1, 8, 8) / _WHITE, table[:, -1].contiguous())
    return found
