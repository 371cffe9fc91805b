"""Locks that let one process at a time use a file or folder."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from arena.progress import console

UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # some network file systems have no locks


@contextmanager
def locked(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Locks `target` through the file `.NAME.lock` beside it; `target` need not exist and may be moved meanwhile.

    The kernel releases the lock when the process ends in any way, so a killed process leaves no lock behind. It may
    leave the lock file, which is then reused. Folders created for the lock file are removed if they are empty.

    Args:
        wait: wait until no other process holds the lock.

    Raises:
        ValueError: another process holds the lock and `wait` is false, or nothing can be written beside `target`.
    """
    path = target.parent / f".{target.name}.lock"
    made = [folder for folder in path.parents if not folder.exists()]
    lock = FileLock(path, thread_local=False, fallback_to_soft=False, on_acquired=_write_id)
    _acquire(lock, path, target, -1 if wait else 0)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # while it is held: filelock takes no lock on a file that was removed after it was opened
        lock.release()
        with suppress(OSError):  # raised for a folder that is not empty
            for folder in made:
                folder.rmdir()


def _write_id(handle: int) -> None:
    with suppress(OSError):  # a full disk: the id is only for messages
        os.truncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())


def _acquire(lock: FileLock, path: Path, target: Path, timeout: float, retries: int = 10) -> None:
    try:
        lock.acquire(timeout=timeout)  # it also creates the folder
    except Timeout:
        raise ValueError(f"{_holder(path)} is using {target}: wait for it, or end it") from None
    except OSError as error:
        if error.errno in UNSUPPORTED:
            console.print(f"{target} cannot be locked ({error.strerror}): make sure that only one process uses it")
        elif isinstance(error, FileNotFoundError) and retries:  # another process has just removed its empty folder
            _acquire(lock, path, target, timeout, retries - 1)
        else:
            raise ValueError(
                f"{target.parent} cannot be written to ({error.strerror}): fix that, or name another place"
            ) from error


def _holder(path: Path) -> str:
    try:
        holder = path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # removed meanwhile, or on Windows, where the locked file cannot be read
        holder = ""
    return f"process {holder}" if holder.isdigit() else "another process"
