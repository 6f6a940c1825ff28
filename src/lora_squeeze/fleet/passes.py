"""The two passes over a fleet, each on many processes or machines: measure all members, squeeze all members."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet import jobs
from lora_squeeze.fleet.find import listed
from lora_squeeze.fleet.members import Member
from lora_squeeze.fleet.pool import run_jobs
from lora_squeeze.plan_file import write_whole

Tell = Callable[[str, int, int], None]  # what is done, members done, members in all
_FORMAT = 1
_LONGEST = 200  # bytes of a file name; systems allow 255


@dataclass(frozen=True)
class Measured:
    """What is known of a member after its tensors were read.

    Args:
        losses: share of its energy that is lost at rank 1, 2, ..., its own rank.
        sha256: digest of its weights file.
    """

    losses: array[float]
    sha256: str


@dataclass(frozen=True)
class Hands:
    """Who does the work.

    Args:
        workers: members at a time.
        ray: address of a cluster; None: this machine.
        tell: called after every member.
    """

    workers: int | None
    ray: str | None
    tell: Tell

    def work(
        self,
        label: str,
        function: Callable[..., Any],
        arguments: Mapping[str, tuple[Any, ...]],
        take: Callable[[str, Any | LoraSqueezeError], None],
        done: int = 0,
    ) -> None:
        """Call the function for every member, and `take` with what comes of it; `done` more were done before."""
        total = done + len(arguments)
        self.tell(label, done, total)
        if not arguments:
            return
        outcomes = run_jobs(function, arguments, workers=self.workers, ray=self.ray)
        try:
            for name, found in outcomes:
                take(name, found)
                done += 1
                self.tell(label, done, total)
        finally:
            if isinstance(outcomes, Generator):
                outcomes.close()  # after Ctrl-C, the workers end here and not at some later time


def measure_all(
    members: Mapping[str, Member], folder: Path, hands: Hands
) -> tuple[dict[str, Measured], dict[str, str]]:
    """Measure every member that is not known from an earlier run, and keep what was found at once.

    Args:
        members: name -> Member.
        folder: one file for each member; it holds as long as the member's files have the same size and time.
        hands: who does it.

    Returns:
        Name -> Measured, and name -> why it could not be measured.
    """
    known = {name: _recall(folder, member) for name, member in members.items()}
    found = {name: measured for name, measured in known.items() if measured is not None}
    failed: dict[str, str] = {}
    todo = {name: (str(members[name].path),) for name in members if name not in found}

    def take(name: str, outcome: Any | LoraSqueezeError) -> None:
        if isinstance(outcome, LoraSqueezeError):
            failed[name] = str(outcome)
            return
        write_whole(_record(folder, name), json.dumps({**_key(members[name]), **outcome}), force=True)
        found[name] = _measured(outcome)

    hands.work("measuring", jobs.measure_member, todo, take, len(found))
    return {name: found[name] for name in members if name in found}, failed


def squeeze_all(
    arguments: Mapping[str, tuple[str, str, int, str | None, str]], device: str | None, force: bool, hands: Hands
) -> tuple[dict[str, Any], dict[str, str]]:
    """Squeeze every member whose result is not there yet.

    Args:
        arguments: name -> path, target, rank, dtype and digest, as `jobs.look` takes them.
        device: where to compute.
        force: replace what else is at the targets.
        hands: who does it.

    Returns:
        Name -> what `jobs.squeeze_member` says, and name -> why it failed.

    Raises:
        LoraSqueezeError: something else is at a target, and `force` is not given. Nothing has been written then.
    """
    failed: dict[str, str] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, each in arguments.items():
        try:
            found[name] = jobs.look(*each)
        except LoraSqueezeError as error:  # the source has been changed since it was measured
            failed[name] = str(error)
        hands.tell("looking", len(found) + len(failed), len(arguments))
    if not force:
        refuse_others([name for name, place in found.items() if place["state"] == "other"])
    done = {name: place for name, place in found.items() if place["state"] == "already there"}

    def take(name: str, outcome: Any | LoraSqueezeError) -> None:
        if isinstance(outcome, LoraSqueezeError):
            failed[name] = str(outcome)
        else:
            done[name] = outcome

    todo = {name: (*each, device, force) for name, each in arguments.items() if name in found and name not in done}
    hands.work("squeezing", jobs.squeeze_member, todo, take, len(done) + len(failed))
    return done, failed


def refuse_others(names: Sequence[str]) -> None:
    """Refuse an output in which something else stands at the places of these members."""
    if names:
        raise LoraSqueezeError(
            f"at the places of {len(names)} members the output holds something else than the result asked for: "
            f"{listed(names)}; nothing was written there. Choose another output, or replace them with --force "
            "(force=True)"
        )


def _recall(folder: Path, member: Member) -> Measured | None:
    """What an earlier run has measured, if the member's files are still the same."""
    try:
        record = json.loads(_record(folder, member.name).read_text(encoding="utf-8"))
        key = _key(member)
        return _measured(record) if {name: record[name] for name in key} == key else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _key(member: Member) -> dict[str, Any]:
    return {"format": _FORMAT, "path": str(member.path), "stamp": list(member.stamp)}


def _measured(record: Mapping[str, Any]) -> Measured:
    return Measured(array("d", record["losses"]), str(record["sha256"]))


def _record(folder: Path, name: str) -> Path:
    """A file for a member, whatever its name."""
    safe = quote(name, safe=" ")
    return folder / f"{safe if len(safe) <= _LONGEST else hashlib.sha256(name.encode()).hexdigest()}.json"
