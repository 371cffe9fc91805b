"""The script for whoever has a GPU for half an hour, end to end on the CPU, and what it asks of the machine."""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, machine, real_report, real_run, techniques
from benchmarks.__main__ import main
from benchmarks.cells import Cell
from benchmarks.clock import OutOfTime
from benchmarks.gpu import MORE_TO_DO, Gpu
from benchmarks.gpu_tests import ROOT
from benchmarks.matrix import Table
from tests.benchmarks.test_real import overrides, tiny_base


@pytest.fixture(autouse=True)
def no_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The clock of a call would end the process of the tests half a minute later."""
    monkeypatch.setenv("ARENA_STARTED", str(time.time()))
    yield
    faulthandler.cancel_dump_traceback_later()


def made_up(folder: Path, **changes: Any) -> int:
    """Runs the script with two cells, one test file and techniques that are made up; gives its exit status."""
    whole = real_run.in_order

    def two(found: list[Table], best: str) -> dict[str, Cell]:
        ours = {key: cell for key, cell in whole(found, best).items() if cell.way == "ours"}
        return dict(list(ours.items())[:2])

    test, base = folder / "test_on_gpu.py", folder / "base"
    if not base.exists():
        tiny_base(base)
        test.write_text("import pytest\n@pytest.mark.gpu\ndef test_flash(): pass\ndef test_not(): assert False\n")
    given: dict[str, Any] = {
        "recipe": "demo", "state": folder / "state", "out": folder / "docs", "tests": str(test), "repeats": 1,
        "minutes": None, **changes,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(techniques, "TECHNIQUES", {"QLoRA, NF4": techniques.Technique()})
        patch.setattr(techniques, "in_steps", lambda recipe, steps: recipe)
        patch.setattr(techniques, "in_process", lambda recipe, runs: {"status": "done", "log_loss": 0.9876})
        patch.setattr(real_report, "draw", lambda panels, columns, path, **words: path.touch())  # seconds
        patch.setattr(real_run, "in_order", two)
        patch.setenv("ARENA_STARTED", str(time.time()))
        try:
            Gpu(tuple(overrides(base)), **given).run()
        except SystemExit as stop:
            return int(str(stop.code))
    return 0


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., int]:
    return partial(made_up, tmp_path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a script that measured its cells and ran its tests."""
    folder = tmp_path_factory.mktemp("measured")
    assert made_up(folder, steps=0) == 0
    faulthandler.cancel_dump_traceback_later()
    return folder


@pytest.fixture
def measured_script(measured: Path, tmp_path: Path) -> Callable[..., int]:
    """That script, going on in the test's own folder."""
    for name in ("state", "docs"):
        shutil.copytree(measured / name, tmp_path / name)
    return partial(made_up, measured, state=tmp_path / "state", out=tmp_path / "docs")


def the(pattern: str, folder: Path) -> Path:
    (found,) = folder.glob(pattern)
    return found


@pytest.mark.slow
def test_the_script_stops_in_time_and_resumes_from_its_archive_alone(
    script: Callable[..., int], tmp_path: Path
) -> None:
    statuses, names = [], []
    for _ in range(8):  # two cells, ceiling, three groups of tests, losses: one part a call
        statuses.append(script(minutes=0.0, archive=tmp_path / "all.zip"))
        result = json.loads(the("docs/bench-cpu-*-tiny.json", tmp_path).read_text())
        done = {*result["cells"], *result["losses"], *result["tests"], *(["ceiling"] if result["ceiling"] else [])}
        names.append(done)
        shutil.rmtree(tmp_path / "state")
        shutil.rmtree(tmp_path / "docs")
        if statuses[-1] == 0:
            break
    assert statuses == [MORE_TO_DO] * 6 + [0]
    assert [len(each) for each in names] == [1, 2, 3, 4, 5, 6, 7]
    assert "flash" in names[3]  # after the cells that are wanted most
    assert script(archive=tmp_path / "all.zip") == 0  # nothing is left to do
    assert the("docs/bench-cpu-*-tiny.png", tmp_path).is_file()
    page = the("docs/bench-cpu-*-tiny.md", tmp_path).read_text()
    assert "| flash | 1 passed |" in page and "| flex | no tests |" in page
    assert "| QLoRA, NF4 |" in page and "| 0.9876 |" in page


