"""Other parameterisations of the update, registered with PEFT."""

from lora_squeeze.methods.adapters.block_lora import BlockLoraConfig as BlockLoraConfig
from lora_squeeze.methods.adapters.hydra_adapter import HydraConfig as HydraConfig
from lora_squeeze.methods.adapters.lift import LiftConfig as LiftConfig
from lora_squeeze.methods.adapters.loldu import LolduConfig as LolduConfig
from lora_squeeze.methods.adapters.lora_xs import LoraXsConfig as LoraXsConfig
from lora_squeeze.methods.adapters.nola import NolaConfig as NolaConfig
from lora_squeeze.methods.adapters.paca import PacaConfig as PacaConfig
from lora_squeeze.methods.adapters.projlora import ProjLoraConfig as ProjLoraConfig
from lora_squeeze.methods.adapters.queryable_lora import QueryableConfig as QueryableConfig
from lora_squeeze.methods.adapters.randlora_ranks import RandLoraRanksConfig as RandLoraRanksConfig
from lora_squeeze.methods.adapters.sara import SaraConfig as SaraConfig
from lora_squeeze.methods.adapters.snella import SnellaConfig as SnellaConfig
from lora_squeeze.methods.adapters.snella_budget import SnellaController as SnellaController
from lora_squeeze.methods.adapters.svfit import SvfitConfig as SvfitConfig
from lora_squeeze.methods.adapters.tera import TeraConfig as TeraConfig
from lora_squeeze.methods.adapters.wara import WaraConfig as WaraConfig
