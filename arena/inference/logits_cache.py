"""A cache of logits on disk, from which an interrupted evaluation resumes.

A shard is a safetensors file with the logits of consecutive micro-batches of a plan. It is written atomically, and its
name holds the range of micro-batches and the SHA-256 of the file. The shards of one evaluation are in a folder named
after the fingerprint of everything that determines the numbers, so shards of another model, other rows or another plan
are never read. A shard that fails verification is reported, removed and recomputed.
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

from arena.packing.plan import PackPlan
from arena.progress import console
from arena.storage.files import atomic_write, fingerprint
from arena.storage.lock import locked

FORMAT = 1  # part of the fingerprint: raise it when the numbers or their layout change
SECONDS = 20.0  # of work in a shard; a killed process loses at most that much and one micro-batch
LARGEST_HEADER = 2**16  # bytes that a shard may have besides its numbers

_NAME = re.compile(r"(\d{8})-(\d{8})-([0-9a-f]{64})\.safetensors")


@dataclass(frozen=True)
class LogitsCache:
    """Where logits are cached, and for which model.

    Attributes:
        folder: a folder for the cache only; each evaluation has its own folder in it.
        identity: what determines the numbers besides rows and plan, as JSON: digests of the weights, model settings.
        machine: a description of the machine and its libraries. Shards from another machine are used and reported,
            because their numbers are equally valid but may differ in the last bits.
        seconds: of work that a shard holds; 0 writes one for each micro-batch.
    """

    folder: Path
    identity: Mapping[str, Any]
    machine: str = ""
    seconds: float = SECONDS

    @contextmanager
    def open(self, plan: PackPlan, facts: Mapping[str, Any]) -> Iterator[PlanLogits]:
        """Yields the logits cached for a plan, to which the rest can be added. One process at a time may hold it.

        Args:
            facts: what determines the numbers besides the plan and `identity`, as JSON: tokens, orders, dtype.

        Raises:
            ValueError: another process is running the same evaluation.
        """
        shared = b"" if plan.shared is None else np.ascontiguousarray(plan.shared, np.int32).tobytes()
        key = fingerprint(FORMAT, dict(self.identity), dict(facts), plan.fingerprint, shared)
        with locked(self.folder / key):
            yield PlanLogits(self.folder / key, key, plan.micro_ends, self.machine)


class PlanLogits:
    """The cached logits of one plan, read from verified shards.

    Attributes:
        logits: float32 (n, 3), in the order of the plan's examples; NaN where they are not computed yet.
        known: bool (m,), which micro-batches have logits.
    """

    def __init__(self, folder: Path, key: str, micro_ends: np.ndarray, machine: str = "") -> None:
        self.folder, self.key, self.machine = folder, key, machine
        self._ends = np.concatenate([[0], micro_ends]).astype(np.int64)
        self.logits = np.full((int(self._ends[-1]), 3), np.nan, dtype=np.float32)
        self.known = np.zeros(len(micro_ends), dtype=bool)
        elsewhere = {where for path in self._files() if (where := self._load_shard(path)) != self.machine}
        for place in sorted(filter(None, elsewhere)):
            console.print(f"{folder}: some logits were computed on {place}; the rest are computed on {self.machine}")

    def add(self, micro_batches: Sequence[int], logits: np.ndarray) -> None:
        """Writes the logits of some micro-batches, one shard for each range of consecutive ones.

        Args:
            micro_batches: their indices in the plan, ascending.
            logits: float32 (their examples, 3), finite.

        Raises:
            OSError: a shard could not be written; earlier shards remain.
        """
        assert np.isfinite(logits).all(), "only finite numbers are cached"
        start = 0
        for _, run in groupby(enumerate(micro_batches), key=lambda each: each[1] - each[0]):
            places = [index for _, index in run]
            first, end = places[0], places[-1] + 1
            count = int(self._ends[end] - self._ends[first])
            self._write(first, end, logits[start : start + count])
            self._store(first, end, logits[start : start + count])
            start += count
        assert start == len(logits), "the logits do not match these micro-batches"

    def _write(self, first: int, end: int, logits: np.ndarray) -> None:
        facts = {"fingerprint": self.key, "first": str(first), "end": str(end), "where": self.machine}
        data = save({"logits": np.ascontiguousarray(logits, dtype=np.float32)}, metadata=facts)
        path = self.folder / f"{first:08d}-{end:08d}-{hashlib.sha256(data).hexdigest()}.safetensors"
        try:
            with atomic_write(path) as draft:
                draft.write_bytes(data)
        except OSError as error:
            reason = error.strerror or str(error)
            hint = "earlier logits remain saved; fix the cause, and the same command resumes"
            raise OSError(error.errno, f"logits could not be saved ({reason}): {hint}", str(self.folder)) from error

    def _store(self, first: int, end: int, logits: np.ndarray) -> None:
        self.logits[self._ends[first] : self._ends[end]] = logits
        self.known[first:end] = True

    def _files(self) -> list[Path]:
        """The files in the folder; drafts left by a killed process are removed silently."""
        found = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for draft in (path for path in found if path.name.startswith(".")):
            _remove(draft)
        return [path for path in found if not path.name.startswith(".")]

    def _load_shard(self, path: Path) -> str:
        """Loads a shard and returns the machine that wrote it; one that fails verification is reported and removed."""
        try:
            first, end, logits, where = self._verified(path)
        except (_InvalidShardError, OSError) as error:
            console.print(f"{path} is not used: {getattr(error, 'strerror', None) or error}; it is recomputed")
            _remove(path)
            return self.machine
        self._store(first, end, logits)
        return where

    def _verified(self, path: Path) -> tuple[int, int, np.ndarray, str]:
        """The first and one past the last micro-batch, their logits, and the machine that computed them."""
        named = _NAME.fullmatch(path.name)
        if not named:
            raise _InvalidShardError("it is not a shard")
        first, end = int(named[1]), int(named[2])
        if not first < end <= len(self.known):
            raise _InvalidShardError("it belongs to another plan")
        if self.known[first:end].any():
            raise _InvalidShardError("another shard holds the same micro-batches")
        count = int(self._ends[end] - self._ends[first])
        if path.stat().st_size > count * 12 + LARGEST_HEADER:
            raise _InvalidShardError("it is too large")
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != named[3]:
            raise _InvalidShardError("it is damaged")
        logits, facts = _parse(data)
        if [facts.get(name) for name in ("fingerprint", "first", "end")] != [self.key, str(first), str(end)]:
            raise _InvalidShardError("it belongs to another evaluation")
        if logits.shape != (count, 3) or logits.dtype != np.float32 or not np.isfinite(logits).all():
            raise _InvalidShardError("its numbers are not logits of these micro-batches")
        return first, end, logits, str(facts.get("where", ""))


class _InvalidShardError(Exception):
    """A file that is not a valid shard of this plan; the message says why."""


def _parse(data: bytes) -> tuple[np.ndarray, dict[str, str]]:
    try:
        logits = load(data)["logits"]
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, KeyError, ValueError) as error:
        raise _InvalidShardError("it holds something else") from error
    return logits, dict(header.get("__metadata__", {}))


def _remove(path: Path) -> None:
    """Removes a file or a folder; of a link, only the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
