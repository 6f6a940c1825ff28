"""Bytes that vLLM's slots for adapters take: those of the tensors that its layers hold for them.

Reads {"model", "max_lora_rank", "max_loras", "targets": [name] or null} as JSON from standard input; writes the bytes.
"""

import json
import os
import sys

if __name__ == "__main__":  # the processes that vLLM starts import this file
    out = os.dup(1)
    os.dup2(2, 1)  # vLLM logs to standard output
    from vllm import LLM
    from vllm_slot_bytes import slot_bytes

    job = json.load(sys.stdin)
    engine = LLM(
        job["model"],
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=job["max_lora_rank"],
        max_loras=job["max_loras"],
        lora_target_modules=job["targets"],
    )
    found = sum(engine.apply_model(slot_bytes))
    with os.fdopen(out, "w") as file:
        json.dump(found, file)
