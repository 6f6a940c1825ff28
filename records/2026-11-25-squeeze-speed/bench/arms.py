"""The ways to truncate one update that are compared, each as its users write it.

(a) `peft`         PEFT's own `convert_to_lora`: product and full SVD in float32
(b) `svd_lowrank`  product and randomised SVD in float32, `torch.svd_lowrank(q = k + 10, niter = 2)`
(c) `qr`           QR of both factors and SVD of the core, in float64 (or float32)
(d) `floor`        what nobody can do without: two Gram products, two projections. Not a truncation: the projections are
                   random. In float64, with the projections in float32 as lora_squeeze does them (or all in float32)

A Gram product is symmetric: BLAS has a routine for it (syrk) that computes one triangle, at half the cost. torch does
not call it, numpy does. `floor` is the torch product, `floor_syrk` the numpy one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]  # B, A


def floor(B: Tensor, A: Tensor, P: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Factors]:
    """B^T B and A A^T in `dtype`; B @ P and P^T @ A in float32, stored in the dtype of B. P is (r, k) float32."""
    wide_B, wide_A = B.to(dtype), A.to(dtype)
    G, H = wide_B.mT @ wide_B, wide_A @ wide_A.mT
    return G, H, ((B.float() @ P).to(B.dtype), (P.mT @ A.float()).to(A.dtype))


def floor_syrk(B: Tensor, A: Tensor, P: Tensor) -> tuple[Tensor, Tensor, Factors]:
    """As `floor` in float64, with Gram products that compute one triangle."""
    wide_B, wide_A = B.double().numpy(), A.double().numpy()
    G, H = torch.from_numpy(wide_B.T @ wide_B), torch.from_numpy(wide_A @ wide_A.T)
    return G, H, ((B.float() @ P).to(B.dtype), (P.mT @ A.float()).to(A.dtype))


def qr(B: Tensor, A: Tensor, rank: int, dtype: torch.dtype) -> Factors:
    """Balanced factors of the best approximation by QR + core SVD."""
    Q_B, R_B = torch.linalg.qr(B.to(dtype))
    Q_A, R_A = torch.linalg.qr(A.to(dtype).mT)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)
    root = S[:rank].sqrt()
    return (Q_B @ (U[:, :rank] * root)).to(B.dtype), ((root[:, None] * Vh[:rank]) @ Q_A.mT).to(A.dtype)


def svd_lowrank(B: Tensor, A: Tensor, rank: int) -> Factors:
    """Balanced factors of an approximation by randomised SVD of the product."""
    U, S, V = torch.svd_lowrank(B.float() @ A.float(), q=rank + 10, niter=2)
    root = S[:rank].sqrt()
    return (U[:, :rank] * root).to(B.dtype), (root[:, None] * V[:, :rank].mT).to(A.dtype)


def peft(B: Tensor, A: Tensor, rank: int) -> Callable[[], Factors]:
    """PEFT's conversion of a model with this one update, ready to run; the model is built here, outside the timing."""
    from peft import LoraConfig, convert_to_lora, get_peft_model

    base = torch.nn.Sequential(torch.nn.utils.skip_init(torch.nn.Linear, A.shape[1], B.shape[0], bias=False))
    model = get_peft_model(base, LoraConfig(r=B.shape[1], lora_alpha=B.shape[1], target_modules=["0"]))
    layer: Any = model.get_submodule("base_model.model.0")
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(A)
        layer.lora_B["default"].weight.copy_(B)

    def convert() -> Factors:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Converting a PEFT adapter to LoRA that is already a LoRA")
            _, tensors = convert_to_lora(model, rank=rank)
        new_A, new_B = tensors.values()
        return new_B, new_A

    return convert
