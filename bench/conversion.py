"""Extraction from a full fine-tune and conversion of other adapters: `python -m bench.conversion [--quick]`.

In one run and in turns, one thread: ours beside what its users have otherwise, all from the same matrices. Errors are
told as ratios to the least one that the rank allows. See `arms` for what is compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.clock import Arm, in_turns
from bench.machine import machine
from bench.tables import table
from lora_squeeze.demo.model import find_model, load_model
from lora_squeeze.demo.task import batches, read_words, split_words, take
from lora_squeeze.formats import lycoris, to_peft
from lora_squeeze.formats.dense import extract
from lora_squeeze.formats.dense_svd import leading_factors
from lora_squeeze.lowrank import LowRank

Factors = tuple[Tensor, Tensor]
SECTIONS = ("matrix", "adapters", "model")
OURS, WIDE, FULL, CLAMP = "ours", "ours, bound 128", "full SVD", "full SVD, clamp 0.99"
BOUND = 128  # the default of `extract`


# --- the ways to truncate a dense matrix ----------------------------------------------------------------------------


def dense_svd(dW: Tensor, rank: int) -> Factors:
    """A full decomposition in float32, the root of S on each side: what mergekit-extract-lora does per matrix."""
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * Vh[:rank]


def clamped_svd(dW: Tensor, rank: int) -> Factors:
    """A full decomposition, S on the left, entries cut at their 0.99 quantile: extraction as sd-scripts defines it."""
    U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
    B, A = U[:, :rank] * S[:rank], Vh[:rank]
    entries = torch.cat([B.flatten(), A.flatten()])
    bound = float(entries.kthvalue(max(1, round(0.99 * entries.numel()))).values)
    return B.clamp(-bound, bound), A.clamp(-bound, bound)


def svd_lowrank(dW: Tensor, rank: int) -> Factors:
    """torch.svd_lowrank with oversampling 10 and two power iterations."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        U, S, V = torch.svd_lowrank(dW, q=rank + 10, niter=2)
    root = S[:rank].sqrt()
    return U[:, :rank] * root, root[:, None] * V[:, :rank].mT


def bounded(dW: Tensor, rank: int) -> Factors:
    """Ours as `extract` and a squeeze do it by default: to the bound, then to the rank."""
    small = LowRank(*leading_factors(dW, BOUND)).truncate(rank)
    return small.B, small.A


ARMS: dict[str, Callable[[Tensor, int], Factors]] = {
    OURS: leading_factors,
    WIDE: bounded,
    FULL: dense_svd,
    CLAMP: clamped_svd,
    "svd_lowrank": svd_lowrank,
}


def spectra(size: int, rank: int) -> dict[str, Tensor]:
    """Square matrices: of exactly this rank, with slowly falling singular values, and without any order."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(size, size, generator=g)).Q for _ in range(2))
    i = torch.arange(1, size + 1)
    low = torch.randn(size, rank, generator=g) @ torch.randn(rank, size, generator=g)
    return {"exact rank": low, "1 / sqrt i": (U * i**-0.5) @ V, "noise": torch.randn(size, size, generator=g)}


def measure_matrices(
    sizes: tuple[int, ...], rank: int, repeats: int, tell: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Seconds, errors and kept energies by size and spectrum."""
    rows = []
    for size in sizes:
        repeats = repeats if size < 4096 else 1
        for name, dW in spectra(size, rank).items():
            tell(f"{size} x {size}, {name}")
            found = {arm: run(dW, rank) for arm, run in ARMS.items()}
            # The time does not depend on the numbers: it is taken for one spectrum.
            timed = (
                in_turns({a: Arm(lambda r=r, M=dW: r(M, rank), repeats) for a, r in ARMS.items()})
                if name == "noise"
                else {}
            )
            rows.append(
                {
                    "size": size,
                    "spectrum": name,
                    "rank": rank,
                    "seconds": {arm: samples.to_json() for arm, samples in timed.items()},
                    **errors(dW, found, rank),
                }
            )
    return rows