@pytest.mark.slow
def test_every_moment_leaves_a_readable_page(
    script: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page and the archive stand there when a part begins, so that whatever ends the process leaves them."""
    seen: list[tuple[int, bool]] = []
    real = real_run.RealBench.cell

    def looked_at(self: Any, cell: Cell) -> dict[str, Any]:
        page = the("docs/bench-cpu-*-tiny.md", tmp_path).read_text()
        seen.append((page.count("not measured yet"), (tmp_path / "state/tiny.zip").is_file()))
        return real(self, cell)

    monkeypatch.setattr(real_run.RealBench, "cell", looked_at)
    assert script(tests="", steps=0) == 0
    (before, archived), (after, _) = seen
    assert before > after > 0 and archived


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "status"), [(OutOfTime(), MORE_TO_DO), (SystemExit(143), 143), (KeyboardInterrupt(), None)]
)
def test_a_part_that_is_stopped_is_done_in_the_next_call(
    script: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int | None,
) -> None:
    real, calls = real_run.RealBench.cell, []

    def stopped_once(self: Any, cell: Cell) -> dict[str, Any]:
        calls.append(cell.key)
        if len(calls) == 2:
            raise error
        return real(self, cell)

    monkeypatch.setattr(real_run.RealBench, "cell", stopped_once)
    if status is None:
        with pytest.raises(KeyboardInterrupt):
            script(tests="", steps=0)
    else:
        assert script(tests="", steps=0) == status
    assert script(tests="", steps=0) == 0
    assert len(calls) == 3 and calls[1] == calls[2] != calls[0]


@pytest.mark.slow
def test_a_failed_test_is_told_at_the_end(measured_script: Callable[..., int], tmp_path: Path) -> None:
    script, test = partial(measured_script, steps=0), tmp_path / "test_fails.py"
    for part in (*tmp_path.glob("state/tiny/*/*tests,*"), tmp_path / "state/tiny.zip"):
        part.unlink()
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): assert False\n")
    assert script(tests=str(test)) == 1
    page = the("docs/bench-cpu-*-tiny.md", tmp_path).read_text()
    assert "1 failed" in page and "::test_it" in page
    test.write_text("import pytest\n@pytest.mark.gpu\ndef test_it(): pass\n")
    assert script(tests=str(test)) == 1  # kept
    assert script(tests=str(test), again="failed") == 0


@pytest.mark.slow
@pytest.mark.parametrize(("status", "ends_with"), [("failed", 1), ("too slow", 1), ("cannot run", 0)])
def test_tests_that_were_given_up_are_on_the_page_with_what_they_found(
    measured_script: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    status: str,
    ends_with: int,
) -> None:
    (part,) = tmp_path.glob("state/tiny/*/part,tests,flash.json")
    part.write_text(json.dumps({"status": status, "reason": "begun 3 times and never ended"}))
    assert measured_script(steps=0) == ends_with
    assert "| flash | 1 passed so far | begun 3 times and never ended |" in the("docs/*-tiny.md", tmp_path).read_text()
    assert (f"{status}: tests,flash; --again '{status}'" in capsys.readouterr().out) == bool(ends_with)
    assert measured_script(steps=0, again=status) == 0
    assert "| flash | 1 passed |" in the("docs/*-tiny.md", tmp_path).read_text()


@pytest.mark.slow
def test_another_device_has_a_table_of_its_own(
    script: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert script(tests="", steps=0) == 0
    monkeypatch.setattr(real_run, "device_name", lambda device: "CPU, of another make")
    assert script(tests="", steps=0) == 0
    pages = sorted(path.name for path in (tmp_path / "docs").glob("*.md"))
    assert len(pages) == 2 and "bench-cpu-of-another-make-tiny.md" in pages
    for page in pages:
        assert "not measured yet" in (tmp_path / "docs" / page).read_text()


def test_the_script_runs_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu", "--help"])
    monkeypatch.delitem(sys.modules, "benchmarks.__main__")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("benchmarks", run_name="__main__")
    shown = capsys.readouterr().out
    for word in ("--minutes", "--state", "--archive", "--plan", "--anyway"):
        assert word in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small", "--rows", "9"], "--rows 9 must be a multiple"),
        (["small", "--workloads", "other"], "--workloads other: name some of"),
        (["gpu", "--tests", "nowhere"], "no CUDA device"),
        (["small", "--out", "s3://b/docs"], "--out s3:/b/docs is a URL"),
        (["gpu", "--out", "s3://b/docs"], "--out s3:/b/docs is a URL"),
        (["gpu", "--state", "s3://b/state"], "--state s3:/b/state is a URL"),
        (["gpus"], "there is no command 'gpus': did you mean gpu?"),
    ],
)
def test_mistakes(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert message in capsys.readouterr().out.replace("\n", " ")
    assert list(tmp_path.iterdir()) == []


def test_the_allocator_is_set_up_before_anything_is_measured(
    script: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arena.distributed.os.environ", {})

    def begun(*given: Any, **named: Any) -> None:
        assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
        raise InterruptedError

    monkeypatch.setattr(real_run.RealBench, "__init__", begun)
    with pytest.raises(InterruptedError):
        script()


@pytest.mark.parametrize("begun", [None, 3.0])
def test_minutes_count_from_before_the_imports(monkeypatch: pytest.MonkeyPatch, begun: float | None) -> None:
    monkeypatch.setattr(gpu, "STARTED", 5.0)
    monkeypatch.setattr(os, "environ", {} if begun is None else {"ARENA_STARTED": str(begun)})

    def clock(minutes: float | None, since: float) -> Any:
        assert since == (begun or 5.0)
        raise InterruptedError

    monkeypatch.setattr(gpu, "Clock", clock)
    with pytest.raises(InterruptedError):
        Gpu().run()


@pytest.mark.parametrize(
    ("does", "why"),
    [
        ("print('fine')", None),
        ("import os; os.abort()", "ended with status -6"),
        ("print('no kernel image'); raise SystemExit(2)", "ended with status 2 (no kernel image)"),
        ("import time; time.sleep(60)", "did not end within 1 s"),
    ],
)
def test_flash_attn_is_tried_in_another_process(
    does: str, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, commands = subprocess.run, []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return real([command[0], "-c", does], **options)

    monkeypatch.setattr(machine.subprocess, "run", run)
    monkeypatch.setattr(machine, "TRIAL_SECONDS", 1 if "sleep" in does else 60)
    for _ in range(2):  # it is kept
        found = machine.why_not_flash(["--recipe", "demo", "train.lr=1"], tmp_path / "state/flash.json")
        assert (found is None) if why is None else why in str(found)
    (command,) = commands
    assert command[1:] == ["-m", "benchmarks", "gpu", "--plan", "--tests", "", "--recipe", "demo", "train.lr=1"]


def test_the_plan_is_shown_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    Gpu(plan=True).run()
    lines = capsys.readouterr().out.splitlines()
    (end,) = (at for at, line in enumerate(lines) if line == "call 2")
    first = " ".join(lines[:end])
    for name in ("train,ours", "train,padded", "infer,padded", "infer,ours", "ceiling", "peak,ours", "tests,flash"):
        assert name in first, name
    assert "tests,flex" in lines[-1]


def test_make_names_a_recipe_only_where_one_is_given() -> None:
    def told(*words: str) -> str:
        made = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", "--assume-old=.venv/ready", *words],
            cwd=ROOT, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return made.stdout

    assert told("bench").rstrip().endswith("-m benchmarks small")
    assert "-m benchmarks gpu --tests '' --minutes None --recipe gemma-2-9b" in told("bench", "RECIPE=gemma-2-9b")
    assert "-m benchmarks gpu --recipe gemma-2-9b" in told("gpu")
    assert "-m benchmarks gpu --recipe gemma-2-2b" in told("gpu", "RECIPE=gemma-2-2b")
    assert "arena train --fold 0 --recipe demo" in told("train")
