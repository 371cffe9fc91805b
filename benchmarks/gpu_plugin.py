"""What pytest loads to run a group of the tests marked `gpu`: each test that begins and ends is noted in a file.

Two environment variables say which group is to be run and where the notes are; a test that has an outcome there is
left out.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.parts import TRIES

GROUP, LOG = "ARENA_TEST_GROUP", "ARENA_TEST_LOG"
# what a test's name says of the group that it is in; the first that fits
GROUPS = {"flex": re.compile("flex"), "flash": re.compile("flash|probe"), "others": re.compile("")}
DEVICE_ERROR = re.compile("CUDA error|AcceleratorError")
_broken: list[str] = []  # tests after which the device does nothing more in this process


def group_of(test: str) -> str:
    """The group of a test, by its name."""
    return next(group for group, names in GROUPS.items() if names.search(test.rpartition("::")[2].lower()))


def add_line(log: Path, line: dict[str, Any]) -> None:
    """Adds a line of JSON to a file whose last line may have been cut off."""
    whole = not log.is_file() or log.read_bytes()[-1:] in (b"", b"\n")
    with log.open("a", encoding="utf-8") as out:
        out.write(("" if whole else "\n") + json.dumps(line) + "\n")


def read_outcomes(log: Path) -> dict[str, str]:
    """Each test's outcome so far: `passed`, `skipped`, `failed`, or `stuck`: begun again and again, and never ended."""
    begun, outcomes, _ = read_log(log)
    return {**outcomes, **{test: "stuck" for test, times in begun.items() if times >= TRIES}}


def read_log(log: Path) -> tuple[Counter[str], dict[str, str], str | None]:
    """How often tests without an outcome were begun, the outcomes, and the test that is running."""
    begun: Counter[str] = Counter()
    outcomes: dict[str, str] = {}
    running = None
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for line in lines:
        try:
            test, event = (json.loads(line)[key] for key in ("test", "event"))
        except (ValueError, KeyError):  # the line that was being written when the process was killed
            continue
        if event == "begun":
            begun[test] += 1
            running = test
        elif event == "stopped" and running is not None:
            begun[running] -= 1
            running = None
        elif test is not None:
            outcomes[test] = event if outcomes.get(test) != "failed" else "failed"  # a test may fail after it passed
            begun.pop(test, None)
            running = None
    return begun, outcomes, running


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves the tests of the group that have no outcome yet."""
    done = read_outcomes(Path(os.environ[LOG]))
    wanted = [each for each in items if group_of(each.nodeid) == os.environ[GROUP] and each.nodeid not in done]
    config.hook.pytest_deselected(items=[each for each in items if each not in wanted])
    items[:] = wanted


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """Notes that a test begins."""
    add_line(Path(os.environ[LOG]), {"test": nodeid, "event": "begun"})


def pytest_runtest_logreport(report: Any) -> None:
    """Notes a test's outcome."""
    if report.when == "call" or report.outcome != "passed":
        add_line(Path(os.environ[LOG]), {"test": report.nodeid, "event": report.outcome})
    if report.outcome == "failed" and DEVICE_ERROR.search(report.longreprtext):
        _broken.append(report.nodeid)


def pytest_runtest_teardown(item: Any) -> None:
    """Ends this process after an error of the device, which would fail all other tests; the rest run in another one."""
    if _broken:
        item.session.shouldstop = "the device is broken in this process"
