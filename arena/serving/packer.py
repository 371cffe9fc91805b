"""Continuous packing: requests that wait together are judged together, in one thread for each base."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Condition, Thread

from arena.data.records import rows_in_memory
from arena.data.rows import Cells
from arena.inference.judge import Judge
from arena.inference.verdicts import Explanation
from arena.progress import warn
from arena.serving.limits import Limits, RefusedError
from arena.serving.metrics import Metrics

BYTES_A_TOKEN = 4  # of text, about: only the size of a batch depends on it
# A batch is to fill this part of a budget: what exceeds it costs a call of the model of its own, however little it is.
FILLED = 0.95
OF_LATE = 0.2  # the weight of a batch that fills its budget in what is known of how far estimates are off
MOST_OFF = 2.0  # the most that counts, either way, so that odd requests do not change the batches of others much
Verdict = Explanation | Exception  # of a row; or why there is none


@dataclass(frozen=True)
class Batch:
    """What was judged together.

    Attributes:
        requests, rows: how many.
        tokens: what was computed for one model.
        logical_tokens: the tokens of all prompts.
    """

    requests: int
    rows: int
    tokens: int
    logical_tokens: int


@dataclass(eq=False)
class Job:
    """A request for the verdicts on some rows.

    Attributes:
        name, judge: by which they are judged.
        texts: of each row, checked.
        prompts: whether the verdicts should have their prompts.
        answer: comes from the packer; a job that is cancelled while it waits is never judged.
    """

    name: str
    judge: Judge
    texts: list[Cells]
    prompts: bool = False
    answer: Future[tuple[list[Verdict], Batch]] = field(default_factory=Future)

    def __post_init__(self) -> None:
        sizes = (len(str(text).encode("utf-8", "replace")) for cells in self.texts for text in cells.values())
        self.tokens = self.judge.task.orders * sum(sizes) // BYTES_A_TOKEN


class Packer:
    """A bounded queue of jobs, and the thread that judges them. An idle packer judges at once.

    Args:
        metrics: counts what is judged.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.waiting_rows = 0
        self._waiting: deque[Job] = deque()
        self._changed = Condition()
        self._working = self._closed = False
        self._seconds_a_row = 0.0
        self._estimates_off = 1.0  # the tokens that batches had of late, over their estimates
        self._thread = Thread(target=self._work, name="packer", daemon=True)
        self._thread.start()

    @property
    def is_idle(self) -> bool:
        """Whether all jobs are answered."""
        with self._changed:
            return not self._waiting and not self._working

    def submit(self, job: Job) -> None:
        """Queues a job. Raises `RefusedError` if the queue is full."""
        with self._changed:
            rows = self.waiting_rows + len(job.texts)
            if self._waiting and rows > self.limits.waiting_rows:
                seconds = max(1, math.ceil(self.waiting_rows * self._seconds_a_row))
                raise RefusedError(
                    429, f"{self.waiting_rows:,} rows are waiting already: try again in {seconds} s",
                    headers={"retry-after": str(seconds)},
                )  # fmt: skip
            self._waiting.append(job)
            self.waiting_rows = rows
            self._changed.notify_all()
        job.answer.add_done_callback(lambda answer: self._drop(job) if answer.cancelled() else None)

    def close(self) -> None:
        """Ends the thread once all jobs are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _drop(self, job: Job) -> None:
        """Takes a cancelled job out of the queue."""
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self.waiting_rows -= len(job.texts)
                self.metrics.cancelled.inc()

    def _work(self) -> None:
        while jobs := self._take():
            try:
                self._judge(jobs)
            except Exception as error:  # the thread must outlive it
                warn(f"a batch failed: {type(error).__name__}")
                for job in jobs:
                    if not job.answer.done():
                        job.answer.set_exception(error)

    def _take(self) -> list[Job]:
        """The jobs to judge next: the one that came first, and those of its judge that fit beside it; none: the end."""
        with self._changed:
            self._working, taken = False, list[Job]()
            while not taken:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    break
                chosen = self._chosen()
                self._waiting = deque(job for job in self._waiting if job not in chosen)
                self.waiting_rows -= sum(len(job.texts) for job in chosen)
                taken = [job for job in chosen if job.answer.set_running_or_notify_cancel()]
            self._working = bool(taken)
            return taken

    def _chosen(self) -> dict[Job, None]:
        first = self._waiting[0]
        most = self._budget(first) * FILLED / self._estimates_off
        chosen, rows, tokens = {first: None}, len(first.texts), first.tokens
        for job in self._waiting:
            fits = rows + len(job.texts) <= self.limits.batch_rows and tokens + job.tokens <= most
            if fits and job is not first and job.judge is first.judge:
                chosen[job] = None
                rows, tokens = rows + len(job.texts), tokens + job.tokens
        return chosen

    def _judge(self, jobs: Sequence[Job]) -> None:
        first, started = jobs[0], time.monotonic()
        texts = [cells for job in jobs for cells in job.texts]
        verdicts, batch = judged_apart(first.judge, texts, prompts=any(job.prompts for job in jobs))
        batch = replace(batch, requests=len(jobs))
        seconds = time.monotonic() - started
        self._seconds_a_row = seconds / len(texts)
        self._learn(batch.tokens, sum(job.tokens for job in jobs), self._budget(first))
        self.metrics.batch_rows.observe(len(texts))
        self.metrics.batch_seconds.observe(seconds)
        self.metrics.rows.labels(first.name).inc(len(texts))
        self.metrics.tokens.labels(first.name, "computed").inc(batch.tokens)
        self.metrics.tokens.labels(first.name, "shared").inc(batch.logical_tokens - batch.tokens)
        for job in jobs:
            job.answer.set_result((verdicts[: len(job.texts)], batch))
            verdicts = verdicts[len(job.texts) :]

    def _budget(self, job: Job) -> int:
        return self.limits.batch_tokens or job.judge.models[0].recipe.packing.budget

    def _learn(self, tokens: int, estimate: int, budget: int) -> None:
        """Corrects later estimates by a batch's tokens; one that leaves its budget nearly empty says little."""
        off = min(max(tokens / max(1, estimate), 1 / MOST_OFF), MOST_OFF)
        self._estimates_off += OF_LATE * min(1.0, tokens / budget) * (off - self._estimates_off)


def judged_apart(judge: Judge, texts: Sequence[Cells], *, prompts: bool) -> tuple[list[Verdict], Batch]:
    """The verdicts on rows that are judged together; if that fails, in halves, so that a row fails alone."""
    rows = [{"id": str(at), "label": None, **cells} for at, cells in enumerate(texts)]
    try:
        found = judge.explain_all(rows_in_memory(rows, judge.task), prompts=prompts)
    except Exception as error:
        if len(texts) == 1:
            warn(f"a row could not be judged: {type(error).__name__}")  # its message may quote the row
            return [error], Batch(1, 1, 0, 0)
        middle = len(texts) // 2
        (left, one), (right, other) = (
            judged_apart(judge, part, prompts=prompts) for part in (texts[:middle], texts[middle:])
        )
        tokens, logical = one.tokens + other.tokens, one.logical_tokens + other.logical_tokens
        return [*left, *right], Batch(1, len(texts), tokens, logical)
    return [*found], Batch(1, len(texts), found[0].tokens, found[0].logical_tokens)
