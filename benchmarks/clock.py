"""The time of one call: whether another part fits into what is left of it, and its end."""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 15.0  # seconds that a part may go on beyond the time in which it was to end
HANGS = 15.0  # seconds after which a call that does not even end then is ended from outside of Python


class OutOfTime(BaseException):
    """A part has had its time."""


class Clock:
    """Says whether there is time for another part.

    Args:
        minutes: None is without end.
        since: `time.time()` when they began; None is now.
    """

    def __init__(self, minutes: float | None, since: float | None = None) -> None:
        gone = 0.0 if since is None else max(0.0, time.time() - since)
        self.end = None if minutes is None else time.monotonic() + 60 * minutes - gone
        self.longest: dict[str, float] = {}
        self.begun = False

    def has_time(self, kind: str, expected: float = 0.0, overhead: float = 0.0) -> bool:
        """Whether a part may begin: if it takes as long as the longest of its kind so far, it must end in time.

        The first part may always begin, else nothing would ever be done.

        Args:
            expected: seconds, as long as no part of the kind was done.
            overhead: seconds of preparations that this part needs, whatever others of its kind needed.
        """
        if self.end is None or not self.begun:
            return True
        return time.monotonic() + overhead + (self.longest.get(kind) or expected) < self.end

    def left(self, grace: float = 0.0) -> float | None:
        """Seconds until the end; None without one."""
        return None if self.end is None else max(0.0, self.end + grace - time.monotonic())

    def spent(self, kind: str, seconds: float) -> None:
        """Books a part."""
        self.begun = True
        self.expect(kind, seconds)

    def expect(self, kind: str, seconds: float) -> None:
        """Takes it that a part of a kind may last so long."""
        self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)

    @contextmanager
    def ending_what_hangs(self) -> Iterator[None]:
        """Ends the process, and prints where its threads are, if the block still runs some seconds after the end.

        The interpreter may not come to notice an alarm, as where it waits for a device that does nothing any more.
        """
        left = self.left(GRACE)
        if left is None or sys.__stderr__ is None:
            yield
            return
        faulthandler.dump_traceback_later(left + HANGS, exit=True, file=sys.__stderr__)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def ended_after(seconds: float | None) -> Iterator[None]:
    """Raises `OutOfTime` in the block after so many seconds, wherever the work is; None: never.

    By a timer of the system, in the main thread alone; elsewhere, and where there is no such timer (Windows), the work
    takes as long as it takes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if seconds is None or not in_main or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))  # 0 would mean never
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
