"""The time of one call: whether another part fits into what is left of it, and its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

GRACE = 15.0  # seconds that a part may go on beyond the time in which it was to end
AGAIN = 5.0  # seconds until the end is told once more, should a library have swallowed it


class OutOfTime(BaseException):
    """The call is at its end."""


class Clock:
    """Says whether there is time for another part.

    Args:
        minutes: from now on; None is without end.
    """

    def __init__(self, minutes: float | None) -> None:
        self.end = None if minutes is None else time.monotonic() + 60 * minutes
        self.longest: dict[str, float] = {}
        self.begun = False

    def has_time(self, kind: str, expected: float = 0.0) -> bool:
        """Whether a part may begin: if it takes as long as the longest of its kind so far, it must end in time.

        The first part may always begin, else nothing would ever be done.

        Args:
            expected: seconds, as long as no part of the kind was done.
        """
        if self.end is None or not self.begun:
            return True
        return time.monotonic() + (self.longest.get(kind) or expected) < self.end

    def left(self) -> float | None:
        """Seconds until the end; None without one."""
        return None if self.end is None else max(0.0, self.end - time.monotonic())

    def spent(self, kind: str, seconds: float) -> None:
        """Books a part."""
        self.begun = True
        self.expect(kind, seconds)

    def expect(self, kind: str, seconds: float) -> None:
        """Takes it that a part of a kind may last so long."""
        self.longest[kind] = max(self.longest.get(kind, 0.0), seconds)

    @contextmanager
    def enforced(self, grace: float = GRACE) -> Iterator[None]:
        """Within the block, raises `OutOfTime` wherever the work is, `grace` seconds after the end.

        By a timer of the system, in the main thread alone; elsewhere, and where there is no such timer (Windows), the
        last part takes as long as it takes.
        """
        left = self.left()
        if (
            left is None
            or not hasattr(signal, "setitimer")
            or threading.current_thread() is not threading.main_thread()
        ):
            yield
            return

        def end(number: int, frame: FrameType | None) -> None:
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, max(left + grace, 0.001), AGAIN)  # 0 would mean never
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
