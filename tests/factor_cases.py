"""What the tests of the maths share: factors with a known spectrum, and the dense float64 reference."""

from dataclasses import dataclass

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from lora_squeeze.lowrank import LowRank

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
ABSOLUTE = 1e-14  # what float64 leaves of a product of factors whose largest entries are 1
EXACT = ("gram", "qr", "dense")
SPECTRA = ("flat", "decaying", "steps", "duplicates", "zero")


def spectrum(kind: str, n: int) -> Tensor:
    """n singular values in descending order, the largest 1."""
    if kind == "decaying":  # from 1 down to 1e-6
        return torch.logspace(0, -6, n, dtype=torch.float64)
    if kind == "steps":  # pairs of equal values
        return 2.0 ** -(torch.arange(n, dtype=torch.float64) // 2)
    return torch.ones(n, dtype=torch.float64)


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=generator, dtype=torch.float64)).Q


def factors(
    out: int, inp: int, r: int, kind: str = "decaying", *, condition: float = 3.0, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Float64 factors whose product has the spectrum `kind`, mixed by a matrix of this condition number."""
    g = torch.Generator().manual_seed(seed)
    n = min(out, inp, r)
    root = spectrum(kind, n).sqrt()
    mix = orthonormal(n, n, g) * torch.logspace(0, -torch.tensor(condition).log10(), n, dtype=torch.float64)
    mix = mix @ orthonormal(r, n, g).T
    B = orthonormal(out, n, g) * root @ mix
    A = torch.linalg.pinv(mix) @ (root[:, None] * orthonormal(inp, n, g).T)
    if kind == "duplicates":  # exactly rank-deficient in every dtype
        B = B[:, torch.arange(r) // 2]
    return (torch.zeros_like(B) if kind == "zero" else B), A


def update(out: int, inp: int, r: int, kind: str = "decaying", *, scale: float = 1.0, seed: int = 0) -> LowRank:
    """A float64 update."""
    return LowRank(*factors(out, inp, r, kind, seed=seed), scale)


@dataclass(frozen=True)
class Reference:
    """The dense float64 SVD of an update divided by `unit`, which keeps all numbers in range."""

    dense: Tensor
    U: Tensor
    S: Tensor
    Vh: Tensor
    unit: float

    @classmethod
    def of(cls, update: LowRank) -> "Reference":
        b, a = (float(t.double().abs().max()) or 1.0 for t in (update.B, update.A))
        dense = (update.B.double() / b) @ (update.A.double() / a)
        sign = -1.0 if update.scale < 0 else 1.0
        return cls(dense * sign, *torch.linalg.svd(dense * sign, full_matrices=False), abs(update.scale) * b * a or 1.0)

    def tail(self, rank: int) -> Tensor:
        """Frobenius norm of the singular values after the first `rank`, per batch item."""
        return self.S[..., rank:].square().sum(-1).sqrt()

    def error(self, other: LowRank) -> Tensor:
        """Frobenius norm of the difference to another update, per batch item, divided by `unit`."""
        B, A = other.B.double(), other.A.double()
        return ((B * (other.scale / self.unit)) @ A - self.dense).square().sum((-2, -1)).sqrt()


def small_magnitude(dtype: torch.dtype) -> tuple[float, float]:
    """Smallest and largest factor magnitude that is tried in a dtype."""
    return {torch.float64: (1e-150, 1e150), torch.float16: (1e-2, 1e2)}.get(dtype, (1e-30, 1e30))


@st.composite
def updates(draw: st.DrawFn) -> LowRank:
    """Updates of every shape, dtype, scale, spectrum and magnitude."""
    out, inp, r = (draw(st.integers(1, 24)) for _ in range(3))
    batch = draw(st.sampled_from([(), (), (3,), (2, 2)]))
    kind = draw(st.sampled_from(SPECTRA))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
    low, high = small_magnitude(dtype)
    moderate = [(1, 1, scale) for scale in (1.0, -2.0, 0.0, 1e-20, 1e20, -1e-3)]
    extreme = [(low, low, 0.5), (high, high, -0.5), (low, high, 2.0), (high, low, 1.0)]
    b, a, scale = draw(st.sampled_from([*moderate, *extreme]))
    condition = draw(st.sampled_from([1.0, 10.0, 1e4, 1e8] if dtype == torch.float64 else [1.0, 10.0]))
    count = torch.Size(batch).numel()
    pairs = [factors(out, inp, r, kind, condition=condition, seed=draw(st.integers(0, 99))) for _ in range(count)]
    B = torch.stack([pair[0] for pair in pairs]).reshape(*batch, out, r)
    A = torch.stack([pair[1] for pair in pairs]).reshape(*batch, r, inp)
    return LowRank((B * b).to(dtype), (A * a).to(dtype), scale)
