"""One process of distributed training runs: started by torchrun from the tests, writes what it saw as JSON.

Usage: distributed_run.py FOLDER CASES, the cases as JSON: name -> {"kind": ddp | fsdp2 | trainer, ...options}.
"""

from __future__ import annotations

import json
import os
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
    squeezer = Squeezer(network, optimizer, make_schedule(SOURCE, TARGET, STEPS, steps="equal"), **options)
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
    callback = SqueezeCallback(TARGET, **{"steps": "equal"} | options)
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


def method(name: str, settings: dict[str, Any], processes: int, me: int) -> dict[str, Any]:
    """A method with a controller, each process with its part of every batch; alone for one process."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils.peft_types import PeftType
    from peft_models import seeded
    from training_cases import small_llama

    import lora_squeeze.methods.adapters
    import lora_squeeze.methods.ranks  # noqa: F401 (both register their methods)
    from lora_squeeze.methods.control import controller_for, deltas_of, parameter_groups

    config = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name.upper())]
    made = config(target_modules=["q_proj", "up_proj"], **settings)
    inner = seeded(lambda: get_peft_model(small_llama(), made)).train()
    network: nn.Module = inner
    if processes > 1:
        network = nn.parallel.DistributedDataParallel(inner, find_unused_parameters=True)
    optimizer = torch.optim.AdamW(parameter_groups(inner, 1e-2), eps=1e-4)  # rounding of tiny gradients stays small
    controller = controller_for(inner, STEPS, optimizer)
    rows = 4 // processes
    for step in range(STEPS):
        controller.before_forward()
        network(**{key: value[rows * me : rows * (me + 1)] for key, value in batch(step).items()}).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    return {"updates": {key: delta.eval().weight().tolist() for key, delta in deltas_of(inner).items()}}


def main(folder: Path, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    for name, options in cases.items():
        kind = options.pop("kind")
        if kind == "method":
            found = method(**options, processes=distributed.get_world_size(), me=distributed.get_rank())
        else:
            found = trainer(folder, options) if kind == "trainer" else plain_loop(kind, options)
        (folder / f"{name}-{distributed.get_rank()}.json").write_text(json.dumps(found))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    # All is written. The interpreter is not taken down: gloo's threads may hold on to tensors, and then torch aborts
    # (pytorch/pytorch, pull request 179291).
    os._exit(0)
