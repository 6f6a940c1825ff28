"""What the tests of fleets share: small members that differ, a pool without processes, a command that takes time."""

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from adapter_cases import SHAPES, plain_config, plain_tensors, write_folder

from lora_squeeze.cli import main
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet import jobs
from lora_squeeze.fleet.pool import Outcome, attempt, outcome

BASE = "org/base"
RANKS = {"team/a": 8, "team/b": 4, "c": 16}  # by name, as they are written by `write_fleet`
PAUSE = 0.25  # seconds that `slow_member` takes longer
real_squeeze_member = jobs.squeeze_member


def write_member(folder: Path, rank: int, kind: str = "decaying", **changes: Any) -> Path:
    """A plain adapter of this rank; no two ranks have the same spectra."""
    tensors = plain_tensors(SHAPES, rank, kind=kind)
    return write_folder(folder, tensors, plain_config(r=rank, **{"base_model_name_or_path": BASE, **changes}))


def write_fleet(folder: Path, ranks: Mapping[str, int] = RANKS) -> Path:
    """Members of these ranks, in folders of their names."""
    for name, rank in ranks.items():
        write_member(folder / name, rank)
    return folder


def serial(
    function: Callable[..., Any],
    jobs: Mapping[str, tuple[Any, ...]],
    *,
    workers: int | None = None,
    ray: str | None = None,
) -> Iterator[Outcome]:
    """The pool's interface, in this process: no new one has to import torch."""
    for key, arguments in jobs.items():
        yield outcome(key, attempt(function, arguments))


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fleets run in this process."""
    monkeypatch.setattr("lora_squeeze.fleet.passes.run_jobs", serial)


def slow_member(*arguments: Any) -> dict[str, Any]:
    """`squeeze_member`, long enough for a run to be interrupted half-way."""
    result = real_squeeze_member(*arguments)
    time.sleep(PAUSE)
    return result


def slow_main() -> None:
    """The command line with slow members."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background hands down another one
    jobs.squeeze_member = slow_member
    main()


def refusal(call: Callable[[], object]) -> str:
    """The text of the refusal that this call ends with."""
    with pytest.raises(LoraSqueezeError) as caught:
        call()
    return str(caught.value)
