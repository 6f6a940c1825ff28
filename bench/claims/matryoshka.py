"""MatryoshkaLoRA (arXiv 2605.07850): is its curve of accuracy over ranks 1 to 32 above that of DyLoRA?

The teacher problem of `bench/claims/teacher.py`, with updates of rank 8. Arms, all of 400 steps of 64 examples and five
seeds, each with its own learning rate (validation loss on two other problems, mean over the ranks that are deployed):

- MatryoshkaLoRA, r = 32, S = 1, 2, ... 32: "sum", with the scales 1 / sqrt(k), as in the authors' scripts; "mean",
  the same divided by the number of ranks (`normalise`), as in another variant of their code; "mean, s = 1", the mean
  with all s_k = 1;
- DyLoRA, r = 32: "plain", the authors' rival, which is the one that is judged, and "frozen";
- a plain LoRA trained at each of the ranks, each with its own rate;
- one plain LoRA of rank 32, cut to its first k components, or squeezed to rank k by singular values.

Deployed ranks: 1, 2, 4, 8, 16, 32. Accuracy on 4096 test examples in points; AURAC over log2 of the rank. Differences
are of paired seeds, and s.d. is the standard deviation of these differences. What is judged beside the first claim is
the form with the highest AURAC on validation examples.

A first run had the sum alone. Its prefixes hardly differed from the base: the loss gives the sum its size, and each
prefix is a small part of it. The means, whose prefixes have the size of what is trained, were added then.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.claims.nested import Curves, Study, plain
from bench.claims.outcome import Finding, Outcome, difference, shown
from bench.claims.teacher import LAYERS, lora, verdict
from lora_squeeze.methods.ranks.dylora import DyloraConfig
from lora_squeeze.methods.ranks.matryoshka import MatryoshkaConfig

_RANKS = [1, 2, 4, 8, 16, 32]
_R = 32
_FORMS = ("sum", "mean", "mean, s = 1")


def run(quick: bool) -> Outcome:
    """Measure all arms."""
    study = Study(_RANKS, 3, range(2), (100,)) if quick else Study(_RANKS, 400, range(5))
    configs = {
        "sum": lambda seed: _matryoshka(seed, "sqrt", False),
        "mean": lambda seed: _matryoshka(seed, "sqrt", True),
        "mean, s = 1": lambda seed: _matryoshka(seed, "none", True),
        "DyLoRA, plain": lambda seed: _dylora(seed, "plain"),
        "DyLoRA, frozen": lambda seed: _dylora(seed, "frozen"),
    }
    arms = {name: study.once(config, study.prefixes, {name: study.prefixes})[0] for name, config in configs.items()}
    arms["LoRA of each rank"] = study.each("LoRA of each rank")
    versions = {"LoRA r = 32, cut": study.cut, "LoRA r = 32, squeezed": study.squeezed}
    arms |= {found.name: found for found in study.once(lambda _: lora(_R), plain, versions)}
    return Outcome(study.rows(list(arms.values())), _findings(arms))


def _matryoshka(seed: int, scaling: str, normalise: bool) -> Any:
    ranks = list(range(1, _R + 1))
    return MatryoshkaConfig(r=_R, ranks=ranks, scaling=scaling, normalise=normalise, seed=seed, target_modules=LAYERS)


def _dylora(seed: int, update: str) -> Any:
    return DyloraConfig(r=_R, alpha=2 * _R, update=update, seed=seed, target_modules=LAYERS)


def _findings(arms: dict[str, Curves]) -> list[Finding]:
    areas = {name: arm.areas(_RANKS) for name, arm in arms.items()}
    best = max(_FORMS, key=lambda form: arms[form].validation)
    gains = {name: difference(areas[best], theirs) for name, theirs in areas.items()}
    top = difference(arms[best].at(-1), arms["DyLoRA, plain"].at(-1))
    bound = "by more than {} s.d. over seeds"
    first = [
        _above(f"{form}: the AURAC is above that of DyLoRA, plain, {bound.format('one')}", areas[form],
               areas["DyLoRA, plain"], 1)
        for form in _FORMS
    ]  # fmt: skip
    return [
        *first,
        _above(f"{best}: the AURAC is above that of the naive truncation {bound.format('two')}", areas[best],
               areas["LoRA r = 32, cut"], 2),
        Finding(f"{best}: at rank 32 it is above DyLoRA, plain", f"{shown(*top, 2)} points", verdict(*top, 0)),
        Finding(f"{best}: the AURAC is at most 2 points below that of LoRA trained at each rank",
                f"{shown(*gains['LoRA of each rank'], 2)} points", verdict(*gains["LoRA of each rank"], -2)),
        Finding(f"{best}: the AURAC is above that of the SVD squeeze of the LoRA of rank 32",
                f"{shown(*gains['LoRA r = 32, squeezed'], 2)} points", verdict(*gains["LoRA r = 32, squeezed"], 0)),
    ]  # fmt: skip


def _above(claim: str, ours: Sequence[float], theirs: Sequence[float], deviations: float) -> Finding:
    gains = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean, deviation = statistics.fmean(gains), statistics.stdev(gains)
    return Finding(claim, f"{mean:.2f} points, s.d. {deviation:.2f}", mean > deviations * deviation)
