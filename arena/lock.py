"""One process at a time at a file or a folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arena.progress import console

UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems have no locks


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds `target`, which need not exist and may be moved meanwhile, by a lock on the file `.NAME.lock` beside it.

    The kernel lets go of the lock when its process ends in whatever way, so none is ever left behind by a killed one;
    its file may be, and is taken over. Folders made for it go with it if nothing was put there. Not to be held across a
    fork.

    Raises:
        ValueError: another process holds it (its id is named), or nothing can be written beside `target`.
    """
    path = target.parent / f".{target.name}.lock"
    made = [folder for folder in path.parents if not folder.exists()]
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
            for folder in made:
                folder.rmdir()  # fails, as it should, where something stands in it
        os.close(handle)


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
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and again:  # another process has just removed the folder it had made
            return _opened(path, target, again - 1)
        raise ValueError(
            f"{target.parent} cannot be written to ({error.strerror}): mend that, or name another place"
        ) from error


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
