"""The torture itself, a little of it; and that what is broken would be seen."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture import flips, report
from tests.torture.ground import Found
from tests.torture.processes import Child, watch

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_short_run_of_the_torture_passes(tmp_path: Path) -> None:
    """In a process of its own, that has no threads to fork."""
    command = [
        sys.executable,
        "-m",
        "tests.torture",
        "--fraction",
        "0.01",
        "--only",
        "kills",
        "flips",
        "--out",
        tmp_path,
    ]
    ended = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"}
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 of 3" in ended.stdout and "41 of 41" in ended.stdout
    assert not list(tmp_path.iterdir())


def test_processes_are_heard_signalled_and_killed(tmp_path: Path) -> None:
    def work(announce: object) -> None:
        count = watch(tmp_path / "run", 3, announce)  # type: ignore[arg-type]
        for at in range(10):
            (tmp_path / f"run{at}").touch()
        print("touched", count(), flush=True)
        raise SystemExit(7)

    child = Child(work, tmp_path / "shown.txt")
    assert child.hear() == "now" and child.hear() is None
    assert child.wait() == 7 and "touched 10" in child.text()
    sleeper = Child(lambda announce: (announce("now"), signal.pause()), tmp_path / "sleeper.txt")
    assert sleeper.hear() == "now"
    sleeper.send(signal.SIGKILL)
    assert sleeper.wait() == -signal.SIGKILL
    broken = Child(lambda announce: 1 / 0, tmp_path / "broken.txt")
    assert broken.wait() == 70 and "ZeroDivisionError" in broken.text()


def test_every_kind_of_damage_changes_something() -> None:
    draws = random.Random(0)
    for kind in flips.KINDS:
        for size in (1, 100, 10_000):
            whole = draws.randbytes(size)
            assert all(flips.spoilt(whole, kind, draws) != whole for _ in range(50)), kind


def test_broken_promises_are_reported(tmp_path: Path) -> None:
    found = Found("a promise", "2 of 2")
    found.count(None)
    found.count("it broke")
    about = {"date": "2026-01-01", "command": "make torture", "device": "CPU", "torch": "2", "seconds": 1.0}
    report.write([found], about, tmp_path)
    text = (tmp_path / "torture.md").read_text()
    assert "1 of 2" in text and "- a promise: it broke" in text
    shutil.rmtree(tmp_path)
