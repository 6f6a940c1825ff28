"""What the tests of replacing folders share: a save, what it must keep, and a child process to try things in."""

import json
import os
import signal
import stat
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from lora_squeeze.formats.folder import replace_folder
from lora_squeeze.formats.safetensors_io import TensorFile, TensorFileWriter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWNED = (CONFIG, WEIGHTS, "adapter_model.bin", "README.md")


def write(target: Path, version: int, force: bool = True) -> None:
    """What a save does: two files that belong together, one of them streamed."""
    with replace_folder(target, force=force, owned=OWNED) as staging:
        (staging / CONFIG).write_text(json.dumps({"version": version}))
        with TensorFileWriter(staging / WEIGHTS, {n: (torch.int64, (2,)) for n in "ab"}, 50) as file:
            for name in "ab":
                file.write(name, torch.full((2,), version))
            file.close({"version": str(version)})


def version_of(target: Path) -> int:
    """The version that all owned files agree on."""
    version: int = json.loads((target / CONFIG).read_text())["version"]
    with TensorFile(target / WEIGHTS) as file:
        assert file.metadata["version"] == str(version), "configuration and weights are of one write"
        assert all(torch.equal(file.read(name), torch.full((2,), version)) for name in "ab")
    return version


def add_foreign(target: Path) -> None:
    """What a user may keep beside an adapter."""
    (target / "notes.md").write_text("mine")
    (target / "logs" / "deep").mkdir(parents=True)
    (target / "logs" / "deep" / "run.txt").write_text("loss")
    (target / "logs" / "empty").mkdir()
    (target / "latest").symlink_to("logs/deep")
    (target / "gone").symlink_to("nowhere")
    (target / "notes.md").chmod(0o604)
    os.utime(target / "notes.md", (1e9, 1e9))
    os.utime(target / "logs", (1e9, 1e9))
    (target / "logs").chmod(0o711)


def check_foreign(target: Path) -> None:
    assert (target / "notes.md").read_text() == "mine"
    assert (target / "logs" / "deep" / "run.txt").read_text() == "loss"
    assert (target / "logs" / "empty").is_dir()
    assert os.readlink(target / "latest") == "logs/deep"
    assert os.readlink(target / "gone") == "nowhere"
    assert stat.S_IMODE((target / "notes.md").stat().st_mode) == 0o604
    assert stat.S_IMODE((target / "logs").stat().st_mode) == 0o711
    assert (target / "notes.md").stat().st_mtime == (target / "logs").stat().st_mtime == 1e9


def existing(parent: Path) -> Path:
    """An adapter of version 1 with foreign files, and files that only the old version has."""
    target = parent / "out"
    write(target, 1)
    (target / "README.md").write_text("old")
    (target / "adapter_model.bin").write_text("old")
    add_foreign(target)
    return target


def no_exchange(one: Path, other: Path) -> bool:
    return False


def tree(parent: Path) -> dict[str, tuple[object, ...]]:
    """All that a refusal must leave as it was."""
    result: dict[str, tuple[object, ...]] = {}
    for path in sorted(parent.rglob("*")):
        info = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        result[str(path)] = (info.st_ino, info.st_mode, info.st_mtime_ns, content)
    return result


def start(body: Callable[[], object]) -> int:
    """Run ``body`` in a fork, so that torch need not be imported again; its process number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks beside threads; ours are idle
        pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not what another test's library has made of it
            body()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def in_child(body: Callable[[], object]) -> int:
    """Run ``body`` in a fork to its end; exit code, negative after a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(start(body), 0)[1])
