"""Killed, interrupted or in a race with others at any step, a folder is wholly the old one or wholly the new one."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from folder_cases import (
    CONFIG,
    OWNED,
    WEIGHTS,
    add_foreign,
    check_foreign,
    existing,
    in_child,
    no_exchange,
    start,
    tree,
    version_of,
    write,
)

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import folder
from lora_squeeze.formats.folder import replace_folder

ALL = {
    "open",
    "os.pwrite",
    "os.fsync",
    "exchange",
    *("os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.setxattr"),
    *("os.symlink", "os.truncate", "os.utime"),
}


@pytest.fixture(params=["exchange", "two renames"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to take the place of a folder."""
    if request.param == "two renames":
        monkeypatch.setattr(folder, "_exchanged", no_exchange)
    return str(request.param)


def die_at(number: int, operations: set[str]) -> None:
    """Let SIGKILL strike before the given file operation of this process."""
    count = itertools.count(1)

    def tick(event: str) -> None:
        if event in operations and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(event: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            tick(event)
            return function(*args)

        return call

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or int(str(arguments[2])) & (os.O_WRONLY | os.O_RDWR):
            tick(event)

    # Python announces its file operations to audit hooks, except these.
    for name in ("pwrite", "fsync"):
        setattr(os, name, counted(f"os.{name}", getattr(os, name)))
    folder._exchanged = counted("exchange", folder._exchanged)  # type: ignore[assignment]
    sys.addaudithook(hook)


def deaths(work: Callable[[], object], operations: set[str] = ALL) -> Iterator[int]:
    """Kill ``work`` at its first file operation, its second, and so on until it gets through."""
    for number in itertools.count(1):

        def body(number: int = number) -> None:
            die_at(number, operations)
            work()

        code = in_child(body)
        if code == 0:
            assert number > 3, f"a write has more than {number - 1} operations"
            return
        assert code == -signal.SIGKILL, f"operation {number} ended with {code}"
        yield number


def test_killed_at_any_operation_a_new_target_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "made" / "out"
    seen = set()
    for number in deaths(lambda: write(target, 2, force=False)):
        seen.add(target.exists())
        if target.exists():
            assert version_of(target) == 2
        write(target, 3, force=target.exists())
        assert version_of(target) == 3
        assert os.listdir(target.parent) == ["out"], f"litter after a kill at operation {number} and a later write"
        for file in target.iterdir():
            file.unlink()
        target.rmdir()
        target.parent.rmdir()
    assert seen == {True, False}


def test_killed_at_any_operation_an_existing_target_is_wholly_old_or_new(tmp_path: Path) -> None:
    target = existing(tmp_path)
    seen = set()
    for number in deaths(lambda: write(target, 2)):
        seen.add(version_of(target))
        assert sorted(p.name for p in target.iterdir() if p.name in OWNED[2:]) == (
            ["README.md", "adapter_model.bin"] if version_of(target) == 1 else []
        )
        check_foreign(target)
        assert len(os.listdir(tmp_path)) <= 2, "at most one hidden folder is left"
        write(target, 1)
        assert os.listdir(tmp_path) == ["out"], f"litter after a kill at operation {number} and a later write"
        check_foreign(target)
        (target / "README.md").write_text("old")
        (target / "adapter_model.bin").write_text("old")
    assert seen == {1, 2}


def test_killed_between_two_renames_the_old_folder_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "_exchanged", no_exchange)
    target = existing(tmp_path)
    absent = 0
    for _ in deaths(lambda: write(target, 2), {"os.rename"}):
        if not target.exists():
            absent += 1
            with pytest.raises(LoraSqueezeError, match="exists already"):
                write(target, 3, force=False)
            assert version_of(target) == 1, "the next write finds the old folder again"
        check_foreign(target)
        write(target, 1)
        assert os.listdir(tmp_path) == ["out"]
        check_foreign(target)
    assert absent == 1, "without an exchange there is one moment without a target"


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
@pytest.mark.parametrize("there", [False, True])
def test_signals_leave_no_litter_even_when_sent_again_during_the_clean_up(
    tmp_path: Path, number: signal.Signals, raised: type[BaseException], there: bool
) -> None:
    target = existing(tmp_path) if there else tmp_path / "made" / "out"
    before = tree(tmp_path)

    def interrupted() -> None:
        handlers = [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)]
        rmtree, cleaned = folder.shutil.rmtree, []

        def disturbed(path: Path) -> None:
            signal.raise_signal(number)  # an impatient user, while the hidden folder is being removed
            cleaned.append(path)
            rmtree(path)

        folder.shutil.rmtree = disturbed  # type: ignore[assignment]
        with pytest.raises(raised), replace_folder(target, force=True, owned=OWNED) as staging:
            (staging / CONFIG).write_text("half")
            signal.raise_signal(number)
            pytest.fail("the signal must end the block")
        assert cleaned, "the second signal came during the clean-up"
        assert [signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)] == handlers

    assert in_child(interrupted) == 0
    assert tree(tmp_path) == before


def test_a_signal_during_the_removal_of_the_old_folder_is_delivered_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rmtree = existing(tmp_path), folder.shutil.rmtree

    def disturbed(path: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        rmtree(path)

    monkeypatch.setattr(folder.shutil, "rmtree", disturbed)
    with pytest.raises(KeyboardInterrupt):
        write(target, 2)
    assert version_of(target) == 2
    assert os.listdir(tmp_path) == ["out"]


def test_a_handler_set_by_the_program_is_left_alone(tmp_path: Path) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: came.append(number))
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with replace_folder(tmp_path / "out", force=False, owned=()):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]
    assert (tmp_path / "out").is_dir()


