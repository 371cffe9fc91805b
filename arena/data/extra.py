"""What training aims at besides the labels of the rows: rows of extra files, and the predictions of a teacher.

Soft labels are probabilities that a judge or a blend predicted. A weight multiplies a row's part of the loss; as the
loss is linear in the label, weighted labels are all that training needs to know.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arena.data.cells import excerpt
from arena.data.dataset import Rows, repeated
from arena.data.files import read_files
from arena.data.predictions import read_predictions, rows_of
from arena.data.task import Task
from arena.metrics import SMALLEST
from arena.settings import DataSettings, ExtraSettings, TeacherSettings

NEAR = 0.8  # prompts with at least this Jaccard similarity of their character n-grams are near duplicates
CHARACTERS = 5  # in an n-gram
HASHES = 128  # of a MinHash (Broder, 1997), whose similarity then has a standard error of about 0.035


@dataclass(frozen=True)
class Extra:
    """Labelled rows that are only trained on.

    Attributes:
        labels: float64 (n, C), which sum to 1.
        taught: float64 (n, C), what training aims at: the labels, smoothed and weighted.
        origin: where they are from, for messages.
    """

    rows: Rows
    labels: np.ndarray
    taught: np.ndarray
    origin: str


def read_extra(settings: DataSettings, task: Task) -> list[Extra]:
    """The rows of extra files: those without settings together, then each with settings."""
    plain = [each for each in settings.extra if isinstance(each, str)]
    found = []
    if plain:
        rows = read_files(plain, task, settings, "required")
        origin = Path(plain[0]).name if len(plain) == 1 else "data.extra"
        found.append(Extra(rows, rows.labels, rows.labels, origin))
    for each in settings.extra:
        if isinstance(each, ExtraSettings):
            rows = read_files([each.path], task, settings, "required" if each.labels is None else "ignored")
            found.append(_with_settings(rows, each, task))
    return found


def without_leaks(
    extra: Sequence[Extra], rows: Rows, held_out: np.ndarray, notes: list[str]
) -> list[NDArray[np.bool_]]:
    """Which rows of each extra file to train on. What is omitted is added to the notes."""
    flags: list[NDArray[np.bool_]] = []
    groups = rows.groups() if extra else []
    held_out_groups, known = {groups[row] for row in held_out.tolist()} if extra else set(), set(groups)
    for at, each in enumerate(extra):
        repeats = repeated(each.rows, rows, *(other.rows for other in extra[:at]))
        own = each.rows.groups()
        leaks = np.array([group in held_out_groups for group in own], dtype=np.bool_)
        # a prompt of the training rows is trained on anyway
        alike = near(own, held_out_groups) & np.array([group not in known for group in own], dtype=np.bool_)
        notes.append(
            f"{each.origin}: {len(own):,} extra rows, of which {repeats.sum():,} repeat a row, "
            f"{(leaks & ~repeats).sum():,} have a {rows.task.group_by} of the held-out rows, and "
            f"{(alike & ~repeats).sum():,} nearly one; they are omitted"
        )
        flags.append(~repeats & ~leaks & ~alike)
    return flags


def _with_settings(rows: Rows, settings: ExtraSettings, task: Task) -> Extra:
    """Rows of a file with its own label source, weight, temperature and smoothing.

    Raises:
        ValueError: a row has no label in the file of predictions; or the task has no classes.
    """
    _needs_classes(task, "data.extra has settings of labels")
    labels = rows.labels if settings.labels is None else _predicted(Path(settings.labels), rows, task)
    soft = tempered(labels, settings.temperature)
    smoothed = (1 - settings.smoothing) * soft + settings.smoothing / len(task.classes)
    return Extra(rows, labels, settings.weight * smoothed, Path(settings.path).name)


def taught_by(rows: Rows, teacher: TeacherSettings, task: Task, trained: NDArray[np.bool_]) -> np.ndarray:
    """What a teacher's predictions make of the labels of rows, float64 (n, C).

    Args:
        trained: bool (n,), the rows that need a prediction.
    """
    _needs_classes(task, "data.teacher is set")
    chosen = np.flatnonzero(trained)
    predicted = _predicted(Path(teacher.path), replace(rows, table=rows.table.select(chosen)), task)
    taught = rows.labels.copy()
    taught[chosen] = (1 - teacher.weight) * taught[chosen] + teacher.weight * tempered(predicted, teacher.temperature)
    return taught


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities to the power of 1 / temperature, normalised: above 1 more even (Hinton et al., 2015)."""
    if temperature == 1:
        return probabilities
    powers = np.clip(probabilities, SMALLEST, 1.0) ** (1 / temperature)
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def near(groups: Sequence[str], others: Iterable[str]) -> NDArray[np.bool_]:
    """bool (len(groups),): whether a group's text nearly equals one of `others`, by MinHash over character n-grams."""
    from datasketch import MinHash, MinHashLSH  # takes a second to import

    def hashed(texts: Sequence[str]) -> list[MinHash]:
        grams = [
            {text[at : at + CHARACTERS].encode() for at in range(max(1, len(text) - CHARACTERS + 1))} for text in texts
        ]
        return list(MinHash.bulk(grams, num_perm=HASHES))

    index, distinct = MinHashLSH(threshold=NEAR, num_perm=HASHES), sorted(set(others) - {""})
    known = hashed(distinct)
    for at, each in enumerate(known):
        index.insert(at, each)
    asked = sorted(set(groups))
    found = {
        text
        for text, each in zip(asked, hashed(asked), strict=True)
        if any(each.jaccard(known[at]) >= NEAR for at in index.query(each))
    }
    return np.array([group in found for group in groups], dtype=np.bool_)


def _predicted(path: Path, rows: Rows, task: Task) -> np.ndarray:
    table = read_predictions(path, task.columns)
    if missing := [each for each in rows.ids if each not in table]:
        raise ValueError(
            f"{path} has no prediction of {len(missing):,} of {len(rows):,} rows, the first with id "
            f"{excerpt(missing[0])}: predict them, or leave them out"
        )
    return rows_of(table, rows.ids)


def _needs_classes(task: Task, what: str) -> None:
    if not task.classes:
        raise ValueError(f"{what}, but task={task.name} has no classes: leave it out")
