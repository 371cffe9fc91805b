"""From a test file to a checked submission: one finite row of probabilities, averaged over judges, for every id."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from arena.data.cells import excerpt
from arena.data.dataset import Rows
from arena.data.files import data_file, read_files
from arena.data.task import Task
from arena.inference.judge_model import JudgeModel
from arena.inference.saved import SavedJudge, check_alike, read_judge
from arena.progress import console
from arena.settings import DataSettings
from arena.stopping import Stopped
from arena.storage.files import atomic_write
from arena.storage.lock import locked

TOLERANCE = 1e-6  # for the sum of a row


def write_submission(
    path: Path, ids: Sequence[str], probabilities: np.ndarray, columns: Sequence[str], sample: Path | None
) -> None:
    """Writes ids and probabilities, in the order given.

    Args:
        probabilities: (n, C).
        columns: the names of the C columns; that of the ids is `id`.
        sample: the competition's sample submission, with the required columns and ids; None if there is none.

    Raises:
        ValueError: the submission would not be accepted; nothing is written.
    """
    table = pd.DataFrame({"id": list(ids), **{name: probabilities[:, at] for at, name in enumerate(columns)}})
    with atomic_write(path) as draft:
        table.to_csv(draft, index=False, float_format="%.9f", lineterminator="\n")
        check_submission(draft, ids, columns, sample)


def check_output(path: Path, ids: Sequence[str], columns: Sequence[str], sample: Path | None) -> None:
    """Raises `ValueError` for errors that can be found before anything is judged: in the path or the sample's rows."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name the file to write")
    if sample is None:
        return
    table = _read(sample)
    if list(table.columns) != (expected := ["id", *columns]):
        found = excerpt(", ".join(map(str, table.columns)), 200)
        raise ValueError(f"{sample} has the columns {found}, but a submission has {expected}: fetch it again")
    if repeated := table["id"][table["id"].duplicated()].tolist():
        raise ValueError(
            f"{sample} has {len(repeated)} ids more than once, such as {excerpt(repeated[0])}: fetch it again"
        )
    if odd := set(table["id"]) ^ set(ids):
        raise ValueError(
            f"{sample} and the test file differ in {len(odd)} ids, such as {excerpt(min(odd))}: use files that belong "
            "together"
        )


def check_submission(path: Path, ids: Sequence[str], columns: Sequence[str], sample: Path | None) -> None:
    """Reads a submission back as a scorer would.

    Raises:
        ValueError: a column, an id or a number is invalid.
    """
    table = _read(path)
    expected = list(_read(sample).columns) if sample else ["id", *columns]
    if list(table.columns) != expected:
        raise ValueError(f"the submission has the columns {list(table.columns)}, but it must have {expected}")
    if repeated := table["id"][table["id"].duplicated()].tolist():
        raise ValueError(f"the submission has {len(repeated)} ids more than once, such as {repeated[0]!r}")
    wanted = set(map(str, _read(sample)["id"])) if sample else set(map(str, ids))
    for name, odd in (("lacks", wanted - set(table["id"])), ("should not have", set(table["id"]) - wanted)):
        if odd:
            raise ValueError(
                f"the submission {name} {len(odd)} ids, such as {min(odd)!r}; check that the sample and the test file "
                "belong together"
            )
    values = table[list(columns)].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    bad = ~np.isfinite(values).all(axis=1) | (values < 0).any(axis=1) | (values > 1).any(axis=1)
    bad |= np.abs(values.sum(axis=1) - 1) > TOLERANCE
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise ValueError(
            f"{bad.sum()} rows are not probabilities, the first with id {table['id'].iloc[first]!r}: "
            f"{values[first].tolist()}"
        )


def _read(path: Path) -> pd.DataFrame:
    """The file's columns as text. Raises `ValueError` if it is not CSV."""
    if not path.is_file():  # reading a pipe or a device may never end
        raise ValueError(f"{path} is not a regular file: remove it, or put a CSV file in its place")
    try:
        return pd.read_csv(path, dtype=str, keep_default_na=False)
    except (ValueError, OverflowError) as error:  # ValueError: also not UTF-8, empty, or rows that are too long
        raise ValueError(f"{path} cannot be read as CSV: {str(error).strip()}; fetch or write it again") from None


def infer(models: Sequence[Path], data: str | None, out: Path, overrides: Sequence[str] = ()) -> None:
    """Writes the judges' mean probabilities of a test file's rows to `out`.

    Args:
        models: the judges' folders.
        data: a folder with a test file, or the file; None: the folder that the first judge was trained on.
        out: the submission to write. Until it is complete, logits are cached in `OUT.parts`, from which the same call
            resumes.
        overrides: settings to change, as in `JudgeModel`.

    Raises:
        ValueError: the judges were trained on different data, the test file cannot be used, or another process is
            writing `out`.
        Stopped: a signal ended it; the logits computed so far are saved.
    """
    judges = [read_judge(model, overrides) for model in models]
    check_alike(judges)
    made_by = f"{len(judges)} fold{'s' if len(judges) > 1 else ''}"
    predict_file(judges[0].task, judges[0].recipe.data, data, out, partial(average, judges), made_by)


