"""The work of `arena judge`: windows of rows, whose results are saved in verified parts as they are judged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from arena.data.cells import FieldError
from arena.data.dataset import Rows
from arena.data.limits import Limits
from arena.data.predictions import BESIDE
from arena.data.records import good_records
from arena.data.rows import Row
from arena.data.task import Task
from arena.distributed import device_name
from arena.inference.judge import Judge
from arena.inference.judge_inputs import Input, every_name
from arena.inference.judged_rows import Added
from arena.progress import Advance, ahead, console, progress
from arena.stopping import Stopped
from arena.storage.parts import InvalidPartError, Parts, open_parts

PIECES = 16  # of rows among which some have no finite logits, to find out which
FEWEST = 32  # rows of which at least one must have finite logits
MOST = 1000  # characters of the field, and of what is wrong with it
LARGEST_REJECTION = 2**14  # bytes of both as JSON, with where the row is
INFINITE = "the row", "got logits that are not finite; look at it, or use model.dtype=float32"

Share = tuple[int, int]  # the number of a share, from 1, and of how many
Rejection = tuple[str, str, str]  # where a row is, the field, and what is wrong with it


def machine_name() -> str:
    """What computes here."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return f"{device_name(device)}, torch {torch.__version__}"


@dataclass(frozen=True)
class Window:
    """The results of a window.

    Attributes:
        at: its number.
        numbers: float64 (rows, k), the probabilities, then those of each order if they are wanted; NaN for a row that
            cannot be judged.
        rejected: for each of these, why.
        tokens: what was computed, and the tokens of all prompts.
    """

    at: int
    numbers: np.ndarray
    rejected: list[Rejection]
    tokens: tuple[int, int]

    def as_bytes(self) -> bytes:
        return json.dumps([self.rejected, self.tokens]).encode() + b"\n" + self.numbers.astype("<f8").tobytes()


@dataclass(frozen=True)
class Work:
    """What is judged.

    Attributes:
        inputs: the files.
        task, limits: how their rows are read.
        orders: of each row, whose probabilities are wanted too; 0: none.
        folder: where results are saved.
        made_from: what determines them, as JSON.
    """

    inputs: Sequence[Input]
    task: Task
    limits: Limits
    orders: int
    folder: Path
    made_from: dict[str, Any]

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each window."""
        return [size for each in self.inputs for size in each.sizes]

    @property
    def width(self) -> int:
        return len(self.task.columns) * (1 + self.orders)

    def share(self, share: Share) -> range:
        """The windows of a share."""
        (number, of), n = share, len(self.sizes)
        return range(n * (number - 1) // of, n * number // of)

    @contextmanager
    def open(self, share: Share) -> Iterator[Parts]:
        """The parts of a share's windows."""
        with open_parts(self.folder, [self.made_from, share], machine_name()) as parts:
            yield parts

    def read(self, parts: Parts) -> Iterator[Window]:
        """The windows that are saved, in their order."""
        sizes = self.sizes

        def largest(first: int, end: int) -> int:
            return sum(sizes[first:end]) * (8 * self.width + LARGEST_REJECTION)

        def check(first: int, end: int, results: bytes) -> Window:
            head, _, numbers = results.partition(b"\n")
            if end != first + 1 or end > len(sizes) or len(numbers) != 8 * sizes[first] * self.width:
                raise InvalidPartError("its numbers are not those of this window")
            rejected, tokens = json.loads(head)
            return Window(first, np.frombuffer(numbers, "<f8").reshape(-1, self.width), rejected, tuple(tokens))

        return parts.read(check, largest)

    @contextmanager
    def judging(self, todo: Sequence[int], done: int) -> Iterator[Advance]:
        """Shows how many rows of windows are judged, and after an interruption where the results are.

        Args:
            todo: the numbers of the windows.
            done: rows that were judged before.
        """
        try:
            with progress("judging", sum(self.sizes[at] for at in todo) + done, "rows", done) as advance:
                yield advance
        except (Stopped, SystemExit):
            console.print(f"the results so far are saved in {self.folder.parent}: the same command resumes from them")
            raise

    def cells(self, window: Window) -> Added:
        """The cells of the columns of results of each row of a window."""
        by_order = window.numbers.reshape(len(window.numbers), -1, len(self.task.columns))[:, 1:].argmax(axis=2)
        flips = (by_order != by_order[:, :1]).any(axis=1).tolist() if self.orders else []
        for row, numbers in enumerate(window.numbers):
            yield None if np.isnan(numbers).any() else [*numbers.tolist(), *flips[row : row + 1]]

    def columns(self) -> dict[str, pa.DataType]:
        """The columns of results. If a file has labels, in whichever columns, those of the results are others.

        Raises:
            ValueError: the files have columns of these names.
        """
        return result_columns(every_name(self.inputs), self.task, self.orders)


