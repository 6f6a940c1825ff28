"""SHiRA, switching: is an adapter of 1 % of the entries in and out of the weights sooner than a LoRA is fused?

The real shapes of SmolLM2-135M (all 210 linear layers of its blocks, random numbers in them) and single square layers
of width 1024 and 4096, in float32 and bfloat16. Three arms, timed in turns in one process (by what its one thread
spends), each once in and once out again:

- SHiRA: `ShiraSwitch.on` and `.off` with a random mask, PEFT's `ShiraConfig(r)` of about 1 % of the entries;
- LoRA, PEFT: `merge_adapter` and `unmerge_adapter` of rank 32;
- LoRA, least: W += s B A and W -= s B A by one fused product each, without the matrix B A in memory and without PEFT:
  the least work there is to do.

The paper: 5 to 16 times faster than fusing a LoRA, for single layers on a CPU. The claim here: at least 3 times faster
than PEFT; the same is asked of the least work. The ratio is the median over rounds of LoRA's time to SHiRA's of the
same round, with its quartiles; it decides where both quartiles are on one side of 3.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.claims.outcome import Finding, Outcome, Row
from bench.clock import Arm, Samples, in_turns
from lora_squeeze.methods.adapters.shira_switch import ShiraSwitch

BOUND, LORA_RANK = 3.0, 32
BLOCK = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
LORAS = {"LoRA, PEFT": "PEFT's fusing", "LoRA, least": "the least work of fusing"}


@dataclass(frozen=True)
class Case:
    """Layers that are switched together; r of SHiRA gives about 1 % of their entries."""

    name: str
    shapes: list[tuple[int, int]]  # out, in
    r: int
    rounds: int


CASES = (
    Case("SmolLM2, 210 layers", BLOCK * 30, 4, 15),
    Case("width 1024", [(1024, 1024)], 5, 40),
    Case("width 4096", [(4096, 4096)], 20, 25),
)


def run(quick: bool) -> Outcome:
    """Milliseconds in and out, and ratios."""
    outcome = Outcome()
    for case in (Case("one block of SmolLM2", BLOCK, 4, 3),) if quick else CASES:
        for dtype in (torch.float32, torch.bfloat16):
            kind = str(dtype).removeprefix("torch.")
            arms, share = _arms(case, dtype)
            times = in_turns({name: Arm(run, case.rounds) for name, run in arms.items()})
            outcome.rows += [_row(case, kind, name, found, share) for name, found in times.items()]
            for lora, words in LORAS.items():
                claim = f"{case.name}, {kind}: at least {BOUND:g} times faster than {words}"
                outcome.findings.append(_finding(claim, times["SHiRA"], times[lora]))
    return outcome


def _arms(case: Case, dtype: torch.dtype) -> tuple[dict[str, Any], float]:
    """What is timed, and the share of entries that SHiRA changes."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    with torch.random.fork_rng():
        torch.manual_seed(0)
        names = r"layers\.\d+"
        sparse = get_peft_model(_layers(case, dtype), ShiraConfig(r=case.r, init_weights=False, target_modules=names))
        low: Any = get_peft_model(
            _layers(case, dtype), LoraConfig(r=LORA_RANK, init_lora_weights=False, target_modules=names)
        )
    switch = ShiraSwitch(sparse)
    factors = [_Factors(layer, dtype) for layer in low.modules() if hasattr(layer, "lora_A")]

    def shira() -> None:
        switch.on("default")
        switch.off()

    def peft() -> None:
        low.merge_adapter()
        low.unmerge_adapter()

    def least() -> None:
        for sign in (1, -1):
            for factor in factors:
                factor.add(sign)

    entries = sum(p.numel() for p in sparse.parameters() if p.requires_grad)
    share = entries / sum(rows * columns for rows, columns in case.shapes)
    return {"SHiRA": shira, "LoRA, PEFT": peft, "LoRA, least": least}, share


def _layers(case: Case, dtype: torch.dtype) -> nn.Module:
    made = nn.ModuleList(nn.Linear(columns, rows, bias=False, dtype=dtype) for rows, columns in case.shapes)
    return nn.ModuleDict({"layers": made})


class _Factors:
    """A and B of one layer in the dtype of W, and W."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.weight = layer.get_base_layer().weight.detach()
        self.A = layer.lora_A["default"].weight.detach().to(dtype)
        self.B = layer.lora_B["default"].weight.detach().to(dtype)
        self.scale = layer.scaling["default"]

    def add(self, sign: int) -> None:
        self.weight.addmm_(self.B, self.A, alpha=sign * self.scale)


def _row(case: Case, kind: str, name: str, found: Samples, share: float) -> Row:
    low, middle, high = statistics.quantiles(found.cpu, n=4, method="inclusive")
    return {
        "part": "milliseconds to put on and take off", "layers": case.name, "dtype": kind, "arm": name,
        "median": 1e3 * middle, "lower quartile": 1e3 * low, "upper quartile": 1e3 * high,
        "share of entries": share if name == "SHiRA" else 1.0,
    }  # fmt: skip


def _finding(claim: str, ours: Samples, theirs: Samples) -> Finding:
    ratios = [b / a for a, b in zip(ours.cpu, theirs.cpu, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    figures = f"{middle:.2f} times, quartiles {low:.2f} and {high:.2f}"
    return Finding(claim, figures, True if low >= BOUND else False if high < BOUND else None)
