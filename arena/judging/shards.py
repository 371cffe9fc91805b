"""Logits kept in files as they come, so that a judging that was cut short resumes where it was.

A shard is one safetensors file with the logits of some micro-batches that follow one another in a plan. It is written
whole, and its name tells which micro-batches they are and the SHA-256 of all its bytes. The shards of one judging stand
in a folder that is called by the fingerprint of everything that decides the numbers; so those of another model, other
rows or another plan are never looked at. What does not verify is named, removed and computed again.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from arena.files import fingerprint, written_whole
from arena.lock import locked
from arena.packing.plan import PackPlan
from arena.progress import console

FORMAT = 1  # part of the fingerprint: raise it when the numbers or their layout change
SECONDS = 20.0  # of work in a shard; as much, and a micro-batch, may be lost when a process is killed
LARGEST_HEADER = 2**16  # bytes that a shard may have besides its numbers

_NAME = re.compile(r"(\d{8})-(\d{8})-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class Shards:
    """Where a judging keeps its logits, and whose they are.

    Attributes:
        folder: a folder for nothing else; every judging has a folder of its own in it.
        by: what decides the numbers besides rows and plan, as JSON: digests of the weights, settings of the model.
        where: the machine and its libraries, in words. Shards made elsewhere are used, and that is said: their numbers
            are as good, but not the same to the last bit.
        seconds: of work that a shard holds; 0 makes one for each micro-batch.
    """

    folder: Path
    by: Mapping[str, Any]
    where: str = ""
    seconds: float = SECONDS

    @contextmanager
    def opened(self, plan: PackPlan, facts: Mapping[str, Any]) -> Iterator[Kept]:
        """Gives what is kept for a plan, and room for the rest. One process at a time.

        Args:
            facts: what decides the numbers besides the plan and `by`, as JSON: tokens, orders, dtype.

        Raises:
            ValueError: another process is at the same judging.
        """
        shared = b"" if plan.shared is None else np.ascontiguousarray(plan.shared, np.int32).tobytes()
        mark = fingerprint(FORMAT, dict(self.by), dict(facts), plan.fingerprint, shared)
        with locked(self.folder / mark):
            yield Kept(self.folder / mark, mark, plan.micro_ends, self.where)


class Kept:
    """The logits of one plan that verified shards hold, and the way to add to them.

    Attributes:
        logits: float32 (n, 3), in the order of the plan's examples; NaN where they are not known yet.
        known: bool (m,), which micro-batches have their logits.
    """

    def __init__(self, folder: Path, mark: str, micro_ends: np.ndarray, where: str = "") -> None:
        self.folder, self.mark, self.where = folder, mark, where
        self._ends = np.concatenate([[0], micro_ends]).astype(np.int64)
        self.logits = np.full((int(self._ends[-1]), 3), np.nan, dtype=np.float32)
        self.known = np.zeros(len(micro_ends), dtype=bool)
        elsewhere = {where for path in self._files() if (where := self._take_up(path)) != self.where}
        for place in sorted(filter(None, elsewhere)):
            console.print(f"{folder}: some was judged on {place}, the rest will be on {self.where}")

    def add(self, micro_batches: Sequence[int], logits: np.ndarray) -> None:
        """Writes the logits of some micro-batches, one shard for each run of them without a gap.

        Args:
            micro_batches: their places in the plan, rising.
            logits: float32 (their examples, 3), finite.

        Raises:
            OSError: a shard could not be written; those before it stay.
        """
        assert np.isfinite(logits).all(), "only finite numbers are kept"
        start = 0
        for _, run in groupby(enumerate(micro_batches), key=lambda each: each[1] - each[0]):
            places = [index for _, index in run]
            first, end = places[0], places[-1] + 1
            count = int(self._ends[end] - self._ends[first])
            self._write(first, end, logits[start : start + count])
            self._know(first, end, logits[start : start + count])
            start += count
        assert start == len(logits), "logits of other micro-batches than was said"

    def _write(self, first: int, end: int, logits: np.ndarray) -> None:
        facts = {"fingerprint": self.mark, "first": str(first), "end": str(end), "where": self.where}
        data = save({"logits": np.ascontiguousarray(logits, dtype=np.float32)}, metadata=facts)
        path = self.folder / f"{first:08d}-{end:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        try:
            with written_whole(path) as draft:
                draft.write_bytes(data)
        except OSError as error:
            reason = error.strerror or str(error)
            hint = "what was saved before stays; mend that, and the same command resumes"
            raise OSError(error.errno, f"logits could not be kept ({reason}): {hint}", str(self.folder)) from error

    def _know(self, first: int, end: int, logits: np.ndarray) -> None:
        self.logits[self._ends[first] : self._ends[end]] = logits
        self.known[first:end] = True

    def _files(self) -> list[Path]:
        """What stands in the folder; drafts of a process that was killed are removed without a word."""
        found = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for draft in (path for path in found if path.name.startswith(".")):
            _remove(draft)
        return [path for path in found if not path.name.startswith(".")]

    def _take_up(self, path: Path) -> str:
        """Uses a shard that verifies and gives where it was made; one that does not is named and removed."""
        try:
            first, end, logits, where = self._verified(path)
        except (_UnusableError, OSError) as error:
            console.print(f"{path} is not used: {getattr(error, 'strerror', None) or error}; it is computed again")
            _remove(path)
            return self.where
        self._know(first, end, logits)
        return where

    def _verified(self, path: Path) -> tuple[int, int, np.ndarray, str]:
        """First and one past the last micro-batch, their logits, and where they were computed."""
        named = _NAME.fullmatch(path.name)
        if not named:
            raise _UnusableError("it is no shard")
        first, end = int(named[1]), int(named[2])
        if not first < end <= len(self.known):
            raise _UnusableError("it is of another plan")
        if self.known[first:end].any():
            raise _UnusableError("another shard holds the same")
        count = int(self._ends[end] - self._ends[first])
        if path.stat().st_size > count * 12 + LARGEST_HEADER:
            raise _UnusableError("it is too large")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != named[3]:
            raise _UnusableError("it is damaged")
        logits, facts = _parse(data)
        if [facts.get(name) for name in ("fingerprint", "first", "end")] != [self.mark, str(first), str(end)]:
            raise _UnusableError("it is of another judging")
        if logits.shape != (count, 3) or logits.dtype != np.float32 or not np.isfinite(logits).all():
            raise _UnusableError("its numbers are no logits of these micro-batches")
        return first, end, logits, str(facts.get("where", ""))


class _UnusableError(Exception):
    """Why a file is not used."""


def _parse(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    try:
        logits = load(data)["logits"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _UnusableError("it holds something else") from error
    return logits, dict(header.get("__metadata__", {}))


def _remove(path: Path) -> None:
    """Removes a file or a folder; a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
