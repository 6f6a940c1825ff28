"""One process of distributed training runs: started by torchrun from the tests, writes what it saw as JSON.

Usage: distributed_run.py FOLDER CASES, the cases as JSON: name -> {"kind": ddp | fsdp2 | trainer, ...options}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from training_cases import SOURCE, STEPS, TARGET, Counting, adamw, batch, model

from lora_squeeze.schedule import make_schedule
from lora_squeeze.training.live import live_modules
from lora_squeeze.training.squeezer import Squeezer


def wrapped(kind: str) -> nn.Module:
    network = model()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(network)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layer in network.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh)
    sharded: nn.Module = fully_shard(network, mesh=mesh)
    return sharded


def plain_loop(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Each process trains its half of every batch."""
    network = wrapped(kind)
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, make_schedule(SOURCE, TARGET, STEPS), **options)
    me, losses = distributed.get_rank(), []
    for step in range(STEPS):
        loss = network(**{key: value[2 * me : 2 * me + 2] for key, value in batch(step).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        squeezer.step()
        mean = loss.detach().clone()
        distributed.all_reduce(mean)
        losses.append(mean.item() / distributed.get_world_size())
    ranks = sorted({m.rank() for m in live_modules(network, "default")})
    squeezer.finish()
    modules = live_modules(network, "default")
    updates = {m.name: m.update().dense().tolist() for m in modules}
    return {
        "losses": losses,
        "history": squeezer.history,
        "ranks": ranks,
        "widths": sorted({m.width for m in modules}),
        "updates": updates,
    }


def trainer(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    from transformers import Trainer, TrainingArguments

    from lora_squeeze.training.callback import SqueezeCallback

    resume = folder / "trainer" / "checkpoint-6" if options.pop("resume", False) else None
    callback = SqueezeCallback(TARGET, **options)
    where = folder / ("resumed" if resume else "trainer")
    settings: dict[str, Any] = dict(
        max_steps=STEPS, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        use_cpu=True, save_strategy="steps", save_steps=6, logging_steps=1, ddp_backend="gloo",
    )  # fmt: skip
    arguments = TrainingArguments(str(where), **settings)
    run = Trainer(model(), arguments, train_dataset=Counting(), callbacks=[callback])
    run.train(resume_from_checkpoint=str(resume) if resume else None)
    run.save_model(str(where / "final"))
    modules = live_modules(run.model, "default")
    return {
        "losses": [entry["loss"] for entry in run.state.log_history if "loss" in entry],
        "history": callback.history,
        "widths": sorted({m.width for m in modules}),
        "updates": {m.name: m.update().dense().tolist() for m in modules},
    }


def main(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for name, options in cases.items():
        kind = options.pop("kind")
        found = trainer(folder, options) if kind == "trainer" else plain_loop(kind, options)
        (folder / f"{name}-{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
