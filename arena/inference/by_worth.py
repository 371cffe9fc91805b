"""Judges rows in the order of what it is worth: each row once, then again where it gains most, until time is up.

A *pass* is one judge in one order of the rows. The first pass judges every row. Each further one begins with the rows
that are closest so far for their length, in chunks that are packed by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from arena.data.dataset import Rows
from arena.inference.deadline import Pace
from arena.inference.evaluate import Evaluation
from arena.inference.infer import LoadedJudge
from arena.inference.judge_model import JudgeModel
from arena.inference.kinds import with_kinds
from arena.inference.saved import SavedJudge
from arena.packing.bins import cost
from arena.packing.tree import prefixes_for
from arena.progress import console, duration
from arena.stopping import stopping
from arena.storage.files import atomic_write

CHUNK = 20  # micro-batches' worth of tokens at most, which fill them to 97.5%
CHUNKS = 8  # of a pass, at least, where there are few rows
REPORT_SECONDS = 60.0  # at least, between two reports within a pass


def worth(probabilities: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """How much each row is expected to gain from being judged once more, for its cost: (n,).

    Averaging lessens the variance of the predictions. If that of the logits is the same for all rows, then the log-loss
    decreases in proportion to 1 - sum(p^2): most where the classes are close, not at all where one is certain.

    Args:
        probabilities: (n, C), the mean so far.
        costs: (n,), the time that it takes.
    """
    return np.asarray((1 - np.square(probabilities).sum(axis=1)) / costs)


def chunks(values: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Rows of these values and tokens, those of the largest value first, in chunks of about as many tokens."""
    order = np.argsort(-values, kind="stable")
    ends = np.cumsum(lengths[order])
    count = max(CHUNKS, round(ends[-1] / (CHUNK * budget)))
    parts = np.split(order, np.searchsorted(ends, ends[-1] * np.arange(1, count) / count))
    return [part for part in parts if len(part)]


@dataclass(frozen=True)
class Tally:
    """What was judged so far.

    Attributes:
        total: float64 (n, C), the sum of each row's probabilities.
        count: int64 (n,), how many those are.
        rows: int64 (passes,), rows judged in each pass.
        tokens, seconds: int64 and float64 (passes,), of what was not saved by an earlier process.
    """

    total: np.ndarray
    count: np.ndarray
    rows: np.ndarray
    tokens: np.ndarray
    seconds: np.ndarray

    @classmethod
    def empty(cls, n: int, classes: int, passes: int) -> Tally:
        rows, tokens = np.zeros((2, passes), dtype=np.int64)
        return cls(np.zeros((n, classes)), np.zeros(n, dtype=np.int64), rows, tokens, np.zeros(passes))

    @classmethod
    def joined(cls, shares: Sequence[Tally]) -> Tally:
        """The tally of several processes, each with rows of its own."""
        summed = {name: sum(getattr(share, name) for share in shares) for name in ("total", "count", "rows", "tokens")}
        return cls(**summed, seconds=np.max([share.seconds for share in shares], axis=0))

    def mean(self, prior: np.ndarray) -> np.ndarray:
        """The mean probabilities of each row, (n, C), and the prior for rows that were not judged."""
        return np.where(self.count[:, None] > 0, self.total / np.maximum(self.count, 1)[:, None], prior)

    def add(self, number: int, which: np.ndarray, probabilities: np.ndarray) -> None:
        """Adds what a pass found about some rows; rows with NaN were not judged."""
        judged = np.isfinite(probabilities).all(axis=1)
        self.total[which[judged]] += probabilities[judged]
        self.count[which[judged]] += 1
        self.rows[number] += judged.sum()

    def save(self, path: Path) -> None:
        """Writes everything, atomically."""
        with atomic_write(path) as draft, draft.open("wb") as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: Path) -> Tally:
        with np.load(path) as arrays:
            return cls(**arrays)


Report = Callable[[Tally], None]


def passes_of(judges: Sequence[SavedJudge]) -> list[tuple[int, int]]:
    """The judge and the order of each pass."""
    return [
        (fold, order)
        for fold, saved in enumerate(judges)
        for order in range(
            1 if saved.task.joins(saved.recipe.prompt) or not saved.recipe.judge.swap else saved.task.orders
        )
    ]


def prior_of(judges: Sequence[SavedJudge], rows: Rows) -> np.ndarray:
    """What the judges together say about rows of which they have read nothing, (n, C)."""
    priors = [with_kinds(saved.used_kinds, rows, np.tile(saved.prior, (len(rows), 1))) for saved in judges]
    return np.asarray(np.mean(priors, axis=0))


