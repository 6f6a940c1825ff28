"""The values that vLLM takes for --max-lora-rank, and the one that it starts with, as JSON."""

import json
import os
from typing import get_args

out = os.dup(1)
os.dup2(2, 1)  # vLLM logs to standard output
from vllm.config.lora import LoRAConfig, MaxLoRARanks  # noqa: E402

with os.fdopen(out, "w") as file:
    json.dump([sorted(get_args(MaxLoRARanks)), LoRAConfig().max_lora_rank], file)
