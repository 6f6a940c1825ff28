"""The settings that each method is measured with: the numbers of a LoRA of rank 8 where a setting decides them.

Training is one of 1000 steps (`training.STEPS`), seen at its beginning. Phases that come before the longest one are cut
short for that: the search of DiffoRA, the warm-up of Bayesian-LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.evidence.saved import configuration
from lora_squeeze.methods.catalogue import CATALOGUE


@dataclass(frozen=True)
class Rare:
    """Work that a controller does once in many steps.

    Args:
        every: steps from one time to the next.
        before: finished steps when it is about to do it.
    """

    every: int
    before: int


@dataclass(frozen=True)
class Method:
    """One row.

    Args:
        label: name in the tables.
        kind: PEFT's name of the method.
        settings: of its configuration.
        per_rank: setting that gets the numbers of a LoRA of rank 1, for methods whose count is a setting.
        on_config, on_model: done to the configuration and to the fresh model.
        rare: see `Rare`.
    """

    label: str
    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    per_rank: str | None = None
    on_config: Callable[[Any], object] | None = None
    on_model: Callable[[Any], object] | None = None
    rare: Rare | None = None

    def config(self, learner: Any, rank_one: int) -> Any:
        """PEFT's configuration for a learner; `rank_one` are the numbers of a LoRA of rank 1 there."""
        more = {self.per_rank: rank_one} if self.per_rank else {}
        found = configuration(self.kind, {**self.settings, **more}, learner)
        if self.on_config is not None:
            self.on_config(found)
        return found


def lora(rank: int) -> Method:
    """A plain LoRA with the scale 2."""
    return Method(f"LoRA {rank}", "LORA", {"r": rank, "lora_alpha": 2 * rank})


def _largest(config: Any) -> None:
    from lora_squeeze.methods.adapters.shira_masks import magnitude_mask, set_mask

    set_mask(config, "wm", magnitude_mask())


def _paper_scale(model: Any) -> None:
    from lora_squeeze.methods.adapters.randlora_paper import set_paper_scale

    set_paper_scale(model)


_SETTINGS: dict[str, dict[str, Any]] = {
    "loraxs": {"settings": {"r": 64}},
    "paca": {"settings": {"r": 16}},
    "snella": {"settings": {"r": 8, "sparsity": 0.5}},
    "wara": {"settings": {"r": 16}},
    "blocklora": {"settings": {"r": 8}},
    "hydra": {"settings": {"r": 4}},
    "lift": {"settings": {"r": 8}, "rare": Rare(400, 399)},
    "sara": {"settings": {"fraction": 0.1}},
    "shira": {"settings": {"r": 8}, "on_config": _largest},
    "randlora": {"settings": {"r": 32}, "on_model": _paper_scale},
    "randloraranks": {"settings": {"r": 32}},
    "projlora": {"per_rank": "length"},
    "matryoshka": {"settings": {"r": 8}},
    "trp": {"rare": Rare(20, 40)},
    "maestro": {"rare": Rare(100, 99)},
    "blora": {"settings": {"warmup": 0.001}},
    "diffora": {"settings": {"search": 0.003}},
}
_LANDMARKS = (
    Method("PEFT DoRA", "LORA", {"r": 8, "lora_alpha": 16, "use_dora": True}),
    Method("PEFT VeRA", "VERA"),
    Method("PEFT SHiRA", "SHIRA", {"r": 8, "random_seed": 0}),
    Method("PEFT RandLoRA", "RANDLORA", {"r": 32}),
    Method("PEFT Uni-LoRA", "UNILORA", per_rank="theta_d_length"),
)


def methods() -> list[Method]:
    """All rows: a LoRA against itself, the catalogue in its order, PEFT's own."""
    found = [lora(8)]
    for entry in CATALOGUE:
        found.append(Method(entry.title, entry.name.upper(), **_SETTINGS.get(entry.name, {})))
        if entry.name == "trp":
            settings = {"form": "factors", "r": 8}
            found.append(Method(f"{entry.title}, factors", "TRP", settings, rare=_SETTINGS["trp"]["rare"]))
    return [*found, *_LANDMARKS]
