"""What a map of an architecture consists of: layers under their original names, and what they are in diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from lora_squeeze.errors import LoraSqueezeError


@dataclass(frozen=True)
class Layer:
    """A layer of the original model, which is one layer of the diffusers model or several.

    Args:
        name: dotted path in the original model.
        targets: dotted paths in the diffusers model, in the order of their rows.
        parts: rows of each target in multiples of in_features; () where there is one target.
        halves: for one target: the two halves of its rows stand in the other order there. True, False, or None where
            they do if there are 2 in_features rows and do not if there are more.
        kernel: of a convolution; () for linear layers. It is no part of what a name means: files show it, but for some
            of LyCORIS.
    """

    name: str
    targets: tuple[str, ...]
    parts: tuple[int, ...] = ()
    halves: bool | None = False
    kernel: tuple[int, ...] = field(default=(), compare=False)

    def swapped(self, out_features: int, in_features: int) -> bool:
        """Whether the halves of the rows change places between the two models.

        Raises:
            LoraSqueezeError: they do, and there is an odd number of rows.
        """
        swapped = out_features == 2 * in_features if self.halves is None else self.halves
        if swapped and out_features % 2:
            raise LoraSqueezeError(
                f"{self.name} has {out_features} rows, where a shift and a scale of one size are expected: is it of "
                "another architecture?"
            )
        return swapped


@dataclass(frozen=True)
class Component:
    """A model of a pipeline and the ways to write the names of its layers.

    Args:
        name: of the component in diffusers: unet, transformer, text_encoder, ...
        layers: all Linear and convolution layers.
        prefixes: in front of an original path with "_" for ".".
        dotted: in front of an original path as it is.
        flat: in front of a diffusers path with "_" for ".".
        by_target: what is written is the first of `flat` with the diffusers path; else the first of `prefixes` with the
            original path.
    """

    name: str
    layers: tuple[Layer, ...]
    prefixes: tuple[str, ...]
    dotted: tuple[str, ...] = ()
    flat: tuple[str, ...] = ()
    by_target: bool = False

    def written(self, layer: Layer) -> str:
        """The name of a layer that is written."""
        prefix, path = (self.flat[0], layer.targets[0]) if self.by_target else (self.prefixes[0], layer.name)
        return prefix + path.replace(".", "_")


@dataclass(frozen=True)
class Place:
    """Where a name of a file stands.

    Args:
        component: name of the component.
        layer: its layer; for names of diffusers, that layer alone.
    """

    component: str
    layer: Layer

    @property
    def targets(self) -> tuple[str, ...]:
        """Neutral names: component and path."""
        return tuple(f"{self.component}.{target}" for target in self.layer.targets)


@dataclass(frozen=True)
class Share:
    """What a neutral name is in a file.

    Args:
        component: name of the component.
        name: that is written.
        layer: its layer.
        index: position among the layer's targets.
    """

    component: str
    name: str
    layer: Layer
    index: int


@dataclass(frozen=True)
class Architecture:
    """A family of pipelines whose layers have the same names.

    Args:
        name: what it is called on the command line.
        components: the first one is the denoiser, whose name may be left out of a neutral name.
    """

    name: str
    components: tuple[Component, ...]

    @cache  # noqa: B019 - a handful of constants
    def places(self) -> Mapping[str, Place]:
        """Every name that is read -> what it is."""
        found: dict[str, Place] = {}
        for component in self.components:
            for layer in component.layers:
                place = Place(component.name, layer)
                flat_name = layer.name.replace(".", "_")
                found |= {prefix + flat_name: place for prefix in component.prefixes}
                found |= {prefix + layer.name: place for prefix in component.dotted}
                for target in layer.targets:
                    place = Place(component.name, Layer(target, (target,), kernel=layer.kernel))
                    flat_name = target.replace(".", "_")
                    found |= {prefix + flat_name: place for prefix in component.flat}
                    found |= {f"{component.name}.{path}": place for path in _spellings(target)}
        return found

    @cache  # noqa: B019
    def shares(self) -> Mapping[str, Share]:
        """Every neutral name -> what is written."""
        found: dict[str, Share] = {}
        for component in self.components:
            fronts = ["", f"{component.name}."] if component is self.components[0] else [f"{component.name}."]
            for layer in component.layers:
                for index, target in enumerate(layer.targets):
                    share = Share(component.name, component.written(layer), layer, index)
                    found |= {front + path: share for front in fronts for path in _spellings(target)}
        return found


def _spellings(target: str) -> tuple[str, ...]:
    """transformers 5 has no `text_model.` in front of the layers of a CLIPTextModel, releases before it do."""
    return (target, target.removeprefix("text_model.")) if target.startswith("text_model.") else (target,)
