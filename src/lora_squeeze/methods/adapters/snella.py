"""SNELLA: a sparse update of high rank from two small factors and a kernel (arXiv 2510.24037), and SNELL (2411.01800).

    K_ij = 0.1 (|u_1i - v_1j| - |u_2i - v_2j|)                     SNELL (NeurIPS 2024): D = K
    D = K + a softmax_j(K_i. / g) + c                              SNELLA
    dW = (D n(D))^T,   n(D) = |D| where it is among the largest of the layer, 0 elsewhere

u_h (in, r / 2) and v_h (out, r / 2) with h = 1, 2 are trained, as many numbers as in a LoRA of rank r; in SNELLA the
scalars a = 1, g = 1 and c = 0 besides. D (in, out) is made anew in every forward and backward pass: neither it nor a
mask is ever kept. The softmax is over the outputs j. n(D) has no gradient: what is left out stays as it is in this
step, and may be among the largest in the next.

How many entries remain is a number of each layer, stored with it: `sparsity` at the start, and with a
`final_sparsity` what the method's controller gives the layer while training, see `snella_budget`.

The authors' code keeps D |D|, their equation D max(|D| - t, 0) with t the largest |D| left out, 0 where none is. The
code made their figures and is the default. t is taken by count here and not as a quantile: so the entries that remain
are exactly as many as they should be, and all of them at sparsity 0, where the code loses the smallest.

u and v begin uniform in +-1 / sqrt(width r / 2), so dW begins near 0 and not at it: at most 1e-4 for each weight of a
layer of width 384. The scalars begin as above, so with `init_weights=False` nothing is different.

As a plain LoRA: only squeezed, dW has any rank. Merging is exact, and so is `get_delta_weight().to_sparse()`. Not
where steps must be fast, since D costs a pass over all weights twice in each, nor where a LoRA is what is served.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lora_squeeze.methods.adapters.engine import AdapterConfig, Delta, Site, register

_HEADS = 2  # distances, of which the kernel is the difference
_WEIGHT = 0.1  # of a distance in the kernel


@dataclass
class SnellaConfig(AdapterConfig):
    """Configuration of SNELLA and SNELL.

    Args:
        r: numbers per input and output, an even number. Default 32; the authors use 8, 16 and 32. It bounds no rank.
        alpha: there is no scale; leave it at None.
        dropout: share of the samples (the first dimension of the input) whose update is left out while training, the
            others count for more. Default 0; the authors have 0.1 for vision transformers.
        kernel: "snella", or "snell" without the softmax and its scalars.
        sparsity: share of the entries of dW that are zero. Default 0; the authors begin at 0 or 0.01 where it rises.
            With "snell", where it stays, 0.9 is usual.
        final_sparsity: share of the entries of all updates together that are zero in the last round of the training, to
            which the controller goes up; 0.2 to 0.8 is usual. Default None: each layer keeps its `sparsity`.
        rounds: parts of the training, after each of which the entries are divided anew. Default 10; the authors have
            one for each epoch.
        warmup: rounds after the first with the budget of the start. Default 0.
        cooldown: rounds before the last with the budget of the end. Default 0.
        shrink: what remains of an entry, "code" D |D| or "paper" D max(|D| - t, 0). The updates of the two differ in
            size, so the learning rates do.
    """

    r: int = 32
    kernel: str = "snella"
    sparsity: float = 0.0
    final_sparsity: float | None = None
    rounds: int = 10
    warmup: int = 0
    cooldown: int = 0
    shrink: str = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("kernel", ("snella", "snell")), ("shrink", ("code", "paper"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.r % _HEADS:
            raise ValueError(f"r must be even, since each of the two distances has half of it, got {self.r}")
        if self.alpha is not None:
            raise ValueError(f"SNELLA has no scale, so alpha must be None, got {self.alpha}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")
        if self.final_sparsity is not None and not self.sparsity <= self.final_sparsity < 1:
            raise ValueError(f"final_sparsity must be from sparsity to below 1, got {self.final_sparsity}")
        if self.rounds < 1 or self.warmup < 0 or self.cooldown < 0:
            raise ValueError(
                f"rounds must be 1 or more, warmup and cooldown 0 or more, got {self.rounds}, {self.warmup} and "
                f"{self.cooldown}"
            )


class SnellaDelta(Delta):
    """One layer; trained: u (2, in, r / 2), v (2, out, r / 2), and a, g, c of the kernel "snella".

    Attributes:
        kept: how many entries of dW are not zero.
    """

    u: nn.Parameter
    v: nn.Parameter
    a: nn.Parameter
    g: nn.Parameter
    c: nn.Parameter
    kept: Tensor

    def __init__(self, site: Site, config: SnellaConfig) -> None:
        super().__init__(site, config)
        if config.dropout:
            self.dropout = _DropSamples(config.dropout)
        for name, width in (("u", site.in_features), ("v", site.out_features)):
            shape = (_HEADS, width, config.r // _HEADS)
            drawn = torch.rand(shape) * 2 - 1
            setattr(self, name, nn.Parameter(drawn / math.sqrt(math.prod(shape[1:]))))
        if config.kernel == "snella":
            for name, start in (("a", 1.0), ("g", 1.0), ("c", 0.0)):
                setattr(self, name, nn.Parameter(torch.full((1,), start)))
        self.register_buffer("kept", torch.tensor(self.first_kept))

    @property
    def entries(self) -> int:
        """Of dW."""
        return self.site.in_features * self.site.out_features

    @property
    def first_kept(self) -> int:
        """How many entries are not zero before any budget changes it."""
        zeros: int = round(self.config.sparsity * self.entries)
        return self.entries - zeros

    def kernel(self) -> Float[Tensor, "out in"]:
        """D^T, with all of its entries; in float32 at least, since distances in half precision are no numbers."""
        u, v = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in (self.u, self.v))
        distances = torch.cdist(v, u)
        K: Tensor = _WEIGHT * (distances[0] - distances[1])
        if self.config.kernel == "snell":
            return K
        return K + self.a * (K / self.g).softmax(0) + self.c

    def weight(self) -> Float[Tensor, "out in"]:
        """The entries that remain, zero elsewhere."""
        return self._cut({})

    def _cut(self, known: dict[str, Tensor]) -> Tensor:
        """The same; the threshold is found once, since to select it costs more than all else."""
        D = self.kernel()
        with torch.no_grad():
            factor = size = D.abs()
            dropped = self.entries - int(self.kept)
            if dropped:
                if not known:
                    known["threshold"] = size.flatten().kthvalue(dropped).values  # the largest that is dropped
                t = known["threshold"]
                factor = (size - t).relu() if self.config.shrink == "paper" else torch.where(size > t, size, 0)
        return (D * factor).to(self.dtype)

    def forward(self, x: Tensor, base_output: Tensor) -> Tensor:
        """dW x, with nothing of the size of dW kept for the backward pass, which makes it again."""
        known: dict[str, Tensor] = {}
        output: Tensor = checkpoint(
            lambda seen: functional.linear(seen, self._cut(known)), x, use_reentrant=False, preserve_rng_state=False
        )
        return output


class _DropSamples(nn.Module):
    """DropPath: some samples as zeros while training, the others larger for it."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        one_each = [len(x), *[1] * (x.dim() - 1)] if x.dim() > 1 else [1]
        stays = torch.rand(one_each, device=x.device) >= self.share
        return x * (stays / (1 - self.share)).to(x.dtype)


register("snella", SnellaConfig, SnellaDelta)
