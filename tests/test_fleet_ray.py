"""Jobs on a real Ray cluster of this machine: a node that dies loses nothing, and what is opened is closed again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pool_cases import SECONDS, alive, die, linger_or_not, misbehave, on_node, settings, square, tries, wait_for

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.pool import TRIES, run_jobs

pytest.importorskip("ray")
HERE = Path(__file__).parent
SMALL = {"object_store_memory": 80 * 2**20, "include_dashboard": False}

# Ray leaves the pipes of the processes that it has started, and its log files, to the garbage collector.


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A head without CPUs, which runs no job, and one node with one CPU."""
    from ray.cluster_utils import Cluster

    # Not below pytest's folder: Ray puts sockets there, and the path of a socket has to be short.
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    home = Path(folder, "ray")  # where Ray writes the address of a cluster, which it does not make by itself
    home.mkdir()
    with pytest.MonkeyPatch.context() as patch, sigterm_kept():
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        patch.setenv("PYTHONPATH", str(HERE))  # where the nodes find the jobs
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": str(home)} | SMALL)
    try:
        add_node(found)
        yield found
    finally:
        found.shutdown()
        deadline = time.monotonic() + SECONDS
        while processes_of(folder):
            assert time.monotonic() < deadline, f"Ray has left {processes_of(folder)} behind"
            time.sleep(0.05)
        shutil.rmtree(folder)


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """What Ray makes of the signal, in the process that starts a node, is undone."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def add_node(cluster: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch, sigterm_kept():
        patch.setenv("PYTHONPATH", str(HERE))
        return cluster.add_node(num_cpus=1, **SMALL)


def processes_of(folder: str) -> list[int]:
    """Processes that name the folder of a cluster, as all of its servers do."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if folder.encode() in (entry / "cmdline").read_bytes() and alive(int(entry.name)):
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def outcomes(address: str, function: Callable[..., Any], jobs: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What comes of each job, errors by their text; no job may have two outcomes."""
    found = list(run_jobs(function, jobs, ray=address))
    result = {key: str(value) if isinstance(value, LoraSqueezeError) else value for key, value in found}
    assert len(found) == len(result), f"one outcome for each job, got {found}"
    return result


def is_connected() -> bool:
    import ray

    return ray.is_initialized()


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_every_job_runs_once_and_yields_what_it_returns(tmp_path: Path, cluster: Any) -> None:
    """More jobs than are handed to the cluster at a time; the address as a person on this machine would write it."""
    jobs = {f"job {number}": (tmp_path, f"job {number}", number) for number in range(20)}
    address = f"127.0.0.1:{cluster.address.rpartition(':')[2]}"
    assert outcomes(address, square, jobs) == {key: number**2 for key, (_, _, number) in jobs.items()}
    assert {key: len(found) for key, found in tries(tmp_path).items()} == dict.fromkeys(jobs, 1)
    assert not is_connected(), "what was opened is closed"


@pytest.mark.parametrize(("workers", "wanted"), [(None, 3), (2, 2)], ids=["default", "two"])
def test_the_cluster_gets_a_few_jobs_at_a_time(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch, workers: int | None, wanted: int
) -> None:
    import ray

    handed, wait = list[int](), ray.wait

    def counted(tasks: list[Any], **options: Any) -> Any:
        handed.append(len(tasks))
        return wait(tasks, **options)

    monkeypatch.setattr(ray, "wait", counted)
    jobs = {str(number): (tmp_path, str(number), number) for number in range(5)}
    assert len(list(run_jobs(square, jobs, ray=cluster.address, workers=workers))) == len(jobs)
    assert handed == [wanted] * (len(jobs) - wanted + 1) + list(range(wanted - 1, 0, -1))


def test_no_jobs_yield_nothing(cluster: Any) -> None:
    assert outcomes(cluster.address, square, {}) == {}


def test_an_error_is_the_outcome_of_its_job_alone(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)  # where "auto" looks
    wanted = {"refuses": "rank 9 is above 8", "raises": r"KeyError: 'first\nsecond'", "exits": "SystemExit: 3"}
    jobs = {how: (tmp_path, how, how) for how in [*wanted, "well"]}
    assert outcomes("auto", misbehave, jobs) == wanted | {"well": "well"}
    assert {key: len(found) for key, found in tries(tmp_path).items()} == dict.fromkeys(jobs, 1)


def test_closing_the_iterator_ends_the_jobs(tmp_path: Path, cluster: Any) -> None:
    close_early(tmp_path, cluster.address)
    assert not is_connected()


def test_a_connection_that_the_caller_has_made_is_used_and_kept(tmp_path: Path, cluster: Any) -> None:
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    try:
        assert outcomes(cluster.address, settings, {"a": (tmp_path, "a")})["a"]["threads"] == 1
        close_early(tmp_path, cluster.address)
        assert is_connected()
        assert not list(tmp_path.glob("*.draft")), "the job had time to clean up"
    finally:
        ray.shutdown()


def close_early(folder: Path, address: str) -> None:
    """Close an iterator while a job runs, and wait for the job to end."""
    jobs = {key: (folder, key, key == "quick") for key in ("quick", "slow", "waiting")}
    found = run_jobs(linger_or_not, jobs, ray=address)
    assert next(found) == ("quick", "quick")
    wait_for(folder / "slow.draft")
    found.close()  # type: ignore[attr-defined]
    deadline = time.monotonic() + SECONDS / 2
    while (folder / "slow.draft").exists() and alive(tries(folder)["slow"][0]):
        assert time.monotonic() < deadline, "the job outlives the iterator"
        time.sleep(0.05)
    assert sorted(tries(folder)) == ["quick", "slow"]


# --- workers and nodes that die ---------------------------------------------------------------------------------------


def test_a_job_that_kills_its_worker_runs_again_three_times_at_most(tmp_path: Path, cluster: Any) -> None:
    found = outcomes(cluster.address, die, {key: (tmp_path, key, int(key)) for key in ("0", str(TRIES))})
    assert found.pop(str(TRIES)).startswith(
        f"{TRIES} killed its worker {TRIES} times, or lost its node (out of memory?): WorkerCrashedError: "
    )
    assert found == {"0": 1}
    assert {key: len(began) for key, began in tries(tmp_path).items()} == {"0": 1, str(TRIES): TRIES}


def test_a_node_that_dies_loses_nothing(tmp_path: Path, cluster: Any) -> None:
    """It dies while it runs a job, after it has finished one: the first of these runs again, the second does not."""
    doomed = add_node(cluster)
    jobs = {f"job {number}": (tmp_path, f"job {number}", number, doomed.node_id) for number in range(12)}
    found: list[tuple[str, Any]] = []
    killed = False
    try:
        for key, value in run_jobs(on_node, jobs, ray=cluster.address):
            found.append((key, value))
            if value["node"] == doomed.node_id:
                assert not killed, "the node gives out one job"
                wait_for(tmp_path / "held")
                cluster.remove_node(doomed, allow_graceful=False)
                killed = True
                (tmp_path / "go on").touch()
    finally:
        if not killed:
            cluster.remove_node(doomed, allow_graceful=False)
    lost = (tmp_path / "held").read_text()
    assert killed and sorted(key for key, _ in found) == sorted(jobs), "every job has one outcome"
    assert {key: value["value"] for key, value in found} == {key: job[2] ** 2 for key, job in jobs.items()}
    written = {path.stem: path.read_text() for path in tmp_path.glob("*.out")}
    assert written == {key: str(job[2] ** 2) for key, job in jobs.items()}
    assert {key: len(began) for key, began in tries(tmp_path).items()} == dict.fromkeys(jobs, 1) | {lost: 2}


# --- no cluster -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(tmp_path: Path, scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # taken, and not listening
        address = f"{scheme}127.0.0.1:{free.getsockname()[1]}"
        begin = time.monotonic()
        with pytest.raises(LoraSqueezeError) as error:
            outcomes(address, square, {"a": (tmp_path, "a", 1)})
    assert str(error.value) == (
        f"nothing answers at '{address}' (Connection refused); give the address that ray start has printed"
    )
    assert time.monotonic() - begin < SECONDS / 4


@pytest.mark.parametrize("address", ["", "here", "local", "host:", "host:port", "http://host:1", "host:1/x"])
def test_an_address_that_is_none_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(LoraSqueezeError) as error:
        outcomes(address, square, {"a": (tmp_path, "a", 1)})
    assert str(error.value) == f"{address!r} is no address of Ray; write auto, host:port or ray://host:port"


def test_a_missing_ray_is_told_with_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        LoraSqueezeError, match=r"^running on a Ray cluster needs Ray: pip install 'lora-squeeze\[ray\]'$"
    ):
        outcomes("auto", square, {"a": (tmp_path, "a", 1)})


def test_the_environment_is_left_as_it_was(tmp_path: Path) -> None:
    before = dict(os.environ)
    with pytest.raises(LoraSqueezeError):
        outcomes("127.0.0.1:1", square, {"a": (tmp_path, "a", 1)})
    assert dict(os.environ) == before


SCRIPT = """
import sys
from pathlib import Path
from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.fleet.pool import run_jobs
from pool_cases import die

folder, address = Path(sys.argv[1]), sys.argv[2]
try:
    print(list(run_jobs(die, {"a": (folder, "a", 1)}, ray=address)))
except LoraSqueezeError as error:
    print(error)
"""


def printed_by_script(folder: Path, address: str) -> str:
    """What a script that runs one job, which kills its worker once, prints on the standard output."""
    command = [sys.executable, "-c", SCRIPT, str(folder), address]
    env = os.environ | {"PYTHONPATH": str(HERE)}
    return subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, timeout=2 * SECONDS, check=True).stdout


def test_nothing_but_results_gets_to_the_standard_output(tmp_path: Path, cluster: Any) -> None:
    """Ray prints there that a worker died."""
    assert printed_by_script(tmp_path, cluster.address) == "[('a', 2)]\n"


@pytest.mark.slow
def test_a_server_that_is_no_ray_is_given_up_soon(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        found = printed_by_script(tmp_path, address)
    assert found.startswith(f"Ray at '{address}' cannot be used: ConnectionError: ") and found.count("\n") == 1


def answer(server: socket.socket) -> None:
    """Hang up on everybody, until the server is closed."""
    while True:
        try:
            server.accept()[0].close()
        except OSError:
            return
