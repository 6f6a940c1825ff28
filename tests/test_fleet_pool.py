"""The local pool: every job has one outcome, whatever becomes of the workers, and no worker is left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from pool_cases import SECONDS, alive, die, die_beside, linger_or_not, misbehave, settings, square, tries, wait_for

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.pool import TRIES, Outcome, run_jobs

HERE = Path(__file__).parent


def outcomes(function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], workers: int = 2) -> dict[str, Any]:
    """What comes of each job, errors by their text; no job may have two outcomes."""
    found: list[Outcome] = list(run_jobs(function, jobs, workers=workers))
    result = {key: str(value) if isinstance(value, LoraSqueezeError) else value for key, value in found}
    assert len(found) == len(result), f"one outcome for each job, got {found}"
    return result


# --- jobs that end ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_every_job_runs_once_and_yields_what_it_returns(tmp_path: Path, workers: int) -> None:
    jobs = {f"job {number}": (tmp_path, f"job {number}", number) for number in range(7)}
    assert outcomes(square, jobs, workers) == {key: number**2 for key, (_, _, number) in jobs.items()}
    began = tries(tmp_path)
    assert {key: len(found) for key, found in began.items()} == dict.fromkeys(jobs, 1)
    processes = {process for found in began.values() for process in found}
    assert os.getpid() not in processes and len(processes) <= workers
    assert not any(alive(process) for process in processes), "workers are gone when the last job is done"


def test_no_jobs_yield_nothing() -> None:
    assert outcomes(square, {}) == {}


def test_outcomes_come_as_they_are_done(tmp_path: Path) -> None:
    """The first job waits for the second."""
    jobs = {key: (tmp_path, key, 0) for key in ("neighbour", "victim")}
    assert [key for key, _ in run_jobs(die_beside, jobs, workers=2)] == ["victim", "neighbour"]


def test_a_worker_uses_one_thread_and_leaves_ctrl_c_to_the_parent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # what the worker would use without being told
    found = outcomes(settings, {"a": (tmp_path, "a")})["a"]
    assert found == {"process": found["process"], "threads": 1, "ignores Ctrl-C": True}


def test_by_default_there_are_as_many_workers_as_cores_that_may_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    found = run_jobs(square, {str(number): (tmp_path, str(number), number) for number in range(5)})
    next(found)
    assert len(multiprocessing.active_children()) == 2
    found.close()  # type: ignore[attr-defined]


def test_an_error_is_the_outcome_of_its_job_alone(tmp_path: Path) -> None:
    wanted = {
        "refuses": "rank 9 is above 8",
        "raises": r"KeyError: 'first\nsecond'",
        "says nothing": "RuntimeError",
        "exits": "SystemExit: 3",
        "well": "well",
    }
    found = outcomes(misbehave, {how: (tmp_path, how, how) for how in [*wanted, "returns a function"]})
    assert "pickle" in found.pop("returns a function")
    assert found == wanted
    assert {key: len(began) for key, began in tries(tmp_path).items()} == dict.fromkeys(
        [*wanted, "returns a function"], 1
    )


def test_fewer_than_one_worker_are_refused() -> None:
    with pytest.raises(LoraSqueezeError, match=r"^workers must be a whole number from 1, got 0$"):
        run_jobs(square, {}, workers=0)


# --- workers that die -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_job_whose_worker_was_killed_runs_again_and_no_other_does(tmp_path: Path, workers: int) -> None:
    times = {"first": 0, "killed": 1, "last": 0}
    wanted = {key: 1 + deaths for key, deaths in times.items()}
    assert outcomes(die, {key: (tmp_path, key, deaths) for key, deaths in times.items()}, workers) == wanted
    assert {key: len(found) for key, found in tries(tmp_path).items()} == wanted


def test_a_job_that_always_kills_its_worker_fails_and_the_others_are_done(tmp_path: Path) -> None:
    keys = ["victim", "neighbour", "other"]
    found = outcomes(die_beside, {key: (tmp_path, key, TRIES) for key in keys})
    assert found.pop("victim") == (
        f"victim killed its worker {TRIES} times (out of memory?), the last one ended with exit code "
        f"{-signal.SIGKILL}; try it alone on a machine with more memory"
    )
    assert found == {"neighbour": 1, "other": 1}
    assert {key: len(began) for key, began in tries(tmp_path).items()} == {"victim": TRIES, "neighbour": 1, "other": 1}


def test_a_job_that_killed_its_worker_waits_until_it_is_alone(tmp_path: Path) -> None:
    """The neighbour runs on for a while after the death; the worker of the other job is idle."""
    jobs = {key: (tmp_path, key, 1) for key in ("victim", "neighbour", "other")}
    assert [key for key, _ in run_jobs(die_beside, jobs, workers=3)] == ["other", "neighbour", "victim"]


# --- the end of the pool ----------------------------------------------------------------------------------------------


def check_ended(folder: Path, jobs: int) -> None:
    """The workers are gone, and have cleaned up behind them."""
    processes = [process for found in tries(folder).values() for process in found]
    assert len(processes) == jobs
    assert not any(alive(process) for process in processes)
    assert not list(folder.glob("*.draft"))


def test_closing_the_iterator_ends_the_workers(tmp_path: Path) -> None:
    jobs = {key: (tmp_path, key, key == "quick") for key in ("quick", "slow")}
    found = run_jobs(linger_or_not, jobs, workers=2)
    assert next(found) == ("quick", "quick")
    wait_for(tmp_path / "slow.draft")
    begin = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - begin < SECONDS / 4
    check_ended(tmp_path, len(jobs))


SCRIPT = """
import sys
from pathlib import Path
from pool_cases import linger
from lora_squeeze.fleet.pool import run_jobs

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    try:
        list(run_jobs(linger, {key: (folder, key) for key in "abcd"}, workers=2))
    except KeyboardInterrupt:
        sys.exit(130)
