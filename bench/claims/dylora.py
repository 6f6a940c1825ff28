"""DyLoRA (arXiv 2210.07558): does one training give a LoRA of every rank up to 8, about as good as eight trainings?

The teacher problem of `bench/claims/teacher.py`, with updates of rank 8. Arms, all of 400 steps of 64 examples and five
seeds, each with its own learning rate (validation loss on two other problems, mean over the ranks that are deployed):

- DyLoRA, r = 8, once: "frozen", where a step trains the drawn component alone, as in the authors' scripts, and "plain";
- a plain LoRA trained at each rank, each with its own rate;
- one plain LoRA of rank 8, cut to its first k components, or squeezed to rank k by singular values.

Accuracy on 4096 test examples in points; AURAC over log2 of the rank.

With layers this small, most of the processor time of a step is overhead, so that DyLoRA's own operations weigh more in
it than they would in a large model; the number of steps is told beside it.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from bench.claims.nested import Curves, Study, plain
from bench.claims.outcome import Finding, Outcome, difference, mean_and_error, shown
from bench.claims.teacher import LAYERS, lora, verdict
from lora_squeeze.methods.ranks.dylora import DyloraConfig

_RANKS = list(range(1, 9))


def run(quick: bool) -> Outcome:
    """Measure all arms."""
    study = Study(_RANKS, 3, range(2), (100,)) if quick else Study(_RANKS, 400, range(5))
    arms: dict[str, Curves] = {}
    for update in ("frozen", "plain"):
        name = f"DyLoRA, {update}"
        arms[name] = study.once(partial(_config, update), study.prefixes, {name: study.prefixes})[0]
    arms["LoRA of each rank"] = study.each("LoRA of each rank")
    versions = {"LoRA r = 8, cut": study.cut, "LoRA r = 8, squeezed": study.squeezed}
    arms |= {found.name: found for found in study.once(lambda _: lora(8), plain, versions)}
    return Outcome(study.rows(list(arms.values())), _findings(arms))


def _config(update: str, seed: int) -> Any:
    return DyloraConfig(r=8, alpha=16, update=update, seed=seed, target_modules=LAYERS)


def _findings(arms: dict[str, Curves]) -> list[Finding]:
    dylora, each = arms["DyLoRA, frozen"], arms["LoRA of each rank"]
    cut, squeezed = arms["LoRA r = 8, cut"], arms["LoRA r = 8, squeezed"]
    means = {arm.name: [statistics.fmean(curve) for curve in arm.values] for arm in arms.values()}
    behind = difference(means[dylora.name], means[each.name])
    plainly = difference(means["DyLoRA, plain"], means[each.name])
    best = max((dylora, arms["DyLoRA, plain"]), key=lambda arm: arm.validation)
    low = {arm.name: [statistics.fmean(curve[:2]) for curve in arm.values] for arm in arms.values()}
    collapse = difference(low[each.name], low[cut.name])
    ratio = each.seconds / dylora.seconds
    area = difference(best.areas(_RANKS), squeezed.areas(_RANKS))
    over_cut = difference(best.areas(_RANKS), cut.areas(_RANKS))
    behind_claim = "over ranks 1 to 8, {} is on average at most 2 points below LoRA trained at each rank"
    return [
        Finding(behind_claim.format(dylora.name), f"{shown(*behind, 2)} points", verdict(*behind, -2)),
        Finding(behind_claim.format("DyLoRA, plain"), f"{shown(*plainly, 2)} points", verdict(*plainly, -2)),
        Finding("a LoRA of rank 8 cut to its first 1 or 2 components is at least 10 points below LoRA of that rank",
                f"{shown(*collapse, 2)} points below", verdict(*collapse, 10)),
        Finding("one training for all ranks takes at most a fourth of the processor time of eight",
                f"{dylora.seconds:.2f} s against {each.seconds:.2f} s, {ratio:.1f} times; "
                f"{len(_RANKS)} times fewer steps", ratio >= 4),
        Finding("the AURAC of DyLoRA, in the form that is better on validation data, is above that of the naive "
                "truncation", f"{best.name}: {shown(*over_cut, 2)} points", verdict(*over_cut, 0)),
        Finding("that AURAC is above that of the SVD squeeze of the LoRA of rank 8",
                f"{shown(*area, 2)} points; the squeeze has {shown(*mean_and_error(squeezed.areas(_RANKS)), 2)}",
                verdict(*area, 0)),
    ]  # fmt: skip
