"""Methods whose update the file alone tells, as plain factors: exact identities, computed from one module's tensors.

=========  ====================================================================================  ==================
method     B, A                                                                                  rank
=========  ====================================================================================  ==================
AdaLoRA    B; diag(E) A                                                                          r
LoHa       products of columns and of rows, see `lora_squeeze.formats.lycoris`                   r^2
LoKr       kron(B1, B2); kron(A1, A2), see there                                                 rank(W1) rank(W2)
VB-LoRA    both put together from the k vectors of the bank with the largest logits              r
Uni-LoRA   both picked from the one vector                                                       r
DeLoRA     B; the rows of A divided by their lengths and those of B's columns, times |w_j|       r
GraLoRA    k blocks of rows, each with its own r columns in B; the blocks of A side by side      k r + hybrid_r
C3A        the matrix of circulants; an identity                                                 min(out, in)
=========  ====================================================================================  ==================

Where a rank is above the smaller side of the matrix, the matrix is formed and taken with an identity.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import lycoris
from lora_squeeze.formats.lycoris import Facts
from lora_squeeze.formats.peft_config import pattern_value
from lora_squeeze.formats.peft_keys import PREFIX
from lora_squeeze.formats.peft_methods.table import Row
from lora_squeeze.formats.safetensors_header import quoted

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]  # by role
Tensors = Mapping[str, Tensor]  # by role
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Identity:
    """How one method's tensors make an update.

    Args:
        roles: sets of the last parts of keys that make a module; the shared ones among them.
        facts: rank and sizes by the shapes; fails with IndexError or ValueError where these do not fit.
        factors: B and A, without scale, in the dtype of the tensors.
        shared: those that stand once in the file, for all modules.
    """

    roles: tuple[frozenset[str], ...]
    facts: Callable[[Shapes, Config], Facts | None]
    factors: Callable[[Tensors, Config, str], Pair]
    shared: str = ""


@dataclass(frozen=True)
class Found:
    """One module of the file: rank and sizes, and its keys by role."""

    facts: Facts
    keys: Mapping[str, str]


def find(shapes: Mapping[str, tuple[int, ...]], config: Config, row: Row) -> dict[str, Found]:
    """The modules of a file, by name.

    Args:
        shapes: of the tensors, by key.
        config: adapter_config.json.
        row: the method, one of IDENTITIES.

    Raises:
        LoraSqueezeError: a tensor is missing, or the shapes do not fit together.
    """
    identity = IDENTITIES[row.peft_type]
    role = re.compile(rf"^(?P<path>.+?)\.(?P<role>(?:{'|'.join(row.prefixes)})\w+)(?:\.weight)?$")
    parts: dict[str, dict[str, str]] = defaultdict(dict)
    shared: dict[str, str] = {}
    for key in shapes:
        if match := role.match(key):
            into = shared if match["role"] == identity.shared else parts[match["path"].removeprefix(PREFIX)]
            into[match["role"]] = key
    found = {}
    for name, keys in parts.items():
        keys = {**keys, **shared}
        if frozenset(keys) not in identity.roles:
            raise LoraSqueezeError(
                f"the tensors of {quoted(name)} are {', '.join(sorted(keys))}; those of a {row.name} would be "
                f"{', '.join(sorted(identity.roles[0]))}; the file is incomplete: get it again"
            )
        try:
            facts = identity.facts({part: shapes[key] for part, key in keys.items()}, config)
        except (IndexError, ValueError, ZeroDivisionError):
            facts = None
        if facts is None or min(facts.rank, facts.out_features, facts.in_features) < 1:
            listed = ", ".join(f"{quoted(key)} is {list(shapes[key])}" for key in keys.values())
            raise LoraSqueezeError(f"tensors of {quoted(name)} do not fit as those of a {row.name}: {listed}")
        found[name] = Found(facts, keys)
    if not found:
        raise LoraSqueezeError(f"no tensors of {row.name} among {len(shapes)}; the file is incomplete: get it again")
    return found


def factors(row: Row, tensors: Tensors, config: Config, name: str) -> Pair:
    """B and A of one module, their product the whole update, of the rank that `find` gives.

    Args:
        row: the method.
        tensors: role -> tensor, floats in the dtype to compute in.
        config: adapter_config.json.
        name: of the module.
    """
    B, A = IDENTITIES[row.peft_type].factors(tensors, config, name)
    return full(B @ A) if B.shape[1] > min(len(B), A.shape[1]) else (B, A)


def full(matrix: Tensor) -> Pair:
    """A matrix and an identity."""
    return lycoris.factors(lycoris.FULL, {"diff": matrix})


def _plain(rank: int, out: int, columns: int) -> Facts:
    return Facts(min(rank, out, columns), (), out, columns)


def _adalora(shapes: Shapes, config: Config) -> Facts | None:
    A, B, E = shapes["lora_A"], shapes["lora_B"], shapes["lora_E"]
    return _plain(A[0], B[0], A[1]) if (A[0], 1) == E == (B[1], 1) else None


def _adalora_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    # PEFT divides by the rank before anything is pruned, and takes 1 for the scale where alpha is not above 0.
    rank = config.get("init_r", 12)
    alpha = config.get("lora_alpha", 8)
    scale = (alpha if alpha > 0 else float(rank)) / (rank + 1e-5)
    return tensors["lora_B"] * scale, tensors["lora_E"] * tensors["lora_A"]


def _lycoris(shapes: Shapes, config: Config) -> Facts | None:
    form = lycoris.form_of(shapes)
    return lycoris.facts(form, shapes) if form else None


def _alpha(config: Config, name: str) -> float:
    return float(pattern_value(config.get("alpha_pattern"), name, config.get("alpha", 8)))


def _loha_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    B, A = lycoris.factors(lycoris.LOHA, tensors)
    return B * (_alpha(config, name) / tensors["hada_w1_b"].shape[0]), A


def _lokr(shapes: Shapes, config: Config) -> Facts | None:
    found = _lycoris(shapes, config)
    if found is None or not _is_line(shapes.get("lokr_w2", ())):
        return found
    return replace(found, rank=min(found.out_features, found.in_features))


def _lokr_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    w2 = tensors.get("lokr_w2")
    if w2 is not None and _is_line(w2.shape):
        # Of a Conv1d, PEFT multiplies W1 with the last two dimensions of W2, not with the first two.
        w1 = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
        B, A = full(torch.kron(w1, w2).reshape(len(w1) * len(w2), -1))
    else:
        B, A = lycoris.factors(lycoris.LOKR, tensors)
    # A LoKr of two whole matrices does not show the rank that alpha is divided by.
    return B * (_alpha(config, name) / pattern_value(config.get("rank_pattern"), name, config.get("r", 8))), A


def _is_line(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3


def _bank_rows(shapes: Shapes, side: str) -> tuple[int, ...]:
    role = f"vblora_logits_{side}"
    return shapes[role] if role in shapes else shapes[f"{role}_topk_indices"]


def _vblora(shapes: Shapes, config: Config) -> Facts | None:
    A, B, length = _bank_rows(shapes, "A"), _bank_rows(shapes, "B"), shapes["vblora_vector_bank"][1]
    return _plain(A[0], B[0] * length, A[1] * length) if A[0] == B[1] else None


def _vblora_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    def mixed(side: str) -> Tensor:
        role = f"vblora_logits_{side}"
        if role in tensors:
            logits, indices = tensors[role].topk(config.get("topk", 2), dim=-1)
            weights = logits.softmax(-1)
        else:  # of the k weights the last one is left out, which makes their sum 1
            indices, weights = tensors[f"{role}_topk_indices"].long(), tensors[f"{role}_topk_weights"]
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
        return (weights[..., None] * tensors["vblora_vector_bank"][indices]).sum(-2)

    return mixed("B").transpose(1, 2).flatten(0, 1), mixed("A").flatten(1)


def _unilora(shapes: Shapes, config: Config) -> Facts | None:
    A, B = shapes["unilora_indices_A"], shapes["unilora_indices_B"]
    return _plain(A[0], B[0], A[1]) if A[0] == B[1] else None


def _unilora_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    theta = tensors["unilora_theta_d"]
    B, A = (theta[tensors[f"unilora_indices_{s}"].long()] * tensors[f"unilora_scales_{s}"] for s in "BA")
    return B, A


def _delora(shapes: Shapes, config: Config) -> Facts | None:
    A, B = shapes["delora_A"], shapes["delora_B"]
    return _plain(A[0], B[0], A[1]) if A[0] == B[1] and shapes["delora_w_norm"] == (A[1],) else None


def _delora_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    A, B = tensors["delora_A"], tensors["delora_B"]
    lengths = A.norm(dim=1).clamp(min=1e-4) * B.norm(dim=0).clamp(min=1e-4)
    return B * (tensors["delora_lambda"] / len(A) / lengths), A * tensors["delora_w_norm"]


def _gralora(shapes: Shapes, config: Config) -> Facts | None:
    A, B = shapes["gralora_A"], shapes["gralora_B"]
    if A[0] != B[0] or A[2] != B[1] or A[2] % A[0]:
        return None
    hybrid = shapes["gralora_A_general"][0] if "gralora_A_general" in shapes else 0
    return _plain(A[0] * A[2] + hybrid, B[0] * B[2], A[0] * A[1])


def _gralora_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    a, b = tensors["gralora_A"], tensors["gralora_B"]
    blocks, rank = len(a), a.shape[2]
    # Block p of rows sees r numbers: r / k of every block of columns, the p-th part of what that block makes.
    parts = a.unflatten(2, (blocks, -1)).permute(2, 0, 3, 1)  # p, block of columns, r / k, columns
    A = torch.cat([torch.block_diag(*part) for part in parts])
    B = torch.block_diag(*b.mT)
    if "gralora_A_general" in tensors:
        B = torch.cat([B, tensors["gralora_B_general"]], 1)
        A = torch.cat([A, tensors["gralora_A_general"]])
    return B * (config.get("alpha", 64) / (rank + len(A) - blocks * rank)), A


def _c3a(shapes: Shapes, config: Config) -> Facts | None:
    rows, columns, block = shapes["c3a_kernel"]
    return _plain(rows * block, rows * block, columns * block)


def _c3a_factors(tensors: Tensors, config: Config, name: str) -> Pair:
    kernel = tensors["c3a_kernel"]
    rows, columns, block = kernel.shape
    place = torch.arange(block)
    circulants = kernel[..., (place[None] - place[:, None]) % block]  # rows, columns, block, block
    return full(circulants.transpose(1, 2).reshape(rows * block, columns * block) / (columns * block))


_HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOKR_1 = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_LOKR_2 = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)
_BANK = frozenset({"vblora_vector_bank"})
_GRALORA = frozenset({"gralora_A", "gralora_B"})
_ALL_LOGITS = frozenset({"vblora_logits_A", "vblora_logits_B"})
_TOP_LOGITS = frozenset(f"{role}_topk_{what}" for role in _ALL_LOGITS for what in ("indices", "weights"))
_UNILORA = frozenset(f"unilora_{what}_{side}" for what in ("indices", "scales") for side in "AB")

IDENTITIES: dict[str, Identity] = {
    "ADALORA": Identity((frozenset({"lora_A", "lora_B", "lora_E"}),), _adalora, _adalora_factors),
    "LOHA": Identity((_HADA, _HADA | {"hada_t1", "hada_t2"}), _lycoris, _loha_factors),
    "LOKR": Identity(tuple(one | two for one in _LOKR_1 for two in _LOKR_2), _lokr, _lokr_factors),
    "VBLORA": Identity((_BANK | _ALL_LOGITS, _BANK | _TOP_LOGITS), _vblora, _vblora_factors, "vblora_vector_bank"),
    "UNILORA": Identity((_UNILORA | {"unilora_theta_d"},), _unilora, _unilora_factors, "unilora_theta_d"),
    "DELORA": Identity(
        (frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"}),), _delora, _delora_factors
    ),
    "GRALORA": Identity((_GRALORA, _GRALORA | {"gralora_A_general", "gralora_B_general"}), _gralora, _gralora_factors),
    "C3A": Identity((frozenset({"c3a_kernel"}),), _c3a, _c3a_factors),
}
