"""A folder is replaced as a whole: what goes, what stays, what is refused and what the system refuses."""

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from folder_cases import CONFIG, OWNED, WEIGHTS, check_foreign, existing, in_child, no_exchange, tree, version_of, write

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats import folder
from lora_squeeze.formats.folder import replace_folder

NOBODY = 65534


@contextmanager
def failing(call: str, reason: int, when: Callable[..., bool]) -> Iterator[None]:
    """Let one function of ``os`` fail for some arguments."""
    real = getattr(os, call)

    def fail(*args: object, **options: object) -> object:
        if when(*args):
            raise OSError(reason, os.strerror(reason), str(args[0]))
        return real(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, call, fail)
        yield


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_what_is_owned_and_keeps_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(folder, "_exchanged", no_exchange)
    target = existing(tmp_path)
    target.chmod(0o2751)
    inode = (target / "notes.md").stat().st_ino
    write(target, 2)
    assert version_of(target) == 2
    check_foreign(target)
    assert sorted(os.listdir(target)) == sorted([CONFIG, WEIGHTS, "notes.md", "logs", "latest", "gone"])
    assert (target / "notes.md").stat().st_ino == inode, "carried by a hard link, not copied"
    assert stat.S_IMODE(target.stat().st_mode) == 0o2751, "the folder keeps its mode"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("reason", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP])
def test_foreign_files_are_copied_where_they_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    target = existing(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "link", refuse)
    write(target, 2)
    assert version_of(target) == 2
    check_foreign(target)


def test_a_foreign_pipe_is_carried_and_never_opened(tmp_path: Path) -> None:
    target = existing(tmp_path)
    os.mkfifo(target / "pipe")
    write(target, 2)
    assert stat.S_ISFIFO((target / "pipe").stat().st_mode)
    with (
        pytest.raises(LoraSqueezeError, match="cannot be written: Invalid cross-device link"),
        failing("link", errno.EXDEV, lambda source, _: Path(source).name == "pipe"),
    ):
        write(target, 3)
    assert version_of(target) == 2


def test_everything_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, exchanged, fsync = existing(tmp_path), folder._exchanged, os.fsync
    steps: list[object] = []

    def note_sync(fd: int) -> None:
        steps.append(os.fstat(fd).st_ino)
        fsync(fd)

    def note_exchange(one: Path, other: Path) -> bool:
        steps.append("exchange")
        return exchanged(one, other)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(folder, "_exchanged", note_exchange)
    with replace_folder(target, force=True, owned=OWNED) as staging:
        (staging / CONFIG).write_text("new")
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("new")
    before = set(steps[: steps.index("exchange")])
    for path in (".", CONFIG, "sub", "sub/file", "logs", "logs/deep", "logs/empty"):
        assert (target / path).stat().st_ino in before, f"{path} is synced before the exchange"
    assert steps[-1] == tmp_path.stat().st_ino, "the parent is synced last"


def test_the_block_wins_over_a_foreign_file_and_shares_a_foreign_folder(tmp_path: Path) -> None:
    target = existing(tmp_path)
    with replace_folder(target, force=True, owned=OWNED) as staging:
        (staging / "notes.md").write_text("new")
        (staging / "logs").mkdir()
        (staging / "logs" / "new.txt").write_text("new")
    assert (target / "notes.md").read_text() == "new"
    assert sorted(os.listdir(target / "logs")) == ["deep", "empty", "new.txt"]


def test_a_folder_under_an_owned_name_is_not_deleted(tmp_path: Path) -> None:
    target = existing(tmp_path)
    (target / "README.md").unlink()
    (target / "README.md").mkdir()
    (target / "README.md" / "thesis.txt").write_text("years of work")
    write(target, 2)
    assert (target / "README.md" / "thesis.txt").read_text() == "years of work"
    with (
        pytest.raises(LoraSqueezeError, match=r"README.md' is a folder where a file is to be written; move it away"),
        replace_folder(target, force=True, owned=OWNED) as staging,
    ):
        (staging / "README.md").write_text("new")
    assert version_of(target) == 2
    assert os.listdir(tmp_path) == ["out"]


