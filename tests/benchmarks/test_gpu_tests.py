"""The runner of tests marked `gpu`: groups, outcomes that are kept one by one, tests that hang.

Those that start processes are marked slow.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from pathlib import Path

import pytest

from benchmarks import gpu_tests as module
from benchmarks.clock import OutOfTime, ended_after
from benchmarks.gpu_plugin import group_of, read_outcomes
from benchmarks.gpu_tests import gpu_tests, run_group
from benchmarks.parts import TRIES

TESTS = """
import os, pathlib, pytest, time
pytestmark = pytest.mark.gpu
HERE = pathlib.Path(__file__).parent

def ran(name):
    with (HERE / "ran.txt").open("a") as out:
        out.write(name + "\\n")

def test_flash(): ran("flash")
@pytest.mark.parametrize("name", ["flash", "flex", "blockwise"])
def test_each(name): ran("each " + name)
def test_the_probe_skips(): pytest.skip("no card")
def test_other(): ran("other")
def test_hangs_with_flash():
    ran("hangs")
    time.sleep(0 if (HERE / "mended").exists() else 600)
def test_after_flash(): ran("after")
"""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    path = tmp_path / "test_made_up.py"
    path.write_text(TESTS)
    return [path]


def ran(folder: Path) -> list[str]:
    return (folder / "ran.txt").read_text().splitlines()


def test_gpu_tests_are_found_by_their_marks(tmp_path: Path) -> None:
    texts = {
        "test_a": "@pytest.mark.gpu\ndef test(): ...", "test_b": "pytestmark = [pytest.mark.gpu, other]",
        "test_c": "text = '@pytest.mark.gpu'", "test_d": "def test(): ...",
        "test_e": "    @pytest.mark.gpu\n    def test(self): ...", "other": "@pytest.mark.gpu",
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / f"{name}.py").write_text(text)
    assert [path.stem for path in gpu_tests(str(tmp_path))] == ["test_a", "test_b", "test_e"]
    assert module.ROOT / "tests/model/test_gpu.py" in gpu_tests("tests")
    with pytest.raises(ValueError, match="--tests nowhere: there is no such"):
        gpu_tests("nowhere")


def test_groups_go_by_the_name_of_the_test() -> None:
    names = {
        "tests/model/attention/test_flex.py::test_it": "others", "t.py::test_flex_and_flash": "flex",
        "t.py::test[x-flash]": "flash",
        "t.py::test_the_probe": "flash", "t.py::test_it[blockwise]": "others", "t.py::T::test_Flex": "flex",
    }  # fmt: skip
    assert {name: group_of(name) for name in names} == names


@pytest.mark.slow
def test_groups_run_apart_and_each_test_once(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    found = {group: run_group(group, files, tmp_path) for group in ("flash", "others", "flex")}
    assert sorted(ran(tmp_path)) == ["after", "each blockwise", "each flash", "each flex", "flash", "hangs", "other"]
    assert found["flash"]["closing"] == "4 passed, 1 skipped" and found["flash"]["status"] == "done"
    assert found["flex"]["outcomes"] == {"passed": 1}
    assert run_group("flash", files, tmp_path)["closing"] == "4 passed, 1 skipped"
    assert len(ran(tmp_path)) == 7
    assert (
        "SKIPPED" in (tmp_path / "tests,flash.txt").read_text()
        and "no card" in (tmp_path / "tests,flash.txt").read_text()
    )


@pytest.mark.slow
def test_what_passed_is_kept_when_the_clock_ends_a_group(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(OutOfTime), ended_after(600):  # the alarm comes once the test that hangs has begun
        threading.Thread(target=_alarm_when, args=(tmp_path / "ran.txt", "hangs"), daemon=True).start()
        run_group("flash", files, tmp_path)
    outcomes = read_outcomes(tmp_path / "tests,flash.jsonl")
    assert sorted(outcomes.values()) == ["passed", "passed", "skipped"]
    before = ran(tmp_path)
    (tmp_path / "mended").touch()
    assert run_group("flash", files, tmp_path)["closing"] == "4 passed, 1 skipped"
    assert ran(tmp_path) == [*before, "hangs", "after"]


def _alarm_when(path: Path, line: str) -> None:
    while not path.exists() or line not in path.read_text():
        time.sleep(0.05)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)


@pytest.mark.slow
def test_a_test_that_never_ends_is_given_up(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "mended").touch()
    log = tmp_path / "tests,flash.jsonl"
    run_group("flash", files, tmp_path)
    (test,) = (test for test in read_outcomes(log) if test.endswith("::test_hangs_with_flash"))
    log.write_text(
        "".join(json.dumps({"test": test, "event": "begun"}) + "\n" for _ in range(TRIES)) + '{"test": "cut off'
    )
    (tmp_path / "ran.txt").unlink()
    found = run_group("flash", files, tmp_path)
    assert "hangs" not in ran(tmp_path) and "after" in ran(tmp_path)
    assert (
        found["status"] == "failed" and found["closing"] == "3 passed, 1 skipped, 1 stuck" and test in found["reason"]
    )


@pytest.mark.slow
def test_a_group_that_cannot_be_collected_has_failed(tmp_path: Path) -> None:
    path = tmp_path / "test_broken.py"
    path.write_text("import pytest\npytestmark = pytest.mark.gpu\nimport nothing_of_this_name\n")
    found = run_group("flash", [path], tmp_path)
    assert found["status"] == "failed" and "status 2" in found["reason"]


CRASHES = """
import os, pytest
pytestmark = pytest.mark.gpu
def test_a(): pass
def test_b(): os.abort()
def test_c(): pass
def test_d(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_e(): pass
"""


@pytest.mark.slow
def test_another_process_resumes_after_a_crash_and_on_a_broken_device(tmp_path: Path) -> None:
    path = tmp_path / "test_crashes.py"
    path.write_text(CRASHES)
    found = run_group("others", [path], tmp_path)
    assert found["closing"] == "3 passed, 1 failed, 1 stuck" and found["status"] == "failed"
    outcomes = {
        test.rpartition("_")[2]: outcome for test, outcome in read_outcomes(tmp_path / "tests,others.jsonl").items()
    }
    assert outcomes == {"a": "passed", "b": "stuck", "c": "passed", "d": "failed", "e": "passed"}
    output = (tmp_path / "tests,others.txt").read_text()
    assert output.count("session starts") == 3 + 2 and "the device is broken" in output
