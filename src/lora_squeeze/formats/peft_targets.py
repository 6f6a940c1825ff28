"""What a PEFT configuration asks for by name: target modules, target parameters, modules to save."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lora_squeeze.formats.expressions import Expression
from lora_squeeze.formats.safetensors_header import quoted

NESTED = ".base_layer"
TIED_HEADS = frozenset({"lm_head", "embed_out", "output_projection"})
_MAX_PARTS, _MAX_ENDING = 32, 256  # of a name in modules_to_save; letters of a part that others may end with


class Targets:
    """What target_modules and target_parameters ask for."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        targets = config.get("target_modules") or []
        self._modules = Expression(targets) if isinstance(targets, str) else frozenset(targets)
        self._heads = TIED_HEADS if config.get("ensure_weight_tying") else frozenset[str]()
        self._parameters: dict[str, set[str]] = defaultdict(set)
        for target in config.get("target_parameters") or []:
            module, _, name = target.rpartition(".")
            self._parameters[module].add(name)

    def parameters(self, path: str) -> list[str]:
        """Names of the parameters of this module that are asked for; none if the module itself is a target.

        A bare name such as "gate_up_proj" could stand in any module. PEFT never adapts a module and a parameter of it,
        so what target_modules lists is a module.
        """
        if not self._parameters or self._is_module(path.removesuffix(f"{NESTED}.out_proj")):
            return []
        ends = ("", *_ends(path.replace(NESTED, "")))
        return sorted(set().union(*(self._parameters[end] for end in ends if end in self._parameters)))

    def _is_module(self, path: str) -> bool:
        """Whether target_modules names this module, as PEFT looks it up; or PEFT adds it as the tied output head."""
        if path.rpartition(".")[2] in self._heads:
            return True
        if isinstance(self._modules, Expression):
            return self._modules.matches(path)
        return any(end in self._modules for end in _ends(path))


def _ends(path: str) -> list[str]:
    """The path, and what is left of it behind each dot."""
    return [path, *(path[i + 1 :] for i, letter in enumerate(path) if letter == ".")]


class Saved:
    """What modules_to_save lists: each name is that of all modules whose path ends with it, "norm" of "layernorm" too.

    Names of more than 32 parts, and first parts of more than 256 letters but for whole ones, are not looked for.
    """

    def __init__(self, names: Sequence[str]) -> None:
        # last part -> the one before -> ... -> ".": length -> first parts of that length, 0 for the long ones
        self._parts: dict[str, Any] = {}
        for name in names:
            first, *rest = name.split(".")
            inner = self._parts
            for part in reversed(rest):
                inner = inner.setdefault(part, {})
            length = len(first) if len(first) <= _MAX_ENDING else 0
            inner.setdefault(".", {}).setdefault(length, set()).add(first)
        self.cause = f"modules_to_save lists {quoted(', '.join(names))[1:-1]}: trained in full"

    def holds(self, name: str) -> bool:
        """Whether the module, or the tensor in one, belongs to them."""
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            inner = self._parts
            for part in reversed(parts[max(0, end - _MAX_PARTS) : end]):
                if any(part[-length:] in firsts for length, firsts in inner.get(".", {}).items()):
                    return True
                if part not in inner:
                    break
                inner = inner[part]
        return False
