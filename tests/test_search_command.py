"""A command as the metric: how it is started, what is read from it, and how it ends."""

import math
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.search_command import CommandMetric


def script(tmp_path: Path, code: str) -> str:
    """A command that runs this code, in a folder with a blank in its name."""
    path = tmp_path / "my scripts" / "eval.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    return f"{sys.executable} -S {shlex.quote(str(path))}"


def measured(tmp_path: Path, code: str, **options: Any) -> float:
    command = script(tmp_path, code) + " {adapter} {rank}"
    return CommandMetric(command, tmp_path / "logs", **options)(tmp_path / "a {rank} folder", 4)


def test_placeholders_are_replaced_after_the_command_is_split(tmp_path: Path) -> None:
    """Blanks, quotes and placeholders in a folder's name change nothing; other braces stay."""
    command = script(tmp_path, "import sys; print(sys.argv[1:], file=sys.stderr); print(1)")
    odd = tmp_path / "it's {rank} $HOME; folder"
    assert CommandMetric(f"{command} --in={{adapter}} 'r {{rank}}' {{x}} $HOME", tmp_path / "logs")(odd, 4) == 1
    assert (tmp_path / "logs" / "rank-4.stderr").read_text() == f"{[f'--in={odd}', 'r 4', '{x}', '$HOME']}\n"


@pytest.mark.parametrize(
    ("printed", "value"),
    [
        ("accuracy 0.81", 0.81),
        ("step 100\nloss: -1.5e-3 (of 2 batches", 2.0),
        ("f1=0.7, mrr2 .5.", 0.5),
        ("took 12.5s\n81.25% of q3 in 4s", 81.25),
        ("1e3 v2", 1000.0),
        ("+7.\n\n", 7.0),
        ("loss 3 inf", math.inf),
    ],
)
def test_the_last_number_on_standard_output_counts(tmp_path: Path, printed: str, value: float) -> None:
    code = f"import sys; print({printed!r}); print(99, file=sys.stderr)"
    assert measured(tmp_path, code) == value


def test_a_loss_of_nan_is_not_passed_over(tmp_path: Path) -> None:
    assert math.isnan(measured(tmp_path, "print('step 100 loss nan')"))


def test_a_key_of_the_last_line_counts_if_asked_for(tmp_path: Path) -> None:
    code = 'print(\'{"f1": 1}\'); print(\'{"f1": 0.5, "name": "x", "n": 3}\'); print()'
    assert measured(tmp_path, code, json_key="f1") == 0.5
    assert measured(tmp_path, code, json_key="n") == 3
    for key in ("name", "mrr"):
        with pytest.raises(
            LoraSqueezeError, match=f"rank 4: no number '{key}' in the JSON .* it has 'f1', 'name', 'n'"
        ):
            measured(tmp_path, code, json_key=key)
    with pytest.raises(LoraSqueezeError, match=r"the last line that the command printed is no JSON object: '0.5'"):
        measured(tmp_path, "print('{}'); print(0.5)", json_key="f1")
    with pytest.raises(LoraSqueezeError, match="no JSON object: ''"):
        measured(tmp_path, "", json_key="f1")


def test_a_command_that_fails_tells_its_last_lines(tmp_path: Path) -> None:
    code = "import sys; print(0.9); print('one\\ntwo\\n\x1b[31mno GPU', file=sys.stderr); sys.exit(3)"
    with pytest.raises(LoraSqueezeError) as error:
        measured(tmp_path, code)
    assert re.match(
        r"rank 4: the command failed with exit code 3: one \| two \| \?\[31mno GPU; what it printed is in .*stdout",
        str(error.value),
    )
    with pytest.raises(LoraSqueezeError, match="failed with exit code 1: only here;"):
        measured(tmp_path, "import sys; print('only here'); sys.exit(1)")
    with pytest.raises(LoraSqueezeError, match="the command was ended by signal 9: "):
        measured(tmp_path, "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(LoraSqueezeError, match="rank 4: the command printed no number on its standard output"):
        measured(tmp_path, "print('done')")


def test_a_command_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    code = "import os, sys, time; print(os.fork(), flush=True); time.sleep(60)"
    begin = time.monotonic()
    with pytest.raises(LoraSqueezeError, match=r"rank 4: the command took longer than 0.5 s"):
        measured(tmp_path, code, timeout=0.5)
    assert time.monotonic() - begin < 10
    child = max(map(int, (tmp_path / "logs" / "rank-4.stdout").read_text().split()))
    for _ in range(100):  # until whoever inherits it has noticed its end
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the command's own child lives on")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("python eval.py", "the command 'python eval.py' does not mention {adapter}"),
        ("", "the command '' does not mention {adapter}"),
        ("python 'eval {adapter}", "cannot be split into words: No closing quotation"),
    ],
)
def test_a_command_that_cannot_be_meant_is_refused(tmp_path: Path, command: str, text: str) -> None:
    with pytest.raises(LoraSqueezeError, match=text):
        CommandMetric(command, tmp_path)
    with pytest.raises(LoraSqueezeError, match="timeout must be above 0 seconds, got 0"):
        CommandMetric("python {adapter}", tmp_path, timeout=0)


def test_a_command_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(LoraSqueezeError, match=r"the command 'no-such-program' cannot be run: .*No such file"):
        CommandMetric("no-such-program {adapter}", tmp_path / "logs")(tmp_path, 1)


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_DFL], ids=["interrupt", "none of Python's"])
def test_an_interruption_while_the_command_starts_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    """The signal comes after the process is there and before anybody knows its number."""
    started: list[subprocess.Popen[bytes]] = []
    real, before = subprocess.Popen, signal.signal(signal.SIGTERM, handler)

    def interrupted(*args: Any, **options: Any) -> Any:
        started.append(real(*args, **options))
        signal.raise_signal(signal.SIGINT)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", interrupted)
    metric = CommandMetric(f"{shlex.quote(sys.executable)} -S -c 'import time; time.sleep(60)' {{adapter}}", tmp_path)
    try:
        with pytest.raises(KeyboardInterrupt):
            metric(tmp_path, 8)
        assert started[0].returncode == -signal.SIGKILL
        assert signal.getsignal(signal.SIGTERM) is handler, "put back"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)