def dead_pid() -> int:
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def test_only_what_dead_writers_of_the_same_target_left_is_removed(tmp_path: Path) -> None:
    dead, alive, ours = dead_pid(), os.getppid(), os.getpid()
    gone = [f".out.{dead}-0123abcd.lora-squeeze", f".out.{ours}-0123abcd.lora-squeeze"]
    kept = [
        f".out.{alive}-0123abcd.lora-squeeze",
        f".out.1{10**16}-0123abcd.squeeze",
        f".out2.{dead}-0123abcd.lora-squeeze",
        f".out.x.{dead}-0123abcd.lora-squeeze",
        f".out.{dead}-0123abcd.lora-squeeze.txt",
        "out2",
    ]
    for name in gone + kept:
        (tmp_path / name / "sub").mkdir(parents=True)
    (tmp_path / f".out.{dead}-11111111.lora-squeeze").symlink_to("out2")
    (tmp_path / f".out.{dead}-22222222.lora-squeeze").write_text("a file")
    write(tmp_path / "out", 1)
    others = [f".out.{dead}-11111111.lora-squeeze", f".out.{dead}-22222222.lora-squeeze"]
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, *others, "out"])
    assert os.listdir(tmp_path / "out2") == ["sub"]


def test_a_writer_of_another_user_counts_as_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f".out.{dead_pid()}-0123abcd.lora-squeeze"
    (tmp_path / name).mkdir()

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    write(tmp_path / "out", 1)
    assert sorted(os.listdir(tmp_path)) == [name, "out"]


def test_a_folder_set_aside_by_a_dead_writer_gives_its_foreign_files_back(tmp_path: Path) -> None:
    target = existing(tmp_path)
    target.rename(tmp_path / f".out.{dead_pid()}-0123abcd.lora-squeeze-old")
    target.mkdir()
    (target / "newer.txt").write_text("mine too")
    write(target, 2)
    assert version_of(target) == 2
    check_foreign(target)
    assert (target / "newer.txt").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.usefixtures("either_way")
def test_of_two_writers_the_last_one_wins_and_nothing_is_mixed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with replace_folder(target, force=True, owned=OWNED) as first:
        (first / CONFIG).write_text("first")
        with replace_folder(target, force=True, owned=OWNED) as second:
            (second / "README.md").write_text("second")
        add_foreign(target)
    assert not (target / "README.md").exists()
    assert (target / CONFIG).read_text() == "first"
    check_foreign(target)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_with_force_a_target_that_comes_or_goes_at_the_last_moment_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    target, real = tmp_path / "out", folder._sync_folders
    if there:
        write(target, 1)

    def late(staging: Path) -> None:
        real(staging)
        monkeypatch.undo()
        if there:
            target.rename(tmp_path / "moved away")
        else:
            write(target, 1)
            add_foreign(target)

    monkeypatch.setattr(folder, "_sync_folders", late)
    write(target, 2)
    assert version_of(target) == 2
    if not there:
        check_foreign(target)
    assert len(os.listdir(tmp_path)) == 1 + there


def test_without_force_a_target_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with (
        pytest.raises(LoraSqueezeError, match="exists already and nothing was written"),
        replace_folder(target, force=False, owned=OWNED) as staging,
    ):
        (staging / CONFIG).write_text("late")
        write(target, 1)
    assert version_of(target) == 1
    assert os.listdir(tmp_path) == ["out"]


def look_at(target: Path) -> None:
    """What a reader sees at any moment: a folder with all its files."""
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    names = os.listdir(fd)
    still_there = os.path.samestat(os.fstat(fd), os.stat(target))
    os.close(fd)
    assert not still_there or {CONFIG, WEIGHTS, "notes.md", "logs"} <= set(names)


def test_what_goes_while_it_is_carried_is_not_taken_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rival renames the folder away right after the first look at a link in it."""
    target, copy = existing(tmp_path), tmp_path / "copy"
    (target / "gone").unlink()  # so that the other link is the first thing that is no plain file
    copy.mkdir()

    def watched(look: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def looked(path: Any, **options: Any) -> os.stat_result:
            found = look(path, **options)
            if os.fspath(path) == str(target / "latest"):
                monkeypatch.undo()
                target.rename(tmp_path / "away")
            return found

        return looked

    for name in ("stat", "lstat"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    with pytest.raises(FileNotFoundError):
        folder._carry(target, copy, ())
    assert (tmp_path / "away").exists()
    assert set(os.listdir(copy)) == set(OWNED), "all that came before it, and nothing of it"


def test_many_writers_and_a_reader_never_meet_a_mix(tmp_path: Path, either_way: str) -> None:
    target, renames = existing(tmp_path), either_way == "two renames"

    def writer(first: int) -> None:
        for version in range(first, first + 15):
            try:
                write(target, version)
            except LoraSqueezeError:
                assert renames, "an exchange never fails for a rival"

    rivals = {start(lambda n=n: writer(n)) for n in (100, 200, 300)}
    while rivals:
        for rival in list(rivals):
            ended, status = os.waitpid(rival, os.WNOHANG)
            if ended:
                rivals.remove(rival)
                assert status == 0
        if not renames:
            look_at(target)
        time.sleep(0.0005)
    if renames:  # a loser among three may have to leave the old folder to the next write
        write(target, 400)
    assert version_of(target) >= 100
    check_foreign(target)
    assert os.listdir(tmp_path) == ["out"]
