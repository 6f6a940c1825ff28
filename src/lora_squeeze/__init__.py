"""Train a LoRA at any rank, deploy it at the rank you choose.

The public names below are imported when they are first used, so that `import lora_squeeze` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_squeeze.adapter import Adapter as Adapter
    from lora_squeeze.adaptive import Adaptive as Adaptive
    from lora_squeeze.combine import merge as merge
    from lora_squeeze.combine import rank_up as rank_up
    from lora_squeeze.combine import subtract as subtract
    from lora_squeeze.conversion import convert as convert
    from lora_squeeze.errors import LoraSqueezeError as LoraSqueezeError
    from lora_squeeze.hub import load as load
    from lora_squeeze.lowrank import LowRank as LowRank
    from lora_squeeze.post_squeeze import squeeze as squeeze
    from lora_squeeze.readers import check as check
    from lora_squeeze.report import Report as Report
    from lora_squeeze.report import inspect as inspect
    from lora_squeeze.schedule import Schedule as Schedule
    from lora_squeeze.schedule import make_schedule as make_schedule
    from lora_squeeze.training.ask import calibrate as calibrate
    from lora_squeeze.training.callback import SqueezeCallback as SqueezeCallback
    from lora_squeeze.training.inplace import squeeze_ as squeeze_
    from lora_squeeze.training.squeezer import Squeezer as Squeezer

    __version__: str

_HOME = {
    "load": "hub",
    "inspect": "report",
    "squeeze": "post_squeeze",
    "convert": "conversion",
    "check": "readers",
    "merge": "combine",
    "subtract": "combine",
    "rank_up": "combine",
    "Adapter": "adapter",
    "LowRank": "lowrank",
    "Report": "report",
    "LoraSqueezeError": "errors",
    "Adaptive": "adaptive",
    "Schedule": "schedule",
    "make_schedule": "schedule",
    "SqueezeCallback": "training.callback",
    "Squeezer": "training.squeezer",
    "squeeze_": "training.inplace",
    "calibrate": "training.ask",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("lora-squeeze")
    if name in _HOME:
        return getattr(import_module(f"lora_squeeze.{_HOME[name]}"), name)
    raise AttributeError(f"module 'lora_squeeze' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
