"""Results of long work on disk, in verified parts, from which an interrupted command resumes.

A part holds the results of consecutive items. It is written atomically, and its name holds the range of items and the
SHA-256 of the file. The parts of one piece of work are in a folder named after the fingerprint of everything that
determines the results, so parts of other work are never read. A part that fails verification is reported, removed, and
its items are computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from arena.progress import console
from arena.storage.files import atomic_write, fingerprint
from arena.storage.lock import locked

FORMAT = 2  # part of the fingerprint: raise it when the layout of a part changes
LARGEST_HEADER = 2**16  # bytes of a part besides its results

_NAME = re.compile(r"(\d{8})-(\d{8})-([0-9a-f]{64})\.part")

Value = TypeVar("Value")


class InvalidPartError(Exception):
    """A file that is not a valid part of this work; the message says why."""


class Parts:
    """The parts of n items' results, in a folder of their own.

    Args:
        key: the fingerprint of what determines the results.
        machine: a description of the machine and its libraries. Parts from another machine are used and reported,
            because their numbers are equally valid but may differ in the last bits.
    """

    def __init__(self, folder: Path, key: str, machine: str = "") -> None:
        self.folder, self.key, self.machine = folder, key, machine

    def write(self, first: int, end: int, results: bytes) -> None:
        """Writes the results of the items from `first` to `end` - 1.

        Raises:
            OSError: the part could not be written; earlier parts remain.
        """
        header = {"key": self.key, "first": first, "end": end, "machine": self.machine}
        data = json.dumps(header).encode() + b"\n" + results
        path = self.folder / f"{first:08d}-{end:08d}-{hashlib.sha256(data).hexdigest()}.part"
        try:
            with atomic_write(path) as draft:
                draft.write_bytes(data)
        except OSError as error:
            reason = error.strerror or str(error)
            hint = "earlier results remain saved; fix the cause, and the same command resumes"
            raise OSError(error.errno, f"results could not be saved ({reason}): {hint}", str(self.folder)) from error

    def read(self, check: Callable[[int, int, bytes], Value], largest: Callable[[int, int], int]) -> Iterator[Value]:
        """The values of all valid parts, in the order of their items.

        Args:
            check: turns a part's first and end item and its results into a value, or raises `InvalidPartError`.
            largest: the most bytes that the results of items from `first` to `end` - 1 can have.
        """
        elsewhere = set()
        for path in self._files():
            try:
                first, end, results, machine = self._verified(path, largest)
                value = check(first, end, results)
            except (InvalidPartError, OSError) as error:
                console.print(f"{path} is not used: {getattr(error, 'strerror', None) or error}; it is recomputed")
                _remove(path)
                continue
            elsewhere |= {machine} - {self.machine, ""}
            yield value
        for place in sorted(elsewhere):
            console.print(f"{self.folder}: some results were computed on {place}; the rest are on {self.machine}")

    def _files(self) -> list[Path]:
        """The files in the folder; drafts left by a killed process are removed silently."""
        paths = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for draft in (path for path in paths if path.name.startswith(".")):
            _remove(draft)
        return [path for path in paths if not path.name.startswith(".")]

    def _verified(self, path: Path, largest: Callable[[int, int], int]) -> tuple[int, int, bytes, str]:
        """The first and one past the last item of a part, their results, and the machine that computed them."""
        named = _NAME.fullmatch(path.name)
        if not named:
            raise InvalidPartError("it is not a part")
        first, end = int(named[1]), int(named[2])
        if first >= end:
            raise InvalidPartError("it holds no items")
        if path.stat().st_size > largest(first, end) + LARGEST_HEADER:
            raise InvalidPartError("it is too large")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != named[3]:
            raise InvalidPartError("it is damaged")
        head, _, results = data.partition(b"\n")
        try:
            header = json.loads(head)
            same = [header["key"], header["first"], header["end"]] == [self.key, first, end]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InvalidPartError("it holds something else") from None
        if not same:
            raise InvalidPartError("it belongs to other work")
        return first, end, results, str(header.get("machine", ""))


@contextmanager
def open_parts(folder: Path, made_from: Any, machine: str = "") -> Iterator[Parts]:
    """Yields the parts of one piece of work in `folder`. One process at a time may hold them.

    Args:
        made_from: what determines the results, as JSON.

    Raises:
        ValueError: another process is doing the same work.
    """
    key = fingerprint(FORMAT, made_from)
    with locked(folder / key):
        yield Parts(folder / key, key, machine)


def _remove(path: Path) -> None:
    """Removes a file or a folder; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
