"""Tables of one model: means over tasks, differences, calibration, cost, single tasks, and what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from bench.evidence.methods import SOURCE
from bench.evidence.report.estimate import Estimate, estimate, number, spread
from bench.evidence.report.rates import rates_table
from bench.evidence.report.results import ACCURACY, BASE, LOSS, UNITS, Arm, Measure, Results, Run
from bench.evidence.rows import Row
from bench.tables import table

CALIBRATION = ("ece", "mce", "ace")


def model_tables(results: Results) -> Iterator[str]:
    """Everything about one model, in Markdown, by paragraphs."""
    runs = results.balanced(results.core_arms())
    yield f"## {results.title}"
    yield _scope(results, runs)
    if runs:
        for measure in (ACCURACY, LOSS, UNITS):
            yield f"### {_title(measure)}"
            yield _ends(results, measure, runs)
            yield values_table(results, measure, runs)
            yield "Minus direct training at the same rank, paired:"
            yield values_table(results, measure, runs, against=SOURCE)
        yield "### Calibration"
        yield "Errors of the confidence in the likeliest choice, and their change against direct and the source:"
        yield calibration_table(results, runs)
        yield "### Cost"
        yield (
            "Of all steps that led to an adapter; times: of the source's. What is squeezed after training includes its "
            "source, which serves all ranks."
        )
        yield cost_table(results, runs)
    if results.further():
        yield "### Further methods"
        yield "Each with direct training at its rank, or the source where it has no rank, on all runs that have both:"
        yield further_table(results)
    found = rates_table(results)
    if found:
        yield "### Learning rates"
        yield found
    yield "### Single tasks"
    yield "Mean ± standard error over seeds, whatever seeds there are."
    for task in results.tasks:
        yield from _task(results, task)
    yield "### Missing"
    yield missing_list(results)


def values_table(results: Results, measure: Measure, runs: Sequence[Run], against: str | None = None) -> str:
    """Method by rank, with AURAC where larger is better; or the same minus a method at the same rank.

    Args:
        results: of one model.
        measure: what is shown.
        runs: the tasks and seeds of every mean.
        against: a method that has all ranks.
    """
    methods = [method for method in results.core() if method != against]
    ranks = results.core_ranks()
    common = results.ranks(*results.core())
    signed = against is not None

    def difference(arm: Arm) -> dict[Run, float] | None:
        other = None if against is None else (against, arm[1])
        if arm not in results.arms or (other is not None and other not in results.arms):
            return None
        values = results.values(arm, measure.field, runs)
        return values if other is None else _minus(values, results.values(other, measure.field, runs))

    def area(method: str) -> dict[Run, float] | None:
        if not common:
            return None
        values = results.areas(method, common, measure, runs)
        return values if against is None else _minus(values, results.areas(against, common, measure, runs))

    rows = []
    for method in methods:
        cells = [difference((method, rank)) for rank in ranks] + ([area(method)] if measure.sign > 0 else [])
        rows.append([method, *(_told(cell, measure, signed) for cell in cells)])
    return table(["method", *map(str, ranks), *(["AURAC"] if measure.sign > 0 else [])], rows)


def calibration_table(results: Results, runs: Sequence[Run]) -> str:
    """ECE, MCE and ACE of every arm, in percent, and what has changed against direct and against the source."""
    rows = []
    for method, rank in results.core_arms():
        cells = []
        for name in CALIBRATION:
            mine = results.values((method, rank), name, runs)
            cells.append(spread(estimate(mine), 2, 100))
            for other in ((SOURCE, rank), results.source):
                same = other == (method, rank) or other not in results.arms
                change = None if same else estimate(_minus(mine, results.values(other, name, runs)))
                cells.append(spread(change, 2, 100, signed=True))
        rows.append([method, str(rank), *cells])
    head = [part for name in CALIBRATION for part in (f"{name.upper()}, %", "- direct", "- source")]
    return table(["method", "rank", *head], rows)


def cost_table(results: Results, runs: Sequence[Run]) -> str:
    """Size, and time and parameter-steps relative to the source."""
    rows = []
    for arm in results.core_arms():
        cells = [_mean(results, arm, name, runs) for name in ("parameters", "bytes", "peak_mib")]
        ratios = []
        for name in ("seconds", "parameter_steps"):
            mine, whole = (results.values(a, name, runs) for a in (arm, results.source))
            told = estimate({run: mine[run] / whole[run] if whole[run] else float("nan") for run in runs})
            ratios.append(spread(told, 3))
        energy = _mean(results, arm, "energy", runs)
        size = [number(cells[0].mean, 0), number(cells[1].mean / 1e6, 3)]
        rows.append([arm[0], str(arm[1]), *size, *ratios, number(cells[2].mean, 0), number(energy.mean, 4)])
    head = ["method", "rank", "parameters", "MB", "seconds, times", "parameter-steps, times", "peak MiB", "energy kept"]
    return table(head, [[_dash(cell) for cell in row] for row in rows])


def further_table(results: Results) -> str:
    """Methods outside the main tables: one line for each rank, over the runs that it shares with direct training."""
    rows = []
    for arm in results.arms:
        if arm[0] not in results.further():
            continue
        other = (SOURCE, arm[1]) if (SOURCE, arm[1]) in results.arms else results.source
        runs = results.balanced([arm, other])
        cells = []
        for measure in (ACCURACY, LOSS):
            mine, theirs = (results.values(a, measure.field, runs) if runs else {} for a in (arm, other))
            cells += [_told(mine, measure, False), _told(_minus(mine, theirs), measure, True)]
        size = [_mean(results, arm, name, runs).mean if runs else float("nan") for name in ("parameters", "bytes")]
        beside = f"direct {other[1]}"
        shown = [_dash(number(size[0], 0)), _dash(number(size[1] / 1e6, 3))]
        rows.append([arm[0], str(arm[1] or "-"), beside, _count(runs), *cells, *shown])
    head = ["method", "rank", "beside", "tasks, runs", ACCURACY.title, "minus", LOSS.title, "minus", "parameters", "MB"]
    return table(head, rows)


def missing_list(results: Results) -> str:
    """Every cell of the tables without a row, so that a gap is never taken for a result."""
    lines = []
    never = _by_method(results.never())
    if never:
        lines.append(f"- nowhere: {never}")
    lines += [f"- {task}, seed {seed}: {_by_method(arms)}" for (task, seed), arms in results.missing().items()]
    return "\n".join(lines) if lines else "Nothing."


def _scope(results: Results, runs: Sequence[Run]) -> str:
    if not runs:
        return "No task has all methods and ranks: there are no means yet. See the single tasks, and what is missing."
    used = sorted({task for task, _ in runs})
    left = [task for task in results.tasks if task not in used]
    seeds = [sum(t == task for t, _ in runs) for task in used]
    each = str(seeds[0]) if min(seeds) == max(seeds) else f"{min(seeds)} to {max(seeds)}"
    error = "tasks, after averaging seeds" if len(used) > 1 else "seeds"
    out = f" Left out, since they lack methods, ranks or all common seeds: {', '.join(left)}." if left else ""
    return (
        f"Means over {len(used)} of {len(results.tasks)} tasks ({', '.join(used)}), seeds of each: {each}; ± is the "
        f"standard error over {error}.{out} AURAC: mean over ranks {_ranks(results)} on the log2 axis."
    )


def _ranks(results: Results) -> str:
    return ", ".join(map(str, reversed(results.ranks(*results.core())))) or "(none in common)"


def _ends(results: Results, measure: Measure, runs: Sequence[Run]) -> str:
    """The base model and the source."""
    base = BASE in results.arms and all(BASE in results.cells[run] for run in runs)
    told = _told(results.values(BASE, measure.field, runs) if base else None, measure, False)
    source = _told(results.values(results.source, measure.field, runs), measure, False)
    return f"Base model: {told}. Source, direct training at rank {results.source[1]}: {source}."


def _task(results: Results, task: str) -> Iterator[str]:
    """Accuracy and loss of one task, every method and rank."""
    seeds = sorted(seed for name, seed in results.cells if name == task)
    cells = {seed: results.cells[task, seed] for seed in seeds}
    present = sorted({arm for cell in cells.values() for arm in cell}, key=results.place)
    ranks = sorted({rank for _, rank in present if rank}, reverse=True)
    shared = results.ranks(*results.core())

    def cell(arm: Arm, measure: Measure) -> str:
        runs = [(task, seed) for seed in seeds if arm in cells[seed]]
        if not runs:
            return "-"
        told = _told(results.values(arm, measure.field, runs), measure, False)
        return told + (f" (n={len(runs)})" if len(runs) < len(seeds) else "")

    def area(method: str) -> str:
        runs = [(task, seed) for seed in seeds if all((method, rank) in cells[seed] for rank in shared)]
        return _told(results.areas(method, shared, ACCURACY, runs), ACCURACY, False) if shared and runs else "-"

    yield f"#### {task} (n={len(seeds)}{_examples(cells[seeds[0]].values())})"
    for measure in (ACCURACY, LOSS):
        rows = []
        for method in dict.fromkeys(method for method, _ in present):
            told = [cell((method, rank), measure) for rank in ranks]
            none = cell((method, 0), measure)
            rows.append([method, none, *told, *([area(method)] if measure is ACCURACY else [])])
        yield f"{_title(measure)}:"
        yield table(["method", "no rank", *map(str, ranks), *(["AURAC"] if measure is ACCURACY else [])], rows)


def _examples(rows: Iterable[Row]) -> str:
    """What a figure of this task is measured on."""
    row = next(iter(rows))
    return f"; {row['examples']} examples, {row['units']} units" if {"examples", "units"} <= row.keys() else ""


def _minus(values: dict[Run, float], others: dict[Run, float]) -> dict[Run, float]:
    return {run: values[run] - others[run] for run in values}


def _told(values: dict[Run, float] | None, measure: Measure, signed: bool) -> str:
    return spread(estimate(values) if values else None, measure.digits, measure.factor, signed=signed)


def _mean(results: Results, arm: Arm, name: str, runs: Sequence[Run]) -> Estimate:
    found = estimate(results.values(arm, name, runs))
    assert found is not None, "only asked for runs that there are"
    return found


def _by_method(arms: Sequence[Arm]) -> str:
    """ "direct 64, 16; base"."""
    parts = []
    for method in dict.fromkeys(method for method, _ in arms):
        ranks = ", ".join(str(rank) for m, rank in arms if m == method and rank)
        parts.append(f"{method} {ranks}".rstrip())
    return "; ".join(parts)


def _count(runs: Sequence[Run]) -> str:
    return f"{len({task for task, _ in runs})}, {len(runs)}"


def _dash(text: str) -> str:
    return text.replace("nan", "-")


def _title(measure: Measure) -> str:
    return measure.title[0].upper() + measure.title[1:]