def errors(dW: Tensor, found: Mapping[str, Factors], rank: int) -> dict[str, Any]:
    """Relative errors of these factors, beside the least one, and kept energies beside the largest."""
    S, norm = torch.linalg.svdvals(dW).double(), float(dW.double().norm())
    distance = {arm: float((B.double() @ A.double() - dW.double()).norm()) / norm for arm, (B, A) in found.items()}
    best_energy = float(S[:rank].square().sum()) / norm**2
    return {
        "error": distance,
        "best_error": float(S[rank:].norm()) / norm,
        "energy_of_best": {arm: (1 - e * e) / best_energy for arm, e in distance.items()},
    }


def matrices_table(rows: list[dict[str, Any]]) -> str:
    """Times as ratios to ours, then errors."""
    times = [
        [f"{row['size']} x {row['size']}, rank {row['rank']}", f"{1e3 * row['seconds'][OURS]['median']:.0f} ms"]
        + [f"{row['seconds'][arm]['median'] / row['seconds'][OURS]['median']:.1f} x" for arm in list(ARMS)[1:]]
        for row in rows
        if row["seconds"]
    ]
    quality = [
        [f"{row['size']}, {row['spectrum']}", f"{row['best_error']:.2e}"]
        + [f"{row['error'][arm]:.2e} ({100 * row['energy_of_best'][arm]:.2f} %)" for arm in ARMS]
        for row in rows
    ]
    return (
        table(["matrix", OURS, *list(ARMS)[1:]], times)
        + "\n\nRelative error (kept energy as a share of the best):\n\n"
        + table(["matrix", "least", *ARMS], quality)
    )


# --- other adapters, beside PEFT's conversion -----------------------------------------------------------------------


