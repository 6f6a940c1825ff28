"""Jobs that the tests of the pools run in other processes, and what they leave behind in a folder."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from lora_squeeze.errors import LoraSqueezeError

SECONDS = 60.0  # for anything that a test waits for


def wait_for(path: Path) -> None:
    """Wait until a file is there."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear within {SECONDS:g} s"
        time.sleep(0.02)


def note(folder: Path, key: str) -> int:
    """Add a try of this job to the journal; which one it is. One short append is never torn."""
    with (folder / "journal").open("ab", buffering=0) as file:
        file.write(json.dumps([key, os.getpid()]).encode() + b"\n")
    return len(tries(folder).get(key, []))


def tries(folder: Path) -> dict[str, list[int]]:
    """The processes that began each job, in order."""
    found: dict[str, list[int]] = {}
    journal = folder / "journal"
    for line in journal.read_text().splitlines() if journal.exists() else []:
        key, process = json.loads(line)
        found.setdefault(key, []).append(process)
    return found


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def square(folder: Path, key: str, number: int) -> int:
    """A plain job."""
    note(folder, key)
    return number * number


def settings(folder: Path, key: str) -> dict[str, Any]:
    """What a worker has been set to."""
    import torch

    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    return {"process": os.getpid(), "threads": torch.get_num_threads(), "ignores Ctrl-C": ignored}


def misbehave(folder: Path, key: str, how: str) -> Any:
    """A job that fails in its own way; "well": it does not."""
    note(folder, key)
    if how == "refuses":
        raise LoraSqueezeError("rank 9 is above 8")
    if how == "raises":
        raise KeyError("first\nsecond")
    if how == "says nothing":
        raise RuntimeError
    if how == "exits":
        raise SystemExit(3)
    return (lambda: None) if how == "returns a function" else how


def die(folder: Path, key: str, times: int) -> int:
    """Kill the own process on the first tries; which try has come to its end."""
    tried = note(folder, key)
    if tried <= times:
        os.kill(os.getpid(), signal.SIGKILL)
    return tried


def die_beside(folder: Path, key: str, times: int) -> int:
    """Like `die`, for the "victim" alone; if it dies, the "neighbour" runs at that time, and any "other" has ended."""
    tried = note(folder, key)
    (folder / f"{key} began").touch()
    if key == "victim" and tried <= times:
        for name in ("neighbour", "other"):
            wait_for(folder / f"{name} began")
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)
    if key == "neighbour":
        wait_for(folder / "victim began")
        time.sleep(1)
    return tried


def linger(folder: Path, key: str) -> str:
    """A job that does not end before it is told to; then it takes back what it has begun to write."""
    note(folder, key)
    draft = folder / f"{key}.draft"
    draft.touch()
    try:
        wait_for(folder / "never")
    finally:
        draft.unlink()
    return key


def linger_or_not(folder: Path, key: str, quick: bool) -> str:
    """Like `linger`; a quick job ends at once."""
    if not quick:
        return linger(folder, key)
    note(folder, key)
    return key


def doze(folder: Path, key: str) -> str:
    """A job that ends when there is a file "wake"."""
    note(folder, key)
    (folder / f"{key} began").touch()
    wait_for(folder / "wake")
    return key


def on_node(folder: Path, key: str, number: int, doomed: str) -> dict[str, Any]:
    """A job that writes a file. On the doomed node the second to come lasts until the node dies.

    Those elsewhere wait for that, so that there is work left when it does.
    """
    import ray

    node = ray.get_runtime_context().get_node_id()
    note(folder, key)
    if node == doomed:
        if (folder / "first").exists():
            write(folder / "held", key)
            time.sleep(SECONDS)
        (folder / "first").touch()
    else:
        wait_for(folder / "go on")
    write(folder / f"{key}.out", str(number**2))
    return {"node": node, "value": number**2}


def write(path: Path, text: str) -> None:
    """Write a file all at once."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text)
    draft.replace(path)
