"""Predictions of labelled rows by several members: runs, files that somebody brings, or the task's simple model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from arena.data.cells import FieldError
from arena.data.dataset import Rows
from arena.data.files import data_file, read_files
from arena.data.folds import load_or_assign_folds
from arena.data.limits import Limits
from arena.data.predictions import Table, read_labels, read_predictions, rows_of
from arena.data.prepare import held_out_file
from arena.data.rows import READERS, read_rows
from arena.data.task import Task
from arena.inference.blend import Member
from arena.inference.find import find_models
from arena.inference.saved import check_classes, read_judge
from arena.progress import console, progress
from arena.settings import DataSettings, Recipe
from arena.tasks import TASKS

BASELINE = "baseline"
DEFAULT_TASK = str(Recipe.model_fields["task"].default)


@dataclass(frozen=True)
class Predicted:
    """The rows that have a label and a prediction of every member.

    Attributes:
        labels: float64 (n, C).
        predictions: float64 (k, n, C), by member.
        groups: int64 (n,), the group of each row, from 0.
        rows: the rows with their texts; None if the labelled file has none.
    """

    task: Task
    members: tuple[Member, ...]
    labels: np.ndarray
    predictions: np.ndarray
    groups: np.ndarray
    rows: Rows | None


@dataclass(frozen=True)
class _Labelled:
    """Labelled rows: how they are read, their labels and groups by id, and, if the file has texts, the rows."""

    settings: DataSettings
    file: Path
    labels: Table
    groups: dict[str, str]
    rows: Rows | None


def read_members(words: Sequence[str], labels: str | None, runs: Path, seed: int = 0) -> Predicted:
    """The predictions of members for the labelled rows that all of them predict. What is left out is printed.

    Args:
        words: runs by name or path, files of predictions, or `baseline`; each may be named, as in `mine=FILE`.
        labels: a file of labelled rows, with or without texts; None: those that the first run was trained on.
        seed: of the simple model.

    Raises:
        ValueError: a member or a file cannot be used, or no row has a label and all predictions.
    """
    members = [_member(word, runs) for word in words]
    names = [member.name for member in members]
    if repeated := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{min(repeated)} names two members: name them apart, as in mine={members[0].path}")
    task, settings = _task(members)
    known = _labelled(labels, task, settings)
    members = [replace(each, path=str(known.file.resolve())) if each.kind == "baseline" else each for each in members]
    tables = [_predictions(member, task, known, seed) for member in members]
    ids = [each for each in known.labels if all(each in table for table in tables)]
    _say_what_is_omitted(members, tables, known.labels, len(ids))
    if not ids:
        raise ValueError(f"no row has a label and all predictions: check that the ids are those of {known.file}")
    rows = known.rows
    if rows is not None:
        at = dict(zip(rows.ids, range(len(rows)), strict=True))
        rows = replace(rows, table=rows.table.select([at[each] for each in ids]))
    groups = np.unique([known.groups[each] for each in ids], return_inverse=True)[1]
    predictions = np.stack([rows_of(table, ids) for table in tables])
    return Predicted(task, tuple(members), rows_of(known.labels, ids), predictions, groups, rows)


def _member(word: str, runs: Path) -> Member:
    name, _, path = word.rpartition("=")
    if path == BASELINE:
        return Member(name or BASELINE, "baseline", "")
    if Path(path).suffix.lower() in READERS:
        return Member(name or Path(path).stem, "file", str(Path(path).resolve()))
    model = find_models(path, runs)[0].resolve()
    run, fold = model.parents[1], model.parent
    one = Path(path).resolve() in (fold, model, fold / "recipe.yaml")  # a single fold was named
    return Member(name or run.name, "run", str(fold if one else run))


def _task(members: Sequence[Member]) -> tuple[Task, DataSettings | None]:
    """The task of the runs, and the data of the first one; without runs it is that of recipes that name none."""
    judges = [read_judge(find_models(member.path, Path())[0]) for member in members if member.kind == "run"]
    for judge in judges:
        check_classes(judge)
        if judge.task != judges[0].task:
            raise ValueError(f"{judge.folder.parents[1]} and {judges[0].folder.parents[1]} predict different things")
    return (judges[0].task, judges[0].recipe.data) if judges else (TASKS[DEFAULT_TASK](), None)


def _labelled(path: str | None, task: Task, settings: DataSettings | None) -> _Labelled:
    if path is None and settings is None:
        raise ValueError("name the file of labelled rows with --labels: only runs know theirs")
    settings = settings or DataSettings(path=str(path))
    file = held_out_file(settings) if path is None else data_file(path, "train", settings.cache)
    if not _has_texts(file, task):
        table = read_labels(file, task)
        return _Labelled(settings, file, table, {each: each for each in table}, None)
    rows = read_files([file], task, settings, "required")
    labels = dict(zip(rows.ids, rows.labels.tolist(), strict=True))
    return _Labelled(settings, file, labels, dict(zip(rows.ids, rows.groups(), strict=True)), rows)


def _has_texts(file: Path, task: Task) -> bool:
    """Whether a file has the columns of texts, and not labels alone."""
    names: list[str] = []

    def choose(found: list[str]) -> list[str]:
        names.extend(found)
        return []

    _, cells = next(read_rows(file, choose, Limits()), ("", {}))
    names += [] if isinstance(cells, FieldError) else cells  # of JSONL, whose rows keep all keys
    return set(task.file_columns(names)) <= set(names)


def _predictions(member: Member, task: Task, known: _Labelled, seed: int) -> Table:
    """A member's predictions of rows that it was not trained on, as far as that is ours to know."""
    if member.kind == "file":
        return read_predictions(Path(member.path), task.columns)
    if member.kind == "run":
        folds = [model.parent for model in find_models(member.path, Path())]
        return {name: each for fold in folds for name, each in read_predictions(fold / "oof.csv", task.columns).items()}
    rows, settings = known.rows, known.settings
    if rows is None:
        raise ValueError("the baseline is fitted on texts, but the labelled rows have none: leave it out")
    fold_of = load_or_assign_folds(rows, settings.folds, settings.fold_seed, Path(settings.cache))
    table: Table = {}
    with progress("fitting the baseline", settings.folds, "folds") as advance:
        for fold in range(settings.folds):
            train, held_out = np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)
            fitted = task.fit_baseline(rows.table.select(train), rows.labels[train], seed)
            assert fitted is not None, f"{task.name} has a baseline"
            predicted = fitted(rows.table.select(held_out))
            table |= zip((rows.ids[row] for row in held_out), predicted.tolist(), strict=True)
            advance(1)
    return table


def _say_what_is_omitted(members: Sequence[Member], tables: Sequence[Table], labels: Table, used: int) -> None:
    for member, table in zip(members, tables, strict=True):
        without, unlabelled = len(labels.keys() - table.keys()), len(table.keys() - labels.keys())
        if without or unlabelled:
            console.print(
                f"{member.name}: {without:,} labelled rows have no prediction, {unlabelled:,} predictions have no label"
            )
    console.print(f"{used:,} rows have a label and the predictions of all members")
