"""The tests marked `gpu`: run in groups, in processes of their own, every test's outcome kept as it comes.

A test that was begun three times and never ended is not run again.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.clock import OutOfTime
from benchmarks.gpu_plugin import GROUP, LOG, add_line, read_log, read_outcomes
from benchmarks.parts import Result

PLUGIN = "benchmarks.gpu_plugin"
ROOT = Path(__file__).parents[1]  # of the checkout: tests and pyproject.toml stand there
MARKED = re.compile(r"^\s*(?:@|pytestmark\b.*)pytest\.mark\.gpu\b|^[^\"']*marks=.*pytest\.mark\.gpu\b", re.MULTILINE)
ENDED = (0, 1, 5)  # pytest's exit status where all passed, some failed, nothing was to be run
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
    known = None
    while True:
        status = _pytest(group, files, log, output)
        outcomes = read_outcomes(log)
        found = summary(outcomes)
        if status in ENDED:
            return found
        if known == (known := read_log(log)):  # it did not even begin a test
            lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
            told = [line for line in lines if line.strip() and not line.startswith("=")] or ["nothing was said"]
            reason = f"pytest ended with status {status}: {told[-1]}"[:500]
            return {**found, "status": "failed", "closing": f"{found['closing']}; {reason}", "reason": reason}


def _pytest(group: str, files: list[Path], log: Path, output: Path) -> int:
    """Runs a group's tests that have no outcome yet, and gives pytest's exit status."""
    command = [
        sys.executable, "-m", "pytest", "-m", "gpu", "-c", str(ROOT / "pyproject.toml"), "-p", PLUGIN, "-rfEs", "-v",
        "--tb=short", "-p", "no:cacheprovider", *map(str, files),
    ]  # fmt: skip
    try:
        with output.open("a", encoding="utf-8") as out:
            return subprocess.run(
                command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, check=False,
                env={**os.environ, GROUP: group, LOG: str(log.absolute())},
            ).returncode  # fmt: skip
    except (OutOfTime, SystemExit, KeyboardInterrupt):
        add_line(log, {"test": None, "event": "stopped"})  # the test that ran did not hang
        raise


def summary(outcomes: dict[str, str]) -> Result:
    """The outcomes of a group as its result."""
    counts = Counter(outcomes.values())
    closing = ", ".join(f"{counts[each]} {each}" for each in ("passed", "skipped", *BAD) if counts[each]) or "no tests"
    bad = [test for test, outcome in outcomes.items() if outcome in BAD]
    result: Result = {"status": "failed" if bad else "done", "closing": closing, "outcomes": dict(counts)}
    return {**result, "reason": ", ".join(bad)} if bad else result
