"""The tests marked `gpu`: run in groups by one process of pytest each, every test's outcome kept as it comes.

This module is also the plugin that pytest loads for that: it chooses the group's tests that have no outcome yet and
writes a line for each that begins and ends. A test that was begun three times and never ended is not run again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from arena.benchmark.clock import OutOfTime
from arena.benchmark.parts import TRIES, Result

ROOT = Path(__file__).parents[2]  # of the checkout: tests and pyproject.toml stand there
MARKED = re.compile(r"^\s*(?:@|pytestmark\b.*)pytest\.mark\.gpu\b|^[^\"']*marks=.*pytest\.mark\.gpu\b", re.MULTILINE)
# what a test's name says of the group that it is in; the first that fits. FlexAttention compiles for minutes, so last.
GROUPS = {"flex": re.compile("flex"), "flash": re.compile("flash|probe"), "others": re.compile("")}
GROUP, LOG = "ARENA_TEST_GROUP", "ARENA_TEST_LOG"  # environment variables that the plugin reads
NO_TESTS = 5  # pytest's exit status where nothing was to be run
BAD = ("failed", "stuck")


def gpu_tests(place: str) -> list[Path]:
    """The test files below `place`, or `place` itself, that have tests marked `gpu`."""
    where = ROOT / place
    files = sorted(where.rglob("test_*.py")) if where.is_dir() else [where]
    if not where.exists():
        raise ValueError(f"--tests {place}: there is no such file or folder in {ROOT}")
    return [path for path in files if MARKED.search(path.read_text(encoding="utf-8"))]


def run_group(group: str, files: list[Path], folder: Path) -> Result:
    """`pytest -m gpu` of the group's tests that have no outcome yet, in a process of its own.

    Args:
        folder: the outcomes (`tests,<group>.jsonl`) and what pytest prints (`tests,<group>.txt`) are added to there.

    Returns:
        `status` (`done` where all that ran passed, else `failed`), `closing`: the counts in words, `outcomes`: how many
        tests have each, and for a failure the names of the tests in `reason`.
    """
    log, output = folder / f"tests,{group}.jsonl", folder / f"tests,{group}.txt"
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-c", str(ROOT / "pyproject.toml"), "-p", __name__, "-rfEs", "-v",
        "--tb=short", "-p", "no:cacheprovider", *map(str, files),
    ]  # fmt: skip
    try:
        with output.open("a", encoding="utf-8") as out:
            status = subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
                env={**os.environ, GROUP: group, LOG: str(log.absolute())},
            ).returncode  # fmt: skip
    except (OutOfTime, SystemExit, KeyboardInterrupt):
        _add(log, {"test": None, "event": "stopped"})  # the test that ran did not hang
        raise
    outcomes = read_outcomes(log)
    found = summary(outcomes)
    if status not in (0, 1, NO_TESTS):
        lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
        told = [line for line in lines if line.strip() and not line.startswith("=")] or ["nothing was said"]
        reason = f"pytest ended with status {status}: {told[-1]}"[:500]
        return {**found, "status": "failed", "closing": f"{found['closing']}; {reason}", "reason": reason}
    return found


def summary(outcomes: dict[str, str]) -> Result:
    """The outcomes of a group as its result."""
    counts = Counter(outcomes.values())
    closing = ", ".join(f"{counts[each]} {each}" for each in ("passed", "skipped", *BAD) if counts[each]) or "no tests"
    bad = [test for test, outcome in outcomes.items() if outcome in BAD]
    result: Result = {"status": "failed" if bad else "done", "closing": closing, "outcomes": dict(counts)}
    return {**result, "reason": ", ".join(bad)} if bad else result


def read_outcomes(log: Path) -> dict[str, str]:
    """Each test's outcome so far: `passed`, `skipped`, `failed`, or `stuck`: begun again and again, and never ended."""
    begun, outcomes, _ = _read(log)
    return {**outcomes, **{test: "stuck" for test, times in begun.items() if times >= TRIES}}


def _read(log: Path) -> tuple[Counter[str], dict[str, str], str | None]:
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


def group_of(test: str) -> str:
    """The group of a test, by its name."""
    return next(group for group, names in GROUPS.items() if names.search(test.rpartition("::")[2].lower()))


def _add(log: Path, line: dict[str, Any]) -> None:
    ended = not log.is_file() or log.read_bytes()[-1:] in (b"", b"\n")
    with log.open("a", encoding="utf-8") as out:
        out.write(("" if ended else "\n") + json.dumps(line) + "\n")


# --- what pytest calls, in the process that `run_group` starts ---


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves the tests of the group that have no outcome yet."""
    done = read_outcomes(Path(os.environ[LOG]))
    wanted = [each for each in items if group_of(each.nodeid) == os.environ[GROUP] and each.nodeid not in done]
    config.hook.pytest_deselected(items=[each for each in items if each not in wanted])
    items[:] = wanted


def pytest_runtest_logstart(nodeid: str, location: Any) -> None:
    """Notes that a test begins."""
    _add(Path(os.environ[LOG]), {"test": nodeid, "event": "begun"})


def pytest_runtest_logreport(report: Any) -> None:
    """Notes a test's outcome."""
    if report.when == "call" or report.outcome != "passed":
        _add(Path(os.environ[LOG]), {"test": report.nodeid, "event": report.outcome})
