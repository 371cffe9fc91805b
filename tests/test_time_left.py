"""How far long work is: plain lines with the time left, a bar on a terminal."""

from __future__ import annotations

import io
import time
from itertools import count

import pytest

from arena import progress as module
from arena.progress import duration, progress


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 5 seconds each time it is read."""
    clock = count(0, 5)
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))


def test_plain_lines_say_how_long_it_will_take(seconds: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("training", 10, "steps") as advance:
        for _ in range(10):
            advance(1, note="loss 1.0")
    assert capsys.readouterr().out.splitlines() == [
        "training: 2 of 10 steps, 10 s, 40 s left, loss 1.0",
        "training: 4 of 10 steps, 20 s, 30 s left, loss 1.0",
        "training: 6 of 10 steps, 30 s, 20 s left, loss 1.0",
        "training: 8 of 10 steps, 40 s, 10 s left, loss 1.0",
        "training: 10 steps in 55.0 s",
    ]


def test_what_was_done_before_makes_the_rest_no_faster(seconds: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("judging", 1000, "examples", 990) as advance:
        advance(1)
        advance(1)
    assert capsys.readouterr().out.splitlines()[0] == "judging: 992 of 1,000 examples, 10 s, 40 s left"


def test_no_remaining_time_is_shown_without_a_total(seconds: None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress("reading", None) as advance:
        advance(5)
        advance(5)
    assert capsys.readouterr().out.splitlines()[0] == "reading: 10 rows, 10 s"


def test_a_bar_within_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when held-out rows are judged within training."""
    shown = io.StringIO()
    monkeypatch.setattr(module, "console", module.Messages(file=shown, force_terminal=True, width=100, markup=False))
    with progress("training", 3, "steps", 1) as advance:
        advance(1, note="loss 1.0")
        with progress("evaluating", 2) as inner:
            inner(2)
        advance(1, note="loss 0.9, held-out 1.01")
    assert "3/3" in shown.getvalue() and "2/2" in shown.getvalue()
    assert "loss 0.9, held-out 1.01" in shown.getvalue()


@pytest.mark.parametrize(
    ("seconds_", "words"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (250, "4 min 10 s"),
        (3599, "59 min 59 s"),
        (11_100, "3 h 05 min"),
    ],
)
def test_durations_in_two_units(seconds_: float, words: str) -> None:
    assert duration(seconds_) == words
