"""Several processes that judge shares of the same rows before a deadline, each on a GPU of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from arena.data.dataset import Rows
from arena.data.tokens import TokenStore
from arena.distributed import fix_threads, last_line, start_process
from arena.inference.by_worth import REPORT_SECONDS, ByWorth, Report, Tally, passes_of
from arena.inference.deadline import SPARE, Deadline, Pace
from arena.inference.infer import submission_of
from arena.inference.judge_model import tokens_of
from arena.inference.saved import SavedJudge, read_judge
from arena.model.backbone import load_tokenizer
from arena.packing.bins import cost, longest_first
from arena.packing.tree import prefixes_for
from arena.progress import console, duration, quiet, warn
from arena.stopping import stopping
from arena.storage.files import write_json

WAIT = 0.2  # seconds between two looks at processes


@dataclass(frozen=True)
class Job:
    """What every process is told.

    Attributes:
        models, overrides, data, out: as for `infer`.
        seconds, started: of the deadline.
        reserve: as for `Pace`.
        parts: where results are saved.
        parent: the process that waits for these, which end if it does.
    """

    models: list[str]
    overrides: list[str]
    data: str | None
    out: str
    seconds: float
    started: float
    reserve: float
    parts: str
    processes: int
    parent: int

    def tally(self, share: int) -> Path:
        """Where a process saves what it has judged."""
        return Path(self.parts) / f"share{share}.npz"

    def log(self, share: int) -> Path:
        """Where its output goes."""
        return Path(self.parts) / f"share{share}.log"


def deal(lengths: np.ndarray, shares: int) -> list[np.ndarray]:
    """Divides rows of these lengths so that all shares cost about the same: indices, ascending."""
    costs = cost(np.zeros_like(lengths), lengths).tolist()
    bins = longest_first(lengths.tolist(), costs, int(lengths.sum()), shares)
    assert bins is not None, "any share may hold everything"
    return [np.array(sorted(each), dtype=np.int64) for each in bins]


def judge_share(job: Job, share: int) -> None:
    """Judges one share of the rows, and saves the tally now and then."""
    judges = [read_judge(Path(model), job.overrides) for model in job.models]
    first = judges[0]
    rows = submission_of(first.task, first.recipe.data, job.data, Path(job.out)).rows
    store = _share_tokens(first, rows)
    which = deal(store.lengths[:: store.orders], job.processes)[share]
    pace = Pace(Deadline(job.seconds, job.started), job.reserve)
    ByWorth(judges, rows, which, pace, Path(job.parts), lambda tally: tally.save(job.tally(share))).run()


def judge_side_by_side(job: Job, judges: Sequence[SavedJudge], rows: Rows, report: Report) -> None:
    """Starts the processes and joins what they have judged once all have ended, or once it is too late to wait.

    Args:
        judges, rows: what the job's models and data are.
        report: is given what all have judged so far, now and then, and at the end.

    Raises:
        ValueError: a process failed; the message has the last line of its output.
        Stopped: a signal ended it; what was judged is saved.
    """
    _share_tokens(judges[0], rows)
    nothing = Tally.empty(len(rows), len(rows.task.columns), len(passes_of(judges)))
    for share in range(job.processes):
        job.tally(share).unlink(missing_ok=True)
        job.log(share).unlink(missing_ok=True)
    deadline, reported = Deadline(job.seconds, job.started), time.monotonic()
    wanted = int(rows.has_input.sum()) * len(nothing.rows)
    try:
        with _running(job) as running, stopping() as stop:
            while _are_running(running, job):
                if stop():
                    raise stop.stopped()
                if deadline.left(SPARE / 2) < 0:
                    warn("not all processes ended in time: what they saved by now is used")
                    for process in running:
                        process.kill()  # one that is late may not end by itself
                    break
                if time.monotonic() - reported >= REPORT_SECONDS:
                    report(tally := _joined(job, nothing))
                    judged, left = tally.rows.sum(), duration(max(0.0, deadline.left(spare=0)))
                    console.print(f"{judged:,} of {wanted:,} judgements so far, deadline in {left}")
                    reported = time.monotonic()
                time.sleep(WAIT)
    finally:  # also of what was judged before one failed
        report(_joined(job, nothing))


def _share_tokens(judge: SavedJudge, rows: Rows) -> TokenStore:
    """The rows' tokens, which the first caller saves for all processes, with what they have in common."""
    store = tokens_of(judge.recipe, rows, load_tokenizer(str(judge.folder)))
    prefixes_for(store, judge.recipe.packing, Path(judge.recipe.data.cache))
    return store


@contextmanager
def _running(job: Job) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes, which end with the block."""
    path = Path(job.parts) / "job.json"
    write_json(path, asdict(job))
    gpus = torch.cuda.device_count()
    running: list[subprocess.Popen[bytes]] = []
    try:
        for share in range(job.processes):
            words = ["arena.inference.shares", str(path), str(share)]
            running.append(start_process(words, job.log(share), share if gpus else None))
        console.print(f"{job.processes} processes share the rows: their output is in {job.parts}/share*.log")
        yield running
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def _are_running(processes: Sequence[subprocess.Popen[bytes]], job: Job) -> bool:
    """Whether any process has not ended. Raises `ValueError` if one has failed."""
    states = [process.poll() for process in processes]
    for share, status in enumerate(states):
        if status:
            raise ValueError(f"process {share} ended with status {status}: {last_line(job.log(share))}")
    return None in states


def _joined(job: Job, nothing: Tally) -> Tally:
    """What all processes have saved so far."""
    paths = [path for share in range(job.processes) if (path := job.tally(share)).is_file()]
    return Tally.joined([nothing, *map(Tally.load, paths)])


def _end_with(parent: int) -> None:
    """Ends this process as SIGTERM does once it has another parent."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main(path: str, share: str) -> None:
    """What a process does."""
    job = Job(**json.loads(Path(path).read_text(encoding="utf-8")))
    threading.Thread(target=_end_with, args=[job.parent], daemon=True).start()
    quiet()
    fix_threads()
    if not torch.cuda.is_available():  # the processes have the same cores
        torch.set_num_threads(max(1, torch.get_num_threads() // job.processes))
    judge_share(job, int(share))


if __name__ == "__main__":
    main(*sys.argv[1:])
