"""Parts: done once, kept, given up when they never end; the clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arena.benchmark import parts as module
from arena.benchmark.parts import Clock, Parts


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
    def killed() -> dict[str, Any]:
        raise KeyboardInterrupt

    parts = Parts(tmp_path, {})
    for _ in range(module.TRIES):
        with pytest.raises(KeyboardInterrupt):
            parts.do("a", killed)
    result = parts.do("a", lambda: {"status": "done"})
    assert result["status"] == "failed" and "never ended" in result["reason"]
    parts.forget("a")
    assert parts.do("a", lambda: {"status": "done"})["status"] == "done"


def test_the_clock_leaves_room_for_the_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    clock = Clock(1.0)
    now[0] = 100.0
    assert clock.has_time("cell")  # the first part may always begin
    now[0] = 10.0
    clock.spent("cell", 30.0)
    now[0] = 29.0
    assert clock.has_time("cell") and clock.left() == 31.0
    now[0] = 31.0
    assert not clock.has_time("cell")
    assert clock.has_time("tests")
    assert Clock(None).has_time("cell") and Clock(None).left() is None
