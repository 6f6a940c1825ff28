"""Squeeze a whole fleet: read headers, measure, choose the ranks, squeeze; and go on where an earlier run stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_squeeze.dials import parse_size
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet import jobs
from lora_squeeze.fleet.choose import Budget, Choice, choose_ranks, loss_at
from lora_squeeze.fleet.find import find, listed
from lora_squeeze.fleet.members import Fleet, read_fleet
from lora_squeeze.fleet.memory import remarks, slot_parameters, start_options
from lora_squeeze.fleet.passes import Hands, Measured, Tell, measure_all, refuse_others, squeeze_all
from lora_squeeze.fleet.report import FleetReport, Row
from lora_squeeze.fleet.weights import complete
from lora_squeeze.plan import DTYPES
from lora_squeeze.plan_file import write_whole
from lora_squeeze.servers import Server, server_of

REPORT_NAME = "report.json"
_MEASURED = "measured"


def squeeze_fleet(
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    memory: int | str,
    engine: str = "vllm",
    slots: int | None = None,
    host_memory: int | str | None = None,
    weights: Mapping[str, float] | None = None,
    base: Collection[str] = (),
    dtype: torch.dtype | None = None,
    slot_dtype: torch.dtype | None = None,
    device: str | None = None,
    skip_unreadable: bool = False,
    dry_run: bool = False,
    force: bool = False,
    workers: int | None = None,
    ray: str | None = None,
    work: str | os.PathLike[str] | None = None,
    tell: Tell | None = None,
) -> FleetReport:
    """Choose the ranks that lose least under one memory budget of a server, and squeeze all adapters to them.

    Args:
        inputs: folders of adapters, folders that hold such folders, or patterns such as "tenants/*".
        output: folder for the squeezed adapters, one folder each, by the names of the members.
        memory: bytes for adapters on the device, a number or text such as "40GB" (10^9) or "40GiB" (2^30).
        engine: "vllm" (default), "sglang", "peft" or "llama.cpp".
        slots: adapters on the device at once, with vllm (its max_loras) and sglang; default all.
        host_memory: bytes for all adapters outside the device, with vllm and sglang, where each has its own rank.
            Default no bound: then every adapter keeps as much rank as a slot has.
        weights: how much the loss of a member counts, by name, such as its share of the requests; default 1.
        base: name of the base model; members of others are left out. Several, if it has several names.
        dtype: dtype of the factors written; default as stored.
        slot_dtype: dtype in which the server holds adapters; default bfloat16.
        device: where to compute; default the CPU.
        skip_unreadable: leave out what cannot be read instead of refusing all.
        dry_run: measure and choose, write nothing to the output.
        force: replace what else is at the places of the squeezed adapters.
        workers: adapters at a time; default every core, or every CPU of the cluster.
        ray: address of a running Ray cluster, whose machines see the same folders; default this machine.
        work: folder for what was measured and the report; a later run goes on from there. Default OUTPUT-fleet.
        tell: called with ("reading", "measuring" or "squeezing", members done, members in all).

    Returns:
        FleetReport; it is also in report.json in the work folder. A member that fails stops no other: see its `failed`.

    Raises:
        LoraSqueezeError: nothing to squeeze, members that cannot be read, several base models, a budget that is too
            small, or something else at the place of an output.

    Notes:
        Reads every adapter twice. The losses are those of truncation, exact in the Frobenius norm; lost energy is not
        lost task quality. A second run writes nothing that is there already, and may have other members or weights.

    Example:
        >>> report = squeeze_fleet(["tenants"], "tenants-small", memory="40GB", slots=64)  # doctest: +SKIP
        >>> print(report.options)  # doctest: +SKIP
        --enable-lora --max-lora-rank 16 --max-loras 64 --max-cpu-loras 64 --lora-target-modules q_proj v_proj
    """
    server = server_of(engine)
    held = slot_dtype or torch.bfloat16
    _check(server, slots, host_memory, dtype, held)
    room, host = parse_size(memory), None if host_memory is None else parse_size(host_memory)
    out = Path(output).expanduser()
    work = Path(f"{out}-fleet") if work is None else Path(work).expanduser()
    hands = Hands(workers, ray, tell or (lambda label, done, total: None))
    folders, unreadable = find(inputs, (out, work))
    fleet = read_fleet(
        folders, unreadable, base=base, skip_unreadable=skip_unreadable, tell=lambda *done: hands.tell("reading", *done)
    )
    weighed = complete(weights or {}, fleet.members, fleet.skipped)
    if not force and not dry_run:
        refuse_others([name for name in fleet.members if not jobs.may_be_ours(out / name)])
    budget, notes = _budget(server, fleet, room, slots, held, host)
    nothing: dict[str, tuple[float, ...]] = dict.fromkeys(fleet.members, ())
    choose_ranks(fleet.members, nothing, weighed, server, budget)  # refuses an impossible budget before all the work
    measured, failed = measure_all(fleet.members, work / _MEASURED, hands)
    if not measured:
        raise LoraSqueezeError(f"no member can be measured: {_reasons(failed)}")
    choice = choose_ranks(
        {name: fleet.members[name] for name in measured},
        {name: found.losses for name, found in measured.items()},
        {name: weighed[name] for name in measured},
        server,
        budget,
    )
    done: dict[str, Any] = {}
    if not dry_run:
        arguments = _arguments(fleet, measured, choice, out, None if dtype is None else _name(dtype))
        done, more = squeeze_all(arguments, device, force, hands)
        failed |= more
    rows = _rows(fleet, weighed, measured, choice, done, failed)
    report = _report(server, fleet, budget, choice, rows, notes, out, _name(held))
    write_whole(work / REPORT_NAME, json.dumps(report.to_json(), indent=1) + "\n", force=True)
    return report


def _budget(
    server: Server, fleet: Fleet, memory: int, slots: int | None, slot_dtype: torch.dtype, host: int | None
) -> tuple[Budget, list[str]]:
    """What there is to spend, and what a person should know of this server and these members."""
    refused = [
        f"{name} ({', '.join(kind for kind in server.refuses if kind in member.carried)})"
        for name, member in fleet.members.items()
        if not set(server.refuses).isdisjoint(member.carried)
    ]
    notes = [f"{server.name} does not load, for what they carry besides: {listed(refused)}"] if refused else []
    room = len(fleet.members) if slots is None else slots
    if server.keeps == "own":
        return Budget(memory, room, slot_dtype.itemsize, 0), notes
    per_rank, guesses = slot_parameters(fleet.shapes, server)
    partial = [name for name, member in fleet.members.items() if member.partial]
    notes += [*guesses, *remarks(server, partial)]
    return Budget(memory, room, slot_dtype.itemsize, per_rank, host), notes


def _report(
    server: Server,
    fleet: Fleet,
    budget: Budget,
    choice: Choice,
    rows: tuple[Row, ...],
    notes: Sequence[str],
    out: Path,
    slot_dtype: str,
) -> FleetReport:
    rank, options = choice.max_rank, ""
    if rank is not None:  # all adapters are in the host's memory where it was budgeted for them
        cached = budget.slots if budget.host_memory is None else max(budget.slots, len(fleet.members))
        options = start_options(server, fleet.shapes, rank, budget.slots, cached)
    return FleetReport(
        engine=server.key,
        options=options,
        max_rank=rank,
        slots=None if rank is None else budget.slots,
        memory=budget.memory,
        host_memory=budget.host_memory,
        slot_dtype=slot_dtype,
        bytes=choice.bytes,
        host_bytes=choice.host_bytes,
        loss=choice.loss,
        curve=choice.curve,
        members=rows,
        skipped=fleet.skipped,
        notes=tuple(notes),
        output=str(out),
    )


def _check(
    server: Server,
    slots: int | None,
    host_memory: int | str | None,
    dtype: torch.dtype | None,
    slot_dtype: torch.dtype,
) -> None:
    """Refuse arguments that cannot be meant."""
    if server.keeps == "own" and slots is not None:
        raise LoraSqueezeError(
            f"{server.name} has no slots: leave out --slots; the memory is for all adapters together"
        )
    if server.keeps == "own" and host_memory is not None:
        raise LoraSqueezeError(f"{server.name} keeps every adapter at its own size: leave out --host-memory")
    if slots is not None and slots < 1:
        raise LoraSqueezeError(f"slots must be a whole number from 1, got {slots}")
    if dtype is not None and _name(dtype) not in DTYPES:
        raise LoraSqueezeError(f"dtype must be one of {', '.join(DTYPES)}, got {_name(dtype)}")
    if not slot_dtype.is_floating_point:
        raise LoraSqueezeError(f"slot_dtype must be a dtype of floating point, got {_name(slot_dtype)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reasons(failed: Mapping[str, str]) -> str:
    return listed(f"{name} ({reason})" for name, reason in failed.items())


def _arguments(
    fleet: Fleet, measured: Mapping[str, Measured], choice: Choice, out: Path, dtype: str | None
) -> dict[str, tuple[str, str, int, str | None, str]]:
    """Member -> path, target, rank, dtype and digest: what `jobs.look` takes."""
    top = Path(os.path.abspath(out))  # other machines have other current folders
    return {
        name: (str(fleet.members[name].path), str(top / name), choice.ranks[name], dtype, found.sha256)
        for name, found in measured.items()
    }


def _rows(
    fleet: Fleet,
    weights: Mapping[str, float],
    measured: Mapping[str, Measured],
    choice: Choice,
    done: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
) -> tuple[Row, ...]:
    rows = []
    for name, member in fleet.members.items():
        result = done.get(name, {})
        rank = choice.ranks.get(name)
        rows.append(
            Row(
                name=name,
                base=member.base,
                weight=weights[name],
                rank=member.rank,
                rank_after=result.get("rank", rank),
                bytes=member.file_bytes,
                bytes_after=result.get("bytes"),
                loss=None if rank is None else loss_at(measured[name].losses, rank),
                state="failed" if name in failed else result.get("state", "planned"),
                reason=failed.get(name, ""),
            )
        )
    return tuple(rows)
