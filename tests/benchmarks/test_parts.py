"""Parts: done once, kept, given up when they never end."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import clock as clock_module
from benchmarks import parts as parts_module
from benchmarks.clock import Clock, OutOfTime
from benchmarks.parts import Job, Parts, run_jobs


def test_a_part_is_done_once_and_again_when_forgotten(tmp_path: Path) -> None:
    calls: list[str] = []

    def work(name: str) -> dict[str, Any]:
        calls.append(name)
        return {"status": "failed" if name == "b" else "done", "call": len(calls)}

    for _ in range(2):
        parts = Parts(tmp_path, {"device": "x"})
        assert [parts.do(name, lambda name=name: work(name))["call"] for name in "ab"] == [1, 2]  # type: ignore[misc]
    assert calls == ["a", "b"]
    assert parts.forget("failed") == ["b"]
    assert parts.get("a") is not None and parts.get("b") is None
    assert parts.do("b", lambda: work("b"))["call"] == 3


def test_parts_of_another_device_are_refused(tmp_path: Path) -> None:
    Parts(tmp_path, {"device": "x", "rows": 3})
    with pytest.raises(ValueError, match=r"holds parts of another run \(device: x there, y now\)"):
        Parts(tmp_path, {"device": "y", "rows": 3})


def test_a_part_that_never_ends_is_given_up(tmp_path: Path) -> None:
    class Killed(BaseException):
        """Nothing is done on the way out, as with SIGKILL."""

    def killed() -> dict[str, Any]:
        raise Killed

    parts = Parts(tmp_path, {})
    for _ in range(parts_module.TRIES):
        with pytest.raises(Killed):
            parts.do("a", killed)
    result = parts.do("a", lambda: {"status": "done"})
    assert result["status"] == "failed" and "never ended" in result["reason"]
    parts.forget("a")
    assert parts.do("a", lambda: {"status": "done"})["status"] == "done"


@pytest.mark.parametrize(
    ("stop", "whole_call", "tries", "seconds"),
    [(OutOfTime, True, 1, True), (OutOfTime, False, 0, True), (SystemExit, True, 0, False)],
)
def test_a_part_that_was_stopped_is_begun_again(
    tmp_path: Path, stop: type[BaseException], whole_call: bool, tries: int, seconds: bool
) -> None:
    """Only the clock counts against a part, and only if it had the whole call."""

    def stopped() -> dict[str, Any]:
        raise stop

    parts = Parts(tmp_path, {})
    for _ in range(3):
        with pytest.raises(stop):
            parts.do("a", stopped, whole_call=whole_call)
        assert (parts.seconds("a") > 0) == seconds  # what is left of a later call must be at least as much
        if tries:
            break
    assert json.loads((tmp_path / "trying,a.json").read_text())["tries"] == tries
    assert parts.do("a", lambda: {"status": "done"})["status"] == "done"


def test_jobs_that_do_not_fit_are_left_and_shorter_ones_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    for module in (clock_module, parts_module):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    told: list[str] = []
    parts = Parts(tmp_path, {}, lambda: told.append("changed"))

    def job(name: str, kind: str, expected: float, seconds: float) -> Job:
        def work() -> dict[str, Any]:
            now[0] += seconds
            return {"status": "done"}

        return Job(name, kind, expected, work)

    jobs = [job("a", "x", 50, 30), job("long", "y", 40, 40), job("b", "x", 50, 20), job("c", "z", 5, 5)]
    assert run_jobs(jobs, parts, Clock(1.1)) == ["long"]  # of x, 30 is known by then
    assert len(told) == 6
    now[0] = 1000.0
    jobs[1] = job("long", "y", 999, 40)
    assert run_jobs(jobs, parts, Clock(0.1)) == []  # the first of a call may always begin
    assert parts.seconds("long") == 40.0 and len(told) == 8


def test_a_slow_kind_does_not_keep_others_from_beginning(tmp_path: Path) -> None:
    parts = Parts(tmp_path, {})
    parts.do("slow", lambda: {"status": "done"})
    (tmp_path / "part,slow.json").write_text('{"status": "done", "took": 1000.0}')
    jobs = [Job(name, kind, 0.0, lambda: {"status": "done"}) for name, kind in
            [("slow", "slow"), ("a", "x"), ("slow too", "slow"), ("b", "x")]]  # fmt: skip
    assert run_jobs(jobs, parts, Clock(9.0)) == ["slow too"]


def test_a_part_that_takes_far_too_long_is_ended_and_the_next_one_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts_module, "LEAST_PATIENCE", 0.2)

    def hang() -> dict[str, Any]:
        time.sleep(30)
        return {"status": "done"}

    jobs = [
        Job("hangs", "x", 0.01, hang),
        Job("next", "y", 0.01, lambda: {"status": "done", "running": 0.5}),
        Job("slow but unknown", "z", 0.0, lambda: time.sleep(0.4) or {"status": "done"}),
    ]
    assert [job.patience for job in jobs] == [0.2, 0.2, None]
    parts = Parts(tmp_path, {})
    assert run_jobs(jobs, parts, Clock(9.0)) == []
    found = parts.get("hangs")
    assert found is not None and found["status"] == "too slow" and "ended after 0 s" in found["reason"]
    assert [parts.get(job.name)["status"] for job in jobs[1:]] == ["done", "done"]  # type: ignore[index]
    assert Job("resumes", "x", 100.0, hang, resumes=True).patience is None  # what it has done is not lost
    assert parts.seconds("next") == 0.5 and Job("a", "x", 100.0, hang, overhead=50.0).patience == 600.0
    with pytest.raises(OutOfTime):  # that is the end of the call
        run_jobs([Job("other", "x", 100.0, hang)], parts, Clock((0.1 - parts_module.GRACE) / 60))
