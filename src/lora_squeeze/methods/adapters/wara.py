"""WaRA: one low-rank map on every wavelet band of the features (arXiv 2506.24092, 2025).

    dW = s sum over bands b of L_b(out)^T M L_b(in),  M = B A,  s = alpha / r

L_b(d) (d / n, d) are the n = 2^levels bands of an orthonormal wavelet packet transform of d features with periodic
extension; A (r, in / n) and B (out / n, r) are trained, r (in + out) / n numbers: at one level half of those of a LoRA.
A is drawn as LoRA's and B begins at 0. A number of features that n does not divide is filled up with zeros, which are
cut off again.

The paper transforms tokens too. Since that transform is orthonormal and the map is the same on all of its bands, it
cancels, so it is left out here: dW is static, and no token sees another. With the Haar wavelet and one map for all
bands the transform of the features cancels as well: dW = s kron(M, I_n) exactly, and a layer multiplies by M alone.

We know the paper's abstracts and a figure: the start, the scale, the wavelet, and "separate" are our reading; "tiny" is
our reading of its Tiny-WaRA, M = U diag(c) V^T with U and V from the SVD of sum over b of L_b(out) W L_b(in)^T / n.

As a plain LoRA: exact at rank n r, n^2 r with separate maps. Where n divides both widths, singular values of one map
on all bands come in groups of n equal ones, so a squeeze to a multiple of n cuts none apart. Not where neighbouring
features have nothing in common, as in most language models: a shuffle of the features before and after, with equal
scores, shows it. At equal r it has half the numbers of a LoRA; compare at twice the r.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lora_squeeze.methods.adapters.decomposed import OfWeightDelta, exact_svd
from lora_squeeze.methods.adapters.engine import AdapterConfig, Site, register

_BANDS = ("shared", "separate")
_HIGHEST = 10  # of Daubechies' wavelets: beyond it the roots of the filter lose their digits


@dataclass
class WaraConfig(AdapterConfig):
    """Configuration of WaRA.

    Args:
        r: rank of one map; the update's is n = 2^levels times that, with "separate" n^2 times.
        alpha: the scale is alpha / r; default r.
        wavelet: "haar", or Daubechies' "db1" (the same) to "db10", whose filters are 2 to 20 long.
        levels: each halves the trained numbers and doubles the rank; with "separate" it doubles the numbers and
            quadruples the rank.
        bands: "shared", one map for all bands; "separate", one for each pair of an output and an input band, n^2 times
            the numbers.
        tiny: train r numbers alone, between singular vectors of W's bands. They are computed again when the adapter is
            loaded, and another W is refused, as `decomposed` says of its methods.
    """

    wavelet: str = "haar"
    levels: int = 1
    bands: str = "shared"
    tiny: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        scaling_filter(self.wavelet)
        if self.levels < 1:
            raise ValueError(f"levels must be a whole number from 1, got {self.levels}")
        if self.bands not in _BANDS:
            raise ValueError(f"bands must be one of {', '.join(_BANDS)}, got {self.bands!r}")
        if self.tiny and self.bands != "shared":
            raise ValueError("tiny has one map for all bands: leave bands at 'shared'")


class WaraDelta(OfWeightDelta):
    """One layer; trained: A (maps, r, in / n) and B (maps, out / n, r), or c (r) if tiny."""

    diagonal_core = True

    def __init__(self, site: Site, config: WaraConfig) -> None:
        super().__init__(site, config)
        self.bands = 2**config.levels
        self.filter = scaling_filter(config.wavelet)
        shared = config.bands == "shared"
        if shared and len(self.filter) == 2:
            self.filter = (1.0, 0.0)  # Haar cancels: the bands may as well be every n-th feature
        every = range(self.bands)
        # Of each map the output and the input band.
        self.pairs = [(b, b) for b in every] if shared else list(itertools.product(every, every))
        self.rank = min(len(self.pairs) * config.r, site.in_features, site.out_features)
        self.scale = (config.r if config.alpha is None else config.alpha) / config.r
        if config.tiny:
            self._make_tiny()
        else:
            self._make_maps(1 if shared else len(self.pairs))

    def _make_maps(self, maps: int) -> None:
        site, config = self.site, self.config
        rows, columns = (math.ceil(d / self.bands) for d in (site.out_features, site.in_features))
        bound = 1 / math.sqrt(columns)
        self.A = nn.Parameter((torch.rand(maps, config.r, columns) * 2 - 1) * bound)
        B = torch.zeros(maps, rows, config.r)
        self.B = nn.Parameter(B if config.init_weights else torch.randn(B.shape))

    def _make_tiny(self) -> None:
        weight = self.site.base_weight().detach().to("cpu", torch.float64)
        of_in = bands_of(weight, self.filter, self.config.levels)  # (out, n, in / n)
        both = bands_of(of_in.permute(1, 2, 0), self.filter, self.config.levels)  # (n, in / n, n, out / n)
        mean = torch.einsum("bibo->oi", both)  # times n, which its singular vectors do not see
        U, S, Vh = exact_svd(mean)
        if len(S) < self.config.r:
            raise ValueError(
                f"{self.site.name}: r is {self.config.r}, and the bands of the weight are {tuple(mean.shape)}; lower "
                "r or leave the layer out of target_modules"
            )
        start = torch.zeros if self.config.init_weights else torch.randn
        self.c = nn.Parameter(start(self.config.r))
        U, Vh = U[:, : self.config.r].float(), Vh[: self.config.r].float()
        self.register_buffer("U", U.contiguous(), persistent=False)
        self.register_buffer("Vh", Vh.contiguous(), persistent=False)
        self.check_when_loaded(U, Vh)

    def maps(self) -> tuple[Tensor, Tensor]:
        """B (maps, out / n, r) with the scale in it, and A (maps, r, in / n)."""
        if self.config.tiny:
            return self.scale * (self.frozen("U") * self.c)[None], self.frozen("Vh")[None]
        return self.scale * self.B, self.A

    def factors(self) -> tuple[Tensor, Tensor]:
        """B (out, rank) with the scale in it, and A (rank, in)."""
        B, A = self.maps()
        out_bands, in_bands = zip(*self.pairs, strict=True)
        tall = self._placed(B.mT, out_bands, self.site.out_features)
        return tall.T, self._placed(A, in_bands, self.site.in_features)

    def _placed(self, rows: Tensor, bands: Sequence[int], features: int) -> Tensor:
        """Rows (maps, r, d / n), each in its band and zero in the others, as features (rank, d)."""
        where = torch.eye(self.bands, dtype=rows.dtype, device=rows.device)[list(bands)]
        inside = torch.einsum("pb,prk->prbk", where, rows.expand(len(bands), -1, -1))
        return from_bands(inside, self.filter, self.config.levels)[..., :features].flatten(0, 1)

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """dW x; one map for all bands is multiplied once, on the bands."""
        if self.config.bands != "shared":
            return super().forward(x, base_output)
        B, A = self.maps()
        bands = bands_of(x, self.filter, self.config.levels)
        mapped = functional.linear(functional.linear(bands, A[0]), B[0])
        return from_bands(mapped, self.filter, self.config.levels)[..., : self.site.out_features]


def scaling_filter(wavelet: str) -> tuple[float, ...]:
    """The low-pass filter of an orthonormal wavelet, by factoring the polynomial of Daubechies (1988).

    Args:
        wavelet: "haar", or "dbN" with N vanishing moments, which has 2 N numbers.

    Returns:
        The filter, its sum the root of 2.

    Raises:
        ValueError: no such wavelet.
    """
    found = re.fullmatch(r"db([1-9]\d?)", "db1" if wavelet == "haar" else wavelet)
    order = int(found[1]) if found else 0
    if not 1 <= order <= _HIGHEST:
        raise ValueError(f"wavelet must be haar or db1 to db{_HIGHEST}, got {wavelet!r}")
    # P(y) = sum_k C(N - 1 + k, k) y^k with y = (2 - z - 1 / z) / 4; of each pair z, 1 / z the one within the circle.
    of_y = np.roots([math.comb(order - 1 + k, k) for k in reversed(range(order))])
    of_z = [min(np.roots([1, 4 * y - 2, 1]), key=abs) for y in of_y]
    taps = np.real(np.poly([-1.0] * order + of_z))
    return tuple((taps * math.sqrt(2) / taps.sum()).tolist())


def bands_of(x: Float[Tensor, "*batch d"], low: Sequence[float], levels: int) -> Float[Tensor, "*batch bands part"]:
    """The wavelet packet transform of the last axis, periodic, filled up with zeros to whole bands.

    Args:
        x: features.
        low: an orthonormal low-pass filter of even length.
        levels: 2^levels bands come out, each of ceil(d / 2^levels) numbers.
    """
    bands = 2**levels
    missing = -x.shape[-1] % bands
    found = (functional.pad(x, (0, missing)) if missing else x)[..., None, :]
    for _ in range(levels):
        halves = []
        for taps in (low, _high(low)):
            rolled = [tap * found.roll(-place, -1)[..., ::2] for place, tap in enumerate(taps) if tap]
            halves.append(torch.stack(rolled).sum(0))
        found = torch.stack(halves, -2).flatten(-3, -2)  # each band's two beside each other
    return found


def from_bands(bands: Float[Tensor, "*batch bands part"], low: Sequence[float], levels: int) -> Tensor:
    """What `bands_of` was given, the zeros at its end included: the transposed transform."""
    found = bands
    for _ in range(levels):
        pairs = found.unflatten(-2, (-1, 2))
        whole = []
        for parity in (0, 1):  # of the place among the features
            parts = [
                tap * pairs[..., half, :].roll(place // 2, -1)
                for half, taps in enumerate((low, _high(low)))
                for place, tap in enumerate(taps)
                if tap and place % 2 == parity
            ]
            whole.append(torch.stack(parts).sum(0))
        found = torch.stack(whole, -1).flatten(-2)
    return found[..., 0, :]


def _high(low: Sequence[float]) -> list[float]:
    """The high-pass filter that makes an orthonormal pair."""
    return [(-1) ** place * tap for place, tap in enumerate(reversed(low))]


register("wara", WaraConfig, WaraDelta)
