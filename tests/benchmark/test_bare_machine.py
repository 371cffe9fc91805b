"""The GPU script on a bare machine, from wheels that are really collected. Needs a network; `pytest -m slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arena.benchmark import start
from arena.benchmark.collect import main
from tests.benchmark.test_real import overrides, tiny_base
from tests.benchmark.wheels import PYTHON, bare_machine

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
        patch.setattr(sys, "argv", ["collect", "--python", PYTHON, "--out", str(folder)])
        main()
    return folder


def run(machine: Path, folder: Path, *words: str, first: str = start.__file__) -> subprocess.CompletedProcess[str]:
    """Runs a file, the starter, on the machine; what it unpacks goes below `folder`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    (folder / "temporary").mkdir(exist_ok=True)
    environment = kept | {"TMPDIR": str(folder / "temporary"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(machine), first, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_machine_is_bare(machine: Path, tmp_path: Path) -> None:
    for module in ("torch", "transformers", "peft", "datasets", "bitsandbytes", "pytest", "pip", "arena"):
        done = run(machine, tmp_path, f"import {module}", first="-c")
        assert (done.returncode == 0) == (module in ("torch", "transformers", "peft")), (module, done.stderr)


def test_without_wheels_it_says_what_is_missing(machine: Path, tmp_path: Path) -> None:
    done = run(machine, tmp_path, "--recipe", "demo")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "lacks bitsandbytes, datasets" in done.stderr and "torch" not in done.stderr.splitlines()[0]
    assert "arena.benchmark.collect" in done.stderr


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
    result = json.loads((tmp_path / "docs/bench-cpu-tiny.json").read_text())
    assert [cell["status"] for cell in result["cells"].values()] == ["done"]
    assert result["tests"]["tests,test_there"]["closing"].startswith("1 passed"), result["tests"]
    assert "bitsandbytes" in result["versions"]
    assert list((tmp_path / "temporary").glob("arena-wheels-*")) == []
