"""Seconds of a training step of SmolLM2 with LoRA of rank 64, in bfloat16 and in float32 in turns.

    PYTHONPATH=. OMP_NUM_THREADS=1 python records/2026-11-30-bfloat16-on-processors/steps.py

Run as many at once as the bench has workers.
"""

from __future__ import annotations

import json
import time

import torch
from peft import LoraConfig

from bench.evidence import tasks
from bench.evidence.learners import causal, learner, narrow
from bench.machine import commit, machine

WARM, STEPS, BATCH = 2, 10, 8


def main() -> None:
    model = learner("smollm2")
    model.packs = True
    data = tasks.load("phonemes")
    batches = model.batches(data, model.usable(data, data.train)[: BATCH * (WARM + STEPS)], BATCH)
    bits = {
        name: has for name, has in torch.cpu.get_capabilities().items() if name in ("avx512_bf16", "amx_bf16", "bf16")
    }
    print(json.dumps({"kind": "machine", "commit": commit(), **bits, **machine()}))
    for precision in ("bfloat16", "float32") * 3:
        causal.choose_precision = narrow.choose_precision = lambda device, chosen=precision: chosen
        adapted = model.attach(LoraConfig(r=64, target_modules=model.targets, task_type=model.task_type), data, 0)
        model.narrow(adapted)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        for step, batch in enumerate(batches):
            if step == WARM:
                start = time.perf_counter()
            model.loss(adapted, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        print(
            json.dumps({"precision": precision, "seconds": round((time.perf_counter() - start) / STEPS, 3)}), flush=True
        )


if __name__ == "__main__":
    main()