def predict_file(
    task: Task, settings: DataSettings, data: str | None, out: Path, predict: Callable[[Rows, Path], np.ndarray],
    made_by: str,
) -> None:  # fmt: skip
    """Writes predictions of a test file's rows to `out`; errors, `data` and `out` are as in `infer`.

    Args:
        settings: how rows are read, and where they are by default.
        predict: gives the probabilities of rows, and may save what it has so far in a folder.
        made_by: what predicts, in words.
    """
    with resumable(out) as parts:
        submission = submission_of(task, settings, data, out)
        submission.write(predict(submission.rows, parts))
        shutil.rmtree(parts, ignore_errors=True)  # if that fails, they only take disk space
        submission.announce(made_by)


@contextmanager
def resumable(out: Path) -> Iterator[Path]:
    """Locks a submission, and yields a folder for what is saved until it is complete; an early end names that folder.

    Raises:
        ValueError: another process is writing `out`.
    """
    parts = out.with_name(f"{out.name}.parts")
    try:
        with locked(out):
            yield parts
    except (Stopped, SystemExit):
        if parts.is_dir():
            console.print(f"the results so far are saved in {parts}: the same command resumes from them")
        raise


@dataclass(frozen=True)
class Submission:
    """A submission of a test file's rows.

    Attributes:
        out: where it is written.
        sample: where the competition's sample submission would be.
    """

    out: Path
    rows: Rows
    sample: Path

    @property
    def known(self) -> Path | None:
        """The sample submission, if there is one."""
        return self.sample if os.path.lexists(self.sample) else None

    def write(self, probabilities: np.ndarray) -> None:
        """Writes the rows' probabilities (n, C), checked; errors are as in `write_submission`."""
        write_submission(self.out, self.rows.ids, probabilities, self.rows.task.columns, self.known)

    def announce(self, made_by: str) -> None:
        """Says what was written."""
        without = int((~self.rows.has_input).sum())
        have = f"{without:,} row has" if without == 1 else f"{without:,} rows have"
        console.print(
            f"written: {self.out}, {len(self.rows):,} rows from {made_by}; {have} no {self.rows.task.missing}, so that "
            "the training rows alone say what is predicted for them"
        )
        if self.known is None:
            console.print(f"there is no {self.sample}, so columns and ids were checked against the test file only")


def submission_of(task: Task, settings: DataSettings, data: str | None, out: Path) -> Submission:
    """The rows of a test file and where to write their predictions; arguments and errors are as in `predict_file`."""
    if data is None and Path(settings.path).is_file():
        raise ValueError(f"the judge was trained on the file {settings.path}: name the test file with DATA= or --data")
    test = data_file(data or settings.path, "test", settings.cache)
    submission = Submission(out, read_files([test], task, settings, "ignored"), test.parent / "sample_submission.csv")
    check_output(out, submission.rows.ids, task.columns, submission.known)
    return submission


def average(judges: Sequence[SavedJudge], rows: Rows, parts: Path | None = None) -> np.ndarray:
    """The mean probabilities of judges, float64 (len(rows), C), in the order of the rows; see `JudgeModel`.

    A base that several judges in a row share is loaded once.

    Args:
        parts: a folder that caches the logits of each judge, from which the same call resumes.
    """
    total = np.zeros((len(rows), len(rows.task.columns)))
    loaded = LoadedJudge(judges[0].recipe.data)
    for saved in judges:
        judge = loaded.become(saved)
        console.print(f"{saved.folder} ({judge.recipe.model.base}): judging {len(rows):,} rows")
        total += judge.probabilities(rows, parts=parts / saved.folder.resolve().parent.name if parts else None)
        del judge  # before the next one is loaded
    return total / len(judges)


class LoadedJudge:
    """One judge at a time in memory. Callers keep no reference to it, because two large models may not fit at once.

    Args:
        data: the settings of data for all judges, whose cache serves all.
    """

    def __init__(self, data: DataSettings) -> None:
        self._data = data
        self._judge: JudgeModel | None = None

    def become(self, saved: SavedJudge) -> JudgeModel:
        """The judge, on the base that is loaded if it can be."""
        saved = replace(saved, recipe=saved.recipe.model_copy(update={"data": self._data}))
        former, self._judge = self._judge, None
        if former is not None and (other := former.beside(saved)) is not None:
            other.drop(former)
        else:
            del former
            _free_memory()
            other = JudgeModel(saved)
        self._judge = other
        return other


def _free_memory() -> None:
    gc.collect()  # a model's layers and their forwards form reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
