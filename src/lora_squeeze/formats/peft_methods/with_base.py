"""Methods whose update depends on the base model: PEFT puts the adapter on it, and one layer at a time is merged.

dW = merged weight - base weight, in float64 where PEFT computes in the dtype that it is given. Where the rank is known
to be low, factors of that rank come from the range of dW; else they are dW and an identity.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lora_squeeze.adapter import Kind, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.peft_keys import PREFIX, Layout
from lora_squeeze.formats.peft_methods.base_weights import Base
from lora_squeeze.formats.peft_methods.identities import Pair, full
from lora_squeeze.formats.peft_methods.table import Row
from lora_squeeze.methods.catalogue import adapter_entries

_ADAPTER = "default"
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
# Rank of the update of one of PEFT's layers; methods that are not here have full rank.
_RANKS: dict[str, Callable[[Any, str], int]] = {
    "ADALORA": lambda layer, name: int(layer.lora_E[name].shape[0]),
    "ADAMSS": lambda layer, name: int(layer.adamss_newB[name].shape[0]),
    "DEFT": lambda layer, name: int(layer.deft_P[name].shape[1]),
    "FOURIERFT": lambda layer, name: 2 * int(layer.fourierft_spectrum[name].numel()),
    "HRA": lambda layer, name: int(layer.hra_u[name].shape[1]),
    "LOHA": lambda layer, name: int(layer.r[name]) ** 2,
    "LORA": lambda layer, name: 2 * int(layer.r[name]),  # KaSA
    "OSF": lambda layer, name: 2 * int(layer.osf_svd_params[name]["S_low"].numel()),
    "PEANUT": lambda layer, name: int(layer.r[name]),
    "PSOFT": lambda layer, name: int(layer.r[name]),
    "PVERA": lambda layer, name: int(layer.pvera_lambda_d[name].numel()) // 2,
    "SUPERTUNING": lambda layer, name: layer.supertuning_values[name].numel() + int(layer.supertuning_rank[name]),
    "TINYLORA": lambda layer, name: int(layer.tinylora_A[name].shape[0]),
    "TRAINABLE_TOKENS": lambda layer, name: len(layer.token_indices[name]),
    "UNILORA": lambda layer, name: int(layer.r[name]),
    "VBLORA": lambda layer, name: int(layer.r[name]),
    "VERA": lambda layer, name: int(layer.vera_lambda_d[name].numel()),
    "WAVEFT": lambda layer, name: int(layer.waveft_spectrum[name].numel()),
}
_MOVES_BIAS = ("ADAMSS", "GLORA", "IA3", "ROAD")
_TOLERANCE = 1e-5  # share of |W| + |dW| that may lie beyond the rank: some methods compute in float32
_OVERSAMPLING = 10


@dataclass(frozen=True, eq=False)
class LiveLayer:
    """One layer that PEFT put on the model.

    Args:
        module: what is known of its update.
        layer: PEFT's.
        weight: of the base model as it was before.
        moves_bias: the bias of the layer changes too.
        adapter: name of the adapter.
    """

    module: Module
    layer: Any
    weight: Tensor
    moves_bias: bool
    adapter: str = _ADAPTER

    @property
    def tolerance(self) -> float:
        """The share of |W| + |dW| that rounding may leave beyond the rank: a KaSA rounds W to its own dtype."""
        is_lora = hasattr(self.layer, "lora_diag")
        return max(_TOLERANCE, torch.finfo(self.weight.dtype).eps) if is_lora else _TOLERANCE

    @property
    def turned(self) -> bool:
        """Whether the weight of a linear layer stands transposed in the model."""
        return self.module.kind == "linear" and not isinstance(self.layer.get_base_layer(), nn.Linear)

    def factors(self) -> Pair:
        """B and A of the update, in float64."""
        merged = self._merged().weight.detach().double()
        W = self.weight.double()
        dW = _matrix(merged - W, self.layer.get_base_layer())
        rank = self.module.rank
        if rank == min(dW.shape[-2:]):
            return full(dW)
        B, A = at_rank(dW, rank)
        rest = (dW - B @ A).norm()
        if rest > self.tolerance * (W.norm() + dW.norm()):
            raise LoraSqueezeError(
                f"{self.module.name}: its update has a part of norm {rest:.2g} beyond the rank {rank} that its method "
                "has in PEFT 0.21.2; the PEFT installed may do something else"
            )
        return B, A

    def bias(self) -> Tensor:
        """The change of the layer's bias."""
        bias = self.layer.get_base_layer().bias
        if not self.moves_bias:
            return torch.zeros(self.module.out_features, dtype=self.module.dtype)
        change: Tensor = self._merged().bias.detach().double() - bias.detach().double()
        return change.to(self.module.dtype)

    def _merged(self) -> Any:
        layer = copy.deepcopy(self.layer).double()
        with torch.no_grad():
            layer.merge(safe_merge=False, adapter_names=[self.adapter])
        return layer.get_base_layer()


