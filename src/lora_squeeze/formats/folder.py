"""Replacing a folder as a whole: after a crash at any moment the folder is either the old or the new one.

The new folder is filled under a hidden name beside the target (same file system) and then exchanged with it in one
step. Two renames of single files are not enough: a reader between them, or a kill, would see a mix of old and new.
"""

import ctypes
import errno
import os
import re
import secrets
import shutil
import signal
import stat
import threading
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from lora_squeeze.errors import LoraSqueezeError
from lora_squeeze.formats.safetensors_header import quoted

_ACTIVE: set[str] = set()  # hidden folders that this process is working on
_ATTEMPTS = 5  # rounds against other writers of the same target
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@contextmanager
def replace_folder(target: str | os.PathLike[str], *, force: bool, owned: Collection[str]) -> Iterator[Path]:
    """Give an empty folder to write into, which takes the place of ``target`` when the block ends.

    After an exception in the block, Ctrl-C or SIGTERM, nothing has changed and nothing is left behind; after SIGKILL
    the target is wholly old or wholly new, and the next call for it removes what was left.

    Args:
        target: the folder to make; missing parents are made too. A symlink to a folder is followed.
        force: replace an existing folder that is not empty.
        owned: names of the files that go with the old folder. Everything else in it is foreign and carried over into
            the new one (hard links, else copies), unless the block has written a file of that name.

    Yields:
        The folder to write into.

    Raises:
        LoraSqueezeError: the target exists and ``force`` is false, is no folder, or contains the current folder; or the
            system refuses a step (permission, space), with its reason.

    Notes:
        Of several writers to one target the last one wins. Where the system cannot exchange two folders (only Linux
        can, on most file systems), the old one is renamed away and the new one in: a kill between these two renames
        leaves no target, and the next call puts the old one back first.
    """
    real = _resolved(Path(target))
    staging = hidden_name(real)
    _ACTIVE.add(staging.name)
    made: list[Path] = []
    with sigterm_raises():
        try:
            with explained(real):
                _clear_stale(real, owned)
                _check_target(real, force)
                make_parents(real.parent, made)
                os.mkdir(staging)
            with explained(real, only_below=staging):
                yield staging
            with explained(real):
                _sync_files(staging)
                _take_place(staging, real, force, owned)
        finally:
            _ACTIVE.discard(staging.name)
            with _signals_held():
                _remove(staging)  # the new folder if it failed, the old one if it was exchanged
                for parent in reversed(made):
                    with suppress(OSError):  # not empty: the target is in place, or another writer uses it
                        os.rmdir(parent)


def check_target(target: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse what `replace_folder` would refuse at its start."""
    real = _resolved(Path(target))
    with explained(real):
        _check_target(real, force)


def _resolved(target: Path) -> Path:
    """The target without symlinks in it, so that the real folder is replaced and not a link to it."""
    try:
        if target.is_symlink() or target.name in ("", ".."):
            return target.resolve(strict=True)
        return target.parent.resolve() / target.name
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: a circle of links; ValueError: NUL
        reason = getattr(error, "strerror", None) or error
        raise LoraSqueezeError(
            f"{quoted(target)} leads to no folder ({reason}); remove it or choose another"
        ) from error


def _check_target(target: Path, force: bool) -> None:
    try:
        mode = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(mode):
        raise LoraSqueezeError(f"{quoted(target)} exists and is not a folder; remove it or choose another")
    if not force and os.listdir(target):
        raise _exists(target)
    with suppress(FileNotFoundError):  # the current folder may have been removed
        if Path.cwd().is_relative_to(target):
            raise LoraSqueezeError(f"{quoted(target)} contains the current folder; leave it before it is replaced")


def _exists(target: Path) -> LoraSqueezeError:
    return LoraSqueezeError(
        f"{quoted(target)} exists already and nothing was written; choose another folder, or replace it with --force "
        "(force=True)"
    )


@contextmanager
def explained(target: Path, only_below: Path | None = None) -> Iterator[None]:
    """Turn a refusal by the system into our error; in the caller's block only one that concerns the output."""
    try:
        yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2)]
        if only_below and error.errno not in _DISK and not any(name.startswith(str(only_below)) for name in names):
            raise
        raise LoraSqueezeError(
            f"{quoted(target)} cannot be written: {error.strerror or error}; nothing was changed. Choose another "
            "folder, or give this one the rights and the space"
        ) from error