"""


def start(folder: Path, text: str) -> "subprocess.Popen[str]":
    script = folder / "script.py"
    script.write_text(text)
    return subprocess.Popen(
        [sys.executable, script, folder],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_ctrl_c_ends_the_script_and_its_workers(tmp_path: Path) -> None:
    """As from a terminal: the signal goes to the script and to all workers."""
    with start(tmp_path, SCRIPT) as process:
        for key in "ab":
            wait_for(tmp_path / f"{key}.draft")
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=SECONDS)
    assert (process.returncode, printed) == (130, "")
    check_ended(tmp_path, 2)


def test_ctrl_c_is_left_to_the_parent_while_workers_start(tmp_path: Path) -> None:
    """A worker imports the script, which takes a while here. Only the worker gets the signal, to see what it does."""
    slow = """
if __name__ == "__mp_main__":
    import os, time, pool_cases
    pool_cases.write(Path(sys.argv[1], "starts"), str(os.getpid()))
    time.sleep(1)
"""
    with start(tmp_path, SCRIPT.replace("workers=2", "workers=1") + slow) as process:
        wait_for(tmp_path / "starts")
        worker = int((tmp_path / "starts").read_text())
        os.kill(worker, signal.SIGINT)
        wait_for(tmp_path / "a.draft")
        os.killpg(process.pid, signal.SIGINT)
        _, printed = process.communicate(timeout=SECONDS)
    assert (process.returncode, printed, tries(tmp_path)) == (130, "", {"a": [worker]})


def test_workers_end_when_the_script_is_killed(tmp_path: Path) -> None:
    text = SCRIPT.replace("linger", "doze")
    with start(tmp_path, text) as process:
        for key in "ab":
            wait_for(tmp_path / f"{key} began")
        process.kill()
        process.wait(SECONDS)
        (tmp_path / "wake").touch()
    deadline = time.monotonic() + SECONDS
    while any(alive(process) for found in tries(tmp_path).values() for process in found):
        assert time.monotonic() < deadline, "workers outlive the script"
        time.sleep(0.05)
    assert sorted(tries(tmp_path)) == ["a", "b"]


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    text = SCRIPT.replace('if __name__ == "__main__":', "if True:")
    with start(tmp_path, text) as process:
        _, printed = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert printed.splitlines()[-1].endswith(
        f"{TRIES} workers ended before they were ready (exit code 1), see what they printed; a script needs "
        'if __name__ == "__main__": around what it does'
    )
