"""Run one target: `python -m fuzz.run TARGET --seconds 300`.

With atheris (Linux; `pip install atheris`) inputs are chosen by the lines that they reach; without it they are seeded
mutations of the corpus. A broken promise does not end the run: every kind is recorded once, with the input that shows
it, and a table follows at the end.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SLOW = 2.0  # seconds for one input
# By name, before anything else imports them: what is imported elsewhere first is run, but its lines guide nothing.
_INSTRUMENTED = ("fuzz.targets", "lora_squeeze.plan_file", "lora_squeeze.post_squeeze")


class Recorder:
    """Runs inputs and keeps one for every kind of failure.

    Args:
        name: of the target.
        folder: where inputs that fail are written.
    """

    def __init__(self, name: str, folder: Path) -> None:
        from fuzz.targets import TARGETS

        self._target, self._folder = TARGETS[name], folder
        self.runs, self.found = 0, dict[str, str]()

    def __call__(self, data: bytes, *, again: bool = False) -> None:
        """Run one input; again: to measure its time a second time."""
        self.runs += 1
        start = time.process_time()
        try:
            self._target(bytes(data))
        except Exception as error:
            frames = [f for f in traceback.extract_tb(error.__traceback__) if "lora_squeeze" in f.filename]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "target"
            self._keep(f"{type(error).__name__} in {place}", data, ascii(str(error))[:200])
        if time.process_time() - start > SLOW and not again:  # the first time may be that of an import
            self(data, again=True)
        elif (seconds := time.process_time() - start) > SLOW:
            self._keep("slow", data, f"{seconds:.1f} s")

    def _keep(self, kind: str, data: bytes, text: str) -> None:
        if kind not in self.found:
            self.found[kind] = text
            self._folder.mkdir(parents=True, exist_ok=True)
            name = "".join(c if c.isalnum() else "_" for c in kind)
            (self._folder / name).write_bytes(data)
            print(f"FOUND {kind}: {text}", flush=True)


def _guided(record: Recorder, corpus: Path, seconds: int, seed: int, atheris: Any) -> None:
    from fuzz.mutate import mutate

    def custom(data: bytes, max_size: int, seed: int) -> bytes:
        choice = random.Random(seed)
        if choice.random() < 0.7:
            return mutate(bytes(data), choice, max_size)
        return bytes(atheris.Mutate(data, max_size))

    artifacts = f"-artifact_prefix={corpus.parent.parent}/"  # not into the current folder
    options = [
        artifacts,
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        "-timeout=60",
        "-max_len=20000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=4000", str(corpus)], record, custom_mutator=custom)
    atheris.Fuzz()


def _seeded(record: Recorder, inputs: list[bytes], seconds: int, seed: int) -> None:
    from fuzz.mutate import mutate

    choice, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        record(mutate(choice.choice(inputs), choice))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--work", type=Path, default=Path(tempfile.gettempdir(), "lora-squeeze-fuzz"), help="corpus and findings"
    )
    asked = parser.parse_args()
    try:
        import atheris
    except ImportError:
        atheris = None
    if atheris is not None:  # before anything of the package is imported, or its lines are not counted
        with atheris.instrument_imports(include=["lora_squeeze"]):
            for name in _INSTRUMENTED:
                importlib.import_module(name)
    import atexit

    import torch

    from fuzz.corpus import write

    torch.set_num_threads(1)
    corpus = asked.work / "corpus"
    write(corpus)
    record = Recorder(asked.target, asked.work / "found" / asked.target)
    atexit.register(lambda: print(f"{asked.target}: {record.runs} runs, {len(record.found)} kinds of failure"))
    if atheris is not None:
        _guided(record, corpus / asked.target, asked.seconds, asked.seed, atheris)
    else:
        inputs = [path.read_bytes() for path in sorted((corpus / asked.target).iterdir())]
        _seeded(record, inputs, asked.seconds, asked.seed)


if __name__ == "__main__":
    main()
