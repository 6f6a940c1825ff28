"""LIFT, the perturbation test: are the entries that LIFT picks those that a language model depends on?

SmolLM2-135M, no training. Noise N(0, s^2) is added to about 5 % of the entries of every linear layer of its blocks
(`LiftConfig(r=17)`: 17 (in + out) entries a layer), picked by LIFT's own code in three ways: the largest after an
approximation of rank 32 (LIFT), the largest of the weight itself (magnitude), at random. Then the perplexity on 200
tweets and reviews of 80 to 100 characters is measured. s is 0.01 and 0.05, the ends of the range asked for; the weights
of SmolLM2 have a standard deviation of about 0.2, ten times that of the paper's models, so s = 0.1, half of
that deviation, was added before any result was seen. Three seeds of noise, the same draws for all three choices.

The paper: the noise on the entries of LIFT wrecks the perplexity, that on the others does not. The claim here: the
rise of the perplexity is at least 3 times that of random entries, and above that of magnitude. A verdict needs a
difference of two standard errors.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.claims.outcome import Finding, Outcome, difference, mean_and_error, shown
from bench.claims.plain_text import adapted, decided, perplexity, targets
from lora_squeeze.methods.adapters import LiftConfig
from lora_squeeze.methods.control import deltas_of
from lora_squeeze.methods.seeds import seeded

CHOICES = {"LIFT": "principal", "magnitude": "magnitude", "random": "random"}
RANK, FILTER = 17, 32
Rises = dict[tuple[str, float], list[float]]


def run(quick: bool) -> Outcome:
    """Perplexities, and LIFT's rise against the two others at each noise."""
    noises, seeds, count = ((0.1,), range(1), 4) if quick else ((0.01, 0.05, 0.1), range(3), 200)
    model = _model(quick)
    base = perplexity(model, count)
    outcome = Outcome([{"part": "perplexity", "entries": "none changed", "noise": 0.0, "perplexity": base}])
    rises: Rises = {}
    for name in CHOICES:
        for noise in noises:
            found = [_disturbed(model, name, noise, seed, count) for seed in seeds]
            rises[name, noise] = [value - base for value in found]
            mean, error = mean_and_error(found)
            row = {"part": "perplexity", "entries": name, "noise": noise, "perplexity": mean, "error": error}
            outcome.rows.append({**row, "share of entries": _share(model, name)})
    for noise in noises:
        outcome.findings += _findings(rises, noise)
    return outcome


def _model(quick: bool) -> Any:
    """SmolLM2 with an adapter for each way to pick entries, all zero."""
    configs = {
        name: LiftConfig(r=RANK, filter_rank=FILTER, choice=choice, **targets(quick))
        for name, choice in CHOICES.items()
    }
    model = adapted(LiftConfig(r=1, choice="random", **targets(quick)))
    for name, config in configs.items():
        model.add_adapter(name, config)
    return model


def _disturbed(model: Any, name: str, noise: float, seed: int, count: int) -> float:
    """Perplexity with noise on an adapter's entries, written into the weights and taken back bit by bit."""
    for layer, delta in deltas_of(model, name).items():
        drawn = torch.randn(len(delta.values), generator=seeded(seed, layer))
        delta.values.data.copy_(noise * drawn)
    model.merge_adapter([name])
    found = perplexity(model, count)
    model.unmerge_adapter()
    return found


def _share(model: Any, name: str) -> float:
    deltas = deltas_of(model, name).values()
    entries = sum(d.site.in_features * d.site.out_features for d in deltas)
    return float(sum(len(d.values) for d in deltas) / entries)


def _findings(rises: Rises, noise: float) -> list[Finding]:
    lift, magnitude, random = (rises[name, noise] for name in CHOICES)
    figures = f"rise {_shown(lift)} against {{}}"
    return [
        Finding(
            f"noise {noise:g}: the rise is at least 3 times that of random entries", figures.format(_shown(random)),
            decided(*difference(lift, [3 * value for value in random])),
        ),
        Finding(
            f"noise {noise:g}: the rise is above that of the largest entries", figures.format(_shown(magnitude)),
            decided(*difference(lift, magnitude)),
        ),
    ]  # fmt: skip


def _shown(values: list[float]) -> str:
    return shown(*mean_and_error(values), 2)
