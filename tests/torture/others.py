"""Promises that have tests of their own: those are run, and counted."""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as Tree
from pathlib import Path

import tests.bad_settings
import tests.data.bad_files
from tests.torture.ground import Found, Ground

ROOT = Path(__file__).parents[2]


def hostile_files(ground: Ground) -> Found:
    kinds = len(tests.data.bad_files.KINDS) + len(tests.bad_settings.COMMANDS) + len(tests.bad_settings.SAMPLES)
    asked = "at least 60 kinds, each a named error or a finite row"
    found = _tests(ground, "hostile files", asked, "tests/test_cli_bad_input.py", "tests/data/test_bad_files.py")
    if kinds < 60:
        found.failures.append(f"only {kinds} kinds")
    found.note = f"{kinds} kinds of files; {found.note}"
    return found


def mirror(ground: Ground) -> Found:
    asked = "resume from it equals resume from disk; one cut short is never taken"
    return _tests(ground, "mirror", asked, "tests/storage")


def unsafe_loads(ground: Ground) -> Found:
    return _tests(ground, "unsafe loads", "0", "tests/test_unsafe_loads.py")


def _tests(ground: Ground, promise: str, asked: str, *paths: str) -> Found:
    """Runs tests, and counts them: each is a trial."""
    report = ground.place(f"tests-{promise.replace(' ', '-')}") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = Found(promise, asked, note=f"tests: `pytest {' '.join(paths)}`")
    if not report.is_file():
        found.failures.append(f"the tests could not be run: {ended.stdout[-1500:]}{ended.stderr[-1500:]}")
        return found
    for case in Tree.parse(report).iter("testcase"):
        wrong = [each.get("message", "") for each in case if each.tag in ("failure", "error")]
        if not any(each.tag == "skipped" for each in case):
            found.count(f"{case.get('classname')}.{case.get('name')}: {wrong[0][:300]}" if wrong else None)
    if not found.tried:
        found.failures.append("no test was run")
    return found
