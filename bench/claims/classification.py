"""Can few trained numbers learn what a LoRA of rank 8 learns? MiniLM-L6 as a classifier, all methods side by side.

Two tasks of the evidence bench: sentiment of tweets and reviews, and the number of syllables of a word. 200 steps of 16
examples, three seeds, a learning rate for each arm chosen on validation data of sentiment; accuracy on test data. The
update is on query and value of the 6 layers, 12 matrices of 384 x 384, but for the arms "ffn", on the second half of
the feed-forward part (384 x 1536). A new linear head is trained in full in every arm; "head" trains nothing else.

Differences are of runs that are paired by task and seed, in points of accuracy, with the standard error over all pairs:
the two tasks differ in what is learned, so six pairs are not six draws of one thing. A claim is not decided where its
bound lies within one standard error. "energy" is the share of the trained update's squared singular values that a plain
LoRA of that rank keeps. The seconds are those in the training loops of the final runs, on one core each.

The cards of the methods ask for more shots, tasks and starts than this; what is not here has not been measured.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.claims.outcome import Finding, Outcome, Row, difference, mean_and_error, shown
from bench.evidence.__main__ import main as evidence
from bench.evidence.rows import read_rows
from lora_squeeze.demo.model import user_cache

TASKS = ("sentiment", "syllables")
RANKS = (64, 32, 16, 8, 4, 2, 1)
_QV = r".*attention\.self\.(query|value)"
_FFN = r".*layer\.\d+\.output\.dense"


def _lora(rank: int, targets: str = _QV) -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": targets}


def _on_qv(**settings: Any) -> dict[str, Any]:
    return {"target_modules": _QV, **settings}


ARMS: dict[str, dict[str, Any]] = {
    "LORA r=8": _lora(8),
    "LORA r=4": _lora(4),
    "LORA r=1": _lora(1),
    "LORA head": {**_lora(1), "lora_alpha": 0},
    "NOLA": _on_qv(r=8, bases=192),
    "TERA": _on_qv(),
    "VERA": _on_qv(r=256),
    "LOLDU": _on_qv(),
    "SVFIT": _on_qv(),
    "SVFIT r=48": _on_qv(r=48),
    "LORAXS r=20": _on_qv(r=20),
    "LORAXS r=8": _on_qv(r=8),
    "LORAXS random": _on_qv(r=8, basis="random"),
    "UNILORA": _on_qv(r=4, theta_d_length=2304),
    "PROJLORA layerwise": _on_qv(r=4, length=2304, projection="layerwise"),
    "PROJLORA nonisometric": _on_qv(r=4, length=2304, projection="nonisometric"),
    "BLOCKLORA shared": _on_qv(r=8, alpha=16, blocks=8, mode="shared"),
    "BLOCKLORA input": _on_qv(r=8, alpha=16, blocks=8, mode="input_blocks"),
    "WARA": _on_qv(r=16, alpha=32),
    "SHIRA": _on_qv(r=8),
    "PACA": _on_qv(r=16),
    "SNELLA": _on_qv(r=8, sparsity=0.8),
    "SNELL": _on_qv(r=8, sparsity=0.8, kernel="snell"),
    "RANDLORARANKS full": _on_qv(r=48, together=1),
    "RANDLORARANKS low": _on_qv(r=48),
    "LORA ffn": _lora(3, _FFN),
    "HYDRA ffn": {"r": 2, "r_sequential": 4, "alpha": 4, "target_modules": _FFN},
    "SORA": _on_qv(r=8, threshold=1e-3),
    "BLORA": _on_qv(r=8, alpha=16),
    "MAESTRO": _on_qv(r=8, alpha=16),
    "DYLORA": _on_qv(r=8, alpha=16),
    "MATRYOSHKA": _on_qv(r=8),
    "DIFFORA": _on_qv(r=8, alpha=16),
    "TRP factors": _on_qv(form="factors", r=8, alpha=16),
    "TRP dense": _on_qv(r=8),
    "LIFT": _on_qv(r=8, refresh=50),
    "SARA": _on_qv(fraction=1 / 24),
    "QUERYABLE": _on_qv(r=8, alpha=16),
    "RANDLORA": _on_qv(r=48),
}  # fmt: skip
_NAMES = {"SNELL": "SNELLA"}  # arms whose first word is not the method's name
_QUICK = ("LORA r=1", "NOLA")


def run(quick: bool) -> Outcome:
    """Go on where the last run was cut, and say what was found."""
    if quick:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--steps", "2", "--examples", "16", "--workers", "1"]
            return _told(_measured(Path(folder), _QUICK, TASKS[1:], (0,), (2,), options))
    return _told(_measured(user_cache() / "claims", tuple(ARMS), TASKS, (0, 1, 2), RANKS, []))


def _measured(
    folder: Path, arms: Sequence[str], tasks: Sequence[str], seeds: Sequence[int], ranks: Sequence[int],
    options: list[str],
) -> list[Row]:  # fmt: skip
    """The rows of the evidence bench, of test data; rates are tuned on the first task."""
    specs = [f"{_NAMES.get(arm.split()[0], arm.split()[0])} {arm}{json.dumps(ARMS[arm])}" for arm in arms]
    rates, rows = folder / "classification-rates.jsonl", folder / "classification.jsonl"
    common = ["--model", "minilm", "--ranks", *map(str, ranks), "--methods", "--peft", *specs, *options]
    evidence(["tune", "--tasks", tasks[0], "--rows", str(rates), "--guess", "3e-3", *common])
    files = ["--rates", str(rates), "--rows", str(rows)]
    evidence(["run", "--tasks", *tasks, "--seeds", *map(str, seeds), *files, *common])
    return [row for row in read_rows([rows]) if row["kind"] == "result" and row["method"] != "base"]


def _told(rows: list[Row]) -> Outcome:
    own = [row for row in rows if not row["method"].endswith(" squeezed")]
    by_arm: dict[str, dict[tuple[str, int], float]] = {}
    for row in own:
        by_arm.setdefault(_arm(row), {})[row["task"], row["seed"]] = 100 * row["accuracy"]
    outcome = Outcome(findings=list(_findings(by_arm)))
    for arm in by_arm:
        mine = [row for row in own if _arm(row) == arm]
        told: Row = {"part": "accuracy, in points", "arm": arm, "numbers": _numbers(mine[0]), "rate": mine[0]["rate"]}
        for task in dict.fromkeys(row["task"] for row in mine):
            told[task], told[f"{task}, error"] = mean_and_error(
                [100 * row["accuracy"] for row in mine if row["task"] == task]
            )
        outcome.rows.append(told)
    outcome.rows += _small(rows)
    outcome.seconds = round(sum(row["seconds"] for row in own), 1)
    return outcome


def _small(rows: Sequence[Row]) -> Iterator[Row]:
    """What becomes of an arm as a plain LoRA, by rank."""
    whole = {(_arm(row), row["task"], row["seed"]): row for row in rows if not row["method"].endswith(" squeezed")}
    squeezed = [row for row in rows if row["method"].endswith(" squeezed")]
    for part, value in (
        ("energy that a plain LoRA keeps, mean over tasks and seeds", lambda row, _: row["energy"]),
        ("points of accuracy that it gains", lambda row, before: 100 * (row["accuracy"] - before["accuracy"])),
    ):
        for arm in dict.fromkeys(_arm(row) for row in squeezed):
            told: Row = {"part": part, "arm": arm}
            for rank in sorted({row["rank"] for row in squeezed}, reverse=True):
                mine = [row for row in squeezed if _arm(row) == arm and row["rank"] == rank]
                told[f"rank {rank}"] = fmean(value(row, whole[arm, row["task"], row["seed"]]) for row in mine)
            yield told


def _arm(row: Row) -> str:
    """Without "peft:" and the name of the method, which comes before the arm's own."""
    return str(row["method"]).removesuffix(" squeezed").split(" ", 1)[1]


