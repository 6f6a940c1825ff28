"""Many jobs on the nodes of a Ray cluster that is running already; see `lora_squeeze.fleet.pool.run_jobs`."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.pool import TRIES, Answer, Outcome, attempt, describe, outcome

_PER_CPU = 3  # tasks handed to the cluster per CPU: enough that none waits for this process
_CONNECT_SECONDS = 5
# Read by Ray as it is imported and connects; what the user has set in the environment goes first.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray tells of each worker that dies on the standard output, whatever log_to_driver says; that is for results.
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",
    # What the memory monitor of a node kills would run again for ever.
    "RAY_task_oom_retries": str(TRIES - 1),
    # Where something else answers, or nothing, Ray would try for many minutes.
    "RAY_NUM_REDIS_GET_RETRIES": "1",
    "RAY_gcs_server_port_wait_time_s": "1",
    "RAY_gcs_rpc_server_connect_timeout_s": "1",
    "RAY_py_gcs_connect_timeout_s": str(_CONNECT_SECONDS),
}


def run_on_ray(
    function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]], *, address: str, at_once: int | None = None
) -> Iterator[Outcome]:
    """Call a function once per job on the nodes of a cluster, one CPU each.

    Args:
        function, jobs: see `run_jobs`. The nodes need the same packages, and the same paths where jobs name files.
        address: "auto", "host:port" or "ray://host:port". A Ray that the caller has initialised is used as it is, and
            stays.
        at_once: jobs in the cluster at a time; default 3 for each of its CPUs.

    Returns:
        Iterator of outcomes in order of completion.

    Raises:
        LoraSqueezeError: from the iterator: no `ray` package, or no cluster that answers.

    Notes:
        Ray itself runs the jobs of a dead node or worker again, at once, up to three tries. A job whose worker dies
        after its work and before its answer runs twice.
    """
    with _connected(address) as ray:
        task = ray.remote(num_cpus=1, max_retries=TRIES - 1)(_answer)
        waiting, running = iter(jobs), dict[Any, str]()
        try:
            while True:
                room = (at_once or _room(ray)) - len(running)
                running |= {task.remote(function, jobs[key]): key for key in islice(waiting, max(room, 0))}
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                for found in done:
                    yield _outcome(ray, running.pop(found), found)
        finally:
            for left in running:
                ray.cancel(left)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Answer:
    """What runs on a node."""
    import torch

    torch.set_num_threads(1)
    return attempt(function, arguments)


def _room(ray: Any) -> int:
    """Tasks that the cluster gets at a time. Asked again and again, since nodes come and go."""
    return max(1, int(_PER_CPU * ray.cluster_resources().get("CPU", 0)))


def _outcome(ray: Any, key: str, found: Any) -> Outcome:
    """The outcome of a task that has ended."""
    errors = ray.exceptions
    try:
        return outcome(key, ray.get(found))
    except (errors.NodeDiedError, errors.WorkerCrashedError, errors.OutOfMemoryError) as error:
        why = f"{key} killed its worker {TRIES} times, or lost its node (out of memory?): {describe(error)}"
    except errors.RayTaskError as error:  # of what runs around the job: all that the job raises is an answer
        last = str(error).strip().splitlines()[-1].strip()
        why = f"{key} could not begin: {last}; do the nodes have the same lora-squeeze?"
    except errors.RayError as error:
        why = f"{key} could not be run: {describe(error)}"
    return outcome(key, (False, why))


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected; what was opened here is closed again."""
    with _settings():
        try:
            import ray
        except ImportError:
            raise LoraSqueezeError("running on a Ray cluster needs Ray: pip install 'lora-squeeze[ray]'") from None
        opened = not ray.is_initialized()
        if opened:
            _check(address)
            try:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:
                raise LoraSqueezeError(f"Ray at {address!r} cannot be used: {describe(error)}") from error
    try:
        yield ray
    finally:
        if opened:
            ray.shutdown()


@contextmanager
def _settings() -> Iterator[None]:
    """The settings in the environment, for a while."""
    added = {name: value for name, value in _SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _check(address: str) -> None:
    """Refuse an address that is none, or where nothing listens."""
    if address == "auto":
        return
    parts = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})", address)
    if parts is None:
        raise LoraSqueezeError(f"{address!r} is no address of Ray; write auto, host:port or ray://host:port")
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=_CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraSqueezeError(
            f"nothing answers at {address!r} ({reason}); give the address that ray start has printed"
        ) from None
