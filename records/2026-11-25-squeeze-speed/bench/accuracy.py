"""Relative error of the singular values, against the SVD of the product in float64."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.plan import Plan
from lora_squeeze.lowrank import LowRank

SIZE, RANK = 1024, 64
DECADES = (2, 4, 6)  # the smallest singular value is 10^-decades of the largest
CASES = ("shared", "in B", "columns", "skewed")


def measure_accuracy(plan: Plan) -> list[dict[str, Any]]:
    """One row per spectrum and way to share it between two factors: largest relative error over values and seeds."""
    rows = []
    for case, decades in product(CASES, DECADES):
        worst = {"ours": 0.0, "qr float32": 0.0, "qr float64": 0.0}
        for seed in range(plan.accuracy_seeds):
            B, A = _factors(case, decades, torch.Generator().manual_seed(seed))
            exact = torch.linalg.svdvals(B.double() @ A.double())[:RANK]
            found = {
                "ours": LowRank(B, A).singular_values(),
                "qr float32": _qr_values(B, A),
                "qr float64": _qr_values(B.double(), A.double()),
            }
            for name, values in found.items():
                worst[name] = max(worst[name], float(((values.double() - exact) / exact).abs().max()))
        rows.append({"case": case, "decades": decades, "error": worst})
    return rows


def _factors(case: str, decades: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Float32 factors of U diag(10^0 ... 10^-decades) V^T.

    shared   half of the exponents in each factor, both rotated: every column holds every direction
    in B     all of the spectrum in B, rotated; the rows of A orthonormal
    columns  all of the spectrum in B, one direction per column
    skewed   as `in B`, with a mixing matrix of condition 100 in place of the rotation
    """

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    U, V, R = (torch.linalg.qr(normal(n, RANK)).Q for n in (SIZE, SIZE, RANK))
    S = 10 ** torch.linspace(0, -decades, RANK, dtype=torch.float64)
    if case == "columns":
        R = torch.eye(RANK, dtype=torch.float64)
    if case == "skewed":
        other = torch.linalg.qr(normal(RANK, RANK)).Q
        R = (R * 10 ** torch.linspace(0, -2, RANK, dtype=torch.float64)) @ other
    left, right = (S.sqrt(), S.sqrt()) if case == "shared" else (S, torch.ones_like(S))
    return ((U * left) @ R).float(), (torch.linalg.inv(R) @ (right[:, None] * V.mT)).float()


def _qr_values(B: Tensor, A: Tensor) -> Tensor:
    values: Tensor = torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)
    return values
