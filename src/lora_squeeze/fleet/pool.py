"""Many jobs on the cores of this machine, or on a Ray cluster; a worker that dies loses nothing.

The local pool is one of its own: when a worker dies, `concurrent.futures` ends all others with it and does not say
which job was at fault. Here every worker has one job and one pipe, so the job that was lost is known.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import connection, resource_tracker
from typing import Any

from lora_squeeze.errors import LoraSqueezeError

TRIES = 3  # of a job whose worker dies
_GRACE = 2.0  # seconds that workers have to clean up when they are told to end
_SPAWN = multiprocessing.get_context("spawn")

Outcome = tuple[str, Any | LoraSqueezeError]  # key of the job, what it returned or why it failed
Answer = tuple[bool, Any]  # True and what a job returned, or False and why it failed


def run_jobs(
    function: Callable[..., Any],
    jobs: Mapping[str, tuple[Any, ...]],
    *,
    workers: int | None = None,
    ray: str | None = None,
) -> Iterator[Outcome]:
    """Call a function once per job, many at a time, and yield what comes of each as it is done.

    Args:
        function: importable at module level, in other processes too. It may run again for the same job: what it does
            must be harmless to do twice.
        jobs: key of the job -> arguments of the call, which can be pickled.
        workers: jobs at a time; default one for each core that this process may use, or, on a cluster, three for each
            of its CPUs, so that none waits for the next.
        ray: address of a running Ray cluster: "auto", "host:port" or "ray://host:port"; default this machine's cores.

    Returns:
        Iterator of outcomes in order of completion, one for each job. An exception of a job is its outcome, as
        LoraSqueezeError; it stops no other job and is not tried again. Closing the iterator ends the workers.

    Raises:
        LoraSqueezeError: fewer than one worker; from the iterator, workers that cannot start, a missing `ray` package
            or a cluster that does not answer.

    Notes:
        A job whose worker dies (killed, out of memory, segmentation fault) runs again, and fails after three tries. On
        this machine it waits until it is alone, so that it neither brings others down nor is brought down by them; a
        cluster runs it again at once. A job that has an outcome never runs again. Jobs are handed out while the caller
        waits for an outcome; results should be small. Each local worker is a new process with one torch thread, which
        takes a few seconds to start. As with all of `multiprocessing`, it imports the main script: a script that calls
        this needs `if __name__ == "__main__":` around what it does.

    Example:
        >>> from math import factorial
        >>> dict(run_jobs(factorial, {"a": (3,), "b": (4,)}, workers=2))  # doctest: +SKIP
        {'a': 6, 'b': 24}
    """
    if workers is not None and workers < 1:
        raise LoraSqueezeError(f"workers must be a whole number from 1, got {workers}")
    if ray is not None:
        from lora_squeeze.fleet.ray_pool import run_on_ray

        return run_on_ray(function, jobs, address=ray, at_once=workers)
    return _Pool(function, jobs, workers or _cores()).run()


def attempt(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer:
    """What a worker sends back for one job: every exception is told, none is raised."""
    try:
        result = function(*arguments)
        pickle.dumps(result)  # here, so that a result that cannot be sent is an error of its job
        return True, result
    except LoraSqueezeError as error:
        return False, str(error)
    except (Exception, SystemExit) as error:
        return False, describe(error)


def outcome(key: str, answer: Answer) -> Outcome:
    """The outcome that an answer stands for."""
    good, found = answer
    return key, found if good else LoraSqueezeError(found)


def describe(error: BaseException) -> str:
    """An exception on one line: its type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, *lines[:1]])


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _serve(function: Callable[..., Any], pipe: connection.Connection) -> None:
    """The life of a worker: say that it is ready, then answer one job after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends Ctrl-C to all; the parent decides what it means
    import torch

    torch.set_num_threads(1)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises: what is half-written gets removed
        pipe.send(None)
        while True:
            pipe.send(attempt(function, pipe.recv()))
    except (EOFError, OSError, KeyboardInterrupt):  # the parent is gone, or wants no more
        return


class _Worker:
    """One process, the pipe to it, and the job that it has."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.ready = False
        self.key: str | None = None
        self.pipe, far = _SPAWN.Pipe()
        self.process = _SPAWN.Process(target=_serve, args=(function, far), daemon=True)
        self.process.start()
        far.close()  # the worker has the only one now: its death is the end of the pipe

    def heard(self) -> Answer | None:
        """What it has sent; None: that it is ready.

        Raises:
            EOFError, OSError: it is dead.
        """
        if not self.pipe.poll():  # it ended, but some process that its job left behind holds the pipe open
            raise EOFError
        answer: Answer | None = self.pipe.recv()
        return answer

    def end(self, seconds: float) -> int | None:
        """Wait for it, then kill it; the exit code."""
        self.process.join(max(seconds, 0))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.pipe.close()
        self.process.close()
        return code


