"""DiffoRA (arXiv 2502.08905): does the search find the layers that need an update, and is it worth its steps?

A residual network of three blocks, each with four layers of width 48 in two pairs, x + down(relu(up(x))), with normal
inputs and ten classes; it has learned the labels of a random network. The teacher is this network with updates of rank
8 in two layers of each block, drawn anew for each seed, as large as their weights; 2048 examples of it are the training
data. Arms, all of 800 steps of 64 examples, search included, and of equal trained parameters (gates apart):

- a plain LoRA of rank 4 in all twelve layers;
- DiffoRA of rank 8, keeping half of the layers of each block; the first fifth of the steps is the search, the rest are
  without an update (`share_unselected=False`), factors begin anew. Gates learn on a tenth of the training data, which
  the factors do not see while the search lasts, with a rate of 3e-2: the default 3e-3 is for longer searches;
- a plain LoRA of rank 8 in half of the layers of each block: chosen at random; by the largest gradient norm of the
  base's weights over all training data, which costs one backward pass; and the true ones, as the bound.

Eight seeds; each arm has its own learning rate, by the validation loss on two other seeds. Accuracy on 4096 test
examples in points. Ranking: share of pairs of a planted and another layer of one block in which the planted one has the
larger gate. To see whether the length of the search is what it lacks, the ranking is told of one of 400 steps, too:
this was added after a first run.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bench.claims.outcome import Finding, Outcome, Row, difference, mean_and_error, shown
from bench.claims.problems import fit
from bench.claims.teacher import (
    CLASSES,
    TUNED,
    Arm,
    Batch,
    Problem,
    adapted,
    batches_of,
    cross_entropy,
    linear,
    lora,
    loss_and_accuracy,
    network,
)
from lora_squeeze.methods.control import controller_for, deltas_of
from lora_squeeze.methods.ranks.diffora import DifforaConfig, choose, kind_and_block
from lora_squeeze.methods.seeds import seeded

_BLOCKS, _WIDTH, _R = 3, 48, 8
_KINDS = ("up0", "down0", "up1", "down1")
_NAMES = [f"blocks.{block}.{kind}" for block in range(_BLOCKS) for kind in _KINDS]
_SEARCH, _GATE_RATE, _GATE_DATA = 0.2, 3e-2, 0.1
_COUNTS = {"train": 2048, "validation": 1024, "test": 4096}


class _Block(nn.Module):
    def __init__(self, *seed: object) -> None:
        super().__init__()
        for kind in _KINDS:
            self.add_module(kind, linear(_WIDTH, _WIDTH, seeded(0, *seed, kind)))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(_KINDS[::2], _KINDS[1::2], strict=True):
            x = x + self.get_submodule(down)(torch.relu(self.get_submodule(up)(x)))
        return x


class _Residual(nn.Module):
    def __init__(self, *seed: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(*seed, number) for number in range(_BLOCKS))
        self.head = linear(_WIDTH, CLASSES, seeded(0, *seed, "head"))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def run(quick: bool) -> Outcome:
    """Measure all arms."""
    steps, seeds, tuned = (8, range(2), TUNED[:1]) if quick else (800, range(8), TUNED)
    before = min(400, steps)

    def problem(seed: int) -> Problem:
        return _planted(seed, before)[0]

    ways: dict[str, Callable[[int, float], nn.Module]] = {
        "LoRA r = 4, all layers": lambda seed, rate: _lora(problem(seed), steps, seed, rate, _NAMES, _R // 2),
        "DiffoRA": lambda seed, rate: _diffora(problem(seed), steps, seed, rate),
    }
    masks: dict[str, Callable[[int], list[str]]] = {
        "random": lambda seed: _best(_drawn(seed, "mask")),
        "gradient norm": lambda seed: _best(_gradient_norms(problem(seed))),
        "true layers": lambda seed: _planted(seed, before)[1],
    }

    def masked(mask: Callable[[int], list[str]]) -> Callable[[int, float], nn.Module]:
        return lambda seed, rate: _lora(problem(seed), steps, seed, rate, mask(seed), _R)

    ways |= {name: masked(mask) for name, mask in masks.items()}
    scores, rates, models = {}, {}, {}
    for name, way in ways.items():
        rates[name], models[name] = Arm(way, problem).trained(seeds, tuned)
        scores[name] = [
            loss_and_accuracy(m, problem(s).data["test"])[1] for s, m in zip(seeds, models[name], strict=True)
        ]
    true = {seed: _planted(seed, before)[1] for seed in seeds}
    chosen = {name: {seed: mask(seed) for seed in seeds} for name, mask in masks.items()}
    gates = {seed: _gates(model) for seed, model in zip(seeds, models["DiffoRA"], strict=True)}
    longer = {seed: _gates(_diffora(problem(seed), steps // 2, seed, rates["DiffoRA"], 1.0)) for seed in seeds}
    chosen["DiffoRA"] = {seed: _best(of) for seed, of in gates.items()}
    hits = {name: [len({*of[seed]} & {*true[seed]}) for seed in seeds] for name, of in chosen.items()}
    ranking = {
        "DiffoRA": [_ranking(gates[seed], true[seed]) for seed in seeds],
        "longer search": [_ranking(longer[seed], true[seed]) for seed in seeds],
        "gradient norm": [_ranking(_gradient_norms(problem(seed)), true[seed]) for seed in seeds],
    }
    parameters = {name: _trained(of[0]) for name, of in models.items()}
    return Outcome(_rows(scores, rates, hits, ranking, parameters), _findings(scores, ranking, steps))


@cache
def _planted(seed: int, steps: int) -> tuple[Problem, list[str]]:
    """The problem, and the layers in which the teacher differs."""
    base, task = _Residual("residual", seed), network([_WIDTH, _WIDTH, CLASSES], "first task, residual", seed)
    fit(base, cross_entropy, [_labelled(task, 256, seed, "first", i, centred=True) for i in range(steps)], 3e-3,
        controlled=False)  # fmt: skip
    base.requires_grad_(False)
    teacher, planted = copy.deepcopy(base), _best(_drawn(seed, "planted"))
    for name in planted:
        layer: Any = teacher.get_submodule(name)
        weight, generator = layer.weight, seeded(seed, "planted", name)
        update = torch.randn(_WIDTH, _R, generator=generator) @ torch.randn(_R, _WIDTH, generator=generator)
        weight.data += weight.norm() / update.norm() * update
    data = {part: _labelled(teacher, count, seed, part) for part, count in _COUNTS.items()}
    return Problem(base, data), planted


@torch.no_grad()
def _labelled(model: nn.Module, count: int, *seed: Any, centred: bool = False) -> Batch:
    x = torch.randn(count, _WIDTH, generator=seeded(*seed))
    logits = model(x)
    return x, (logits - logits.mean(0) if centred else logits).argmax(-1)


def _drawn(seed: int, what: str) -> dict[str, float]:
    return dict(zip(_NAMES, torch.rand(len(_NAMES), generator=seeded(seed, what)).tolist(), strict=True))


def _best(scores: Mapping[str, float]) -> list[str]:
    return choose(scores, 0.5)


def _gates(model: nn.Module) -> dict[str, float]:
    return {name: float(delta.a.detach()) for name, delta in deltas_of(model).items()}


def _gradient_norms(problem: Problem) -> dict[str, float]:
    base = copy.deepcopy(problem.base).requires_grad_(True)
    cross_entropy(base, problem.data["train"]).backward()
    layers: dict[str, Any] = {name: base.get_submodule(name) for name in _NAMES}
    return {name: float(layer.weight.grad.norm()) for name, layer in layers.items()}


def _lora(problem: Problem, steps: int, seed: int, rate: float, names: list[str], rank: int) -> nn.Module:
    model = adapted(problem.base, lora(rank, lora_alpha=rank, target_modules=names), seed)
    fit(model, cross_entropy, batches_of(problem.data["train"], steps, seed), rate)
    return model


def _diffora(problem: Problem, steps: int, seed: int, rate: float, search: float = _SEARCH) -> nn.Module:
    config: Any = DifforaConfig(
        r=_R, keep=0.5, search=search, share_unselected=False, seed=seed, target_modules=_NAMES, gates_lr=_GATE_RATE
    )
    model = adapted(problem.base, config, seed)
    x, y = problem.data["train"]
    held = int(_GATE_DATA * len(y))
    own = {
        "gates": batches_of((x[:held], y[:held]), steps, seed),
        "weights": batches_of((x[held:], y[held:]), steps, seed),
        "all": batches_of((x, y), steps, seed),
    }
    ahead: Any = controller_for(model, steps)  # of its own, to know whose turn each step will be
    batches = []
    for step in range(steps):
        ahead.steps_done = step
        batches.append(own[ahead.phase if step < search * steps else "all"][step])
    fit(model, cross_entropy, batches, rate)
    return model


def _trained(model: nn.Module) -> int:
    """Trained numbers, without gates and factors of layers that have no update."""
    idle = {id(p) for delta in deltas_of(model).values() for p in ([*delta.parameters()] if delta.idle else [delta.a])}
    return sum(p.numel() for p in model.parameters() if p.requires_grad and id(p) not in idle)


def _ranking(scores: Mapping[str, float], true: list[str]) -> float:
    """Share of the pairs of a planted layer and another one of its block that are in the right order; ties are half."""
    pairs = [
        (scores[a], scores[b])
        for a in true
        for b in scores
        if b not in true and kind_and_block(a)[1] == kind_and_block(b)[1]
    ]
    return statistics.fmean((a > b) + 0.5 * (a == b) for a, b in pairs)


def _rows(
    scores: dict[str, list[float]], rates: dict[str, float], hits: dict[str, list[int]],
    ranking: dict[str, list[float]], parameters: dict[str, int],
) -> list[Row]:  # fmt: skip
    rows: list[Row] = []
    for name, values in scores.items():
        row: Row = {"part": "arms of equal parameters and steps", "arm": name, "rate": rates[name]}
        row |= {"trained numbers": parameters[name], "test, %": shown(*mean_and_error(values), 2)}
        row["planted layers found, of 6"] = shown(*mean_and_error(hits[name]), 1) if name in hits else None
        row["ranking"] = shown(*mean_and_error(ranking[name]), 2) if name in ranking else None
        rows.append(row)
    return rows


def _findings(scores: dict[str, list[float]], ranking: dict[str, list[float]], steps: int) -> list[Finding]:
    ours = scores["DiffoRA"]
    random, uniform, norms = (
        difference(ours, scores[name]) for name in ("random", "LoRA r = 4, all layers", "gradient norm")
    )
    order = mean_and_error(ranking["DiffoRA"])
    search = f"of {steps} steps, {round(_SEARCH * steps)} are the search"
    return [
        Finding("DiffoRA is above a random choice of layers by more than a standard error, at equal parameters and "
                "steps",
                f"{shown(*random)} points; {search}", random[0] > random[1]),
        Finding("DiffoRA is not more than a standard error below a LoRA of all layers at half the rank",
                f"{shown(*uniform, 2)} points", sum(uniform) >= 0),
        Finding("DiffoRA is above a choice by gradient norm by more than a standard error",
                f"{shown(*norms, 2)} points", norms[0] > norms[1]),
        Finding("gates rank planted layers above the others of their block in more than 90 % of the pairs",
                f"{shown(*order, 2)}; with a search of {steps // 2} steps "
                f"{shown(*mean_and_error(ranking['longer search']), 2)}; gradient norms "
                f"{shown(*mean_and_error(ranking['gradient norm']), 2)}",
                order[0] > 0.9),
    ]  # fmt: skip