def test_a_foreign_file_that_comes_during_the_exchange_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, exchanged = existing(tmp_path), folder._exchanged

    def late(one: Path, other: Path) -> bool:
        (target / "late.txt").write_text("mine")
        return exchanged(one, other)

    monkeypatch.setattr(folder, "_exchanged", late)
    write(target, 2)
    assert (target / "late.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "force", "message"),
    [
        ("folder", False, r"out' exists already and nothing was written; .* --force \(force=True\)"),
        ("link to folder", False, r"exists already and nothing was written; .* --force \(force=True\)"),
        ("file", False, "out' exists and is not a folder; remove it or choose another"),
        ("file", True, "out' exists and is not a folder; remove it or choose another"),
        ("link to file", True, "exists and is not a folder"),
        ("dangling link", False, r"out' leads to no folder \(No such file or directory\); remove it"),
        ("dangling link", True, r"out' leads to no folder \(No such file or directory\); remove it"),
        ("circle of links", True, "out' leads to no folder .*; remove it"),
        ("below a file", False, "cannot be written: Not a directory; nothing was changed"),
        ("long name", False, "cannot be written: File name too long; nothing was changed"),
    ],
)
def test_refused_before_anything_is_made(tmp_path: Path, kind: str, force: bool, message: str) -> None:
    target = tmp_path / "out"
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("mine")
    if kind == "folder":
        target = tmp_path / "folder" / ".." / "out"
        (tmp_path / "folder").rename(tmp_path / "out")
        (tmp_path / "folder").mkdir()
    elif kind == "file":
        target.write_text("mine")
    elif kind == "below a file":
        target = tmp_path / "file" / "deep" / "out"
    elif kind == "long name":
        target = tmp_path / ("n" * 250)
    else:
        to = {"link to folder": "folder", "link to file": "file", "dangling link": "nowhere", "circle of links": "out"}
        target.symlink_to(to[kind])
    before = tree(tmp_path)
    with (
        pytest.raises(LoraSqueezeError, match=message),
        replace_folder(target, force=force, owned=OWNED),
    ):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == before


def test_the_current_folder_is_not_replaced_under_the_feet_of_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = existing(tmp_path)
    monkeypatch.chdir(target / "logs")
    for path in (target, Path("..")):
        with pytest.raises(LoraSqueezeError, match=r"out' contains the current folder; leave it"):
            write(path, 2)
    assert version_of(target) == 1


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_may_be_filled(tmp_path: Path, force: bool) -> None:
    target = tmp_path / "out"
    target.mkdir()
    target.chmod(0o750)
    write(target, 1, force)
    assert version_of(target) == 1
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    target = existing(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / "elsewhere" / "link"
    link.symlink_to("../out")
    write(link, 2)
    assert link.is_symlink()
    assert version_of(target) == 2
    check_foreign(target)
    assert os.listdir(tmp_path / "elsewhere") == ["link"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077, 0o002])
def test_the_umask_decides_the_mode_of_a_new_folder(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "made" / "out", 1)
    finally:
        os.umask(before)
    for path in (tmp_path / "made", tmp_path / "made" / "out"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError, MemoryError, ConnectionError])
@pytest.mark.parametrize("there", [False, True])
def test_an_exception_in_the_block_passes_and_changes_nothing(
    tmp_path: Path, error: type[BaseException], there: bool
) -> None:
    target = existing(tmp_path) if there else tmp_path / "made" / "deep" / "out"
    before = tree(tmp_path)
    with pytest.raises(error, match="why"), replace_folder(target, force=True, owned=OWNED) as staging:
        (staging / CONFIG).write_text("half")
        (staging / "sub").mkdir()
        raise error("why")
    assert tree(tmp_path) == before
    assert not folder._ACTIVE, "no name is remembered for ever"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EPERM, None])
def test_without_an_exchange_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    class NoExchange:
        """A C library whose renameat2 fails with ``code``, or that has none."""

        def __init__(self, name: None, use_errno: bool) -> None:
            if code is not None:
                self.renameat2 = lambda *_: -1

    monkeypatch.setattr(folder.ctypes, "CDLL", NoExchange)
    monkeypatch.setattr(folder.ctypes, "get_errno", lambda: code)
    target = existing(tmp_path)
    write(target, 2)
    assert version_of(target) == 2
    check_foreign(target)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has renameat2")
def test_the_exchange_is_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert folder._exchanged(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path / "a") == ["b"]
    with pytest.raises(FileNotFoundError, match="No such file"):
        folder._exchanged(tmp_path / "a", tmp_path / "absent")
    target = existing(tmp_path)
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("a rename where an exchange would do"))
    write(target, 2)
    assert version_of(target) == 2


