"""A metric that is a command of the user: run without a shell, read from what it prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lora_squeeze.errors import LoraSqueezeError

# Not inside a word, such as the 1 of "f1", and not cut short, such as the 0.5 of "0.5s". A model that has fallen apart
# often measures nan or inf: to take an earlier number of the line instead would hide it.
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)(?!\w|\.\d)", re.IGNORECASE
)
_TAIL = 5  # lines of a failed command that are told


@dataclass(frozen=True)
class CommandMetric:
    """Runs a command for each adapter: `CommandMetric("python eval.py {adapter}", logs)(folder, rank)`.

    Args:
        command: the command line; {adapter} stands for the folder of the adapter, {rank} for its rank. It is split as a
            shell would, but there is no shell: no pipes, no variables. For those, write a script.
        logs: folder for what the command prints.
        json_key: take this key of the JSON object on the last line; default: the last number that is printed.
        timeout: seconds after which the command is ended.

    Raises:
        LoraSqueezeError: a command that cannot be split or does not mention {adapter}; when it is called, one that
            cannot be started, fails, takes too long or prints no number.
    """

    command: str
    logs: Path
    json_key: str | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not any("{adapter}" in word for word in self._words()):
            raise LoraSqueezeError(
                f"the command {self.command!r} does not mention {{adapter}}, the place of the folder to be measured"
            )
        if self.timeout is not None and not self.timeout > 0:
            raise LoraSqueezeError(f"timeout must be above 0 seconds, got {self.timeout}")

    @property
    def name(self) -> str:
        """What results are filed under."""
        return self.command if self.json_key is None else f"{self.command} -> {self.json_key}"

    def __call__(self, adapter: Path, rank: int) -> float:
        """The metric of the adapter in this folder."""
        places = {"{adapter}": str(adapter), "{rank}": str(rank)}
        # Put in after the splitting: a folder's name may have blanks in it. In one pass: or a placeholder in its name.
        words = [re.sub(r"\{adapter\}|\{rank\}", lambda found: places[found[0]], word) for word in self._words()]
        out, err = self.logs / f"rank-{rank}.stdout", self.logs / f"rank-{rank}.stderr"
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            code = self._run(words, out, err)
        except (OSError, ValueError) as error:
            raise LoraSqueezeError(f"the command {words[0]!r} cannot be run: {error}") from None
        told = f"what it printed is in {out} and {err.name}"
        if code is None:
            raise LoraSqueezeError(f"rank {rank}: the command took longer than {self.timeout:g} s; {told}")
        if code:
            how = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise LoraSqueezeError(f"rank {rank}: the command {how}: {_tail(err) or _tail(out)}; {told}")
        try:
            return self._read(out.read_text(encoding="utf-8", errors="replace"))
        except LoraSqueezeError as error:
            raise LoraSqueezeError(f"rank {rank}: {error}; {told}") from None

    def _words(self) -> list[str]:
        try:
            return shlex.split(self.command)
        except ValueError as error:
            raise LoraSqueezeError(f"the command {self.command!r} cannot be split into words: {error}") from None

    def _run(self, words: list[str], out: Path, err: Path) -> int | None:
        """The exit code; None after the timeout. Ends with everything that the command has started."""
        process = None
        with out.open("wb") as stdout, err.open("wb") as stderr:
            try:
                with _signals_held():
                    process = subprocess.Popen(
                        words, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
                    )
                return process.wait(self.timeout)
            except subprocess.TimeoutExpired:
                return None
            finally:
                # Also after Ctrl-C, which a group of its own does not see.
                if process is not None and process.returncode is None:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _read(self, text: str) -> float:
        lines = [line for line in text.splitlines() if line.strip()]
        if self.json_key is not None:
            return _json_number(lines[-1] if lines else "", self.json_key)
        found = _NUMBER.findall(text)
        if not found:
            raise LoraSqueezeError("the command printed no number on its standard output")
        return float(found[-1])


@contextmanager
def _signals_held() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait for the end of the block: a process that is being started would be left behind."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    held: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: held.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for one in held[:1]:
            signal.raise_signal(one)


def _json_number(line: str, key: str) -> float:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise LoraSqueezeError(f"the last line that the command printed is no JSON object: {line!r:.80}")
    value = found.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        known = ", ".join(map(repr, list(found)[:10]))
        raise LoraSqueezeError(f"no number {key!r} in the JSON object that the command printed; it has {known}")
    return float(value)


def _tail(path: Path) -> str:
    """The last lines of a file, safe to print, in one."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return "".join(c if c.isprintable() else "?" for c in " | ".join(lines[-_TAIL:]))[-1000:]