def _numbers(row: Row) -> int:
    """Trained ones beside the head; of those at scale 0, none counts."""
    if row["options"].get("lora_alpha") == 0:
        return 0
    classes = {"sentiment": 3, "syllables": 4}.get(row["task"], 0)
    return round(row["parameter_steps"] / row["steps"]) - classes * 385


def _findings(by_arm: dict[str, dict[tuple[str, int], float]]) -> Iterator[Finding]:
    """Claims whose arms are there."""
    for claim, ours, theirs, margin in (
        ("NOLA with half of the numbers of LoRA r=1 is at most 1 point below it", "NOLA", "LORA r=1", -1),
        ("TeRA with a seventeenth of the numbers of LoRA r=1 is at most 2 points below it", "TERA", "LORA r=1", -2),
        ("SVFit of all singular values is at most 1 point below LoRA r=8", "SVFIT", "LORA r=8", -1),
        ("SVFit of all singular values is not below LoRA r=1", "SVFIT", "LORA r=1", 0),
        ("LoRA-XS r=20 is at most 1.5 points below LoRA r=8", "LORAXS r=20", "LORA r=8", -1.5),
        ("LoRA-XS between singular vectors is above one between random ones", "LORAXS r=8", "LORAXS random", 0),
        ("Uni-LoRA is at most 1 point below LoRA r=4", "UNILORA", "LORA r=4", -1),
        ("one vector for all layers is not below one for each layer", "UNILORA", "PROJLORA layerwise", 0),
        ("an isometric projection is not below another", "UNILORA", "PROJLORA nonisometric", 0),
        ("Block-LoRA in blocks of the input is at most 1 point below LoRA r=8", "BLOCKLORA input", "LORA r=8", -1),
        ("WaRA is at most 1 point below LoRA r=8", "WARA", "LORA r=8", -1),
        ("SHiRA is at most 1 point below LoRA r=8", "SHIRA", "LORA r=8", -1),
        ("PaCA is at most 1 point below LoRA r=8", "PACA", "LORA r=8", -1),
        ("SNELLA is not below SNELL", "SNELLA", "SNELL", 0),
        ("RandLoRA of full rank is above rank 48 at equal numbers", "RANDLORARANKS full", "RANDLORARANKS low", 0),
        ("Hydra is at most 0.5 points below LoRA", "HYDRA ffn", "LORA ffn", -0.5),
        ("SoRA is at most 1 point below LoRA r=8", "SORA", "LORA r=8", -1),
        ("Bayesian-LoRA is at most 1 point below LoRA r=8", "BLORA", "LORA r=8", -1),
        ("Maestro is at most 1 point below LoRA r=8", "MAESTRO", "LORA r=8", -1),
    ):
        if ours in by_arm and theirs in by_arm:
            mean, error = difference(*_paired(by_arm, ours, theirs))
            yield Finding(claim, f"{shown(mean, error, 2)} points", _above(mean, error, margin))
    if {"BLOCKLORA shared", "LORA r=1"} <= by_arm.keys():
        mean, error = difference(*_paired(by_arm, "BLOCKLORA shared", "LORA r=1"))
        claim = "Block-LoRA with a shared A of one row is LoRA r=1 by another name: within 1 point of it"
        yield Finding(claim, f"{shown(mean, error, 2)} points", _above(-abs(mean), error, -1))
    if {"LOLDU", "LORA r=8", "LORA head"} <= by_arm.keys():
        reached, lora = _paired(by_arm, "LOLDU", "LORA r=8")
        _, head = _paired(by_arm, "LOLDU", "LORA head")
        mean, error = difference(reached, [0.9 * a + 0.1 * b for a, b in zip(lora, head, strict=True)])
        claim = "LoLDU has at least 90 % of what LoRA r=8 gains over the head alone"
        yield Finding(claim, f"{shown(mean, error, 2)} points from these 90 %", _above(mean, error, 0))


def _paired(by_arm: dict[str, dict[tuple[str, int], float]], *arms: str) -> tuple[list[float], list[float]]:
    first, second = (by_arm[arm] for arm in arms)
    keys = sorted(first.keys() & second.keys())
    return [first[key] for key in keys], [second[key] for key in keys]


def _above(mean: float, error: float, margin: float) -> bool | None:
    """Whether a difference is not below a margin; None within one standard error of it."""
    return mean >= margin if abs(mean - margin) > error else None
