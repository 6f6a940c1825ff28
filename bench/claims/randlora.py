"""Is a full rank worth more than a low one at equal numbers? RandLoRA (arXiv 2502.00987) against LoRA.

Least squares on an update of 64 x 64, whose target has a flat spectrum (all singular values 1) or a decaying one
(1 / i), with random singular vectors. RandLoRA is PEFT's with the paper's scale, r = 4 (1088 numbers) and r = 5 (897);
LoRA is r = 8 (1024), as trained and as the best one that exists. Then the paper's ablation at 1088 numbers: the same
bases multiplied in one group (rank 4), in groups of two (rank 32), and each by itself (full rank).

Adam for 1000 steps, a rate for each arm and target chosen on another target, three targets. "left" is the share of the
target's energy that is not reached.
"""

from __future__ import annotations

from typing import Any

from peft import RandLoraConfig

from bench.claims.arms import Arm, lora
from bench.claims.matrices import LAYER, best_row, decaying, fitted, flat
from bench.claims.outcome import Finding, Outcome, difference, mean_and_error, shown
from lora_squeeze.methods.adapters.randlora_paper import set_paper_scale
from lora_squeeze.methods.adapters.randlora_ranks import RandLoraRanksConfig

WIDTH = 64
LORA_RANK = 8
BASES = {4: "1088 numbers", 5: "897 numbers"}


def randlora(r: int) -> Arm:
    """PEFT's, with the paper's scale."""

    def config(seed: int) -> Any:
        return RandLoraConfig(r=r, target_modules=[LAYER], projection_prng_key=seed)

    return Arm(f"RandLoRA r={r}", config, set_paper_scale)


def grouped(r: int, together: int | None, name: str) -> Arm:
    """The paper's ablation."""
    return Arm(name, lambda seed: RandLoraRanksConfig(r=r, together=together, target_modules=[LAYER], seed=seed))


def run(quick: bool) -> Outcome:
    """Both directions, and the ablation."""
    outcome = Outcome()
    seeds, steps = ((0, 1), 4) if quick else ((0, 1, 2), 1000)
    _against_lora(outcome, seeds, steps)
    _ablation(outcome, seeds, steps)
    return outcome


def _against_lora(outcome: Outcome, seeds: tuple[int, ...], steps: int) -> None:
    part = "RandLoRA and LoRA"
    found: dict[tuple[str, str], list[float]] = {}
    for spectrum, problems in (("flat", flat(WIDTH)), ("1 / i", decaying(WIDTH))):
        row, found["best", spectrum] = best_row(problems, seeds, LORA_RANK, part, spectrum=spectrum)
        outcome.rows.append(row)
        for arm in (lora(LORA_RANK, [LAYER]), *(randlora(r) for r in BASES)):
            fit = fitted(arm, problems, seeds, steps)
            found[arm.name, spectrum] = fit.residuals
            outcome.rows.append(fit.row(part, spectrum=spectrum, arm=arm.name))
    for r, numbers in BASES.items():
        ours = found[f"RandLoRA r={r}", "flat"]
        mean, error = mean_and_error(ours)
        best = mean_and_error(found["best", "flat"])[0]
        outcome.findings.append(
            Finding(
                f"flat spectrum: RandLoRA with {numbers} leaves less than 0.85, no LoRA of 1024 less than 0.875",
                f"{shown(mean, error)} against {best:.3f}",
                mean + 2 * error < 0.85 and best > 0.87,
            )
        )
    ours, theirs = found["RandLoRA r=4", "1 / i"], found["LoRA r=8", "1 / i"]
    outcome.findings.append(
        Finding(
            "spectrum 1 / i: the trained LoRA leaves less than half of what RandLoRA leaves",
            f"{shown(*mean_and_error(theirs))} against {shown(*mean_and_error(ours))}, "
            f"the best LoRA {mean_and_error(found['best', '1 / i'])[0]:.3f}",
            max(theirs) < 0.5 * min(ours),
        )
    )


def _ablation(outcome: Outcome, seeds: tuple[int, ...], steps: int) -> None:
    part = "the same numbers at three ranks"
    names = {"rank 4": None, "rank 32": 2, "full rank": 1}
    found: dict[tuple[str, str], list[float]] = {}
    for spectrum, problems in (("flat", flat(WIDTH)), ("1 / i", decaying(WIDTH))):
        for name, together in names.items():
            fit = fitted(grouped(4, together, name), problems, seeds, steps)
            found[name, spectrum] = fit.residuals
            outcome.rows.append(fit.row(part, spectrum=spectrum, arm=name))
    for spectrum in ("flat", "1 / i"):
        mean, error = difference(found["rank 4", spectrum], found["full rank", spectrum])
        outcome.findings.append(
            Finding(
                f"spectrum {spectrum}: of equal numbers, full rank leaves less than rank 4",
                ", ".join(f"{name} {mean_and_error(found[name, spectrum])[0]:.3f}" for name in names)
                + f"; rank 4 less full rank {shown(mean, error)}",
                None if abs(mean) <= 2 * error else mean > 0,
            )
        )
