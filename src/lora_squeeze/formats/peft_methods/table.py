"""Every method of PEFT 0.21.2 and every variant of its LoRA: what it does to a weight, and what that is as a LoRA.

docs/convert-methods.md is this table for people. The methods of this package stand in its own catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import quoted
from lora_squeeze.methods.catalogue import adapter_entries

Route = Literal["plain", "exact", "squeezed", "impossible"]


@dataclass(frozen=True)
class Row:
    """One method.

    Args:
        peft_type: as adapter_config.json has it.
        name: for people.
        update: the change of a weight W (out, in), or what the method does instead.
        route: "plain", a LoRA already; "exact", a LoRA of lower rank than the matrix; "squeezed", an update of full
            rank, of which a squeeze keeps a share of the energy; "impossible".
        rank: of the exact LoRA, a formula; "" where there is none.
        needs_base: the base model is needed to compute the update.
        why: what the base is needed for, or why there is no LoRA of it.
        prefixes: with which the last parts of its tensors' names begin.
        field: of a LoraConfig, which makes it this variant when set; None for a method.
    """

    peft_type: str
    name: str
    update: str
    route: Route
    rank: str = ""
    needs_base: bool = False
    why: str = ""
    prefixes: tuple[str, ...] = ()
    field: str | None = None


_SHAPES = "the file does not have the shapes of the weights"
_FORMED = "the update is formed from W"
_FULL = "min(out, in)"
_PROMPT = "it trains inputs of the layers and changes no weight"
_ROUTED = "its update depends on the input, token by token"

TABLE: tuple[Row, ...] = (
    # Known from the file.
    Row("LORA", "LoRA", "s B A", "plain", "r", prefixes=("lora_",)),
    Row("ADALORA", "AdaLoRA", "lora_alpha / (init_r + 1e-5) B diag(E) A", "exact", "r that is left",
        prefixes=("lora_",)),
    Row("LOHA", "LoHa", "alpha / r (B1 A1) * (B2 A2), by element", "exact", "r^2", prefixes=("hada_",)),
    Row("LOKR", "LoKr", "alpha / r kron(W1, W2)", "exact", "rank(W1) rank(W2)", prefixes=("lokr_",)),
    Row("VBLORA", "VB-LoRA", "B A, their parts mixed from a bank of vectors", "exact", "r", prefixes=("vblora_",)),
    Row("DELORA", "DeLoRA", "B diag(lambda / (r norm(a_i) norm(b_i))) A diag(norm(w_j))", "exact", "r",
        prefixes=("delora_",)),
    Row("GRALORA", "GraLoRA", "alpha / (r + hybrid_r) (k^2 blocks of rank r / k, + B A)", "exact", "k r + hybrid_r",
        prefixes=("gralora_",)),
    Row("C3A", "C3A", "blocks, each circulant", "squeezed", _FULL, prefixes=("c3a_",)),
    # Known from the file and the base model.
    Row("UNILORA", "Uni-LoRA", "B A, their numbers picked from one vector", "exact", "r", True,
        "which numbers are picked is in the file with save_indices alone, else drawn anew over the model",
        ("unilora_",)),
    Row("VERA", "VeRA", "diag(b) B diag(d) A, B and A shared and frozen", "exact", "r", True,
        "the shared matrices are as large as the largest layer; " + _SHAPES, ("vera_",)),
    Row("PVERA", "PVeRA", "as VeRA, with the means of its distribution", "exact", "r", True,
        "the shared matrices are as large as the largest layer; " + _SHAPES, ("pvera_",)),
    Row("TINYLORA", "TinyLoRA", "U S R V^T, R mixed from few numbers", "exact", "r", True,
        "the file does not say which module has which of the vectors", ("tinylora_",)),
    Row("MISS", "MiSS", "D^T for every r columns; with init_weights='bat', W D + D by blocks", "exact",
        "r; min(out, in) for 'bat'", True, _SHAPES, ("miss_",)),
    Row("HRA", "HRA", "W (H1 ... Hr - I), H a reflection", "exact", "r", True, _FORMED, ("hra_",)),
    Row("PSOFT", "PSOFT", "psoft_alpha / r B (R - I) A, B and A from the SVD of W", "exact", "r", True, _FORMED,
        ("psoft_",)),
    Row("DEFT", "DEFT", "Q (s R - P^T W)", "exact", "r", True, _FORMED, ("deft_",)),
    Row("PEANUT", "PEANuT", "a network of W^T, of width r", "exact", "r", True, _FORMED, ("peanut_",)),
    Row("ADAMSS", "AdaMSS", "B A V by groups of rows, V from the SVD of W", "exact", "r", True, _FORMED, ("adamss_",)),
    Row("OSF", "OSF", "new low singular directions of W - the old ones", "exact", "2 (min(out, in) - effective_rank)",
        True, _FORMED, ("osf_",)),
    Row("FOURIERFT", "FourierFT", "real part of the inverse Fourier transform of few numbers", "exact",
        "2 n_frequency", True, _SHAPES, ("fourierft_",)),
    Row("WAVEFT", "WaveFT", "inverse wavelet transform of few numbers", "exact", "n_frequency", True, _SHAPES,
        ("waveft_",)),
    Row("SUPERTUNING", "Supertuning", "chosen entries, and s B A if r is set", "exact", "number of entries + r", True,
        _SHAPES, ("supertuning_",)),
    Row("TRAINABLE_TOKENS", "Trainable tokens", "new rows of an embedding - the old ones", "exact", "number of tokens",
        True, _FORMED, ("trainable_tokens_",)),
    Row("RANDLORA", "RandLoRA", "sum of r-rank products of frozen random matrices, rescaled", "squeezed", _FULL, True,
        "the random matrices are as large as the largest layer; " + _SHAPES, ("randlora_",)),
    Row("SHIRA", "SHiRA", "r (out + in) chosen entries", "squeezed", _FULL, True, _SHAPES, ("shira_",)),
    Row("OFT", "OFT", "W (R - I), R orthogonal by blocks", "squeezed", _FULL, True, _FORMED, ("oft_",)),
    Row("BOFT", "BOFT", "s W R - W, R a product of orthogonal butterflies", "squeezed", _FULL, True, _FORMED,
        ("boft_",)),
    Row("ROAD", "RoAd", "(R - I) W, R turns and stretches pairs of rows; the bias too", "squeezed", _FULL, True,
        _FORMED, ("road_",)),
    Row("IA3", "IA3", "rows (and bias) or columns of W rescaled", "squeezed", _FULL, True, _FORMED, ("ia3_",)),
    Row("HIRA", "HiRA", "W * (B A), by element", "squeezed", _FULL, True, _FORMED, ("hira_",)),
    Row("GLORA", "GLoRA", "W * A + B, by element; the bias too", "squeezed", _FULL, True, _FORMED, ("glora_",)),
    Row("FROD", "FRoD", "U (S + L) V^T - W", "squeezed", _FULL, True, _FORMED, ("frod_",)),
    # No update of a matrix.
    Row("LN_TUNING", "LN tuning", "new weights of norms", "impossible", why="a norm has a vector, no matrix"),
    Row("BEFT", "BEFT", "biases alone", "impossible", why="a bias is a vector, no matrix"),
    Row("PROMPT_TUNING", "Prompt tuning", "virtual tokens", "impossible", why=_PROMPT),
    Row("MULTITASK_PROMPT_TUNING", "Multitask prompt tuning", "virtual tokens", "impossible", why=_PROMPT),
    Row("P_TUNING", "P-tuning", "virtual tokens", "impossible", why=_PROMPT),
    Row("PREFIX_TUNING", "Prefix tuning", "virtual keys and values", "impossible", why=_PROMPT),
    Row("CPT", "CPT", "changes of the tokens of a context", "impossible", why=_PROMPT),
    Row("CARTRIDGE", "Cartridge", "virtual keys and values", "impossible", why=_PROMPT),
    Row("ADAPTION_PROMPT", "Llama-Adapter", "virtual tokens in the upper layers", "impossible", why=_PROMPT),
    Row("SHADOW", "ShadowPEFT", "a network beside the model", "impossible",
        why="it adds what another network computes from the input to the hidden states"),
    Row("LILY", "Lily", "B A, B mixed by a router", "impossible", why=_ROUTED),
    Row("POLY", "Poly", "LoRAs mixed by task", "impossible",
        why="its update depends on the task that comes with the input"),
    Row("XLORA", "X-LoRA", "LoRAs mixed by a classifier", "impossible", why=_ROUTED + "; take its LoRAs one by one"),
    # Variants of LoRA.
    Row("LORA", "DoRA", "diag(m / norm(V)) V - W with V = W + s B A, the norm by rows", "squeezed", _FULL, True,
        _FORMED, ("lora_",), field="use_dora"),
    Row("LORA", "KaSA", "s B diag(d) A - the r lowest singular directions of W", "exact", "2 r", True, _FORMED,
        ("lora_",), field="kasa_config"),
    Row("LORA", "QALoRA", "s B A P, P adds groups of columns, times in / group^2", "exact", "r", prefixes=("lora_",),
        field="use_qalora"),
    Row("LORA", "BD-LoRA", "s B A, one of them in diagonal blocks", "exact", "r", prefixes=("lora_",),
        field="use_bdlora"),
    Row("LORA", "VeLoRA", "s B A; it differs in training alone", "exact", "r", prefixes=("lora_",),
        field="velora_config"),
    Row("LORA", "MonteCLoRA", "s B A; it samples in training alone", "exact", "r", prefixes=("lora_",),
        field="monteclora_config"),
    Row("LORA", "Arrow", "LoRAs mixed by a router", "impossible", why=_ROUTED + "; take its LoRAs one by one",
        field="arrow_config"),
)  # fmt: skip
_VARIANTS = {row.field: row for row in TABLE if row.field}
_OURS = tuple(
    Row(kind, entry.title, entry.update, "exact" if entry.route == "exact" else "squeezed", entry.rank or _FULL, True,
        "its frozen numbers are drawn or computed anew over the model", (f"{entry.name}_",))
    for kind, entry in adapter_entries().items()
)  # fmt: skip


def row_of(config: Mapping[str, Any]) -> Row:
    """The row of the adapter with this adapter_config.json.

    Raises:
        LoraSqueezeError: a method that this table does not have, or two variants of LoRA in one.
    """
    kind = config.get("peft_type")
    rows = [row for row in (*TABLE, *_OURS) if row.peft_type == kind and row.field is None]
    if not rows:
        raise LoraSqueezeError(
            f"peft_type is {quoted(str(kind))}, which PEFT 0.21.2 does not have; make a LoRA of it with the PEFT that "
            "saved it: peft.save_as_lora(folder, model, rank)"
        )
    if kind != "LORA":
        return rows[0]
    found = [row for field, row in _VARIANTS.items() if config.get(field)]
    if len(found) > 1:
        raise LoraSqueezeError(
            f"it is {' and '.join(row.name for row in found)} at once, and what they are together is not known here; "
            "merge it into the base model in PEFT with model.merge_and_unload()"
        )
    return found[0] if found else rows[0]
