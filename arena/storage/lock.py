"""Locks that let one process at a time use a file or folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from arena.progress import console

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems have no locks


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Locks `target` through the file `.NAME.lock` beside it; `target` need not exist and may be moved meanwhile.

    The kernel releases the lock when the process ends in any way, so a killed process leaves no lock behind. It may
    leave the lock file, which is then reused. Folders created for the lock file are removed if they are empty. The lock
    must not be held across a fork. On Windows the library filelock is used, which does not know the other process's id.

    Raises:
        ValueError: another process holds the lock, or nothing can be written beside `target`.
    """
    path = target.parent / f".{target.name}.lock"
    made = [folder for folder in path.parents if not folder.exists()]
    with _locked_by_kernel(path, target, made) if fcntl else _locked_by_library(path, target, made):
        yield


@contextmanager
def _locked_by_library(path: Path, target: Path, made: list[Path]) -> Iterator[None]:
    """Locks with filelock, which removes its file where that is safe."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is using {target}: wait for it, or end it") from None
    except OSError as error:
        raise _not_writable(target, error) from error
    try:
        yield
    finally:
        lock.release()
        _remove_empty(made)


@contextmanager
def _locked_by_kernel(path: Path, target: Path, made: list[Path]) -> Iterator[None]:
    handle = _held(path, target)
    try:
        with suppress(OSError):  # a full disk: the id is only for messages
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            if _same(handle, path):
                path.unlink()  # while it is held: see `_held`
        _remove_empty(made)
        os.close(handle)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):  # raised for a folder that is not empty
        for folder in folders:
            folder.rmdir()


def _held(path: Path, target: Path) -> int:
    """The open, locked file. A file that was removed between opening and locking locks nothing, so that is retried."""
    while True:
        handle = _opened(path, target)
        try:
            _lock(handle, target)
            if _same(handle, path):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _opened(path: Path, target: Path, retries: int = 10) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # less the umask
    except OSError as error:
        if isinstance(error, FileNotFoundError) and retries:  # another process has just removed its empty folder
            return _opened(path, target, retries - 1)
        raise _not_writable(target, error) from error


def _not_writable(target: Path, error: OSError) -> ValueError:
    return ValueError(f"{target.parent} cannot be written to ({error.strerror}): fix that, or name another place")


def _lock(handle: int, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace")
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise ValueError(f"{who} is using {target}: wait for it, or end it") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        console.print(f"{target} cannot be locked ({error.strerror}): make sure that only one process uses it")


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
