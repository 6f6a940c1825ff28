"""Methods that find the rank while training: PEFT tuners with a controller around the optimiser's steps."""

from lora_squeeze.methods.ranks.blora import BloraConfig as BloraConfig
from lora_squeeze.methods.ranks.diffora import DifforaConfig as DifforaConfig
from lora_squeeze.methods.ranks.dylora import DyloraConfig as DyloraConfig
from lora_squeeze.methods.ranks.maestro import MaestroConfig as MaestroConfig
from lora_squeeze.methods.ranks.matryoshka import MatryoshkaConfig as MatryoshkaConfig
from lora_squeeze.methods.ranks.sora import SoraConfig as SoraConfig
from lora_squeeze.methods.ranks.trp import TrpConfig as TrpConfig
