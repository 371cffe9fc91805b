"""Long work in parts: each part's result is a JSON file, kept as it comes, so that a stopped run goes on where it was.

A part that was begun twice and never ended (a machine that hangs or is taken away in the middle) is given up the third
time, so that it cannot keep the others from being done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from arena.files import write_json

TRIES = 2
Result = dict[str, Any]


class BrokenDevice(Exception):  # noqa: N818 - it ends a process, the next one goes on
    """The device does nothing more in this process."""


class Parts:
    """The parts of one run in a folder.

    Args:
        folder: one JSON a part.
        about: what all of them depend on, such as the device and the number of rows.

    Raises:
        ValueError: the folder holds parts of something else.
    """

    def __init__(self, folder: Path, about: Result) -> None:
        self.folder = folder
        known = self._read("about")
        if known is not None and known != about:
            changed = ", ".join(f"{key}: {known.get(key)} there, {about[key]} now" for key in _changed(known, about))
            raise ValueError(f"{folder} holds parts of another run ({changed}): name another --state, or remove it")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "about.json", about)

    def get(self, name: str) -> Result | None:
        """The result of a part, or None where it has not been done."""
        return self._read(f"part,{name}")

    def all(self, pattern: str) -> dict[str, Result]:
        """The results there are of the parts whose names match, by name."""
        names = [path.stem.removeprefix("part,") for path in sorted(self.folder.glob("part,*.json"))]
        return {name: found for name in names if fnmatch(name, pattern) and (found := self.get(name)) is not None}

    def do(self, name: str, work: Callable[[], Result]) -> Result:
        """Does a part that has not been done, and keeps its result with the seconds it `took`."""
        done = self.get(name)
        if done is not None:
            return done
        tries = (self._read(f"trying,{name}") or {"tries": 0})["tries"]
        if tries >= TRIES:
            return self._keep(name, failed(f"begun {tries} times and never ended"))
        write_json(self._path(f"trying,{name}"), {"tries": tries + 1})
        start = time.monotonic()
        result = work()
        return self._keep(name, {**result, "took": round(time.monotonic() - start, 1)})

    def forget(self, pattern: str) -> list[str]:
        """Removes the results whose name or status matches a pattern (`train,*`, `failed`), and gives their names."""
        found = [name for name, result in self.all("*").items() if fnmatch(name, pattern) or _is(result, pattern)]
        for name in found:
            self._path(f"part,{name}").unlink()
            self._path(f"trying,{name}").unlink(missing_ok=True)
        return found

    def _keep(self, name: str, result: Result) -> Result:
        write_json(self._path(f"part,{name}"), result)
        self._path(f"trying,{name}").unlink(missing_ok=True)
        return result

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _read(self, name: str) -> Result | None:
        path = self._path(name)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


class Clock:
    """Says whether there is time for another part.

    Args:
        minutes: from now on; None is without end.
    """

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.longest: dict[str, float] = {}
        self.begun = False

    def has_time(self, kind: str) -> bool:
        """Whether a part of a kind may begin: if it takes as long as the longest of its kind so far, it must end in
        time. The first part may always begin, else nothing would ever be done."""
        if self.end is None or not self.begun:
            return True
        return time.monotonic() + self.longest.get(kind, 0.0) < self.end

    def left(self) -> float | None:
        """Seconds until the end; None without one."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def spent(self, kind: str, seconds: float) -> None:
        """Books a part."""
        self.begun = True
        self.expect(kind, seconds)

    def expect(self, kind: str, seconds: float) -> None:
        """Takes it that a part of a kind may last so long."""
        self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)


def failed(reason: str, status: str = "failed") -> Result:
    """The result of a part that has none."""
    return {"status": status, "reason": reason}


def _is(result: Result, status: str) -> bool:
    return bool(result.get("status") == status)


def _changed(known: Result, about: Result) -> list[str]:
    return [key for key in about if known.get(key) != about[key]] or ["its settings"]
