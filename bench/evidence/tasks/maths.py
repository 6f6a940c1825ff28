"""School maths: questions of DeepMind's mathematics_dataset (Apache-2.0), made once and then read from the cache.

The package needs an old sympy, an old NumPy and Python 3.11 (from 3.12 on, `random` refuses the floats that it passes),
so it runs in an environment of its own, which is thrown away afterwards. The questions are the same everywhere: their
hash is checked.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from bench.evidence.data import PARTS, Data, Example, split
from lora_squeeze.demo.model import user_cache

PINS = ("mathematics-dataset==1.0.1", "sympy==1.5.1", "numpy==1.23.5", "mpmath==1.4.1", "absl-py==2.5.1", "six==1.17.0")
PYTHON = (3, 11)  # the last with which these work
MODULES = {
    "maths-add": "arithmetic__add_or_sub",
    "maths-linear": "algebra__linear_1d",
    "maths-sort": "comparison__sort",
    "maths-round": "numbers__round_number",
    "maths-digit": "numbers__place_value",
    "maths-compare": "comparison__pair",
}
COUNT = 5000
SHA256 = "bfcd489bc571e8b411ba5e110bc3458e856ca5825a4621f333c4619b22a57dd0"


def add() -> Data:
    """Sums and differences of two numbers, decimals among them."""
    return _task("maths-add", 18, 10)


def linear() -> Data:
    """Linear equations in one unknown."""
    return _task("maths-linear", 24, 4)


def sort() -> Data:
    """Three or more numbers in order; answers up to 14 characters."""
    return _task("maths-sort", 18, 14, longest=14)


def round_number() -> Data:
    """Numbers to a number of decimals, or to tens and more; answers up to 8 characters."""
    return _task("maths-round", 22, 10, longest=8)


def digit() -> Data:
    """A digit of a number by its place."""
    return _task("maths-digit", 14, 3, tuple("0123456789"))


def compare() -> Data:
    """Whether one number is larger than, smaller than or equal to another: the questions whose answer is yes or no."""
    return _task("maths-compare", 20, 2, ("False", "True"))


def _task(
    name: str, prompt_tokens: int, answer_tokens: int, classes: tuple[str, ...] = (), longest: int | None = None
) -> Data:  # fmt: skip
    found = [
        Example(row["question"], row["answer"])
        for row in questions()
        if row["module"] == MODULES[name]
        and (longest is None or len(row["answer"]) <= longest)
        and (not classes or row["answer"] in classes)
    ]
    parts = split(((example.prompt, example) for example in found), name)
    kept = "" if longest is None else f", answers up to {longest} characters"
    source = f"{PINS[0].replace('==', ' ')}, {MODULES[name]}, easy part{kept}, sha256 of all questions {SHA256[:12]}"
    return Data(name, source, *(parts[p] for p in PARTS), classes, prompt_tokens, answer_tokens)


@cache
def questions() -> list[dict[str, str]]:
    """All questions, generated when they are asked for the first time.

    Raises:
        SystemExit: the environment cannot be made, or the questions are not those that the results are of.
    """
    path = questions_file()
    text = path.read_bytes() if path.exists() else b""
    if _hash(text) != SHA256:
        with _alone(path):
            text = path.read_bytes() if path.exists() else b""  # another process may have made it meanwhile
            if _hash(text) != SHA256:
                text = _make(path)
    return [json.loads(line) for line in text.decode().splitlines()]


def questions_file() -> Path:
    """Where the questions are kept."""
    return user_cache() / f"maths-{SHA256[:12]}.jsonl"


def _make(path: Path) -> bytes:
    """The questions, into a file that is there as a whole or not at all."""
    text = _generated()
    if _hash(text) != SHA256:
        raise SystemExit(f"the questions made here have the hash {_hash(text)}, results are of {SHA256}")
    waiting = path.with_suffix(".waiting")
    waiting.write_bytes(text)
    waiting.replace(path)
    return text


def _generated() -> bytes:
    """The questions, from an environment that is thrown away."""
    python = _python()
    print("making the school-maths questions, once: about a minute", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=user_cache()) as folder:
        own = str(Path(folder, "bin", "python"))
        script = Path(__file__).with_name("maths_generate.py")
        _run(python, "-m", "venv", folder)
        _run(own, "-m", "pip", "install", "--quiet", "--no-deps", *PINS)
        return _run(own, str(script), str(COUNT), *MODULES.values())


def _python() -> str:
    """The interpreter that the environment is made with."""
    name = f"python{PYTHON[0]}.{PYTHON[1]}"
    found = sys.executable if sys.version_info[:2] == PYTHON else shutil.which(name)
    if not found:
        raise SystemExit(f"school maths is made with {name}, which is not on the PATH: install it beside this one")
    return found


def _run(*command: str) -> bytes:
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "0"})
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:4])} ... failed: {done.stderr.decode(errors='replace')[-500:]}")
    return done.stdout


def _hash(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One process at a time makes this file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
