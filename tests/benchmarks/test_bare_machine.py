"""The GPU script on a bare machine, from wheels that are really collected. Needs a network; `pytest -m slow`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path, PurePosixPath
from random import Random
from typing import Any
from zipfile import ZipFile

import pytest

from benchmarks import start
from benchmarks.__main__ import main
from tests.benchmarks.test_real import overrides, tiny_base
from tests.benchmarks.wheels import PYTHON, bare_machine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a bare machine."""
    return bare_machine(tmp_path_factory.mktemp("machine") / "bare")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the machine lacks, really fetched."""
    folder = tmp_path_factory.mktemp("wheels") / "here"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["benchmarks", "collect", "--python", PYTHON, "--out", str(folder)])
        main()
    return folder


def start_on(machine: Path, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Begins to run a file, or -c and a text, on the machine; what is unpacked there goes below `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    (folder / "temporary").mkdir(exist_ok=True)
    environment = kept | {"TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [str(machine), *words], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run(machine: Path, folder: Path, *words: str, first: str = start.__file__) -> subprocess.CompletedProcess[str]:
    """Runs a file, the starter, on the machine."""
    process = start_on(machine, folder, first, *words)
    out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def test_the_machine_is_bare(machine: Path, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft", "datasets", "bitsandbytes", "pytest", "pip", "arena"):
        done = run(machine, tmp_path, f"import {module}", first="-c")
        assert (done.returncode == 0) == (module in ("torch", "transformers", "peft")), (module, done.stderr)


def test_without_wheels_it_says_what_is_missing(machine: Path, tmp_path: Path) -> None:
    done = run(machine, tmp_path, "--recipe", "demo")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "lacks bitsandbytes, datasets" in done.stderr and "torch" not in done.stderr.splitlines()[0]
    assert "benchmarks collect" in done.stderr


def test_help(machine: Path, wheels: Path, tmp_path: Path) -> None:
    done = run(machine, tmp_path, "--wheels", str(wheels), "--help")
    assert done.returncode == 0, done.stderr
    assert "[--wheels FOLDER]" in done.stdout and "--minutes" in done.stdout


def test_the_script_measures_and_runs_tests_from_the_wheels(machine: Path, wheels: Path, tmp_path: Path) -> None:
    test = tmp_path / "test_there.py"
    test.write_text(
        "import datasets, hypothesis, os, pytest, sys\n@pytest.mark.gpu\ndef test_it():\n"
        "    places = {each.__file__.startswith(os.environ['TMPDIR']) for each in (datasets, hypothesis, pytest)}\n"
        f"    assert places == {{True}} and sys.executable == {str(machine)!r}\n"
    )
    asked = [
        "--recipe", "demo", "--minutes", "8", "--state", "state", "--out", "docs", "--repeats", "1", "--steps", "0",
        "--only", "train,ours,attention=blockwise", "--tests", str(test), *overrides(tiny_base(tmp_path / "base")),
    ]  # fmt: skip
    done = run(machine, tmp_path, "--wheels", str(wheels), *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    (written,) = (tmp_path / "docs").glob("bench-cpu-*-tiny.json")
    result = json.loads(written.read_text())
    assert [cell["status"] for cell in result["cells"].values()] == ["done"]
    assert result["tests"]["others"]["closing"] == "1 passed", result["tests"]
    assert "bitsandbytes" in result["versions"]
    assert list((tmp_path / "temporary").glob("arena-wheels-*")) == []


def test_killed_at_any_moment_the_script_resumes_from_its_archive(machine: Path, wheels: Path, tmp_path: Path) -> None:
    """All cells, tests and techniques: calls of a tenth of the real clock, some of them killed, and one to the end.

    Each call begins in an empty folder with nothing but the archive that the one before it left.
    """
    test = tmp_path / "test_there.py"
    names = [f"test_{group}_{at}" for group in ("flash", "other", "flex") for at in range(3)]
    test.write_text(
        f"import pathlib, pytest, time\n@pytest.mark.gpu\n@pytest.mark.parametrize('name', {names})\ndef test(name):\n"
        f"    time.sleep(1)\n    with open({str(tmp_path / 'ran.txt')!r}, 'a') as out: print(name, file=out)\n"
    )
    asked = [
        "--recipe", "demo", "--repeats", "1", "--steps", "2", "--archive", "results.zip",
        "--tests", str(test), *overrides(tiny_base(tmp_path / "base")),
    ]  # fmt: skip
    random = Random(0)
    archive, statuses = tmp_path / "results.zip", []
    seen: dict[str, dict[str, Any]] = {}
    for number, minutes in enumerate([SHORT] * (KILLED + ENDED) + [WHOLE]):
        folder = tmp_path / f"call{number}"
        folder.mkdir()
        if archive.is_file():
            shutil.copy(archive, folder)
        killed_after = random.uniform(10, 50) if number < KILLED else None
        words = ["--wheels", str(wheels), "--minutes", str(minutes), *asked]
        # what takes longer than a whole short call, such as compiling on a slow machine, was given up
        words += ["--again", "failed"] if minutes == WHOLE else []
        status = call(machine, folder, killed_after, *words)
        statuses.append(status)
        if not (folder / "results.zip").is_file():
            assert killed_after is not None and not seen  # before anything was begun
            continue
        shutil.copy(folder / "results.zip", archive)
        found = results(archive)
        kept = {name: result for name, result in seen.items() if result["status"] != "failed"}
        assert {name: found.get(name) for name in kept} == kept, "what was found before is found again, unchanged"
        seen = found
        page = page_of(archive)
        assert page.startswith("# tiny on CPU") and "## Training" in page and "## Techniques" in page
    assert statuses == [-9] * KILLED + [3] * ENDED + [0]
    cells = [found for name, found in seen.items() if "cell" in found]
    assert len(cells) > 30 and {each["status"] for each in cells} == {"done", "cannot run"}
    assert {"ceiling", "tests,flash", "tests,others", "tests,flex"} <= set(seen)
    assert sum(name.startswith("loss,") for name in seen) == 6
    ran = Counter((tmp_path / "ran.txt").read_text().split())
    assert set(ran) == set(names) and sum(ran.values()) <= len(names) + KILLED  # one may be killed in each call
    assert page_of(archive).count("not measured yet") == 0


SHORT, WHOLE = 0.9, 60.0  # minutes of a call
KILLED = ENDED = 3  # calls that are killed, and calls that are ended by their clock


def call(machine: Path, folder: Path, killed_after: float | None, *words: str) -> int:
    """The status of one call of the starter, -9 where it was killed."""
    process = start_on(machine, folder, start.__file__, *words)
    try:
        process.communicate(timeout=killed_after or 3600)
    except subprocess.TimeoutExpired:
        assert killed_after is not None, f"{folder.name} did not end by its clock"
        process.kill()
        process.communicate()
    return process.returncode


def results(archive: Path) -> dict[str, dict[str, Any]]:
    """What an archive holds of each part that has ended."""
    with ZipFile(archive) as opened:
        names = {name: PurePosixPath(name) for name in opened.namelist() if "/losses/" not in name}
        return {
            path.stem.removeprefix("part,"): json.loads(opened.read(name))
            for name, path in names.items()
            if path.name.startswith("part,")
        }


def page_of(archive: Path) -> str:
    with ZipFile(archive) as opened:
        (page,) = (name for name in opened.namelist() if name.startswith("pages/") and name.endswith(".md"))
        return opened.read(page).decode()
