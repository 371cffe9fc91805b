"""One background thread that retries jobs until they succeed, so that callers never wait."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from arena.progress import format_error
from arena.storage.remote import PermanentError


@dataclass
class Job:
    """One upload.

    Attributes:
        name: a later job of the same name replaces one that is waiting.
        number: a waiting job is dropped when a job with a higher number arrives, unless it is protected or its number
            is infinity.
        work: does the upload; raises `PermanentError` if a retry is useless, any other error if it is not.
        discard: frees what the job holds; called once, when the job is done or dropped.
        tries, due: how often it failed, and when it is due next on the monotonic clock; infinity means when another
            job arrives, or at the end.
    """

    name: str
    number: float
    work: Callable[[], None]
    discard: Callable[[], None]
    tries: int = 0
    due: float = 0.0


class Sender:
    """Runs jobs one after another in its own thread.

    Args:
        label: the destination of the jobs, for messages.
        report: is called with each message; a failing store is reported once, and again when it recovers.
        first_pause, longest_pause: seconds before a failed job is retried; doubled after each failure.
        tries: after this many failures in a row a job rests until another arrives.
    """

    def __init__(
        self, label: str, report: Callable[[str], None], first_pause: float = 1.0, longest_pause: float = 60.0,
        tries: int = 8,
    ) -> None:  # fmt: skip
        self.label, self.report = label, report
        self.first_pause, self.longest_pause, self.tries = first_pause, longest_pause, tries
        self.protected = -1.0  # jobs of this number are never dropped for others
        self.done: set[str] = set()  # names of the jobs that succeeded
        self.waiting: dict[str, Job] = {}
        self.busy: Job | None = None
        self.failing: str | None = None  # the reason, while the store fails
        self.closing = self.ended = False
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Queues a job and returns at once. Waiting jobs with lower numbers that are not protected are dropped."""
        with self.changed:
            assert not self.closing, "no job may be submitted after close()"
            if job.name in self.waiting:
                self._drop(self.waiting[job.name])
            for each in list(self.waiting.values()):
                if job.number < math.inf and self._is_superseded(each, job):
                    self._drop(each)
            self._retry_resting()
            self.waiting[job.name] = job
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, daemon=True, name="mirror")
                self.thread.start()
            self.changed.notify_all()

    def pending(self, name: str) -> bool:
        """Whether a job of this name is waiting or running."""
        with self.changed:
            return name in self.waiting or (self.busy is not None and self.busy.name == name)

    def protect(self, number: float) -> None:
        """From now on jobs of this number, and of no other, are never dropped for later ones."""
        with self.changed:
            self.protected = number

    def close(self, patience: float) -> list[str]:
        """Waits up to `patience` seconds for the remaining jobs and ends the thread.

        Reports and returns the names of the jobs that did not succeed.
        """
        deadline = time.monotonic() + patience
        with self.changed:
            self.closing = True
            self._retry_resting()
            self.changed.notify_all()
            while self.busy or any(job.due < math.inf for job in self.waiting.values()):
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self.changed.wait(left)
            self.ended = True
            self.changed.notify_all()
            names = ([self.busy.name] if self.busy else []) + list(self.waiting)
        if names:
            why = f" ({self.failing})" if self.failing else ""
            self.report(f"mirror: {', '.join(names)} did not arrive at {self.label}{why}")
        return names

    def _is_superseded(self, job: Job, to: Job) -> bool:
        return job.number < to.number and job.number != self.protected

    def _drop(self, job: Job) -> None:
        del self.waiting[job.name]
        job.discard()

    def _retry_resting(self) -> None:
        """Makes resting jobs due again."""
        for job in self.waiting.values():
            if job.due == math.inf:
                job.tries, job.due = 0, 0.0

    def _run(self) -> None:
        while (job := self._take()) is not None:
            try:
                job.work()
            except PermanentError as error:
                self.report(f"mirror: {job.name} is not uploaded: {error}")
                self._finish(job)
            except Exception as error:  # whatever a store raises must not end the thread
                self._failed(job, format_error(error))
            else:
                self.done.add(job.name)
                self._succeeded()
                self._finish(job)

    def _take(self) -> Job | None:
        """The next job that is due; None at the end."""
        with self.changed:
            while not self.ended:
                now = time.monotonic()
                job = next((job for job in self.waiting.values() if job.due <= now), None)
                if job is not None:
                    self.busy = self.waiting.pop(job.name)
                    return job
                next_due = min((job.due for job in self.waiting.values()), default=math.inf)
                self.changed.wait(None if next_due == math.inf else next_due - now)
        return None

    def _finish(self, job: Job) -> None:
        job.discard()
        with self.changed:
            self.busy = None
            self.changed.notify_all()

    def _succeeded(self) -> None:
        with self.changed:
            worked_before, self.failing = self.failing is None, None
        if not worked_before:
            self.report(f"mirror: {self.label} works again")

    def _failed(self, job: Job, why: str) -> None:
        with self.changed:
            known, self.failing = self.failing is not None, why
            self.busy = None
            newer = any(self._is_superseded(job, each) for each in self.waiting.values() if each.number < math.inf)
            if newer or job.name in self.waiting:
                job.discard()
            else:
                pause = min(self.first_pause * 2**job.tries, self.longest_pause)
                job.tries += 1
                job.due = time.monotonic() + pause if job.tries < self.tries else math.inf
                self.waiting[job.name] = job
            self.changed.notify_all()
        if not known:
            self.report(f"mirror: {self.label} fails ({why}); training continues, and uploads are retried")