def result_columns(columns: Sequence[str], task: Task, orders: int = 0) -> dict[str, pa.DataType]:
    """The columns of results beside those of rows; errors are as in `Work.columns`."""
    names, plain = set(columns), task.columns
    has_labels = names & set(plain) or task.label_columns(list(columns), "optional")
    own = [BESIDE + name for name in plain] if has_labels else list(plain)
    of_orders = [f"{name}_order{order}" for order in range(orders) for name in own]
    found = dict.fromkeys([*own, *of_orders], pa.float64()) | ({"flips": pa.bool_()} if orders else {})
    if taken := sorted(names & {*found, *(BESIDE + name for name in plain)}):
        raise ValueError(f"{taken[0]} is a column of the rows, but results are written there: rename it")
    return found


@dataclass(frozen=True)
class Checked:
    """A window of rows that were read, before they are judged.

    Attributes:
        at: its number.
        name: of its file.
        rows: those that can be used, in their order.
        where: where in the file each row of the window is.
        problems: what is wrong with the others, by their numbers in the window: the field, and what.
    """

    at: int
    name: str
    rows: Rows
    where: list[str]
    problems: dict[int, tuple[str, str]]


def judge_windows(work: Work, parts: Parts, todo: Sequence[int], done: int, load: Callable[[], Judge]) -> None:
    """Judges windows, and saves the results of each.

    Args:
        todo: their numbers.
        done: rows that were judged before.
        load: loads the judge.
    """
    judge = load()
    with work.judging(todo, done) as advance:
        for checked in ahead(read_windows(work, todo), depth=1):
            logits = work.folder / f"logits{checked.at}"
            found = judge_window(judge, checked, work.width, logits)
            parts.write(checked.at, checked.at + 1, found.as_bytes())
            shutil.rmtree(logits, ignore_errors=True)
            advance(len(checked.where))


def read_windows(work: Work, todo: Sequence[int]) -> Iterator[Checked]:
    """Windows in the order of their numbers, each file of which is read once."""
    wanted, at = set(todo), 0
    for each in work.inputs:
        own = [number for number in range(len(each.ends)) if at + number in wanted]
        for number, window in enumerate(each.windows(work.limits, own[-1]) if own else ()):
            if number in own:
                each.check_same()  # what is saved is of the rows that were looked through
                yield _checked(work, at + number, each, window)
        at += len(each.ends)


def _checked(work: Work, at: int, each: Input, window: Sequence[Row]) -> Checked:
    readable = {row: cells for row, (_, cells) in enumerate(window) if not isinstance(cells, FieldError)}
    why = {row: cells for row, (_, cells) in enumerate(window) if isinstance(cells, FieldError)}
    rows, problems = good_records(list(readable.values()), work.task, "ignored", work.limits, each.first)
    numbers = list(readable)
    why |= {numbers[number]: problem for number, problem in problems}
    wrong = {row: (problem.field, problem.what) for row, problem in why.items()}
    return Checked(at, each.name, replace(rows, fingerprint=f"window{at}"), [where for where, _ in window], wrong)


def judge_window(judge: Judge, checked: Checked, width: int, logits: Path | None) -> Window:
    """The results of a window.

    Args:
        width: of the numbers of a row, as in `Work`.
        logits: a folder in which logits are saved while they are computed, so that the same call resumes; or None.

    Raises:
        FloatingPointError: none of many rows got finite logits.
    """
    numbers = np.full((len(checked.where), width), np.nan)
    judged = [row for row in range(len(numbers)) if row not in checked.problems]
    numbers[judged], tokens = finite(judge, checked.rows, width, logits)
    if len(judged) >= FEWEST and np.isnan(numbers).all():
        raise FloatingPointError(
            f"none of {len(judged):,} rows of {checked.name} got finite logits: use model.dtype=float32"
        )
    why = checked.problems | {row: INFINITE for row in judged if np.isnan(numbers[row]).any()}
    rejected = [(checked.where[row], field[:MOST], what[:MOST]) for row, (field, what) in sorted(why.items())]
    return Window(checked.at, numbers, rejected, (int(tokens[0]), int(tokens[1])))


def finite(judge: Judge, rows: Rows, width: int, logits: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The results of rows, NaN for those without finite logits, and the tokens of all."""
    if not len(rows):
        return np.empty((0, width)), np.zeros(2)
    try:
        found = judge.verdicts(rows, logits)
        numbers = np.hstack([found.mean, *found.by_order])[:, :width]
        return numbers, np.array([found.tokens, found.logical_tokens])
    except FloatingPointError:
        if len(rows) == 1:
            return np.full((1, width), np.nan), np.zeros(2)
    pieces = []
    for part in np.array_split(np.arange(len(rows)), min(PIECES, len(rows))):
        some = replace(rows, table=rows.table.select(part), fingerprint=f"{rows.fingerprint}-{part[0]}-{part[-1]}")
        pieces.append(finite(judge, some, width, logits))
    return np.concatenate([each for each, _ in pieces]), np.sum([tokens for _, tokens in pieces], axis=0)
