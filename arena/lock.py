"""One process at a time at a file or a folder."""

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
    """Holds `target`, which need not exist and may be moved meanwhile, by a lock on the file `.NAME.lock` beside it.

    The kernel lets go of the lock when its process ends in whatever way, so none is ever left behind by a killed one;
    its file may be, and is taken over. Folders made for it go with it if nothing was put there. Not to be held across a
    fork. On Windows the library filelock does the same, and does not know the id of the other process.

    Raises:
        ValueError: another process holds it (its id is named), or nothing can be written beside `target`.
    """
    path = target.parent / f".{target.name}.lock"
    made = [folder for folder in path.parents if not folder.exists()]
    with _locked_by_kernel(path, target, made) if fcntl else _locked_by_library(path, target, made):
        yield


@contextmanager
def _locked_by_library(path: Path, target: Path, made: list[Path]) -> Iterator[None]:
    """By filelock, which removes its file where that is safe."""
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process is at work on {target}: wait for it, or end it") from None
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
        with suppress(OSError):  # a full disk: the id is for people, the lock holds without it
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
    with suppress(OSError):  # as it should be where something stands in one
        for folder in folders:
            folder.rmdir()


def _held(path: Path, target: Path) -> int:
    """The open and locked file. One that was removed between opening and locking it locks nothing: then again."""
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


def _opened(path: Path, target: Path, again: int = 10) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)  # less the umask
    except OSError as error:
        if isinstance(error, FileNotFoundError) and again:  # another process has just removed the folder it had made
            return _opened(path, target, again - 1)
        raise _not_writable(target, error) from error


def _not_writable(target: Path, error: OSError) -> ValueError:
    return ValueError(f"{target.parent} cannot be written to ({error.strerror}): mend that, or name another place")


def _lock(handle: int, target: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode(errors="replace")
        who = f"process {holder}" if holder.isdigit() else "another process"
        raise ValueError(f"{who} is at work on {target}: wait for it, or end it") from None
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        console.print(f"{target} is not locked ({error.strerror}): take care that only one process works on it")


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
