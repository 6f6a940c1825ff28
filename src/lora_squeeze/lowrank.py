"""LowRank: an update of a weight matrix, kept as its two factors.

    dW = scale * B @ A        B (*batch, out, r)    A (*batch, r, in)    dW (*batch, out, in)

Leading dimensions are independent updates of one shape and one rank: the experts of a mixture, or same-shape modules
stacked for speed. Nothing here forms dW, except `dense()`, which says so.

How a layer becomes such a matrix (the formats do this on reading and undo it on writing):

=====================  ==============================  ===============================================================
layer                  B, A                            dW
=====================  ==============================  ===============================================================
Linear                 (out, r), (r, in)               as the weight
Conv1D, fan_in_fan_out (out, r), (r, in)               transposed weight: the weight is (in, out)
Conv1d, 2d, 3d         (out, r), (r, in * kernel)      weight.flatten(1)
Embedding              (dim, r), (r, vocabulary)       transposed weight: the weight is (vocabulary, dim)
stacked experts        (E, out, r), (E, r, in)         one matrix per expert
=====================  ==============================  ===============================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from lora_squeeze.decompose import Decomposition, Method, decompose
from lora_squeeze.errors import LoraSqueezeError


@dataclass(frozen=True, eq=False)
class LowRank:
    """An update scale * B @ A.

    Args:
        B: (*batch, out, r), any float dtype.
        A: (*batch, r, in), same batch, dtype and device.
        scale: factor in front, a finite number.

    Raises:
        LoraSqueezeError: the two factors do not fit together, or the scale is not finite.

    Example:
        >>> update = LowRank(torch.eye(4, 2), torch.eye(2, 3), scale=2.0)
        >>> update.rank, update.shape, update.singular_values().tolist()
        (2, (4, 3), [2.0, 2.0])
    """

    B: Float[Tensor, "*batch out r"]
    A: Float[Tensor, "*batch r in"]
    scale: float = 1.0

    def __post_init__(self) -> None:
        b, a = tuple(self.B.shape), tuple(self.A.shape)
        if len(b) < 2 or len(a) < 2 or b[-1] != a[-2] or b[:-2] != a[:-2]:
            raise LoraSqueezeError(f"factors do not fit: B is {b}, A is {a}; expected (..., out, r) and (..., r, in)")
        if not self.B.is_floating_point() or self.B.dtype != self.A.dtype or self.B.device != self.A.device:
            raise LoraSqueezeError(
                f"factors must share one float dtype and one device: B is {self.B.dtype} on {self.B.device}, "
                f"A is {self.A.dtype} on {self.A.device}"
            )
        if min(*b, *a) < 1:
            raise LoraSqueezeError(f"a factor is empty: B is {b}, A is {a}")
        if not math.isfinite(self.scale):
            raise LoraSqueezeError(f"scale must be a finite number, got {self.scale}")

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound of the rank of dW."""
        return self.B.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of dW: (*batch, out, in)."""
        return (*self.B.shape[:-1], self.A.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the factors."""
        return self.B.dtype

    @property
    def device(self) -> torch.device:
        """Device of the factors."""
        return self.B.device

    def to(self, target: torch.device | torch.dtype | str) -> LowRank:
        """The same update with both factors moved to a device or cast to a dtype."""
        if isinstance(target, torch.dtype):
            return replace(self, B=self.B.to(target), A=self.A.to(target))
        return replace(self, B=self.B.to(target), A=self.A.to(target))

    def dense(self) -> Float[Tensor, "*batch out in"]:
        """dW as a matrix, in float32 (float64 for float64 factors). Costs out * in memory: for small layers."""
        inner = torch.float64 if self.dtype == torch.float64 else torch.float32
        return (self.B.to(inner) @ self.A.to(inner)) * self.scale

    def decompose(self, method: Method = "gram", *, rank: int | None = None, seed: int = 0) -> Decomposition:
        """Singular value decomposition, see `lora_squeeze.decompose.decompose`."""
        return decompose(self.B, self.A, self.scale, method, rank=rank, seed=seed)

    def singular_values(self, method: Method = "gram") -> Float[Tensor, "*batch n"]:
        """Singular values of dW in descending order, float64, n = min(r, out, in)."""
        return self.decompose(method).S

    def truncate(
        self,
        rank: int,
        method: Method = "gram",
        *,
        scale: float | None = None,
        dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> LowRank:
        """The best approximation of at most this rank in the Frobenius norm, as balanced factors.

        dW_k = sum_{i<=k} S_i u_i v_i^T, B' = U_k (S_k/s)^1/2, A' = (S_k/s)^1/2 V_k^T, so that s B' A' = dW_k and
        B'^T B' = A' A'^T = diag(S_k)/s. The error |dW - dW_k| is the root of the sum of the discarded S_i^2.

        Args:
            rank: k >= 1. At or above the rank that the factors have, the update comes back unchanged.
            method: see `lora_squeeze.decompose`; "gram" is exact and the fastest.
            scale: s of the result, > 0; default this update's own scale (1 if that is not positive).
            dtype: dtype of the result; default this update's.
            seed: seed of the sketch of "rsvd".

        Returns:
            LowRank of rank k; of min(out, in) where k is more than that.
        """
        if rank < 1:
            raise LoraSqueezeError(f"rank must be at least 1, got {rank}")
        scale, dtype = self._scale_after(scale), dtype or self.dtype
        if rank >= self.rank:
            return self.with_scale(scale, dtype)
        rank = min(rank, *self.shape[-2:])
        return LowRank(*self.decompose(method, rank=rank, seed=seed).factors(rank, scale, dtype), scale).to(self.device)

    def with_scale(self, scale: float, dtype: torch.dtype | None = None) -> LowRank:
        """The same update written with another scale s' > 0, B' = B * scale / s', and in another dtype if one is given.

        What does not change comes back as it is; B is rounded once. Where that would make numbers of float16 too small
        to keep their digits, a power of two goes from A to B.
        """
        dtype = dtype or self.dtype
        if scale == self.scale:
            return self if dtype == self.dtype else self.to(dtype)
        if not (math.isfinite(scale) and scale > 0):
            raise LoraSqueezeError(f"scale must be a positive number, got {scale}")
        inner = torch.float64 if self.dtype == torch.float64 else torch.float32
        B, A = self.B.to(inner) * (self.scale / scale), self.A
        if dtype == torch.float16 and abs(self.scale) < scale / 8:
            power = _power(A, B)
            B, A = B * power, A.to(inner) / power
        return LowRank(B.to(dtype), A.to(dtype), scale)

    def rank_up(self, rank: int, seed: int = 0) -> LowRank:
        """The same update with room to learn: new columns of B are zero, new rows of A are Kaiming-uniform as in LoRA.

        Args:
            rank: new rank, at or above the present one.
            seed: seed of the new rows; the global generator is not touched.
        """
        extra = rank - self.rank
        if extra < 0:
            raise LoraSqueezeError(f"rank_up to {rank}: the update already has rank {self.rank}; use truncate")
        rows = torch.rand((*self.A.shape[:-2], extra, self.A.shape[-1]), generator=torch.Generator().manual_seed(seed))
        rows = (2 * rows - 1) / math.sqrt(self.A.shape[-1])
        return replace(
            self,
            B=torch.cat([self.B, self.B.new_zeros((*self.B.shape[:-1], extra))], -1),
            A=torch.cat([self.A, rows.to(self.A)], -2),
        )

    def norm(self) -> Float[Tensor, "*batch"]:
        """Frobenius norm of dW, float64: the root of the sum of S_i^2."""
        S = self.singular_values("qr")
        largest = torch.where(S[..., :1] > 0, S[..., :1], 1.0)  # squares of very large or small ones leave float64
        norm: Tensor = largest[..., 0] * torch.linalg.vector_norm(S / largest, dim=-1)
        return norm

    def distance(self, other: LowRank) -> Float[Tensor, "*batch"]:
        """Frobenius norm of the difference of two updates, exact to about 1e-15 of the larger one."""
        return (self.to(torch.float64) - other.to(torch.float64)).norm()

    def __add__(self, other: LowRank) -> LowRank:
        """The sum: factors side by side, rank r1 + r2. Exact; where the scales differ, up to the rounding of B."""
        if self.shape != other.shape:
            raise LoraSqueezeError(f"updates of different shapes cannot be added: {self.shape} and {other.shape}")
        scale = self.scale or 1.0
        dtype = torch.promote_types(self.dtype, other.dtype)
        mine, theirs = self.B.to(dtype) * (self.scale / scale), other.B.to(dtype) * (other.scale / scale)
        return LowRank(torch.cat([mine, theirs], -1), torch.cat([self.A.to(dtype), other.A.to(dtype)], -2), scale)

    def __neg__(self) -> LowRank:
        return replace(self, scale=-self.scale)

    def __sub__(self, other: LowRank) -> LowRank:
        """The difference, as the sum: rank r1 + r2."""
        return self + (-other)

    def __mul__(self, factor: float) -> LowRank:
        return replace(self, scale=self.scale * factor)

    __rmul__ = __mul__

    def _scale_after(self, scale: float | None) -> float:
        if scale is None:
            return self.scale if self.scale > 0 else 1.0
        if not (math.isfinite(scale) and scale > 0):
            raise LoraSqueezeError(f"scale must be a positive number, got {scale}")
        return scale


def _power(large: Tensor, small: Tensor) -> float:
    """The power of two that brings the largest numbers of two tensors together; 1 where they are not as expected."""
    ratio = float(large.abs().amax().double() / small.abs().amax().double())
    return 2.0 ** round(math.log2(ratio) / 2) if 1 < ratio < math.inf else 1.0
