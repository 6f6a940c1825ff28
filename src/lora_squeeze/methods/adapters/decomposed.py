"""Updates between two frozen factors of W itself: what LoLDU, SVFit and LoRA-XS have in common.

    dW = B core A,  B (out, r) and A (r, in) from a decomposition of W, core diagonal or r x r

Only the core is trained and stored. B and A are computed again from the weight when an adapter is loaded, on the CPU
in float64, since directions with close singular values depend on the last bits. The weight must therefore be that of
the training: a fingerprint of it is stored, and another weight is refused, also the same one rounded to 16 bits.

A merge in float32 that was taken back leaves the last bits of the weight changed. Mostly its factors are the same to
more digits than count; where they are not, as of repeated singular values, a second fingerprint, of the factors, tells
it, and the adapter is refused. In 16 bits such a merge leaves another weight, and so it is while another adapter is
merged: make and load adapters of these methods before anything is merged into a base of 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.methods.adapters.engine import AdapterConfig, FactorDelta, Site
from lora_squeeze.methods.seeds import seeded

_FINGERPRINTS = ("fingerprint", "fingerprint_of_factors")
_UNIT = 2.0**-30  # of the numbers of a fingerprint
_PROBES = 4
_TOLERANCE = 1e-5  # share of |W|: rounding W to bfloat16 or float16 makes 1e-3 or 2e-4, two sums in float32 1e-7
_SAME_FACTORS = 1e-3  # share of an update that the same core makes of the factors


class OfWeightDelta(FactorDelta):
    """An update with frozen numbers that are computed from W, and again when the adapter is loaded.

    Buffers: `fingerprint` of W and `fingerprint_of_factors` of what was made of it, both stored. An adapter whose file
    has none is not checked.

    Attributes:
        diagonal_core: the core between the factors is diagonal.
    """

    diagonal_core = False
    fingerprint: Tensor
    fingerprint_of_factors: Tensor

    def check_when_loaded(self, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"]) -> None:
        """Refuse the adapter beside a weight that gives other factors than these."""
        self.register_buffer("fingerprint", fingerprint(self.site.base_weight()))
        self.register_buffer("fingerprint_of_factors", fingerprint_of_factors(B, A, self.diagonal_core))

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        """Look first; a file without fingerprints misses nothing."""
        self._before_loading(state_dict, prefix)
        parent: Any = super()
        parent._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *args)
        missing[:] = [key for key in missing if key.removeprefix(prefix) not in _FINGERPRINTS]

    def _before_loading(self, state_dict: Any, prefix: str) -> None:
        """Refuse numbers that were trained over another weight, or between other factors of it."""
        given = {name: state_dict.get(prefix + name) for name in _FINGERPRINTS if name in self._buffers}
        weight = given.get("fingerprint")
        if weight is None:
            return
        if not _same_weight(self.fingerprint, weight) and _same_weight(fingerprint(self.site.base_weight()), weight):
            self._make_anew()  # the weight has come with this very state
        for name, value in given.items():
            if value is not None:
                self._compare(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Loaders that put each tensor in its place by themselves are checked too."""
        if name in _FINGERPRINTS and name in self._buffers:
            self._compare(name, value)
        super().__setattr__(name, value)

    def _compare(self, name: str, given: Tensor) -> None:
        """Raise what there is to say about a fingerprint that is not our own."""
        if name == "fingerprint":
            if not _same_weight(self.fingerprint, given):
                raise LoraSqueezeError(
                    f"{self.site.name}: the adapter was trained over a weight with other numbers, of which its "
                    "directions are made; load the same base model in the same dtype, with nothing merged into it, nor "
                    "taken out again in 16 bits"
                )
            return
        far = (self.fingerprint_of_factors.cpu() - given.cpu()).abs().max() * _UNIT
        if far > _SAME_FACTORS:
            way_out = ", or train with store_factors=True" if hasattr(self.config, "store_factors") else ""
            raise LoraSqueezeError(
                f"{self.site.name}: the weight is that of the training but for its last bits, and just those decide "
                "about its factors, which are others now; load the base model anew, without a merge that was taken "
                f"back{way_out}"
            )

    def _make_anew(self) -> None:
        """Compute the frozen numbers of the weight as it is now."""
        with torch.random.fork_rng(devices=[]):  # what the twin's trained numbers begin with is of no use
            twin = type(self)(self.site, self.config)
        self.rank = twin.rank
        for name, buffer in twin.named_buffers():
            self._buffers[name] = buffer.to(getattr(self, name).device)
        for name, parameter in twin.named_parameters():
            own = self.get_parameter(name)
            own.data = own.data.new_empty(parameter.shape)


