"""What is imported when: a command that only prints its help must not wait for torch."""

import subprocess
import sys
from pathlib import Path

import pytest
from adapter_cases import write_folder

import lora_squeeze

HEAVY = (
    "torch",
    "numpy",
    "transformers",
    "peft",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "matplotlib",
    "plotly",
    "rich",
)


def imported(code: str) -> set[str]:
    """The heavy packages that a new process has imported after running this code."""
    code = f"import sys\n{code}\nprint('loaded', *(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import lora_squeeze; lora_squeeze.__version__; dir(lora_squeeze)") == set()


@pytest.mark.parametrize("command", [[], ["squeeze"], ["inspect"], ["train"], ["demo"], ["calibrate"], ["fleet"]])
def test_help_imports_neither_torch_nor_its_friends(command: list[str]) -> None:
    code = f"""
from lora_squeeze.cli import main
sys.argv = ["lora-squeeze", *{command}, "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code
"""
    assert imported(code) <= {"rich"}, "only what draws the help"


def test_squeezing_a_folder_needs_torch_only(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in")
    code = f"""
import lora_squeeze
small = lora_squeeze.load({str(folder)!r}).squeeze(energy=0.9)
small.save({str(tmp_path / "out")!r})
small.report.to_json()
"""
    assert imported(code) <= {"torch", "numpy"}


def test_the_public_names_are_there_and_others_are_not() -> None:
    for name in lora_squeeze.__all__:
        assert getattr(lora_squeeze, name) is not None
    assert set(lora_squeeze.__all__) <= set(dir(lora_squeeze))
    with pytest.raises(AttributeError, match="module 'lora_squeeze' has no attribute 'squeez'"):
        lora_squeeze.squeez  # noqa: B018
