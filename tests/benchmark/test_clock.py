"""The time of a call: what fits, and its end."""

from __future__ import annotations

import signal
import threading
import time

import pytest

from arena.benchmark import clock as module
from arena.benchmark.clock import Clock, OutOfTime


def test_the_clock_leaves_room_for_the_longest_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert clock.has_time("tests") and not clock.has_time("tests", 30.0)
    clock.expect("tests", 20.0)
    assert clock.has_time("tests", 30.0)  # what was seen counts, not what was expected
    assert Clock(None).has_time("cell") and Clock(None).left() is None


def test_the_end_is_enforced_wherever_the_work_is() -> None:
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(OutOfTime), Clock(0.1 / 60).enforced(grace=0.1):
        time.sleep(30)
    assert 0.15 < time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_an_end_that_a_library_swallows_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AGAIN", 0.1)
    swallowed = []
    with pytest.raises(OutOfTime), Clock(0.0).enforced(grace=0.05):
        try:
            time.sleep(30)
        except BaseException as error:
            swallowed.append(error)
        time.sleep(30)
    assert len(swallowed) == 1


@pytest.mark.parametrize("minutes", [None, 1.0])
def test_nothing_is_left_where_the_work_ends_in_time(minutes: float | None) -> None:
    with Clock(minutes).enforced():
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_there_is_no_timer() -> None:
    done = []

    def work() -> None:
        with Clock(0.0).enforced(grace=0.0):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