def in_order(judge: JudgeModel, rows: Rows, order: int) -> tuple[np.ndarray, Callable[[np.ndarray], Evaluation]]:
    """The tokens of each row in one order, and what plans the evaluation of some of the rows in it."""
    store, packing, joins = judge.tokens(rows), judge.recipe.packing, judge.task.joins(judge.recipe.prompt)
    planned = partial(
        Evaluation, rows.task, store, orders=[order], budget=packing.budget, ids=rows.ids,
        prefixes=prefixes_for(store, packing, Path(judge.recipe.data.cache)), joins=joins,
    )  # fmt: skip
    lengths = store.lengths.reshape(-1, store.orders)
    return lengths.sum(axis=1) if joins else lengths[:, order], planned


class ByWorth:
    """The passes over some rows.

    Args:
        judges: judges that may be averaged.
        which: the rows to judge; those without input are left out.
        parts: a folder that caches logits, from which the same call resumes.
        report: is given what was judged so far, after the first pass, now and then, and at the end.
    """

    def __init__(
        self, judges: Sequence[SavedJudge], rows: Rows, which: np.ndarray, pace: Pace, parts: Path, report: Report
    ) -> None:
        self.judges, self.rows, self.pace, self.parts = judges, rows, pace, parts
        self.which = which[rows.has_input[which]]
        self.passes = passes_of(judges)
        self.tally = Tally.empty(len(rows), len(rows.task.columns), len(self.passes))
        self._prior, self._loaded = prior_of(judges, rows), LoadedJudge(judges[0].recipe.data)
        self._report, self._clock, self._reported = report, pace.deadline.clock, float("-inf")

    def run(self) -> Tally:
        """Judges until everything is done or time is up.

        Raises:
            Stopped: a signal ended it; the logits computed so far are saved.
            FloatingPointError, ValueError: as in `JudgeModel.probabilities`.
        """
        loading, in_time = 0.0, len(self.which) > 0
        try:
            for fold, saved in enumerate(self.judges):
                if not in_time or not self.pace.has(loading):
                    break
                since = self._clock()
                judge = self._loaded.become(saved)
                loading = self._clock() - since
                in_time = all(self._pass(judge, number) for number, each in enumerate(self.passes) if each[0] == fold)
                del judge  # before the next one is loaded
        finally:  # also of what was judged before an error
            self._report(self.tally)
        return self.tally

    def _pass(self, judge: JudgeModel, number: int) -> bool:
        """Judges the rows in one order; False if there was not enough time."""
        order, name = self.passes[number][1], judge.folder.resolve().parent.name
        lengths, evaluation = in_order(judge, self.rows, order)
        cache = judge.logits_cache(self.parts / name)
        with stopping() as stop, self.pace.showing(f"{name}, order {order}", int(lengths[self.which].sum())):
            for chunk in self._chunks(number, lengths, judge.recipe.packing.budget):
                tokens, seconds = self.pace.tokens, self.pace.seconds
                with self.pace.measuring():
                    found = evaluation(chunk).probabilities(
                        judge.classifier, dtype=judge.recipe.model.dtype, logits_cache=cache, stop=stop, pace=self.pace
                    )
                self.tally.add(number, chunk, with_kinds(judge.saved.used_kinds, self.rows, found, chunk))
                self.tally.tokens[number] += self.pace.tokens - tokens
                self.tally.seconds[number] += self.pace.seconds - seconds
                if not np.isfinite(found).all():
                    return False
                self._report_at_times()
                if stop():  # the signal arrived after the last micro-batch
                    raise stop.stopped()
        if number == 0:
            self._report(self.tally)  # from here on every row is judged
        if number == 0 and (own := self.tally.tokens[0]):  # 0 if an earlier process has done it all
            whole = self.tally.seconds[0] * lengths[self.which].sum() / own
            every, left = duration(whole * len(self.passes)), duration(max(0.0, self.pace.deadline.left()))
            console.print(f"all {len(self.passes)} passes take about {every}; {left} are left for the others")
        return True

    def _chunks(self, number: int, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
        """The rows of a pass: the longest first in the first one, and then those that gain most for their time."""
        own = values = lengths[self.which]
        if number > 0:
            values = worth(self.tally.mean(self._prior)[self.which], cost(np.zeros_like(own), own))
        return [self.which[each] for each in chunks(values, own, budget)]

    def _report_at_times(self) -> None:
        since = self._clock()
        if since - self._reported >= REPORT_SECONDS:
            self._report(self.tally)
            self._reported = self._clock()
