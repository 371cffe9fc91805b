"""Rows of a task from records in memory, such as dicts or a data frame, checked as those of files are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias
from uuid import uuid4

import pandas as pd
from datasets import Dataset, Features, List, Value

from arena.data.cells import FieldError, Labels, excerpt
from arena.data.dataset import Rows
from arena.data.limits import Limits, characters
from arena.data.rows import Cells, required
from arena.data.task import Task

Records: TypeAlias = Mapping[str, Any] | pd.DataFrame | Dataset | Iterable[Mapping[str, Any]]
Problem = tuple[int, FieldError]  # of a record, by its number from 0


class BadRecordsError(ValueError):
    """Records that cannot be used.

    Attributes:
        problems: one for each of them.
    """

    def __init__(self, problems: Sequence[Problem]) -> None:
        (first, error), more = problems[0], len(problems) - 1
        others = f" (and {more:,} other{'s' if more > 1 else ''})" if more else ""
        super().__init__(f"row {first}{others}, {error.field}: {error.what}")
        self.problems = list(problems)


def rows_of_records(records: Records, task: Task, labels: Labels = "ignored", limits: Limits | None = None) -> Rows:
    """Checked rows, whose ids are the numbers of the records, from 0.

    Raises:
        BadRecordsError: some records cannot be used.
    """
    rows, problems = good_records(cells_of(records), task, labels, limits)
    if problems:
        raise BadRecordsError(problems)
    return rows


def good_records(
    records: Sequence[Cells], task: Task, labels: Labels = "ignored", limits: Limits | None = None
) -> tuple[Rows, list[Problem]]:
    """The rows of the records that can be used, with their numbers as ids; and what is wrong with the others.

    The first record tells the layout of all.

    Args:
        labels, limits: as in `read_dataset`.
    """
    limits, good, problems = limits or Limits(), [], []
    layout = task.layout_of(records[0]) if records else None
    for number, cells in enumerate(records):
        try:
            limits.check_row(characters(cells))
            required(task.file_columns(list(cells)), list(cells))
            known = cells if layout is None else layout(cells)
            texts, label = task.read_texts(known, limits), task.read_label(known, labels)
            good.append({"id": str(number), **texts, "label": label})
        except FieldError as error:
            problems.append((number, error))
    return rows_in_memory(good, task), problems


def rows_in_memory(checked: Sequence[Cells], task: Task) -> Rows:
    """Rows of cells that are checked: an `id`, the columns of `task.features`, and a `label` or None."""
    features = Features({"id": Value("string"), **task.features, "label": List(Value("float32"))})
    columns = {name: [cells[name] for cells in checked] for name in features}
    # nothing may be cached by the content, which is not known
    return Rows(task, Dataset.from_dict(columns, features=features), f"memory-{uuid4().hex}")


def cells_of(records: Records) -> list[Cells]:
    """The cells of each record: of one dict, or of each row of a data frame, a data set or an iterable of dicts.

    Raises:
        ValueError: they are something else.
    """
    if isinstance(records, pd.DataFrame):
        whole = records.astype(object).where(records.notna(), None)
        return [dict(zip(whole.columns, row, strict=True)) for row in whole.itertuples(index=False, name=None)]
    if isinstance(records, Mapping):
        return [dict(records)]
    if isinstance(records, str | bytes) or not isinstance(records, Iterable):
        raise ValueError(f"rows is {excerpt(records)}: give dicts, a data frame or a data set")
    cells = []
    for number, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"row {number} is {excerpt(record)}: give a dict of its columns")
        cells.append(dict(record))
    return cells
