"""The neighbours of LoRA-Squeeze: other low-rank methods, each of which ends in an update that becomes a plain LoRA."""

from lora_squeeze.methods.catalogue import CATALOGUE as CATALOGUE
from lora_squeeze.methods.catalogue import Entry as Entry
