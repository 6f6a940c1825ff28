"""Adapters of PEFT's other methods, and of the variants of its LoRA, as plain LoRA factors."""

from lora_squeeze.formats.peft_methods.load import load as load
from lora_squeeze.formats.peft_methods.table import TABLE as TABLE
from lora_squeeze.formats.peft_methods.table import Row as Row
from lora_squeeze.formats.peft_methods.table import row_of as row_of