class DecomposedDelta(OfWeightDelta):
    """One layer; a method adds the trained numbers and says what the core is.

    Args:
        site, config: as for every delta.
        B, A: the frozen factors.
        stored: they are written to the file.
        checked: they are computed from W again when the adapter is loaded, so W must be the same.
    """

    rank: int
    B: Tensor
    A: Tensor

    def __init__(
        self, site: Site, config: AdapterConfig, B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], *,
        stored: bool = False, checked: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(site, config)
        self.rank = B.shape[1]
        self.register_buffer("B", B.float().contiguous(), persistent=stored)
        self.register_buffer("A", A.float().contiguous(), persistent=stored)
        if checked:
            self.check_when_loaded(B, A)

    def core(self) -> Tensor:
        """The scale included, (r, r), or (r) for a diagonal."""
        raise NotImplementedError

    def factors(self) -> tuple[Tensor, Tensor]:
        """B core (out, r), and A (r, in)."""
        core, B = self.core(), self.frozen("B")
        return B * core if core.dim() == 1 else B @ core, self.frozen("A")

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """B (core (A x)): autograd keeps r numbers per token."""
        core, inner = self.core(), functional.linear(x, self.frozen("A"))
        inner = inner * core if core.dim() == 1 else functional.linear(inner, core)
        return functional.linear(inner, self.frozen("B"))


def fingerprint(weight: Float[Tensor, "out in"]) -> Int[Tensor, " numbers"]:
    """|W| and the products of W with pairs of fixed random vectors, in units of 2^-30.

    A change E of the weight moves each product by about |E|, whatever it looks like.
    """
    W = weight.detach().to("cpu", torch.float64)
    u, v = (_normal(seeded(axis, "probe"), _PROBES, n) for axis, n in enumerate(W.shape))
    numbers = torch.cat([W.norm()[None], ((u @ W) * v).sum(1)])
    return (numbers / _UNIT).round().long()


def fingerprint_of_factors(
    B: Float[Tensor, "out r"], A: Float[Tensor, "r in"], diagonal: bool
) -> Int[Tensor, " numbers"]:  # fmt: skip
    """The products of B core A with the same vectors, as shares of its size, in units of 2^-30; core is random.

    Signs that two factors change together are seen through where the core is diagonal, since they cancel there.
    """
    B, A = B.detach().to("cpu", torch.float64), A.detach().to("cpu", torch.float64)
    r = B.shape[1]
    u, v = (_normal(seeded(axis, "probe"), _PROBES, n) for axis, n in enumerate((len(B), A.shape[1])))
    core = _normal(seeded(0, "core"), *((r,) if diagonal else (r, r)))
    mixed = (u @ B) * core if diagonal else (u @ B) @ core
    size = (B.norm(dim=0) * A.norm(dim=1)).norm() if diagonal else B.norm() * A.norm()
    shares: Tensor = (mixed * (v @ A.T)).sum(1) / size.clamp(min=1e-300)
    return (shares / _UNIT).round().long()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    numbers: Tensor = torch.randn(shape, dtype=torch.float64, device="cpu", generator=generator)
    return numbers


def _same_weight(one: Tensor, other: Tensor) -> bool:
    one, other = one.cpu(), other.cpu()
    return bool((one - other).abs().max() <= _TOLERANCE * one[0] + 1)


def exact_svd(weight: Float[Tensor, "out in"]) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, q), S (q), Vh (q, in) in float64, where the largest entry of each column of U is positive.

    Notes:
        With the sign set, whoever computes it gets the same vectors; but for equal singular values, of which only the
        space that they span is determined.
    """
    U, S, Vh = torch.linalg.svd(weight.detach().to("cpu", torch.float64), full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return U * sign, S, Vh * sign.T
