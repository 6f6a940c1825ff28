"""The knobs that all methods share, spelled as in PEFT."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from peft import PeftConfig


@dataclass
class AdapterConfig(PeftConfig):
    """What every parameterisation is configured with; a method adds its own fields and defaults.

    Args:
        r: rank, or what the method says of it.
        alpha: the update is multiplied by alpha / r, or as the method says; None: the method's default.
        dropout: share of the inputs of the update that are zeroed while training.
        target_modules: names of modules, or a regular expression of whole names; "all-linear" takes all linear layers.
        exclude_modules: names or a regular expression of modules to leave alone.
        layers_to_transform: numbers of the layers to adapt; None: all.
        layers_pattern: name of the list of layers, where it cannot be told.
        modules_to_save: modules trained and stored whole, such as a new head.
        bias: "none", "all" or "<method>_only": which biases are trained.
        init_weights: True begins with the base model's own function; False draws the zero parts at random too, which is
            of use in tests alone.
        seed: of what is drawn and not trained: frozen bases, masks, projections, and the order of a controller's draws.
            What is trained begins with numbers of torch's global generator, as in PEFT: `torch.manual_seed`.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: Any = None
    exclude_modules: Any = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    bias: str = "none"
    init_weights: bool = True
    seed: int = 0
    method: ClassVar[str] = field(default="", init=False)  # set by `register`
    taken: ClassVar[bool] = False  # by a method of PEFT's own

    @property
    def static(self) -> bool:
        """Whether the update is the same for all inputs, so that it can be merged and converted."""
        return True

    def own_settings(self, lr: float) -> dict[str, dict[str, Any]]:
        """Of parameters that are not to be trained as the others are: pattern of the last part of the name -> settings.

        Args:
            lr: learning rate of the others.
        """
        return {}

    def __post_init__(self) -> None:
        parent: Any = super()
        parent.__post_init__()
        from peft.utils.peft_types import PeftType

        if self.taken:
            raise ValueError(f"the PEFT installed has a method {self.method.upper()} of its own; use that")

        self.peft_type = PeftType(self.method.upper())
        for name in ("target_modules", "exclude_modules"):
            given = getattr(self, name)
            setattr(self, name, set(given) if isinstance(given, list) else given)
        if self.r is not None and self.r < 1:
            raise ValueError(f"r must be a whole number from 1, got {self.r}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform: which of these layers are adapted")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("layers_to_transform cannot be used with a regular expression as target_modules")
