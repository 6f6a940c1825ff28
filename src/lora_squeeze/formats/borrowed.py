"""The updates of another adapter under other names: what a conversion writes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.lowrank import LowRank


@dataclass(frozen=True, eq=False)
class Origin:
    """Where an update comes from.

    Args:
        name: of the module in the other adapter.
        rows: which rows of its dW, in which order; None for all as they are.
    """

    name: str
    rows: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Borrowed:
    """Source of a converted adapter.

    Args:
        adapter: the other one.
        origins: name of a module here -> where it comes from.
        keys: key of a carried tensor here -> its key there.
    """

    adapter: Adapter
    origins: Mapping[str, Origin]
    keys: Mapping[str, str] = field(default_factory=dict)

    def updates(self, modules: Sequence[Module]) -> list[LowRank]:
        """The updates of these modules. Those that come from one module share its factors."""
        origins = [self.origins[module.name] for module in modules]
        names = list(dict.fromkeys(origin.name for origin in origins))
        found = dict(
            zip(names, self.adapter.source.updates([self.adapter.modules[name] for name in names]), strict=True)
        )
        return [_rows(found[origin.name], origin.rows) for origin in origins]

    def pieces(self, name: str) -> Iterator[Tensor]:
        """A carried tensor."""
        return self.adapter.pieces(self.keys[name])

    def digest(self) -> str | None:
        """sha256 of the file that the other adapter is read from."""
        return self.adapter.source.digest()


def _rows(update: LowRank, rows: Tensor | None) -> LowRank:
    return update if rows is None else replace(update, B=update.B.index_select(-2, rows.to(update.device)))


def common_scale(adapter: Adapter) -> float:
    """The scale of all modules where they have one above 0, else 1: what a format with one scale per file declares."""
    scales = {module.scale for module in adapter.modules.values()}
    return scale if len(scales) == 1 and (scale := next(iter(scales))) > 0 else 1.0


def check_layers(adapter: Adapter, reader: str) -> None:
    """Refuse an adapter of a model with repeated layers, for a format whose readers repeat none.

    Raises:
        LoraSqueezeError: its modules would be those of other layers.
    """
    if adapter.config.get("layer_replication"):
        raise LoraSqueezeError(
            f"layer_replication: the adapter is for a model in which PEFT repeats layers; {reader} would add its "
            "updates to other layers: merge it into the model with PEFT instead"
        )


def check_carries_nothing(adapter: Adapter, reader: str, way_out: str) -> None:
    """Refuse tensors beside the factors, for a format whose readers do not take them.

    Raises:
        LoraSqueezeError: names the first of them and the way out.
    """
    for extra in adapter.extras.values():
        raise LoraSqueezeError(
            f"{extra.name}: {reader} takes no tensors beside the factors ({extra.kind}: {extra.cause}); {way_out}"
        )
