"""How other readers will read an adapter: rules as data, one file per family of readers."""

from lora_squeeze.readers.verdict import READERS as READERS
from lora_squeeze.readers.verdict import Finding as Finding
from lora_squeeze.readers.verdict import Verdict as Verdict
from lora_squeeze.readers.verdict import check as check
