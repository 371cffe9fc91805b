"""One background thread that does jobs until they succeed, so that whoever hands them over never waits."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from arena.mirror.store import Hopeless
from arena.progress import said


@dataclass
class Job:
    """Something to bring away.

    Attributes:
        name: a later job of the same name takes the place of one that waits.
        number: a job that waits gives way to one with a higher number, unless it is spared; infinity: never.
        work: does it; raises `Hopeless` where trying again is of no use, anything else where it is.
        discard: frees what the job holds; called once, when it is done or given up.
        tries, due: how often it failed, and when it is tried next, on the monotonic clock; infinity: when another
            job comes, or at the end.
    """

    name: str
    number: float
    work: Callable[[], None]
    discard: Callable[[], None]
    tries: int = 0
    due: float = 0.0


class Sender:
    """Does jobs one after the other in a thread of its own.

    Args:
        label: what the jobs go to, for messages.
        say: takes messages. A failing store is said once, and once when it works again.
        first_pause, longest_pause: seconds before a job that failed is tried again; doubled each time.
        tries: after so many in a row a job rests until another comes.
    """

    def __init__(
        self, label: str, say: Callable[[str], None], first_pause: float = 1.0, longest_pause: float = 60.0,
        tries: int = 8,
    ) -> None:  # fmt: skip
        self.label, self.say = label, say
        self.first_pause, self.longest_pause, self.tries = first_pause, longest_pause, tries
        self.spared = -1.0  # jobs of this number give way to none
        self.done: set[str] = set()  # names of the jobs that succeeded
        self.waiting: dict[str, Job] = {}
        self.busy: Job | None = None
        self.failing: str | None = None  # why, while it fails
        self.closing = self.ended = False
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def submit(self, job: Job) -> None:
        """Takes a job; returns at once. Jobs of lower numbers that wait and are not spared are given up for it."""
        with self.changed:
            assert not self.closing, "jobs come before close()"
            if job.name in self.waiting:
                self._give_up(self.waiting[job.name])
            for each in list(self.waiting.values()):
                if job.number < math.inf and self._gives_way(each, job):
                    self._give_up(each)
            self._wake()
            self.waiting[job.name] = job
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, daemon=True, name="mirror")
                self.thread.start()
            self.changed.notify_all()

    def pending(self, name: str) -> bool:
        """Whether a job of this name waits or is being done."""
        with self.changed:
            return name in self.waiting or (self.busy is not None and self.busy.name == name)

    def spare(self, number: float) -> None:
        """From now on jobs of this number, and of no other, give way to none."""
        with self.changed:
            self.spared = number

    def close(self, patience: float) -> list[str]:
        """Waits up to `patience` seconds for what is left and ends the thread; says and gives what has not arrived."""
        deadline = time.monotonic() + patience
        with self.changed:
            self.closing = True
            self._wake()
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
            self.say(f"mirror: {', '.join(names)} did not arrive at {self.label}{why}")
        return names

    def _gives_way(self, job: Job, to: Job) -> bool:
        return job.number < to.number and job.number != self.spared

    def _give_up(self, job: Job) -> None:
        del self.waiting[job.name]
        job.discard()

    def _wake(self) -> None:
        """Jobs that rest are tried again."""
        for job in self.waiting.values():
            if job.due == math.inf:
                job.tries, job.due = 0, 0.0

    def _run(self) -> None:
        while (job := self._take()) is not None:
            try:
                job.work()
            except Hopeless as error:
                self.say(f"mirror: {job.name} is left out: {error}")
                self._finish(job)
            except Exception as error:  # whatever a store raises must not end the thread
                self._failed(job, said(error))
            else:
                self.done.add(job.name)
                self._worked()
                self._finish(job)

    def _take(self) -> Job | None:
        """The next job that is due; None when there will be none."""
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

    def _worked(self) -> None:
        with self.changed:
            worked_before, self.failing = self.failing is None, None
        if not worked_before:
            self.say(f"mirror: {self.label} works again")

    def _failed(self, job: Job, why: str) -> None:
        with self.changed:
            known, self.failing = self.failing is not None, why
            self.busy = None
            newer = any(self._gives_way(job, each) for each in self.waiting.values() if each.number < math.inf)
            if newer or job.name in self.waiting:
                job.discard()
            else:
                pause = min(self.first_pause * 2**job.tries, self.longest_pause)
                job.tries += 1
                job.due = time.monotonic() + pause if job.tries < self.tries else math.inf
                self.waiting[job.name] = job
            self.changed.notify_all()
        if not known:
            self.say(f"mirror: {self.label} fails ({why}); it is tried again while training continues")
