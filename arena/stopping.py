"""Graceful stops: a signal or a deadline is noted, and the work ends at the next point where nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from arena.progress import console

SIGHUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # sent when a terminal closes; Windows has none
MORE_TO_DO = 3  # exit status of a run that reached its deadline


def _signals() -> list[signal.Signals]:
    """The signals that ask a process to end; without SIGHUP if it is already ignored, as under nohup."""
    hang_up = [SIGHUP] if SIGHUP is not None and signal.getsignal(SIGHUP) is not signal.SIG_IGN else []
    return [signal.SIGTERM, signal.SIGINT, *hang_up]


class Stopped(Exception):  # noqa: N818 - it ends a run but is not an error
    """A run was stopped early, with everything saved.

    Attributes:
        status: exit status of the process: 128 plus the signal's number, as in shells, or 3 at a deadline.
    """

    def __init__(self, reason: str, status: int) -> None:
        super().__init__(reason)
        self.status = status


class Stop:
    """Tells whether a run should stop; it is called between micro-batches.

    Args:
        seconds: from now until the deadline; None: no deadline.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self.seconds = seconds
        self.start = time.monotonic()

    def __call__(self) -> bool:
        return self.signal is not None or (self.seconds is not None and time.monotonic() - self.start >= self.seconds)

    def stopped(self) -> Stopped:
        """The exception to raise once everything is saved."""
        if self.signal is not None:
            return Stopped(f"ended by {self.signal.name}", 128 + self.signal)
        return Stopped(f"ended after {self.seconds:g} seconds, as requested", MORE_TO_DO)


@contextmanager
def stopping(seconds: float | None = None) -> Iterator[Stop]:
    """Notes SIGTERM, SIGINT and SIGHUP instead of ending; a second SIGTERM or SIGINT ends the process at once.

    A second SIGHUP does not, because the shell and the kernel both send one when a terminal closes. Files are written
    atomically, so none is ever left incomplete. Outside the main thread signals cannot be caught, and only the deadline
    applies.
    """
    stop = Stop(seconds)
    before = {each: signal.getsignal(each) for each in _signals()}

    def note(number: int, frame: FrameType | None) -> None:
        stop.signal = signal.Signals(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if SIGHUP in before:
            signal.signal(SIGHUP, signal.SIG_IGN)
        console.print(f"{stop.signal.name}: stopping after this micro-batch; another SIGTERM or Ctrl-C stops at once")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    for each in before:
        signal.signal(each, note)
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Makes SIGTERM, SIGINT and SIGHUP end the process at once, with status 128 plus the signal's number.

    This is for work that has nothing to save; a `stopping` block within it stops gracefully instead. Outside the main
    thread signals cannot be caught, and this has no effect.
    """

    def end(number: int, frame: FrameType | None) -> None:
        console.print(f"ended by {signal.Signals(number).name}")
        raise SystemExit(128 + number)  # unlike an `Exception`, libraries do not swallow it

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, end) for each in _signals()}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
