"""One PEFT tuner for all parameterisations: a method is a configuration and the update that it computes.

A method's file has two classes and one call:

    @dataclass
    class NolaConfig(AdapterConfig): ...       the knobs, with their defaults
    class NolaDelta(FactorDelta): ...          parameters, and dW from them
    register("nola", NolaConfig, NolaDelta)    PEFT knows it from here on

Then `get_peft_model(model, NolaConfig(...))`, `save_pretrained`, `PeftModel.from_pretrained`, several adapters side by
side, `merge_and_unload` and `lora-squeeze convert` work as for PEFT's own methods.
"""

from lora_squeeze.methods.adapters.engine.config import AdapterConfig as AdapterConfig
from lora_squeeze.methods.adapters.engine.delta import Delta as Delta
from lora_squeeze.methods.adapters.engine.delta import FactorDelta as FactorDelta
from lora_squeeze.methods.adapters.engine.delta import Site as Site
from lora_squeeze.methods.adapters.engine.register import register as register