def measure_adapters(size: int, rank: int, repeats: int) -> list[dict[str, Any]]:
    """PEFT's convert_to_lora and ours on a model of one layer."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    kinds = {
        "LoRA 64": LoraConfig(r=64, lora_alpha=64, target_modules=["0"]),
        "LoHa 8": LoHaConfig(r=8, alpha=8, target_modules=["0"]),
        "LoKr 8": LoKrConfig(r=8, alpha=8, target_modules=["0"]),
    }
    return [_adapter(name, config, size, rank, repeats) for name, config in kinds.items()]


def _adapter(name: str, config: Any, size: int, rank: int, repeats: int) -> dict[str, Any]:
    from peft import convert_to_lora, get_peft_model

    model = get_peft_model(nn.Sequential(nn.Linear(size, size, bias=False)), config)
    g = torch.Generator().manual_seed(1)
    parts: dict[str, Tensor] = {}
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.requires_grad:
                weight.copy_(torch.randn(weight.shape, generator=g) / weight.shape[-1] ** 0.5)
                parts[key.split(".")[3]] = weight.detach()
    dW: Tensor = model.get_submodule("base_model.model.0").get_delta_weight("default").detach()

    def theirs() -> Factors:
        A, B = convert_to_lora(model, rank=rank)[1].values()
        return B, A

    def ours() -> Factors:
        if "lora_A" in parts:
            update = LowRank(parts["lora_B"], parts["lora_A"])
        else:
            update = LowRank(*lycoris.factors(lycoris.form_of(parts) or "", parts))
        small = update.truncate(rank)
        return small.B * small.scale, small.A

    samples = in_turns({OURS: Arm(ours, 3 * repeats), "PEFT": Arm(theirs, repeats)})
    found = errors(dW, {OURS: ours(), "PEFT": theirs()}, rank)
    return {"name": name, "size": size, "rank": rank, "seconds": {k: s.to_json() for k, s in samples.items()}, **found}


def adapters_table(rows: list[dict[str, Any]]) -> str:
    """Times and errors."""
    cells = []
    for row in rows:
        mine, theirs = (row["seconds"][arm]["median"] for arm in (OURS, "PEFT"))
        shown = [f"{row['error'][arm]:.6f}" for arm in (OURS, "PEFT")]
        name = f"{row['name']}, {row['size']} x {row['size']}, to rank {row['rank']}"
        cells.append([name, f"{1e3 * mine:.1f} ms", f"{theirs / mine:.0f} x", f"{row['best_error']:.6f}", *shown])
    return table(["adapter", OURS, "PEFT", "least error", "error, ours", "error, PEFT"], cells)


# --- a real full fine-tune ------------------------------------------------------------------------------------------


def measure_model(scratch: Path, steps: int, ranks: tuple[int, ...], tell: Callable[[str], None]) -> dict[str, Any]:
    """Tune all weights of SmolLM2-135M for a while, extract the change, and see what is left of what was learned."""
    base = find_model(tell)
    model, tokenizer = load_model(base, torch.device("cpu"))
    train, held = split_words(read_words(), 0)
    losses, wanted = {}, take(held, tokenizer, 300)
    losses["base"] = _loss(model, wanted)
    _tune(model, take(train, tokenizer, 10 * steps), tell)
    losses["tuned"] = _loss(model, wanted)
    model.save_pretrained(scratch / "tuned")
    model.bfloat16().save_pretrained(scratch / "tuned-bf16")
    result: dict[str, Any] = {"origin": base.origin, "steps": steps, "loss": losses, "runs": []}
    for rank in ranks:
        tell(f"rank {rank}")
        result["runs"].append(_extractions(base.path, scratch, rank, tell))
        losses[f"rank {rank}"] = _adapted_loss(base, scratch / OURS, wanted)
    result["bfloat16"] = list(extract(scratch / "tuned-bf16", base.path).notes)
    return result


def _tune(model: Any, data: Any, tell: Callable[[str], None]) -> None:
    from lora_squeeze.demo.settings import Settings
    from lora_squeeze.demo.train import train

    def report(step: int, loss: float) -> None:
        if step % 25 == 0:
            tell(f"step {step}: loss {loss:.3f}")

    train(
        model, list(batches(data, 10)), Settings("", seed=0, steps=0, learning_rate=5e-5), torch.device("cpu"), report
    )


@torch.no_grad()
def _loss(model: Any, data: Any) -> float:
    from lora_squeeze.demo.task import IGNORED
    from lora_squeeze.demo.train import completion_logits

    model.eval()
    total = count = 0.0
    for batch in batches(data, 50):
        logits, labels = completion_logits(model, batch).flatten(0, 1), batch.labels.flatten()
        total += float(nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


def _adapted_loss(base: Any, adapter: Path, data: Any) -> float:
    from peft import PeftModel

    model, _ = load_model(base, torch.device("cpu"))
    return _loss(PeftModel.from_pretrained(model, str(adapter)), data)


def _ours(base: Path, scratch: Path, rank: int, bound: int, name: str) -> None:
    """From two folders to a PEFT folder."""
    to_peft.adopt(extract(scratch / "tuned", base, max_rank=bound)).squeeze(rank=rank).save(scratch / name, force=True)


def _full(base: Path, scratch: Path, rank: int) -> None:
    """Full decompositions of the same layers, from two files to one."""
    one, other = (load_file(folder / "model.safetensors") for folder in (scratch / "tuned", base))
    found = {}
    for key in _layers(other):
        B, A = dense_svd(one[key] - other[key], rank)
        path = f"base_model.model.{key.removesuffix('.weight')}"
        found |= {f"{path}.lora_B.weight": B.contiguous(), f"{path}.lora_A.weight": A.contiguous()}
    (scratch / FULL).mkdir(exist_ok=True)
    save_file(found, scratch / FULL / "adapter_model.safetensors")


def _layers(tensors: Mapping[str, Tensor]) -> list[str]:
    return [key for key, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in key]


def _extractions(base: Path, scratch: Path, rank: int, tell: Callable[[str], None]) -> dict[str, Any]:
    """Seconds in turns, and the relative error over all layers together."""
    runs: dict[str, Callable[[], object]] = {
        OURS: lambda: _ours(base, scratch, rank, rank, OURS),
        WIDE: lambda: _ours(base, scratch, rank, BOUND, WIDE),
        FULL: lambda: _full(base, scratch, rank),
    }
    samples = in_turns({arm: Arm(run, 3, warm_up=False) for arm, run in runs.items()})
    tell("errors")
    one, other = (load_file(folder / "model.safetensors") for folder in (scratch / "tuned", base))
    factors = {arm: load_file(scratch / arm / "adapter_model.safetensors") for arm in runs}
    total, squares = 0.0, dict.fromkeys((*runs, CLAMP), 0.0)
    for key in _layers(other):
        dW, path = one[key] - other[key], f"base_model.model.{key.removesuffix('.weight')}"
        pairs = {arm: [found[f"{path}.lora_{side}.weight"] for side in "BA"] for arm, found in factors.items()}
        for arm, (B, A) in {**pairs, CLAMP: clamped_svd(dW, rank)}.items():
            squares[arm] += float((dW.double() - B.double() @ A.double()).square().sum())
        total += float(dW.double().square().sum())
    error = {arm: (square / total) ** 0.5 for arm, square in squares.items()}
    return {"rank": rank, "seconds": {arm: found.to_json() for arm, found in samples.items()}, "error": error}


def model_table(result: dict[str, Any]) -> str:
    """Seconds, errors and losses by rank."""
    rows = []
    for run in result["runs"]:
        seconds = {arm: samples["median"] for arm, samples in run["seconds"].items()}
        shown = [f"{error:.5f}" for error in run["error"].values()]
        loss = result["loss"][f"rank {run['rank']}"]
        times = [f"{seconds[arm] / seconds[OURS]:.1f} x" for arm in (WIDE, FULL)]
        rows.append([str(run["rank"]), f"{seconds[OURS]:.1f} s", *times, *shown, f"{loss:.4f}"])
    arms = (OURS, WIDE, FULL, CLAMP)
    head = ["rank", OURS, WIDE, FULL, *(f"error: {arm}" for arm in arms), "held-out loss"]
    loss = result["loss"]
    return (
        f"{result['origin']}, {result['steps']} steps with all weights; held-out loss {loss['base']:.4f} before, "
        f"{loss['tuned']:.4f} after, nats a token\n\n{table(head, rows)}\n\n"
        + "\n".join(f"- bfloat16: {note}" for note in result["bfloat16"])
    )


def main() -> None:
    """Measure, print the tables, keep them if asked."""
    parser = argparse.ArgumentParser(prog="python -m bench.conversion", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small matrices, few steps: about two minutes")
    parser.add_argument(
        "--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to measure; default all"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FOLDER", help="keep result.json, log.txt and these scripts there"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log: list[str] = []
    begun = time.perf_counter()

    def say(text: str) -> None:
        print(text, flush=True)
        log.append(text)

    def tell(what: str) -> None:
        say(f"[{time.perf_counter() - begun:6.0f} s] {what}")

    quick = arguments.quick
    result: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "machine": machine()}
    say("\n".join(f"- {key}: {value}" for key, value in result["machine"].items()))
    if "matrix" in arguments.only:
        result["matrix"] = measure_matrices((512, 1024) if quick else (1024, 2048, 4096), 16, 3, tell)
        say(f"\n## matrix\n\n{matrices_table(result['matrix'])}\n")
    if "adapters" in arguments.only:
        result["adapters"] = measure_adapters(512 if quick else 2048, 16, 3)
        say(f"\n## adapters\n\n{adapters_table(result['adapters'])}\n")
    if "model" in arguments.only:
        with tempfile.TemporaryDirectory(prefix="lora-squeeze-bench-") as scratch:
            result["model"] = measure_model(Path(scratch), 10 if quick else 60, (16,) if quick else (16, 64), tell)
        say(f"\n## model\n\n{model_table(result['model'])}\n")
    if arguments.record:
        _record(arguments.record, result, log)


def _record(folder: Path, result: dict[str, Any], log: list[str]) -> None:
    """Keep figures, tables and the scripts as they were run."""
    (folder / "bench").mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "log.txt").write_text("\n".join(log) + "\n")
    for name in ("__init__", "clock", "conversion", "machine", "tables", "targets"):
        shutil.copy(Path(__file__).with_name(f"{name}.py"), folder / "bench")


if __name__ == "__main__":
    main()
