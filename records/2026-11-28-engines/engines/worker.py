"""The engines' environment, and scripts of workers/ in it: JSON in, JSON out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Of every process that is started here. The size of vLLM's cache of keys and values is in GiB; the last but one lets
# requests load adapters, the last lets a script look at the model that the engine holds.
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
}
_HERE = Path(__file__).parent


def environment() -> Path:
    """Interpreter of the engines' environment, which is made first if need be.

    Raises:
        subprocess.CalledProcessError: it cannot be made; what pip said is on standard error.
    """
    settings = os.environ | {"PYTHON": sys.executable}
    made = subprocess.run([_HERE / "environment.sh"], stdout=subprocess.PIPE, text=True, env=settings, check=True)
    return Path(made.stdout.strip())


def run(python: Path, name: str, job: Any, seconds: float = 300) -> Any:
    """What workers/NAME.py writes to its standard output.

    Args:
        python: interpreter of the engines' environment.
        name: of the script.
        job: what it reads from standard input.
        seconds: after which it is given up.

    Raises:
        RuntimeError: it failed; the end of what it printed.
    """
    done = subprocess.run(
        [python, _HERE / "workers" / f"{name}.py"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=seconds,
        env=os.environ | SETTINGS,
    )
    if done.returncode:
        raise RuntimeError(f"{name} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)
