"""The logits of a plan, in memory and, if wanted, in parts on disk from which an interrupted evaluation resumes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from arena.packing.plan import PackPlan
from arena.storage.files import fingerprint
from arena.storage.parts import InvalidPartError, Parts, open_parts

SECONDS = 20.0  # of work in a part; a killed process loses at most that much and one micro-batch


@dataclass(frozen=True)
class LogitsCache:
    """Where logits are cached, and for which model.

    Attributes:
        folder: a folder for the cache only; each evaluation has its own folder in it.
        identity: what determines the numbers besides rows and plan, as JSON: digests of the weights, model settings.
        machine: a description of the machine and its libraries, as for `Parts`.
        seconds: of work that a part holds; 0 writes one for each micro-batch.
    """

    folder: Path
    identity: Mapping[str, Any]
    machine: str = ""
    seconds: float = SECONDS

    @contextmanager
    def open(self, plan: PackPlan, facts: Mapping[str, Any]) -> Iterator[Parts]:
        """Yields the parts of a plan's logits.

        Args:
            facts: what determines the numbers besides the plan and `identity`, as JSON: tokens, orders, dtype.

        Raises:
            ValueError: another process is running the same evaluation.
        """
        shared = b"" if plan.shared is None else np.ascontiguousarray(plan.shared, np.int32).tobytes()
        made_from = [dict(self.identity), dict(facts), plan.fingerprint, fingerprint(shared)]
        with open_parts(self.folder, made_from, self.machine) as parts:
            yield parts


class Logits:
    """The logits of the examples of a plan.

    Args:
        width: C, the number of classes.
        parts: where logits of an earlier, identical call are read from, and new ones are written to.

    Attributes:
        plan: whose micro-batches are counted.
        values: float32 (n, C), in the order of the plan's examples; NaN where they are not computed yet.
        known: bool (m,), which micro-batches have logits.
    """

    def __init__(self, plan: PackPlan, width: int, parts: Parts | None) -> None:
        self.plan, self.parts, self.width = plan, parts, width
        self._ends = np.concatenate([[0], plan.micro_ends]).astype(np.int64)
        self.values = np.full((len(plan.examples), width), np.nan, dtype=np.float32)
        self.known = np.zeros(plan.n_micro_batches, dtype=bool)
        if parts is not None:
            for first, end, values in parts.read(self._check, self._bytes):
                self._store(first, end, values)

    def add(self, micro_batches: Sequence[int], values: np.ndarray) -> None:
        """Adds the logits of some micro-batches, and writes a part for each range of consecutive ones.

        Args:
            micro_batches: their indices in the plan, ascending.
            values: float32 (their examples, C), finite.

        Raises:
            OSError: a part could not be written; earlier parts remain.
        """
        assert np.isfinite(values).all(), "only finite numbers are cached"
        start = 0
        for _, run in groupby(enumerate(micro_batches), key=lambda each: each[1] - each[0]):
            indices = [index for _, index in run]
            first, end = indices[0], indices[-1] + 1
            own = values[start : start + int(self._ends[end] - self._ends[first])]
            if self.parts is not None:
                self.parts.write(first, end, np.ascontiguousarray(own, dtype="<f4").tobytes())
            self._store(first, end, own)
            start += len(own)
        assert start == len(values), "the logits do not match these micro-batches"

    def complete(self) -> np.ndarray:
        """The logits of every example."""
        assert self.known.all() and np.isfinite(self.values).all(), "an example got no logits"
        return self.values

    def _store(self, first: int, end: int, values: np.ndarray) -> None:
        self.values[self._ends[first] : self._ends[end]] = values
        self.known[first:end] = True

    def _bytes(self, first: int, end: int) -> int:
        """The size of the logits of some micro-batches, as far as the plan has them."""
        first, end = (min(index, len(self.known)) for index in (first, end))
        return int(self._ends[end] - self._ends[first]) * self.width * 4

    def _check(self, first: int, end: int, results: bytes) -> tuple[int, int, np.ndarray]:
        if end > len(self.known):
            raise InvalidPartError("it belongs to another plan")
        if self.known[first:end].any():
            raise InvalidPartError("another part holds the same micro-batches")
        if len(results) != self._bytes(first, end):
            raise InvalidPartError("its numbers are not logits of these micro-batches")
        values = np.frombuffer(results, dtype="<f4").reshape(-1, self.width)
        if not np.isfinite(values).all():
            raise InvalidPartError("its numbers are not logits of these micro-batches")
        return first, end, values