def is_staging(path: object, *_: object) -> bool:
    return str(path).endswith(".lora-squeeze")


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EBUSY])
def test_a_failed_second_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    monkeypatch.setattr(folder, "_exchanged", no_exchange)
    target = existing(tmp_path)
    before = tree(target)
    with (
        pytest.raises(LoraSqueezeError, match=f"{os.strerror(reason)}; nothing was changed"),
        failing("rename", reason, is_staging),
    ):
        write(target, 2)
    assert tree(target) == before
    assert os.listdir(tmp_path) == ["out"]


def test_if_the_old_folder_cannot_be_put_back_the_message_says_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_exchanged", no_exchange)
    target = existing(tmp_path)
    with (
        pytest.raises(LoraSqueezeError, match=r"could not be put back .*; its former content is in '.*-old'") as caught,
        failing("rename", errno.EACCES, lambda source, _: Path(source) != target),
    ):
        write(target, 2)
    aside = Path(str(caught.value).rsplit("'", 2)[1])
    assert version_of(aside) == 1
    write(target, 2)
    assert version_of(target) == 2
    check_foreign(target)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("mkdir", errno.EACCES),
        ("mkdir", errno.EROFS),
        ("fsync", errno.EIO),
        ("fsync", errno.ENOSPC),
        ("link", errno.ENOSPC),
        ("rename", errno.EXDEV),
    ],
)
def test_the_reason_of_the_system_is_given_and_no_litter_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, reason: int
) -> None:
    monkeypatch.setattr(folder, "_exchanged", no_exchange)
    monkeypatch.setattr(folder.shutil, "copy2", lambda source, copy: os.link(source, copy))
    target = existing(tmp_path)
    before = tree(tmp_path)
    with (
        pytest.raises(LoraSqueezeError, match=f"{os.strerror(reason)}; (nothing was changed|choose another place)"),
        failing(call, reason, lambda *_: True),
    ):
        write(target, 2)
    assert tree(tmp_path) == before


def test_a_disk_full_in_the_block_is_explained_other_errors_pass(tmp_path: Path) -> None:
    for text, error, expected in [
        ("cannot be written: No space left", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), LoraSqueezeError),
        ("source", FileNotFoundError(errno.ENOENT, "no", "source"), FileNotFoundError),
    ]:
        with (
            pytest.raises(expected, match=text),
            replace_folder(tmp_path / "made" / "out", force=False, owned=()),
        ):
            raise error
    with (
        pytest.raises(LoraSqueezeError, match="made/out' cannot be written: No such file"),
        replace_folder(tmp_path / "made" / "out", force=False, owned=()) as staging,
    ):
        (staging / "absent" / "file").write_text("")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def public(tmp_path: Path) -> Iterator[Path]:
    """A folder that an ordinary user can reach, which pytest's own are not when root runs the tests."""
    if os.geteuid() != 0:
        yield tmp_path
        return
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def be_ordinary_user() -> None:
    if os.geteuid() == 0:
        os.setuid(NOBODY)


def test_a_parent_without_write_permission_is_explained(public: Path) -> None:
    target = existing(public)
    public.chmod(0o555)

    def write_there() -> None:
        be_ordinary_user()
        with pytest.raises(LoraSqueezeError, match="cannot be written: Permission denied; nothing was changed"):
            write(target, 2)

    assert in_child(write_there) == 0
    public.chmod(0o755)
    assert os.listdir(public) == ["out"]
    assert version_of(target) == 1


def test_read_only_foreign_folders_are_carried_and_leave_no_litter(public: Path) -> None:
    target = existing(public)
    (target / "logs" / "deep").chmod(0o555)
    target.chmod(0o555)
    if os.geteuid() == 0:
        for path in (public, *public.rglob("*")):
            os.chown(path, NOBODY, NOBODY, follow_symlinks=False)

    def write_there() -> None:
        be_ordinary_user()
        write(target, 2)

    assert in_child(write_there) == 0
    assert os.listdir(public) == ["out"]
    assert version_of(target) == 2
    check_foreign(target)
    assert stat.S_IMODE((target / "logs" / "deep").stat().st_mode) == 0o555
    assert stat.S_IMODE(target.stat().st_mode) == 0o555
    for path in (target, target / "logs" / "deep"):
        path.chmod(0o755)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may write into a folder of another user")
def test_root_leaves_a_folder_to_its_owner(tmp_path: Path) -> None:
    target = existing(tmp_path)
    os.chown(target, NOBODY, NOBODY)
    write(target, 2)
    assert (target.stat().st_uid, target.stat().st_gid) == (NOBODY, NOBODY)
