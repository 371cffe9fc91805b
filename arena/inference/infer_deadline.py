"""`arena infer --deadline`: a submission that is valid from the first minute on and gets better until time is up."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from arena.distributed import check_at_once
from arena.inference.by_worth import ByWorth, Tally, passes_of, prior_of
from arena.inference.deadline import Pace, deadline_from, seconds_of
from arena.inference.infer import Submission, resumable, submission_of
from arena.inference.kinds import print_kinds
from arena.inference.saved import SavedJudge, check_alike, read_judge
from arena.inference.shares import Job, judge_side_by_side
from arena.model.card import card_of, with_dtype
from arena.progress import console, duration, warn
from arena.storage.files import fingerprint

RESERVED = 3  # times as long as the first submission took is kept for writing the last one


def infer_within(
    limit: str, models: Sequence[Path], data: str | None, out: Path, overrides: Sequence[str] = (),
    at_once: int | None = None,
) -> None:  # fmt: skip
    """Writes the mean probabilities of a test file's rows, judged as often as there is time for.

    `out` is valid at any moment: it is first written with the training prior, and again as rows are judged. The other
    arguments and errors are as in `infer`.

    Args:
        limit: the time until everything is written, such as `8.5h`.
        at_once: how many processes share the rows, each on a GPU of its own; None: one for each GPU.

    Raises:
        ValueError: `limit` or `at_once` cannot be used.
    """
    seconds = seconds_of(limit)
    at_once = max(1, torch.cuda.device_count()) if at_once is None else at_once
    check_at_once(at_once)
    judges = [read_judge(model, overrides) for model in models]
    check_alike(judges)
    if len({judge.recipe.judge.swap for judge in judges}) > 1:
        raise ValueError(
            "some of the judges read both orders of a row, others only one: set judge.swap=true or judge.swap=false"
        )
    card = card_of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for judge in judges:  # before a submission is replaced
        judge.check_base(with_dtype(judge.recipe, card).model)
    with resumable(out) as parts:
        submission = submission_of(judges[0].task, judges[0].recipe.data, data, out)
        for judge in judges:
            print_kinds(judge.used_kinds, submission.rows)
        deadline, since = deadline_from(seconds, parts), time.monotonic()
        written = _Written(submission, judges, parts)
        pace = Pace(deadline, RESERVED * (time.monotonic() - since))
        if at_once == 1:
            every = np.arange(len(submission.rows))
            ByWorth(judges, submission.rows, every, pace, parts, written.report).run()
        else:
            job = Job(
                [str(model) for model in models], list(overrides), data, str(out), seconds, deadline.started,
                pace.reserve, str(parts), at_once, os.getpid(),
            )  # fmt: skip
            judge_side_by_side(job, judges, submission.rows, written.report)
        _say_what_was_done(submission, judges, written.tally, parts)


class _Written:
    """The submission, and the tally that it was written from, which is saved for a process that resumes.

    Until such a process has judged as much again, with what was saved, the submission stays as it was.
    """

    def __init__(self, submission: Submission, judges: Sequence[SavedJudge], parts: Path) -> None:
        rows, files = submission.rows, [path for judge in judges for path in sorted(judge.folder.rglob("*"))]
        state = [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        key = fingerprint(rows.fingerprint, state, [judge.recipe.model_dump(mode="json") for judge in judges])
        self._submission, self._prior, self._saved = submission, prior_of(judges, rows), parts / f"tally-{key}.npz"
        self.tally = Tally.empty(len(rows), len(rows.task.columns), len(passes_of(judges)))
        if self._saved.is_file():
            self.tally = Tally.load(self._saved)
        self.report(self.tally)
        console.print(
            f"{submission.out} is valid from now on: {int((self.tally.count > 0).sum()):,} of {len(rows):,} rows are "
            "judged, the others have the training prior"
        )

    def report(self, tally: Tally) -> None:
        """Writes what was judged, unless it is less than before."""
        if tally.rows.sum() >= self.tally.rows.sum():
            self.tally = tally
            self._submission.write(tally.mean(self._prior))
            tally.save(self._saved)


def _say_what_was_done(submission: Submission, judges: Sequence[SavedJudge], tally: Tally, parts: Path) -> None:
    """Prints a table of the passes, and removes what was saved if there is nothing left to do."""
    passes, wanted = passes_of(judges), int(submission.rows.has_input.sum())
    table = Table("fold", title="rows that were judged", title_justify="left")
    for name in ("order", "rows", "of all", "time", "tokens/s"):
        table.add_column(name, justify="right")
    for (fold, order), rows, tokens, seconds in zip(passes, tally.rows, tally.tokens, tally.seconds, strict=True):
        speed = f"{tokens / seconds:,.0f}" if seconds else ""
        name = judges[fold].folder.resolve().parent.name
        table.add_row(name, str(order), f"{rows:,}", f"{rows / max(1, wanted):.0%}", duration(seconds), speed)
    console.print(table)
    if (tally.rows == wanted).all():
        shutil.rmtree(parts, ignore_errors=True)  # if that fails, they only take disk space
    else:
        console.print(f"time was up; what was judged is saved in {parts}, and the same command resumes from there")
    if missing := wanted - int((tally.count > 0).sum()):
        warn(
            f"{missing:,} of {wanted:,} rows were not judged even once and have the training prior: give more time, "
            "more GPUs or a smaller model"
        )
    submission.announce(f"{len(judges)} fold{'s' if len(judges) > 1 else ''} in the time that there was")
