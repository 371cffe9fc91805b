"""The time of a call: what fits, and its end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from benchmarks import clock as module
from benchmarks.clock import Clock, OutOfTime, ended_after


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


def test_minutes_count_from_when_the_process_began(monkeypatch: pytest.MonkeyPatch) -> None:
    left = Clock(9.0, since=time.time() - 60).left()
    assert left is not None and 8 * 60 - 5 < left <= 8 * 60
    assert Clock(9.0, since=time.time() + 60).left() == pytest.approx(540, abs=5)  # a clock that was set back
    assert Clock(9.0).left(15.0) == pytest.approx(555, abs=5)


def test_overhead_is_added_to_what_is_known_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "monotonic", lambda: 0.0)
    clock = Clock(1.0)
    clock.spent("cell", 30.0)
    assert clock.has_time("cell", overhead=29.0) and not clock.has_time("cell", overhead=31.0)


def test_the_end_comes_wherever_the_work_is() -> None:
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    with pytest.raises(OutOfTime), ended_after(0.2):
        time.sleep(30)
    assert 0.15 < time.monotonic() - start < 10
    assert signal.getsignal(signal.SIGALRM) is before and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("seconds", [None, 60.0])
def test_nothing_is_left_where_the_work_ends_in_time(seconds: float | None) -> None:
    with ended_after(seconds):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_there_is_no_timer() -> None:
    done = []

    def work() -> None:
        with ended_after(0.0):
            time.sleep(0.05)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


HANGS = """
import signal, sys, time
from benchmarks import clock
clock.GRACE, clock.HANGS = 0.2, 0.3
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})  # as where the interpreter does not come to notice it
one = clock.Clock(0.1 / 60)
with one.ending_what_hangs():
    pass
time.sleep(1)  # nothing ends what has ended in time
with one.ending_what_hangs(), clock.ended_after(0.3):
    print("here", flush=True)
    time.sleep(60)
"""


def test_a_process_that_hangs_is_ended_with_the_place_where_it_was() -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, check=False, timeout=50)
    assert done.returncode == 1 and time.monotonic() - start < 30
    assert "here" in done.stdout and "Timeout" in done.stderr and 'File "<string>"' in done.stderr