def at_rank(dW: Float[Tensor, "out in"], rank: int) -> Pair:
    """Factors of a matrix that has at most this rank, but for rounding: the best ones in a random part of its range."""
    width = min(rank + _OVERSAMPLING, *dW.shape)
    probe = torch.randn(dW.shape[1], width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    Q = torch.linalg.qr(dW @ (dW.T @ (dW @ probe))).Q
    U, S, Vh = torch.linalg.svd(Q.T @ dW, full_matrices=False)
    return Q @ (U[:, :rank] * S[:rank].sqrt()), S[:rank, None].sqrt() * Vh[:rank]


def layers(
    folder: Path, base: Base, row: Row, config: Mapping[str, Any], dtype: torch.dtype, labels: int | None = None
) -> dict[str, LiveLayer]:
    """The layers of an adapter on its base model, by module name.

    Args:
        folder: of the adapter.
        base: the base model; one on disk is built with transformers, one in memory is left as it is.
        row: the method.
        config: adapter_config.json.
        dtype: of the adapter's numbers.
        labels: of a classifier that is built; default those of the base model's configuration.

    Raises:
        LoraSqueezeError: PEFT or transformers are missing or cannot do it, with their reason.

    Notes:
        The whole base model is in memory, once. A layer that PEFT changes in place would change a given model;
        PEFT 0.21.2 replaces.
    """
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError:
        raise LoraSqueezeError(
            f"{row.name} is read with PEFT and transformers, which are not here; "
            "install them: pip install lora-squeeze[train]"
        ) from None
    if row.peft_type in adapter_entries():
        import lora_squeeze.methods.adapters
        import lora_squeeze.methods.ranks  # noqa: F401 (both register their methods with PEFT)
    model, missing = (base, set[str]()) if isinstance(base, nn.Module) else _build(base.name, config, labels)
    original = {name: module.weight.detach() for name, module in model.named_modules() if _has_weight(module)}
    adapted = _adapted(model, folder, row)
    found = {}
    for path, layer in adapted.named_modules():
        if isinstance(layer, BaseTunerLayer) and (row.peft_type == "TRAINABLE_TOKENS" or not _is_tokens(layer)):
            name = path.removeprefix(PREFIX).replace(".token_adapter", "")
            if f"{name}.weight" in missing:
                raise LoraSqueezeError(f"{name}: the base model has no such weight; give the one it was trained on")
            found[name] = live_layer(name, layer, original[name], row, dtype)
    if not found:
        raise LoraSqueezeError(f"{folder}: PEFT put no layer on this base model; give the one it was trained on")
    return found


def live_layer(
    name: str, layer: Any, weight: Tensor, row: Row, dtype: torch.dtype, adapter: str = _ADAPTER
) -> LiveLayer:
    """What one of PEFT's layers does to a weight.

    Args:
        name: of the layer in the base model.
        layer: PEFT's.
        weight: of the base model, without updates.
        row: the method.
        dtype: of the adapter's numbers.
        adapter: its name.

    Raises:
        LoraSqueezeError: a quantised weight, or a layer whose update is no LoRA.
    """
    inner = layer.get_base_layer()
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise LoraSqueezeError(f"{name}: the base model is quantised here; give it in 16 or 32 bits")
    if row.peft_type == "OFT" and weight[0, 0].numel() > 1 and weight.dim() > 2:
        raise LoraSqueezeError(
            f"{name}: an OFT of a convolution cannot become a LoRA: the forward pass of PEFT 0.21.2 counts overlapping "
            "places several times, which no weight does"
        )
    check_groups(name, inner)
    out, columns = _matrix(weight.to("meta"), inner).shape
    low = _RANKS.get(row.peft_type, _own_rank)
    if row.peft_type == "MISS" and layer.miss_fn != "bat":
        low = _miss_rank
    rank = min(low(layer, adapter) or out, out, columns)
    kind: Kind = "embedding" if isinstance(inner, nn.Embedding) else "conv" if weight.dim() > 2 else "linear"
    module = Module(
        name=name,
        rank=rank,
        scale=1.0,
        dtype=dtype,
        out_features=out,
        in_features=columns,
        kind=kind,
        kernel=tuple(weight.shape[2:]),
        layout=Layout(name, "", "", pattern=re.escape(name)),
        source_bytes=8 * (4 * weight.numel() + rank * (out + columns)),
    )
    moves = row.peft_type in _MOVES_BIAS or getattr(layer, "moves_bias", False)
    moves = moves and getattr(inner, "bias", None) is not None
    return LiveLayer(module, layer, weight, moves, adapter)


def _own_rank(layer: Any, name: str) -> int:
    """Of a layer of this package; 0 where there is no bound below full rank."""
    return int(getattr(layer.deltas[name], "rank", None) or 0) if hasattr(layer, "deltas") else 0


def _miss_rank(layer: Any, name: str) -> int:
    return int(layer.miss_block[name].shape[0])


def check_groups(name: str, layer: nn.Module) -> None:
    """Refuse a convolution in groups.

    Raises:
        LoraSqueezeError: it is one.
    """
    if getattr(layer, "groups", 1) > 1:
        raise LoraSqueezeError(
            f"{name}: a convolution in groups, of which PEFT has no LoRA that changes its weight alone; merge the "
            "adapter into the base model in PEFT with model.merge_and_unload()"
        )


def _matrix(weight: Tensor, layer: Any) -> Tensor:
    """A tensor like the layer's weight, as the matrix that updates of its kind are."""
    from transformers.pytorch_utils import Conv1D

    return weight.mT if isinstance(layer, nn.Embedding | Conv1D) else weight.flatten(1)


def _has_weight(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), nn.Parameter)


