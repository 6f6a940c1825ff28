"""Two processes under torchrun: they squeeze alike, and train as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_run import method
from training_cases import SOURCE, STEPS, TARGET, adamw, model, train

import lora_squeeze
from lora_squeeze.schedule import make_schedule
from lora_squeeze.training.live import live_modules
from lora_squeeze.training.squeezer import Squeezer

_SCRIPT = Path(__file__).with_name("distributed_run.py")


AWARE = {"data_aware": True, "allocate": "global"}
CASES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "ddp aware": {"kind": "ddp", **AWARE},
    "fsdp2": {"kind": "fsdp2"},
    "fsdp2 aware": {"kind": "fsdp2", **AWARE},
    "trainer": {"kind": "trainer"},
    "resumed": {"kind": "trainer", "resume": True},
}
METHODS: dict[str, dict[str, Any]] = {
    "dylora": {"r": 4},
    "matryoshka": {"r": 4},
    "sora": {"r": 4, "threshold": 0.05, "l1": 0.1},
    "trp": {"form": "factors", "r": 4, "period": 3, "energy": 0.8},
    "maestro": {"r": 4, "lasso": 1e-3, "threshold": 0.005, "shrinks": 3},
    "blora": {"r": 4, "gates": 0.0, "warmup": 0.25, "penalty": 0.1, "gates_lr": 0.5},
    "diffora": {"r": 4, "search": 0.7},
    "lift": {"r": 2, "refresh": 4},
    "snella": {"r": 4, "final_sparsity": 0.6, "rounds": 3},
}
CASES |= {name: {"kind": "method", "name": name, "settings": settings} for name, settings in METHODS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases in one launch: most of the time goes into imports."""
    made = tmp_path_factory.mktemp("distributed")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0", str(_SCRIPT), str(made), json.dumps(CASES),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return made


def seen(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two processes saw."""
    first, second = (json.loads((folder / f"{name}-{i}.json").read_text()) for i in (0, 1))
    return first, second


def alone() -> tuple[list[float], dict[str, list[list[float]]]]:
    network = model()
    optimizer = adamw(network)
    squeezer = Squeezer(network, optimizer, make_schedule(SOURCE, TARGET, STEPS, steps="equal"))
    losses = train(network, optimizer, squeezer, range(STEPS))
    return losses, {m.name: m.update().dense().tolist() for m in live_modules(network, "default")}


@pytest.mark.parametrize("name", ["ddp", "ddp aware", "fsdp2", "fsdp2 aware"])
def test_two_processes_train_as_one(name: str, folder: Path) -> None:
    first, second = seen(folder, name)
    assert first["updates"] == second["updates"], "both hold the same factors, bit for bit"
    assert [e["rank"] for e in first["history"]] == [e["rank"] for e in second["history"]]
    losses, updates = alone()
    if "aware" not in name:  # the statistics of two halves are another mean than those of the whole
        assert first["losses"] == pytest.approx(losses, rel=1e-4)
        for module, dense in updates.items():
            mine = torch.tensor(first["updates"][module])
            assert torch.allclose(mine, torch.tensor(dense), atol=1e-2 * float(mine.abs().max())), module
        assert first["ranks"] == [TARGET], "unused directions are zero, whatever the shapes"
    assert first["losses"][-1] < first["losses"][0]
    # DDP lets go of the parameters at the end; FSDP does not, so they keep their shapes.
    assert (max(first["widths"]) == SOURCE) == name.startswith("fsdp2")


def test_the_trainer_under_ddp_ends_with_a_small_adapter(folder: Path) -> None:
    first, second = seen(folder, "trainer")
    assert first["updates"] == second["updates"]
    assert first["widths"] == [TARGET]
    assert [e["rank"] for e in first["history"]] == [4, 2]
    for key in ("loss_before", "loss_after"):
        assert [e[key] for e in first["history"]] == [e[key] for e in second["history"]], "the mean over both"
    saved = lora_squeeze.load(folder / "trainer" / "final")
    assert saved.rank == TARGET
    for name, dense in first["updates"].items():
        assert torch.allclose(saved.update(name).dense(), torch.tensor(dense), atol=1e-6)
    # A checkpoint on the way has the source's shapes with zeros in the unused directions: squeezing it loses nothing.
    half = lora_squeeze.load(folder / "trainer" / "checkpoint-6")
    assert half.rank == SOURCE
    assert half.squeeze(rank=4).report.energy == pytest.approx(1.0, abs=1e-9)


def test_a_resumed_trainer_under_ddp_ends_alike(folder: Path) -> None:
    whole, resumed = seen(folder, "trainer")[0], seen(folder, "resumed")[0]
    assert resumed["updates"] == seen(folder, "resumed")[1]["updates"]
    assert [e["rank"] for e in resumed["history"]] == [4, 2], "the history is that of the whole run"
    assert resumed["losses"] == pytest.approx(whole["losses"], rel=1e-5)
    assert resumed["widths"] == [TARGET]


@pytest.mark.parametrize("name", METHODS)
def test_a_controller_makes_two_processes_one(folder: Path, name: str) -> None:
    first, second = seen(folder, name)
    assert first == second
    one = method(name, METHODS[name], processes=1, me=0)["updates"]
    assert any(torch.tensor(update).abs().max() > 1e-3 for update in one.values())
    for key, update in first["updates"].items():
        found, wanted = torch.tensor(update), torch.tensor(one[key])
        assert (found - wanted).norm() <= 1e-3 * wanted.norm()