def make_parents(folder: Path, made: list[Path]) -> None:
    """mkdir -p; ``made`` receives what was missing, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        made.append(path)
        try:
            os.mkdir(path)
        except FileExistsError:  # another writer was faster
            made.pop()


def _take_place(staging: Path, target: Path, force: bool, owned: Collection[str]) -> None:
    """Move staging to the target; a former folder is then at staging."""
    for attempt in range(_ATTEMPTS):
        try:
            swapped = _try_place(staging, target, force, owned)
            break
        except OSError as error:  # with force: another writer's folder came or went since the look at the target
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST) and not force:
                raise _exists(target) from error
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or attempt == _ATTEMPTS - 1:
                raise
    if swapped:
        with suppress(FileNotFoundError):
            _carry(staging, target, owned)  # foreign files that came between the first carrying and the exchange
    with suppress(OSError):  # the new folder is in place; some file systems cannot sync folders
        sync(target.parent)


def _try_place(staging: Path, target: Path, force: bool, owned: Collection[str]) -> bool:
    """One attempt; whether there was a former folder to swap with."""
    swap = force and os.path.lexists(target)
    if swap:
        _carry(target, staging, owned)
    if os.path.lexists(target):
        _copy_mode(target, staging)  # after the carrying: the mode may be read-only
    _sync_folders(staging)
    if swap:
        _exchange(staging, target, owned)
    else:
        os.rename(staging, target)  # takes the place of an empty folder, fails on any other
    return swap


def _copy_mode(source: Path, copy: Path) -> None:
    info = os.stat(source)
    with suppress(OSError):  # only root may give away
        os.chown(copy, info.st_uid, info.st_gid)
    os.chmod(copy, stat.S_IMODE(info.st_mode))


def _carry(old: Path, new: Path, skip: Collection[str]) -> None:
    """Put everything of ``old`` but the files in ``skip`` into ``new`` too, where ``new`` has no such name."""
    for name in sorted(os.listdir(old)):
        source, copy = old / name, new / name
        mode = os.lstat(source).st_mode  # one look: a rival may take the old folder away, and put another in its place
        if stat.S_ISDIR(mode):
            if not copy.is_dir():
                if os.path.lexists(copy):
                    raise LoraSqueezeError(f"{quoted(source)} is a folder where a file is to be written; move it away")
                os.mkdir(copy)
            _carry(source, copy, ())
            shutil.copystat(source, copy)
        elif name not in skip and not os.path.lexists(copy):
            _carry_file(source, mode, copy)


def _carry_file(source: Path, mode: int, copy: Path) -> None:
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(source), copy)
        shutil.copystat(source, copy, follow_symlinks=False)
        return
    try:
        os.link(source, copy)
    except OSError:
        if not stat.S_ISREG(mode):
            raise
        shutil.copy2(source, copy)
        sync(copy)


def _exchange(staging: Path, target: Path, owned: Collection[str]) -> None:
    """Swap two folders: in one step where the system can, else by renames that can be undone."""
    if _exchanged(staging, target):
        return
    aside = target.with_name(f"{hidden_name(target).name}-old")
    _ACTIVE.add(aside.name)
    try:
        try:
            os.rename(target, aside)
            os.rename(staging, target)
        except BaseException:
            if aside.exists():
                with _signals_held():
                    _restore(aside, target, owned)
            raise
        os.rename(aside, staging)
    finally:
        _ACTIVE.discard(aside.name)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two paths by renameat2; False where there is no such call or the file system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM):  # EPERM: how some containers bar unknown calls
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _restore(aside: Path, target: Path, owned: Collection[str]) -> None:
    """Put a folder that was renamed away back, or what is foreign in it into the folder that has come in its place."""
    try:
        if os.path.lexists(target):
            _carry(aside, target, owned)
            _remove(aside)
        else:
            os.rename(aside, target)
    except OSError as error:
        raise LoraSqueezeError(
            f"{quoted(target)} could not be put back ({error.strerror}); its former content is in {quoted(aside)}"
        ) from error


def hidden_name(target: Path) -> Path:
    """A fresh hidden name beside the target that tells which process it belongs to."""
    return target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.lora-squeeze")


def _clear_stale(target: Path, owned: Collection[str]) -> None:
    """Remove what writers of this target left behind when they were killed."""
    pattern = re.compile(re.escape(f".{target.name}.") + r"(\d{1,18})-[0-9a-f]{8}\.lora-squeeze(-old)?")
    try:
        names = sorted(os.listdir(target.parent))
    except OSError:  # no parent yet, or no right to list it: then there is nothing to see, or it shows later
        return
    for name in names:
        stale = target.with_name(name)
        match = pattern.fullmatch(name)
        if match is None or name in _ACTIVE or is_alive(int(match[1])) or stale.is_symlink() or not stale.is_dir():
            continue
        if match[2]:
            _restore(stale, target, owned)
            continue
        mine = hidden_name(target)
        _ACTIVE.add(mine.name)
        with suppress(OSError):  # another user's in a shared folder, or another writer was faster
            # Its writer may live after all, on another machine: then it must fail at its last step, not move in a
            # folder that is half removed.
            os.rename(stale, mine)
            _remove(mine)
        _ACTIVE.discard(mine.name)


def is_alive(pid: int) -> bool:
    if pid == os.getpid():  # not in _ACTIVE: left by an earlier process of this number, as after a container restart
        return False
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def _remove(folder: Path) -> None:
    """Remove a folder if it is there, also where folders in it are read-only."""
    for root, _, _ in os.walk(folder):
        with suppress(OSError):
            os.chmod(root, 0o700)
    try:
        shutil.rmtree(folder)
    except OSError as error:
        if os.path.lexists(folder):
            warnings.warn(f"{quoted(folder)} could not be removed: {error.strerror}; remove it by hand", stacklevel=2)


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what cannot be synced, as folders on some file systems
            raise
    finally:
        os.close(fd)


def _sync_files(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            if stat.S_ISREG(os.lstat(path := Path(root, name)).st_mode):
                sync(path)


def _sync_folders(folder: Path) -> None:
    for root, _, _ in os.walk(folder):
        sync(Path(root))


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM raise SystemExit so that clean-up runs; a handler that somebody has set is left alone."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _signals_held() -> Iterator[None]:
    """Let no Ctrl-C or SIGTERM cut a clean-up short; one that came is delivered at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler is not None:  # None: set outside Python, and could not be set back
            signal.signal(number, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
