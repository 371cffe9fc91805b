"""Prepares a fold: from a folder of files to the rows, labels and tokens for training and evaluation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import concatenate_datasets
from numpy.typing import NDArray

from arena.data.columns import Texts, end_to_end, numbered
from arena.data.dataset import Rows
from arena.data.extra import read_extra, taught_by, without_leaks
from arena.data.files import data_file, read_files
from arena.data.folds import leaking, load_or_assign_folds
from arena.data.task import Task
from arena.data.tokens import TokenStore, join, tokenise
from arena.prompt_settings import PromptSettings, Template, built_in_templates
from arena.settings import DataSettings, Recipe
from arena.storage.files import fingerprint

# placeholders that other programs use in templates; other braces are ordinary text
PLACEHOLDER = re.compile(
    r"\{\{?\s*(prompt|response_[ab]|answer\w*|question|instruction|conversation|text)\s*\}\}?", re.IGNORECASE
)

Split = tuple[Rows, np.ndarray, NDArray[np.bool_], list[str]]  # rows, those held out, whether to train on each, notes


@dataclass(frozen=True)
class FoldData:
    """Rows, labels and tokens of one fold.

    Row numbers count the training file's rows first, then those of `data.validation`, then those of `data.extra`.

    Attributes:
        rows: the rows of the training file and of `data.validation`.
        ids: the id of each row for messages; those of extra files include the file.
        labels: float64 (rows, C), in the order of `task.classes`; C is 0 if there are none.
        store: tokens of all rows.
        train_rows: rows to train on, without those that have no input.
        eval_rows: all rows of the held-out fold, or of `data.validation`.
        has_input: bool (rows,), `Task.has_input` of each row.
        prior: (C,), mean label of `train_rows`, which is predicted for rows without input; for a task without classes,
            a 0 for each of its columns.
        fingerprint: changes when the rows, the fold or the prompt settings change.
        trained_on: fingerprint of the files and of the split, the same for all folds.
        notes: messages about omitted rows.
        omitted: rows that would be trained on if they had input.
        extra: the rows of `data.extra`.
        groups: int64 (rows,), the number of each row's group; None unless `packing.group` is set.
        taught: float64 (rows, C), what training aims at if that is not the labels: they may be weighted, smoothed, or
            a teacher's.
    """

    rows: Rows
    ids: Sequence[str]
    labels: np.ndarray
    store: TokenStore
    train_rows: np.ndarray
    eval_rows: np.ndarray
    has_input: np.ndarray
    prior: np.ndarray
    fingerprint: str
    trained_on: str
    notes: list[str]
    omitted: np.ndarray
    extra: tuple[Rows, ...] = ()
    groups: np.ndarray | None = None
    taught: np.ndarray | None = None

    @property
    def task(self) -> Task:
        return self.rows.task

    @cached_property
    def targets(self) -> np.ndarray | None:
        """float32 (len(store), C): the target of each example: what its row teaches, in the example's order.

        None if the task has no classes: the store then has the places of the tokens to predict.
        """
        if not self.task.classes:
            return None
        orders = range(self.store.orders)
        taught = self.labels if self.taught is None else self.taught
        by_order = np.empty((len(taught), len(orders), taught.shape[1]), dtype=np.float32)
        for order in orders:
            by_order[:, order] = self.task.reorder(taught, order)
        return by_order.reshape(len(self.store), -1)

    @cached_property
    def kinds(self) -> np.ndarray:
        """int8 (rows,): `Task.kind` of each row."""
        return np.concatenate([part.kinds for part in (self.rows, *self.extra)])

    @cached_property
    def held_out(self) -> Rows:
        """The held-out rows, in the order of `eval_rows`."""
        return replace(self.rows, table=self.rows.table.select(self.eval_rows))


def prepare_fold(recipe: Recipe, task: Task, fold: int, tokenizer: Any) -> FoldData:
    """Reads, splits and tokenises the data of fold `fold` of a recipe.

    Raises:
        ValueError: a file cannot be used, the fold does not exist, or the template has placeholders; no incomplete
            file is left behind.
    """
    _check_template(recipe.prompt.template, task)
    settings, cache = recipe.data, Path(recipe.data.cache)
    rows, held_out, train, notes = split_rows(settings, task, fold)
    taught = rows.labels if settings.teacher is None else taught_by(rows, settings.teacher, task, train)
    extra = read_extra(settings, task)
    kept = without_leaks(extra, rows, held_out, notes)
    parts, selected = [rows, *(each.rows for each in extra)], [train, *kept]
    others = [pa.array([f"{name} ({each.origin})" for name in each.rows.ids], pa.string()) for each in extra]
    has_input, chosen = np.concatenate([part.has_input for part in parts]), np.concatenate(selected)
    if len(omitted := np.flatnonzero(chosen & ~has_input)):
        notes.append(f"{len(omitted):,} training rows have no {task.missing} and are omitted")
    train_rows = np.flatnonzero(chosen & has_input)
    _check_rows(fold, train_rows, held_out, has_input, task, notes)
    orders = task.orders if recipe.reads_all_orders or recipe.train.swap != "never" else 1
    labels = np.concatenate([rows.labels, *(each.labels for each in extra)]) if extra else rows.labels
    taught = np.concatenate([taught, *(each.taught for each in extra)]) if extra else taught
    aims = [] if taught is labels or np.array_equal(taught, labels) else [fingerprint(taught.tobytes())]
    split = [*split_identity(parts, settings), *aims]
    return FoldData(
        rows=rows,
        ids=Texts(pa.chunked_array([*rows.ids.column.chunks, *others], pa.string())),
        labels=labels,
        taught=taught if aims else None,
        store=join([tokenise(part, tokenizer, recipe.prompt, cache, orders=orders) for part in parts]),
        train_rows=train_rows,
        eval_rows=held_out,
        has_input=has_input,
        prior=labels[train_rows].mean(axis=0) if task.classes else np.zeros(len(task.columns)),
        fingerprint=fingerprint(split, fold, recipe.prompt.identity()),
        trained_on=fingerprint(split),
        notes=notes,
        omitted=omitted,
        extra=tuple(parts[1:]),
        groups=numbered(end_to_end(chain(*(part.group_keys() for part in parts)))) if recipe.packing.group else None,
    )


def split_rows(settings: DataSettings, task: Task, fold: int) -> Split:
    """The rows of the training file and of `data.validation`, and which of them a fold holds out."""
    return (_with_fold if settings.validation is None else _with_validation)(settings, task, fold)


def split_identity(parts: Sequence[Rows], settings: DataSettings) -> list[Any]:
    """What decides which rows are in which fold: the rows, with those of `data.extra`, and the split."""
    return [[part.fingerprint for part in parts], settings.folds, settings.fold_seed]


def held_out_file(settings: DataSettings) -> Path:
    """The file whose rows are held out, or a part of them."""
    return (
        data_file(settings.path, "train", settings.cache) if settings.validation is None else _validation_file(settings)
    )


def _with_fold(settings: DataSettings, task: Task, fold: int) -> Split:
    """A fold of the training file is held out."""
    if not 0 <= fold < settings.folds:
        raise ValueError(f"there is no fold {fold}: the recipe has folds 0 to {settings.folds - 1}")
    rows = read_files([data_file(settings.path, "train", settings.cache)], task, settings, "required")
    folds = load_or_assign_folds(rows, settings.folds, settings.fold_seed, Path(settings.cache))
    return rows, np.flatnonzero(folds == fold), folds != fold, []


def _with_validation(settings: DataSettings, task: Task, fold: int) -> Split:
    """The rows of `data.validation` are held out; training rows that share a group with one of them are not used."""
    if fold != 0:
        raise ValueError(
            f"there is no fold {fold}: with data.validation there is only fold 0; leave one of the two out"
        )
    paths = data_file(settings.path, "train", settings.cache), _validation_file(settings)
    train, validation = (read_files([path], task, settings, "required") for path in paths)
    leaks, shared = (
        leaking(rows, others, np.arange(len(others))) for rows, others in ((train, validation), (validation, train))
    )
    notes = [
        f"{shared.sum():,} of {len(validation):,} held-out rows have a {task.group_by} of the training file, whose "
        f"{leaks.sum():,} rows with it are omitted"
    ]
    table = concatenate_datasets([train.table, validation.table])
    rows = Rows(task, table, fingerprint(train.fingerprint, validation.fingerprint))
    trained = np.concatenate([~leaks, np.zeros(len(validation), dtype=np.bool_)])
    return rows, len(train) + np.arange(len(validation)), trained, notes if leaks.any() else []


def _validation_file(settings: DataSettings) -> Path:
    """A file by its path, or beside the training file by its name."""
    named = Path(str(settings.validation))
    if named.is_file():
        return named
    if Path(settings.path).is_file():
        raise ValueError(f"data.validation: there is no file {named}; give its path")
    try:
        return data_file(settings.path, str(named), settings.cache)
    except ValueError as error:
        raise ValueError(
            f"{error}; data.validation is {named}: name a file of held-out rows, such as "
            "data.validation=dev for dev.tsv"
        ) from None


def _check_rows(
    fold: int, train_rows: np.ndarray, held_out: np.ndarray, has_input: np.ndarray, task: Task, notes: list[str]
) -> None:
    if not len(train_rows) or not len(held_out):
        why = f" ({'; '.join(notes)})" if notes else ""
        raise ValueError(
            f"fold {fold} has {len(train_rows)} rows to train on and {len(held_out)} to score{why}: add rows"
        )
    if not has_input[held_out].any():
        raise ValueError(f"no row of fold {fold} has a {task.missing}: use other data or fewer folds")


def _check_template(template: Template, task: Task) -> None:
    """Refuses another task's built-in template, and placeholders, which would appear literally in every prompt.

    Judges that were trained that way still work.
    """
    for name in built_in_templates() - set(task.templates) if task.templates else ():
        if template == PromptSettings.model_validate({"template": name}).template:
            raise ValueError(
                f"prompt.template={name} is not for task={task.name}: set prompt.template={task.templates[0]}, or "
                "write your own"
            )
    for name, words in template:
        if found := PLACEHOLDER.search(words):
            raise ValueError(
                f"prompt.template.{name} has {found[0]}, but templates have no placeholders: texts are inserted "
                "between the fields, the user's prompt after `user`, the answers after `answer_a` and `answer_b`. "
                "Remove it"
            )
