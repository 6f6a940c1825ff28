"""SaRA, its ground: are the smallest entries of the weights of no effect?

SmolLM2-135M, no training. The smallest 10 % and 20 % of the entries of every linear layer of its blocks, as
`SaraConfig(fraction=...)` picks them, become zero, and the perplexity on 200 tweets and reviews of 80 to 100
characters is measured. Beside it, as many entries picked at random.

The paper: images of Stable Diffusion stay nearly the same at 10 to 20 %. The claim here: less than 2 % relative change
of the perplexity, upwards or downwards, at 10 %; the same bound is asked at 20 %, where the paper's figure ends. The
error is the standard error over texts of the paired change; a verdict needs a distance of two of them from the bound.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.claims.outcome import Finding, Outcome, Row
from bench.claims.plain_text import adapted, decided, nats, targets
from lora_squeeze.methods.adapters import SaraConfig
from lora_squeeze.methods.control import deltas_of
from lora_squeeze.methods.seeds import seeded

BOUND = 0.02


def run(quick: bool) -> Outcome:
    """Perplexity with zeros in the place of small entries and of random ones."""
    shares, count = ((0.1,), 4) if quick else ((0.1, 0.2), 200)
    outcome = Outcome()
    for share in shares:
        model = adapted(SaraConfig(fraction=share, **targets(quick)))
        base, tokens = nats(model, count)  # a fresh adapter changes nothing
        if not outcome.rows:
            outcome.rows.append(_row("none", 0.0, base, base, tokens))
        for entries in ("smallest", "random"):
            row = _row(entries, share, base, _zeroed(model, entries, count), tokens)
            outcome.rows.append(row)
            if entries == "smallest":
                figures = f"{100 * row['change']:+.2f} % ± {100 * row['error']:.2f} %"
                holds = decided(BOUND - abs(row["change"]), row["error"])
                claim = f"zeroing the smallest {share:.0%} changes the perplexity by less than 2 %"
                outcome.findings.append(Finding(claim, figures, holds))
    return outcome


def _zeroed(model: Any, entries: str, count: int) -> Tensor:
    """Nats of each text with zeros written into the weights."""
    for layer, delta in deltas_of(model).items():
        if entries == "random":
            size = delta.site.in_features * delta.site.out_features
            drawn = torch.randperm(size, generator=seeded(0, layer))[: len(delta.index)]
            delta.index.copy_(drawn.sort().values)
            delta.start.copy_(delta.site.base_weight().detach().flatten()[delta.index.long()])
        delta.values.data.zero_()
    model.merge_adapter()
    found, _ = nats(model, count)
    model.unmerge_adapter()
    return found


def _row(entries: str, share: float, base: Tensor, found: Tensor, tokens: Tensor) -> Row:
    """The relative change of the perplexity is exp(d) - 1, d the mean of the paired differences by token."""
    change = (found - base).sum() / tokens.sum()
    rest = (found - base) - change * tokens
    error = float((rest.square().sum() * len(tokens) / (len(tokens) - 1)).sqrt() / tokens.sum())
    return {
        "part": "perplexity", "zeroed": entries, "share": share,
        "perplexity": math.exp(float(found.sum() / tokens.sum())),
        "change": math.expm1(float(change)), "error": math.exp(float(change)) * error,
    }  # fmt: skip
