"""PEFT's own test suite, from the source distribution of the PEFT that is installed, asked of other methods.

PEFT lists the cases of its common tests in decorators. `asked_of` takes such a class and puts our cases in their place;
tests of one method of PEFT's own, and those of prompt learning, are left out.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

PACKAGE = "peft_tests"


class Known(NamedTuple):
    """A test that must fail.

    Args:
        tests: expression of its whole name.
        methods: that it is asked of.
        why: it fails.
        always: rather than with some of PEFT's other parameters.
    """

    tests: str
    methods: tuple[str, ...]
    why: str
    always: bool = True


def suite(name: str) -> Any:
    """A module of PEFT's tests, downloaded from the package index once for each version of PEFT."""
    home = _home()
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / "lock"):  # a second process waits for the first
        if not (home / PACKAGE).exists():
            with tempfile.TemporaryDirectory(dir=home) as work:
                _unpack(Path(work))
                tests = next(Path(work).glob("peft-*/tests"))
                (tests / "__init__.py").touch()
                tests.rename(home / PACKAGE)
    if str(home) not in sys.path:
        sys.path.append(str(home))
    return importlib.import_module(f"{PACKAGE}.{name}")


def _home() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lora-squeeze" / f"peft-{version('peft')}-tests"


def _unpack(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*command, "--dest", str(folder), f"peft=={version('peft')}"], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")


def asked_of(cases: Mapping[str, Sequence[Any]], known: Sequence[Known]) -> Callable[[type], type]:
    """A class decorator: the inherited tests, with our cases.

    Args:
        cases: names of a test's parameters, as PEFT writes them -> our values for them.
        known: tests that must fail.
    """

    def change(tests: type) -> type:
        for name in dir(tests):
            test = getattr(tests, name)
            if not name.startswith("test_") or not callable(test):
                continue
            asked = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            ours = [mark for mark in asked if mark.args[0] in cases]
            left_out = not ours or "prompt" in name
            setattr(tests, name, None if left_out else _with(test, name, asked, cases, known))
        return tests

    return change


def _with(
    test: Any, name: str, asked: Sequence[Any], cases: Mapping[str, Sequence[Any]], known: Sequence[Known]
) -> Any:
    copy: Any = types.FunctionType(test.__code__, test.__globals__, name, test.__defaults__, test.__closure__)
    copy.__kwdefaults__, copy.__module__ = test.__kwdefaults__, test.__module__
    copy.pytestmark = [mark for mark in test.pytestmark if mark.name != "parametrize"]
    for mark in asked:
        if mark.args[0] not in cases:
            copy.pytestmark.append(mark)
            continue
        values = []
        for value in cases[mark.args[0]]:
            methods = {part.method for part in value if isinstance(part, type)}
            found = [each for each in known if methods & {*each.methods} and re.fullmatch(each.tests, name)]
            expected = [pytest.mark.xfail(reason=each.why, strict=each.always) for each in found]
            values.append(pytest.param(*value, id=_id(value), marks=expected))
        copy.pytestmark.append(pytest.mark.parametrize(mark.args[0], values).mark)
    return copy


def _id(value: Sequence[Any]) -> str:
    return " ".join(Path(part).name for part in value if isinstance(part, str)) or value[0].__name__
