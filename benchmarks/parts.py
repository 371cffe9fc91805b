"""Long work in parts: each part's result is a JSON file, kept as it comes, so that a stopped run resumes.

A part that was begun three times and never ended (a machine that hangs or is taken away in the middle) is given up, so
that it cannot keep the others from being done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from arena.progress import console
from arena.storage.files import write_json
from benchmarks.clock import GRACE, Clock, OutOfTime, ended_after

TRIES = 3
PATIENCE, LEAST_PATIENCE = 4.0, 120.0  # times the seconds that a part was expected to take, and seconds at the least
Result = dict[str, Any]


class BrokenDevice(Exception):  # noqa: N818 - it ends a process, the next one goes on
    """The device does nothing more in this process."""


@dataclass(frozen=True)
class Job:
    """A part that may be done.

    Attributes:
        kind: parts of one kind take about as long as each other.
        expected: seconds that it runs, as far as is known before any of its kind was done.
        work: gives its result.
        overhead: seconds that it is expected to take beside that, such as for another model than the part before has.
        resumes: begun again, it resumes where it was stopped, so that it is never too slow.
    """

    name: str
    kind: str
    expected: float
    work: Callable[[], Result]
    overhead: float = 0.0
    resumes: bool = False

    @property
    def patience(self) -> float | None:
        """Seconds after which it is ended as too slow; None where nothing is known of it beforehand."""
        whole = self.expected + self.overhead
        return max(LEAST_PATIENCE, PATIENCE * whole) if whole and not self.resumes else None


class Parts:
    """The parts of one run in a folder.

    Args:
        folder: one JSON a part.
        about: what all of them depend on, such as the device and the number of rows.
        changed: called whenever something in the folder has changed.

    Raises:
        ValueError: the folder holds parts of something else.
    """

    def __init__(self, folder: Path, about: Result, changed: Callable[[], object] = lambda: None) -> None:
        self.folder, self.changed = folder, changed
        known = self._read("about")
        if known is not None and known != about:
            differing = ", ".join(f"{key}: {known.get(key)} there, {about[key]} now" for key in _changed(known, about))
            raise ValueError(f"{folder} holds parts of another run ({differing}): name another --state, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "about.json", about)

    def get(self, name: str) -> Result | None:
        """The result of a part, or None where it has not been done."""
        return self._read(f"part,{name}")

    def all(self, pattern: str) -> dict[str, Result]:
        """The results there are of the parts whose names match, by name."""
        names = [path.stem.removeprefix("part,") for path in sorted(self.folder.glob("part,*.json"))]
        return {name: found for name in names if fnmatch(name, pattern) and (found := self.get(name)) is not None}

    def do(self, name: str, work: Callable[[], Result], *, whole_call: bool = True) -> Result:
        """Does a part that has not been done, and keeps its result with the seconds it `took`.

        Args:
            whole_call: it is the first part of this process. If the clock ends such a part, that counts as one of its
                `TRIES`, for it had all the time there is; else it does not, and neither does a signal.
        """
        done = self.get(name)
        if done is not None:
            return done
        tries = self._trying(name)["tries"]
        if tries >= TRIES:
            return self._keep(name, failed(f"begun {tries} times and never ended"))
        self._try(name, tries + 1)
        start = time.monotonic()
        try:
            result = work()
        except (OutOfTime, SystemExit, KeyboardInterrupt) as stop:
            counts = whole_call and isinstance(stop, OutOfTime)
            self._try(name, tries + counts, time.monotonic() - start if isinstance(stop, OutOfTime) else 0.0)
            raise
        return self._keep(name, {**result, "took": round(time.monotonic() - start, 1)})

    def give_up(self, name: str, reason: str, status: str) -> Result:
        """Keeps as the result of a part that there is none."""
        return self._keep(name, {**failed(reason, status), "took": self._trying(name).get("seconds", 0.0)})

    def seconds(self, name: str) -> float:
        """How long a part ran, or, where the clock ended it, how long it was tried at the least; 0 if neither."""
        done = self.get(name)
        return float(self._trying(name).get("seconds", 0.0) if done is None else ran(done))

    def forget(self, pattern: str) -> list[str]:
        """Removes the results whose name or status matches a pattern (`train,*`, `failed`), and gives their names."""
        found = [name for name, result in self.all("*").items() if fnmatch(name, pattern) or _is(result, pattern)]
        for name in found:
            self._path(f"part,{name}").unlink()
            self._path(f"trying,{name}").unlink(missing_ok=True)
        self.changed()
        return found

    def _keep(self, name: str, result: Result) -> Result:
        write_json(self._path(f"part,{name}"), result)
        self._path(f"trying,{name}").unlink(missing_ok=True)
        self.changed()
        return result

    def _try(self, name: str, tries: int, seconds: float = 0.0) -> None:
        write_json(self._path(f"trying,{name}"), {"tries": tries, "seconds": seconds})
        self.changed()

    def _trying(self, name: str) -> Result:
        return self._read(f"trying,{name}") or {"tries": 0}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> Result | None:
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def run_jobs(jobs: Iterable[Job], parts: Parts, clock: Clock) -> list[str]:
    """Does the jobs that have no result yet, in order; one that would not end in time is left and the next one tried.

    Returns:
        The names of those that are left.

    Raises:
        BrokenDevice: a result says that the device does nothing more in this process.
    """
    jobs = list(jobs)
    for job in jobs:  # how long parts take is known from those of earlier calls
        clock.expect(job.kind, parts.seconds(job.name))
    left = []
    for job in jobs:
        if parts.get(job.name) is not None:
            continue
        if not clock.has_time(job.kind, job.expected, job.overhead):
            left.append(job.name)
            continue
        result = _in_time(job, parts, clock)
        clock.spent(job.kind, ran(result))
        console.print(f"{job.name}: {in_words(result)}")
        if result.get("broken"):
            raise BrokenDevice(f"{job.name}: {result['reason']}")
    return left


def _in_time(job: Job, parts: Parts, clock: Clock) -> Result:
    """The result of a job, which is ended where it takes far longer than expected, or the call is at its end.

    Raises:
        OutOfTime: the call is at its end.
    """
    left, patience = clock.left(GRACE), job.patience
    seconds = min((each for each in (left, patience) if each is not None), default=None)
    try:
        with ended_after(seconds):
            return parts.do(job.name, job.work, whole_call=not clock.begun)
    except OutOfTime:
        if seconds == left:
            raise
        return parts.give_up(job.name, f"ended after {seconds:.0f} s: far longer than expected", "too slow")


def ran(result: Result) -> float:
    """Seconds that a part ran, without its preparations where these are known."""
    return float(result.get("running") or result.get("took") or 0.0)


def failed(reason: str, status: str = "failed") -> Result:
    """The result of a part that has none."""
    return {"status": status, "reason": reason}


def in_words(result: Result) -> str:
    """A result in one line."""
    if "closing" in result:
        return str(result["closing"])
    if result["status"] != "done":
        return f"{result['status']}: {result['reason'][:200]}"
    words = {
        "logical_per_second": "{:,.0f} logical tokens/s", "median": "{:.2f} s", "tflops": "{:.3g} TFLOP/s",
        "log_loss": "log-loss {:.4f}", "took": "took {:.0f} s",
    }  # fmt: skip
    return ", ".join(form.format(result[name]) for name, form in words.items() if result.get(name) is not None)


def _is(result: Result, status: str) -> bool:
    return bool(result.get("status") == status)


def _changed(known: Result, about: Result) -> list[str]:
    return [key for key in about if known.get(key) != about[key]] or ["its settings"]
