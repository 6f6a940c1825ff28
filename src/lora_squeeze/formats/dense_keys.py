"""Names in two checkpoints of one model: which tensors are the same one, and what kind of layer each belongs to.

Names match as they are, or by one change of prefix for all names that share one: "model." that comes and goes with the
head around a body, "module." and "_orig_mod." of wrappers, "language_model.model." that is "model.language_model." in
another release of transformers. A change counts only if it takes every name with that prefix to a name of the other
checkpoint, and two changes that would do are refused. Names that one of the two has alone divide the others by longer
prefixes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from lora_squeeze.adapter import Kind
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import quoted

Shape = tuple[int, ...]
WEIGHT, BIAS = ".weight", ".bias"
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_DEEPEST = 3  # parts of a prefix that may change
# The last part of the path of a layer with one row per token, or per position.
EMBEDDINGS = frozenset(
    {
        "embed_in", "embed_positions", "embed_tokens", "embed_tokens_per_layer", "position_embedding",
        "position_embeddings", "relative_attention_bias", "shared", "tok_embeddings", "token_embedding",
        "token_type_embeddings", "word_embeddings", "wpe", "wte",
    }
)  # fmt: skip
HEADS = frozenset({"lm_head", "embed_out", "output_projection"})
INPUTS = frozenset({"embed_tokens", "wte", "embed_in"})  # embeddings that models tie their heads to
_CONV1D = frozenset({"c_attn", "q_attn", "c_proj", "c_fc"})  # in GPT-2 and its kin, stored (in, out)
_ATTENTION = ".in_proj_weight"  # nn.MultiheadAttention has one weight for q, k and v


@dataclass(frozen=True)
class Pairing:
    """Which tensor of the tuned model is which of the base.

    Args:
        pairs: name -> (key in the tuned model, key in the base). The name has the longer of two prefixes, since the
            model with a head can load the file of its body; the base's where they are equally long.
        changes: prefixes that differ, (tuned, base).
        only_tuned: name -> key, of those without a partner.
        only_base: keys without a partner.
    """

    pairs: dict[str, tuple[str, str]]
    changes: list[tuple[str, str]]
    only_tuned: dict[str, str]
    only_base: list[str]


def pair(tuned: Mapping[str, Shape], base: Mapping[str, Shape]) -> Pairing:
    """Find the pairs by their names; shapes decide between two changes of prefix that would both do.

    Raises:
        LoraSqueezeError: no names match, or a prefix could be changed in two ways.
    """
    mine, theirs = _unwrapped(tuned), _unwrapped(base)
    pairs = {name: (mine[name], theirs[name]) for name in theirs if name in mine}
    rest, free = [name for name in mine if name not in pairs], {name for name in theirs if name not in pairs}
    shapes = {name: tuned[mine[name]] for name in rest} | {name: base[theirs[name]] for name in free}
    found: dict[str, tuple[str, str]] = {}
    changes = list(dict.fromkeys(_changes(rest, free, "", shapes)))
    for old, new in changes:
        for name in (name for name in rest if name.startswith(old) and name not in found):
            other = new + name[len(old) :]
            if other in free:
                free.discard(other)
                found[name] = (_better(old, new) + name[len(old) :], other)
    for name, (better, other) in found.items():
        if better in pairs:
            raise LoraSqueezeError(f"{quoted(name)} and {quoted(pairs[better][0])} are both {quoted(better)}")
        pairs[better] = (mine[name], theirs[other])
    if not pairs:
        raise LoraSqueezeError(
            f"no tensor names in common: the first is {quoted(next(iter(mine)))} in the tuned model and "
            f"{quoted(next(iter(theirs)))} in the base; give two checkpoints of one model"
        )
    only = {name: mine[name] for name in rest if name not in found}
    return Pairing(pairs, changes, only, [theirs[name] for name in theirs if name in free])


def _unwrapped(keys: Iterable[str]) -> dict[str, str]:
    """Name -> key; a wrapper around the whole model is no part of names."""
    names = {key: key for key in keys}
    while len(first := {name.partition(".")[0] for name in names}) == 1 and first <= _WRAPPERS:
        names = {name.partition(".")[2]: key for name, key in names.items()}
    return names


def _changes(
    names: Sequence[str], free: Collection[str], prefix: str, shapes: Mapping[str, Shape]
) -> Iterator[tuple[str, str]]:
    """Changes of prefix that take all names with `prefix` to free names of the base; else of longer prefixes."""
    new = _change(names, free, prefix, shapes)
    if new is not None:
        yield _shortened(prefix, new)
        return
    # What is left of a name must still say which layer and which of its tensors.
    inner = [name for name in names if name[len(prefix) :].count(".") > 1]
    if prefix.count(".") < _DEEPEST:
        for longer in dict.fromkeys(prefix + name[len(prefix) :].partition(".")[0] + "." for name in inner):
            yield from _changes([name for name in inner if name.startswith(longer)], free, longer, shapes)
    for name in [name for name in names if name[len(prefix) :].count(".") <= 1] if prefix else ():
        if (new := _change([name], free, prefix, shapes)) is not None:
            yield _shortened(prefix, new)


def _change(names: Sequence[str], free: Collection[str], prefix: str, shapes: Mapping[str, Shape]) -> str | None:
    """What `prefix` must become for all these names. One name alone says little: it may only lose or gain parts."""
    tails = [name[len(prefix) :] for name in names]
    if not tails:
        return None
    starts = [other.removesuffix(tails[0]) for other in free if other == tails[0] or other.endswith(f".{tails[0]}")]
    fits = [new for new in starts if new.count(".") <= _DEEPEST and all(new + tail in free for tail in tails)]
    alike = [new for new in fits if all(shapes[new + t] == shapes[n] for t, n in zip(tails, names, strict=True))]
    fits = sorted(alike or fits, key=lambda new: (-_shared(prefix, new), new))
    if len(names) == 1:
        fits = [new for new in fits if not all(_shortened(prefix, new))]
        return fits[0] if len(fits) == 1 else None
    if len(fits) > 1 and _shared(prefix, fits[0]) == _shared(prefix, fits[1]):
        raise LoraSqueezeError(
            f"{quoted(names[0])} of the tuned model could be {quoted(fits[0] + tails[0])} or "
            f"{quoted(fits[1] + tails[0])} of the base: rename the tensors in one of the files"
        )
    return fits[0] if fits else None


def _shortened(old: str, new: str) -> tuple[str, str]:
    """The change without the parts at the end that stay."""
    one, other = old.split(".")[:-1], new.split(".")[:-1]
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    return "".join(f"{part}." for part in one), "".join(f"{part}." for part in other)


def _shared(one: str, other: str) -> int:
    """Number of parts that two prefixes have in common."""
    return sum((Counter(one.split(".")[:-1]) & Counter(other.split(".")[:-1])).values())


def _better(tuned: str, base: str) -> str:
    """The prefix that names get: the longer one without wrappers."""
    bare = ["".join(f"{part}." for part in prefix.split(".")[:-1] if part not in _WRAPPERS) for prefix in (base, tuned)]
    return max(bare, key=lambda prefix: prefix.count("."))  # the first of two equals


@dataclass(frozen=True)
class Layer:
    """The matrix that a weight is.

    Args:
        kind: of the layer.
        out_features, in_features: rows and columns of dW.
        copies: matrices in the tensor.
        kernel: of a convolution.
        turned: the tensor holds the transpose of dW.
    """

    kind: Kind
    out_features: int
    in_features: int
    copies: int = 1
    kernel: Shape = ()
    turned: bool = False


def path_of(name: str) -> str:
    """The path of the layer; of stacked experts and others that are parameters of their own, the name itself."""
    return name.removesuffix(WEIGHT).removesuffix(BIAS)


def is_vocabulary(name: str) -> bool:
    """Whether this belongs to an embedding or to an output head."""
    return path_of(name).rpartition(".")[2] in EMBEDDINGS | HEADS


def layers(shapes: Mapping[str, Shape]) -> dict[str, Layer | str]:
    """What every tensor is: a layer whose update is a matrix, or why it is none.

    Args:
        shapes: name -> shape of the base's tensor, of the whole model: neighbours tell how a weight is stored.

    Notes:
        A weight of two dimensions is that of a linear layer, but for the names in EMBEDDINGS; one of three to five is
        a convolution's, one of three with "experts" in its path a stack of experts. GPT-2's layers are stored
        (in, out): c_attn and c_fc are known by a bias that is as long as the second dimension.
    """
    conv1d = any(
        path_of(name).rpartition(".")[2] in _CONV1D
        and len(shape) == 2
        and shape[0] != shape[1]
        and shapes.get(path_of(name) + BIAS) == shape[1:]
        for name, shape in shapes.items()
    )
    return {name: _layer(name, shape, shapes, conv1d) for name, shape in shapes.items()}


def _layer(name: str, shape: Shape, shapes: Mapping[str, Shape], conv1d: bool) -> Layer | str:
    path = path_of(name)
    last = path.rpartition(".")[2]
    if len(shape) == 3 and "experts" in path.split("."):
        turned = _turned_experts(path, shapes)
        rows, columns = (shape[2], shape[1]) if turned else shape[1:]
        return Layer("experts", rows, columns, copies=shape[0], turned=turned)
    if len(shape) < 2:
        return "a vector"
    if not name.endswith(WEIGHT):
        return "no weight of a layer of its own"
    if f"{path.rpartition('.')[0]}{_ATTENTION}" in shapes:
        return "an attention layer of torch, whose weights PEFT takes together"
    if len(shape) == 2:
        if last in EMBEDDINGS or (last in _CONV1D and conv1d):
            return Layer("embedding" if last in EMBEDDINGS else "linear", shape[1], shape[0], turned=True)
        return Layer("linear", *shape)
    if len(shape) > 5:
        return "a tensor of more than five dimensions"
    if shape[1] == 1 < shape[0]:
        return "a convolution of one channel each, which has no rank to reduce"
    return Layer("conv", shape[0], math.prod(shape[1:]), kernel=shape[2:])


def _turned_experts(path: str, shapes: Mapping[str, Shape]) -> bool:
    """Whether stacked experts are stored (in, out): what goes up must come down to where it began."""
    base = path.rpartition(".")[0]
    up, down = shapes.get(f"{base}.gate_up_proj", ()), shapes.get(f"{base}.down_proj", ())
    return len(up) == len(down) == 3 and up[1] == down[2] and up[2] % down[1] == 0