class _Pool:
    """Runs jobs in processes of this machine."""

    def __init__(self, function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], limit: int) -> None:
        self.function, self.jobs, self.limit = function, jobs, limit
        self.fresh = deque(jobs)
        self.suspects = deque[str]()  # jobs whose worker died
        self.deaths: dict[str, int] = {}
        self.remaining = len(jobs)
        self.workers: list[_Worker] = []
        self.failed_starts = 0  # in a row

    def run(self) -> Iterator[Outcome]:
        """See `run_jobs`."""
        try:
            while self.remaining:
                self._hire()
                found = self._listen()
                self.remaining -= len(found)
                self._assign()  # before the caller takes its time over what was found
                yield from found
        finally:
            self._dismiss()

    def _hire(self) -> None:
        while len(self.workers) < min(self.limit, self.remaining):
            with _interrupts_held():
                self.workers.append(_Worker(self.function))

    def _assign(self) -> None:
        """Give every idle worker a job, as long as there are any."""
        for worker in self.workers:
            if not worker.ready or worker.key is not None:
                continue
            source = self._source()
            if not source:
                return
            try:
                worker.pipe.send(self.jobs[source[0]])
                worker.key = source.popleft()
            except OSError:  # it died while idle: no fault of this job. `_listen` will notice
                continue

    def _source(self) -> deque[str]:
        """Where the next job comes from: those that are known to kill workers wait until they are alone."""
        alone = not self.fresh and all(worker.key is None for worker in self.workers)
        return self.suspects if alone else self.fresh

    def _listen(self) -> list[Outcome]:
        """Wait until workers say something or die; the outcomes that come of it."""
        ends: dict[Any, _Worker] = {
            end: worker for worker in self.workers for end in (worker.pipe, worker.process.sentinel)
        }
        awake = {id(worker): worker for worker in (ends[end] for end in connection.wait(ends))}
        found: list[Outcome] = []
        for worker in awake.values():
            try:
                answer = worker.heard()
            except (EOFError, OSError):
                found += self._lost(worker)
                continue
            if answer is not None and worker.key is not None:
                found.append(outcome(worker.key, answer))
            worker.ready, worker.key, self.failed_starts = True, None, 0
        return found

    def _lost(self, worker: _Worker) -> list[Outcome]:
        """Take note that a worker is dead; an outcome if its job has killed too many."""
        self.workers.remove(worker)
        code = worker.end(_GRACE)
        if not worker.ready:
            self.failed_starts += 1
            if self.failed_starts == TRIES:
                raise LoraSqueezeError(
                    f"{TRIES} workers ended before they were ready (exit code {code}), see what they printed; a script "
                    'needs if __name__ == "__main__": around what it does'
                )
        key = worker.key
        if key is None:
            return []
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] < TRIES:
            self.suspects.append(key)
            return []
        why = f"{key} killed its worker {TRIES} times (out of memory?), the last one ended with exit code {code}"
        return [outcome(key, (False, f"{why}; try it alone on a machine with more memory"))]

    def _dismiss(self) -> None:
        """End all workers, and wait until they are gone."""
        for worker in self.workers:
            worker.process.terminate()
        deadline = time.monotonic() + _GRACE
        for worker in self.workers:
            worker.end(deadline - time.monotonic())


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until a process is started and listed. The process begins so too, until it ignores them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # the first process would start it, which lets the signals in again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
