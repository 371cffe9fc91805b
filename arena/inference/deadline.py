"""A deadline: how it is written, from when it counts, and what there is still time for, as measured on the way."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from arena.progress import Advance, console, duration, progress
from arena.storage.files import write_json

SPARE = 0.05  # of the time, that is left when everything is written
CAUTION = 1.5  # the longest that a micro-batch may take, relative to what it should
STARTED = "ARENA_STARTED"  # the environment variable that holds when the time began
STARTED_FILE = "started.json"  # the same, for a command that was killed and resumes

_TIME = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")


def seconds_of(text: str) -> float:
    """The seconds of a time such as `8.5h`, `30m`, `45s` or `1h30m`. Raises `ValueError` for anything else."""
    found = _TIME.fullmatch("".join(text.split()).lower())
    parts = found.groups("0") if found else "000"
    seconds = sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    if seconds <= 0:
        raise ValueError(f"--deadline {text} is not a time: write hours, minutes and seconds as in 8.5h, 30m or 1h30m")
    return seconds


@dataclass(frozen=True)
class Deadline:
    """By when everything has to be written.

    Attributes:
        seconds: from `started` to the deadline.
        started: in seconds since 1970.
        clock: gives the present time in the same way.
    """

    seconds: float
    started: float
    clock: Callable[[], float] = time.time

    def left(self, spare: float = SPARE) -> float:
        """The seconds until only a part of the whole time is left; negative after that."""
        return self.started + (1 - spare) * self.seconds - self.clock()


def deadline_from(seconds: float, parts: Path) -> Deadline:
    """A deadline that counts from ARENA_STARTED, or else from the start of the first of the processes that resume.

    Args:
        parts: the folder of the results so far, in which the start is saved.

    Raises:
        ValueError: ARENA_STARTED is not a time in the past.
    """
    path = parts / STARTED_FILE
    if given := os.environ.get(STARTED):
        if not re.fullmatch(r"\d+(\.\d+)?", given) or float(given) > time.time():
            raise ValueError(
                f"{STARTED}={given} is not a time in the past: set it to seconds since 1970, as `date +%s` prints them"
            )
        deadline = Deadline(seconds, float(given))
    else:
        deadline = Deadline(seconds, psutil.Process().create_time())
        saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if saved is not None and saved["seconds"] == seconds and Deadline(**saved).left() > 0:
            deadline = Deadline(**saved)
            console.print(f"the time counts from an earlier call: delete {path} to begin anew")
    write_json(path, {"seconds": seconds, "started": deadline.started})
    console.print(f"{duration(max(0.0, deadline.left(spare=0)))} of {duration(seconds)} are left")
    return deadline


class Pace:
    """Measures how fast work is done, shows it, and says what there is time for before a deadline.

    Costs are in tokens of linear layers, as in `PackPlan.costs`. What a GPU has been given and not yet done counts as
    done; this is about one micro-batch.

    Args:
        reserve: seconds before the spare time, for writing the results.

    Attributes:
        cost: of everything that was done.
        seconds: that it took.
        tokens: of the examples that were done.
    """

    def __init__(self, deadline: Deadline, reserve: float = 0.0) -> None:
        self.deadline, self.reserve = deadline, reserve
        self.cost = self.seconds = 0.0
        self.tokens = 0
        self._since: float | None = None  # when the present work began, which `seconds` lacks
        self._advance: Advance = lambda *_, **__: None

    def fits(self, cost: float) -> bool:
        """Whether there is time for some work."""
        return self.has(CAUTION * self.expected(cost))

    def has(self, seconds: float) -> bool:
        """Whether there are more seconds left than these."""
        return self.deadline.left() - self.reserve > seconds

    def expected(self, cost: float) -> float:
        """The seconds that some work takes at the speed so far; 0 before anything is done."""
        return cost * self._elapsed() / self.cost if self.cost else 0.0

    def add(self, tokens: int, cost: float) -> None:
        """Counts work that is done."""
        self.cost += cost
        self.tokens += tokens
        left = duration(max(0.0, self.deadline.left(0)))
        self._advance(tokens, note=f"{self.tokens / max(self._elapsed(), 1e-9):,.0f} tokens/s, deadline in {left}")

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Counts the time of the block, unless nothing was done in it."""
        cost, self._since = self.cost, self.deadline.clock()
        try:
            yield
        finally:
            if self.cost > cost:
                self.seconds = self._elapsed()
            self._since = None

    @contextmanager
    def showing(self, title: str, tokens: int) -> Iterator[None]:
        """Shows the progress of the block, in which so many tokens are to be done."""
        with progress(title, tokens, "tokens") as self._advance:
            yield

    def _elapsed(self) -> float:
        return self.seconds + (0.0 if self._since is None else self.deadline.clock() - self._since)