def _is_tokens(layer: object) -> bool:
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    return isinstance(layer, TrainableTokensLayer)


def _build(name: str, config: Mapping[str, Any], labels: int | None) -> tuple[nn.Module, set[str]]:
    """The base model as the class that the adapter was trained on, and its tensors that no file has."""
    import transformers

    told = config.get("auto_mapping") or {}
    try:
        # First, since a model's class without a configuration is its default, in full size.
        settings = transformers.AutoConfig.from_pretrained(name, **({} if labels is None else {"num_labels": labels}))
        kind = str(told.get("base_model_class") or _TASKS.get(str(config.get("task_type")), ""))
        kind = kind or (settings.architectures or ["AutoModel"])[0]
        model: nn.Module
        model, loading = getattr(transformers, kind).from_pretrained(
            name,
            config=settings,
            dtype="auto",
            output_loading_info=True,
            ignore_mismatched_sizes=labels is not None,  # the base model's own head, in whose place the saved one is
        )
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise LoraSqueezeError(
            f"{name}: transformers cannot build this base model ({_first_line(error)}); in Python, give the model "
            "itself as base="
        ) from None
    return model.eval(), set(loading["missing_keys"])


def _adapted(model: nn.Module, folder: Path, row: Row) -> nn.Module:
    """PEFT's model, on a copy of this one that has its numbers in the same memory."""
    from peft import PeftModel

    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    alias = copy.deepcopy(model, shared)
    try:
        with warnings.catch_warnings(record=True) as said, torch.random.fork_rng(devices=[]):
            warnings.simplefilter("always")
            # Beside a base of half precision PEFT keeps adapters in float32, as they were trained and saved.
            adapted: nn.Module = PeftModel.from_pretrained(alias, str(folder), torch_device="cpu")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise LoraSqueezeError(
            f"{folder}: PEFT cannot load this {row.name} on the base model ({_first_line(error)})"
        ) from None
    missing = next((str(w.message) for w in said if "missing adapter keys" in str(w.message)), None)
    if missing:
        raise LoraSqueezeError(f"{folder}: the file is incomplete, get it again (PEFT: {missing:.300})")
    return adapted.eval()


def _first_line(error: Exception) -> str:
    return f"{(str(error).strip().splitlines() or [type(error).__name__])[0]:.200}"
