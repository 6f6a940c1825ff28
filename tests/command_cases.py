"""Runs of the command as a user sees them: exit code, standard output, standard error."""

import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import rich.progress  # imported once here, not in every fork
import rich.table  # noqa: F401
from folder_cases import in_child

from lora_squeeze.cli import main


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str


def command(folder: Path, *arguments: object) -> Run:
    """`lora-squeeze` with these arguments, in a fork: torch need not be imported again. Output goes through files."""
    out, err = folder / "stdout.txt", folder / "stderr.txt"

    def child() -> None:
        sys.argv = ["lora-squeeze", *map(str, arguments)]
        with out.open("w") as sys.stdout, err.open("w") as sys.stderr:
            try:
                main()
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
                raise
        os._exit(code)

    code = in_child(child)
    run = Run(code, out.read_text(), err.read_text())
    out.unlink()
    err.unlink()
    return run


def fresh_command(cache: Path, *arguments: object) -> Run:
    """The same in a new interpreter, for what loads a model: transformers does that in threads, and torch's pool of
    threads does not survive a fork. `datasets` keeps what it has read in the folder `cache`.
    """
    words = [sys.executable, "-c", "from lora_squeeze.cli import main; main()", *map(str, arguments)]
    settings = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(words, capture_output=True, text=True, env=settings)
    return Run(done.returncode, done.stdout, done.stderr)
