"""An adapter of another format as one of mlx-lm."""

from __future__ import annotations

import re
from dataclasses import replace

from lora_squeeze.adapter import Adapter, Module
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.borrowed import Borrowed, Origin, check_carries_nothing, check_layers, common_scale
from lora_squeeze.formats.mlx import GROUP, Layout, MlxFormat

_BLOCK = re.compile(r"^(?:.+\.)?(?:layers|h|blocks)\.\d+\.(?P<inner>.+)$")


def adopt(adapter: Adapter) -> Adapter:
    """The same updates as an mlx-lm adapter.

    Args:
        adapter: of another format; names as in transformers, which mlx-lm has too for models of the Llama kind.

    Returns:
        A lazy Adapter that saves as an mlx-lm folder, all modules at one rank: lower ones are filled up with zeros.

    Raises:
        LoraSqueezeError: a convolution, experts, a carried tensor, or layers that PEFT repeats: mlx-lm takes none of
            them.

    Notes:
        The configuration names the modules for all blocks of the model (num_layers -1). Where a block has no update of
        its own, mlx-lm makes a fresh one there, which is zero.
    """
    if isinstance(adapter.format, MlxFormat):
        return adapter
    check_carries_nothing(adapter, "mlx-lm", "leave them out with extras=False (--without-extras)")
    check_layers(adapter, "mlx-lm")
    if adapter.config.get("alora_invocation_tokens"):
        raise LoraSqueezeError(
            "an activated LoRA acts from its invocation tokens on; mlx-lm would apply it to all tokens"
        )
    modules = {name: _module(module) for name, module in adapter.modules.items()}
    keys = {match["inner"] if (match := _BLOCK.match(name)) else name for name in modules}
    return replace(
        adapter,
        modules=modules,
        source=Borrowed(adapter, {name: Origin(name) for name in modules}),
        format=MlxFormat(),
        config={"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": {"keys": sorted(keys)}},
        default_scale=common_scale(adapter),
        metadata={"format": "mlx"},
        dropped=(),
        companions=(),
    )


def _module(module: Module) -> Module:
    if module.kind not in ("linear", "embedding"):
        raise LoraSqueezeError(
            f"{module.name}: {module.kind} has no counterpart that is sure in mlx-lm; convert the other modules alone "
            "with exclude= (--exclude)"
        )
    return replace(
        module, group=GROUP, floor=1, step=1, layout=Layout(f"{module.name}.lora_a", f"{module.name}.lora_b")
    )
