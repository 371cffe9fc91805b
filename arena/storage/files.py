"""Atomic writes of files and folders, and fingerprints of content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

SCRATCH = ".scratch"
NO_SYNC = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # errors of file systems that cannot flush
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` turns two slashes into one; a single letter is a drive


def local_path(path: str | Path, name: str, endings: Sequence[str] = ()) -> Path:
    """Checks a path that a user gave for writing.

    Args:
        name: the option or setting, for messages.
        endings: file name endings such as `.csv`, of which `path` must have one; if empty, any file or folder.

    Raises:
        ValueError: `path` is a URL, has another ending, or is a folder where a file is expected.
    """
    if URL.match(str(path)):
        raise ValueError(f"{name} {path} is a URL: write to a local path and copy the result afterwards")
    if endings and Path(path).is_dir():
        raise ValueError(f"{name} {path} is a folder: name the file to write")
    if endings and Path(path).suffix.lower() not in endings:
        raise ValueError(f"{name} {path}: name a file that ends in {', '.join(endings)}")
    return Path(path)


@contextmanager
def atomic_write(target: Path) -> Iterator[Path]:
    """Yields a scratch path beside `target`, which replaces `target` when the block ends without an error.

    The block may create a file or a directory there. If it raises, `target` is unchanged and the scratch path is
    removed. The rename is atomic for a file; an existing directory is moved out of the way before it is removed. File
    modes follow the umask, whatever modes the writing library sets.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=SCRATCH, dir=target.parent))
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        error.strerror = f"{error.strerror}: {target.parent} cannot be written to; name another place"
        raise
    try:
        draft = scratch / target.name
        with _os_errors(target):
            yield draft
        if target.is_dir() and not draft.is_dir():
            raise IsADirectoryError(f"{target} is a folder: name a file")
        paths = [draft, *draft.rglob("*")]
        with suppress(OSError):  # a file system without modes
            _follow_umask(draft, paths)
        for path in paths:
            _sync_one(path)
        _swap(draft, target, draft.with_name(f"{target.name}.replaced"))
        _sync_one(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _swap(draft: Path, target: Path, aside: Path) -> None:
    """Renames the draft to the target; an existing folder is restored if that fails."""
    is_folder = target.is_dir() and not target.is_symlink()
    if is_folder:
        target.replace(aside)
    try:
        draft.replace(target)
    except BaseException:
        if is_folder:
            aside.replace(target)
        raise


@contextmanager
def _os_errors(target: Path) -> Iterator[None]:
    """Raises an `OSError` in place of errors of libraries in other languages; that of a full disk names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and error.filename is None:
            error.filename = str(target)
        raise
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(target)) from error


def remove_scratch(folder: Path) -> None:
    """Removes the scratch paths that killed processes left in a folder. No other process may be writing there."""
    for path in folder.glob(f".*{SCRATCH}"):
        shutil.rmtree(path, ignore_errors=True)


def _follow_umask(draft: Path, paths: list[Path]) -> None:
    """Sets the modes that new files and folders get by the umask: some libraries write files for the owner only."""
    sample = draft.with_name(f"{draft.name}.mode")
    sample.touch()
    file_mode = stat.S_IMODE(sample.stat().st_mode)
    sample.unlink()
    sample.mkdir()
    folder_mode = stat.S_IMODE(sample.stat().st_mode)
    sample.rmdir()
    for path in paths:
        if not path.is_symlink():
            path.chmod(folder_mode if path.is_dir() else file_mode)


def _sync_one(path: Path) -> None:
    """Flushes a file or folder to the disk if the file system can: some cannot flush folders, or even open them.

    Raises:
        OSError: a file could not be flushed.
    """
    is_folder = path.is_dir()
    try:
        handle = os.open(path, os.O_RDWR if os.name == "nt" and not is_folder else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_SYNC | ({errno.EACCES, errno.EISDIR} if is_folder else set()):
            raise


def require_utf8(*values: object) -> None:
    """Refuses paths and settings that are not UTF-8, before a run uses them for hours and then cannot save them.

    Raises:
        ValueError: a value holds half of a surrogate pair, as a path does that is not UTF-8.
    """
    for text in map(str, values):
        if text.encode("utf-8", "ignore").decode() != text:
            raise ValueError(f"{text[:200]!a} is not UTF-8: rename that file or folder, or correct the text")


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, atomically."""
    with atomic_write(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fingerprint(*parts: Any) -> str:
    """16 hexadecimal digits that change when any part changes. Parts are bytes, or anything JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def remembered_digest(path: Path) -> str:
    """`file_digest`, computed once per process unless the file's size or modification time changes."""
    state = path.stat()
    return _digest_of(path.resolve(), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_of(path: Path, size: int, mtime_ns: int) -> str:
    return file_digest(path)


def user_cache() -> Path:
    """This package's folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "arena"
