"""The script for whoever has a GPU for half an hour, end to end on the CPU, and what it asks of the machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from arena import cli
from arena.benchmark import machine, real_report, real_run, techniques
from arena.benchmark.gpu import MORE_TO_DO, Gpu
from tests.benchmark.test_real import overrides, tiny_base


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the script with two cells, one test file and techniques that are made up; gives its exit status."""
    test = tmp_path / "test_on_gpu.py"
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\ndef test_not(): assert False\n")
    monkeypatch.setattr(techniques, "TECHNIQUES", {"QLoRA, NF4": None})
    monkeypatch.setattr(techniques, "run_techniques", lambda *given: [{"status": "done", "log_loss": 0.9876}])
    base = tiny_base(tmp_path / "base")
    monkeypatch.setattr(real_report, "draw", lambda tables, result, path: path.touch())  # seconds; tested elsewhere
    whole = real_run.in_order
    monkeypatch.setattr(real_run, "in_order", lambda found: dict(list(whole(found).items())[:2]))

    def run(**changes: Any) -> int:
        given: dict[str, Any] = {
            "recipe": "demo", "state": tmp_path / "state", "out": tmp_path / "docs", "tests": str(test), "repeats": 1,
            "minutes": None, **changes,
        }  # fmt: skip
        try:
            Gpu(tuple(overrides(base)), **given).run()
        except SystemExit as stop:
            return int(str(stop.code))
        return 0

    return run


def test_the_script_stops_in_time_and_goes_on(script: Callable[..., int], tmp_path: Path) -> None:
    statuses = []
    for _ in range(6):  # test file, ceiling, two cells, losses: one part a call
        statuses.append(script(minutes=0.0))
        if statuses[-1] == 0:
            break
    assert statuses == [MORE_TO_DO] * 4 + [0]
    result = json.loads((tmp_path / "docs/bench-cpu-tiny.json").read_text())
    assert len(result["cells"]) == 2 and result["tests"]["tests,test_on_gpu"]["closing"].startswith("1 passed")
    assert (tmp_path / "docs/bench-cpu-tiny.png").is_file()
    page = (tmp_path / "docs/bench-cpu-tiny.md").read_text()
    assert "1 passed" in page and "| QLoRA, NF4 |" in page and "| 0.9876 |" in page
    assert script() == 0  # nothing is left to do


def test_a_failed_test_is_told_at_the_end(script: Callable[..., int], tmp_path: Path) -> None:
    test = tmp_path / "test_fails.py"
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): assert False\n")
    assert script(tests=str(test)) == 1
    page = (tmp_path / "docs/bench-cpu-tiny.md").read_text()
    assert "1 failed" in page
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n")
    assert script(tests=str(test)) == 1  # kept
    assert script(tests=str(test), again="failed") == 0


def test_tests_that_take_too_long_are_left(tmp_path: Path) -> None:
    test = tmp_path / "test_long.py"
    test.write_text("import pytest, time\n@pytest.mark.gpu\ndef test_it(): time.sleep(60)\n")
    assert machine.run_tests(test, 0.5)["status"] == "stopped"


def test_wheels_without_flash_attn_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"there is no flash_attn-\*\.whl"):
        machine.install_flash(tmp_path, tmp_path)


def test_the_script_runs_as_a_module() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "arena.benchmark.gpu", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("--minutes", "--state", "--install", "--wheels", "--anyway"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bench", "--recipe", "gemma-2-9b", "--layers", "8"], "--layers is of the small model"),
        (["bench", "--minutes", "5"], "--minutes needs --recipe"),
        (["bench", "train.lr=1"], "--overrides needs --recipe"),
        (["bench", "--recipe", "gemma-2-9b"], "no CUDA device"),
        (["gpu", "--tests", "nowhere"], "no CUDA device"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["arena", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().out.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_gpu_tests_are_found_by_their_marks(tmp_path: Path) -> None:
    texts = {
        "test_a": "@pytest.mark.gpu\ndef test(): ...", "test_b": "pytestmark = [pytest.mark.gpu, other]",
        "test_c": "text = '@pytest.mark.gpu'", "test_d": "def test(): ...",
        "test_e": "    @pytest.mark.gpu\n    def test(self): ...", "other": "@pytest.mark.gpu",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert [path.stem for path in machine.gpu_tests(str(tmp_path))] == ["test_a", "test_b", "test_e"]
    assert "model.test_gpu" in [machine.name_of(path) for path in machine.gpu_tests("tests")]


def test_flash_attn_is_installed_where_it_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    calls: list[list[str]] = []

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        place = Path(command[command.index("--target") + 1])
        place.mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(machine.subprocess, "run", pip)
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    (wheels / "flash_attn-2.8-cp312.whl").touch()
    machine.install_flash(tmp_path, wheels)
    (command,) = calls
    assert "--no-index" in command and str(wheels / "flash_attn-2.8-cp312.whl") in command
    assert sys.path[0] == str(tmp_path / "packages")
    assert machine.os.environ["PYTHONPATH"].split(":") == [str(tmp_path / "packages"), str(machine.ROOT), "elsewhere"]


def test_make_names_a_recipe_only_where_one_is_given() -> None:
    def told(*words: str) -> str:
        made = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/ready", *words],
            cwd=machine.ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return made.stdout

    assert told("bench").rstrip().endswith("arena bench")
    assert "arena bench --recipe gemma-2-9b" in told("bench", "RECIPE=gemma-2-9b")
    assert "arena gpu --recipe gemma-2-9b" in told("gpu")
    assert "arena gpu --recipe gemma-2-2b" in told("gpu", "RECIPE=gemma-2-2b")
    assert "arena train --fold 0 --recipe demo" in told("train")
