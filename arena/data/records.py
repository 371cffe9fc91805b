"""Rows of a task from records in memory, such as dicts or a data frame, checked as those of files are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
import pandas as pd
import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, List, Value

from arena.data.cells import FieldError, Labels, excerpt
from arena.data.dataset import Rows
from arena.data.limits import Limits, characters
from arena.data.rows import Cells, required
from arena.data.task import Task

Records: TypeAlias = Mapping[str, Any] | pd.Series | pd.DataFrame | Dataset | Iterable[Mapping[str, Any]]
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
    records: Sequence[Cells], task: Task, labels: Labels = "ignored", limits: Limits | None = None,
    first: Cells | None = None,
) -> tuple[Rows, list[Problem]]:  # fmt: skip
    """The rows of the records that can be used, with their numbers as ids; and what is wrong with the others.

    Args:
        labels, limits: as in `read_dataset`.
        first: the record of a file that tells the layout of all; by default each tells its own.
    """
    limits, good, problems = limits or Limits(), [], []
    told = None if first is None else task.layout_of(first)
    for number, cells in enumerate(records):
        try:
            limits.check_row(characters(cells))
            required(task.file_columns(list(cells)), list(cells))
            layout = task.layout_of_record(cells) if first is None else told
            known = cells if layout is None else layout(cells)
            texts, label = task.read_texts(known, limits), task.read_label(known, labels)
            good.append({"id": str(number), **texts, "label": label})
        except FieldError as error:
            problems.append((number, error))
    return rows_in_memory(good, task), problems


def rows_in_memory(checked: Sequence[Cells], task: Task) -> Rows:
    """Rows of cells that are checked: an `id`, the columns of `task.features`, and a `label` or None."""
    features = Features({"id": Value("string"), **task.features, "label": List(Value("float32"))})
    name = f"memory-{uuid4().hex}"  # nothing is cached by the content, which takes long to digest
    table = pa.Table.from_pylist(list(checked), schema=features.arrow_schema)
    return Rows(task, Dataset(table, DatasetInfo(features=features), fingerprint=name), name)


def cells_of(records: Records) -> list[Cells]:
    """The cells of each record: of one dict, or of each row of a data frame, a data set or an iterable of dicts.

    A row of a data frame, which is a `Series`, stands for a dict.

    Arrays and tuples in cells become lists, and what pandas takes for missing becomes null.

    Raises:
        ValueError: they are something else, or a column has no name of its own.
    """
    if isinstance(records, pd.Series):  # a row of a data frame
        records = [records]
    if isinstance(records, pd.DataFrame):
        names = list(records.columns)
        if odd := [name for name in names if not isinstance(name, str) or names.count(name) > 1]:
            raise ValueError(
                f"the data frame has the column {odd[0]!r}: give each column a text as its name, and only one"
            )
        return [_cells(zip(names, row, strict=True)) for row in records.itertuples(index=False, name=None)]
    if isinstance(records, Mapping):
        if any(isinstance(cell, list | tuple | np.ndarray) for cell in records.values()):
            raise ValueError(
                "a dict of lists is given: put it into a list if they are the turns of one conversation, or into "
                "pandas.DataFrame if they are the columns of many"
            )
        return [_cells(records.items())]
    if isinstance(records, str | bytes) or not isinstance(records, Iterable):
        raise ValueError(
            f"rows is {excerpt(records)}: give dicts, a data frame or a data set; judge.read(PATH) reads a file"
        )
    cells = []
    for number, record in enumerate(records):
        own = dict(record) if isinstance(record, pd.Series) else record
        if not isinstance(own, Mapping) or not all(isinstance(name, str) for name in own):
            raise ValueError(f"row {number} is {excerpt(record)}: give a dict of its columns")
        cells.append(_cells(own.items()))
    return cells


def _cells(items: Iterable[tuple[str, Any]]) -> Cells:
    return {name: _plain(cell) for name, cell in items}


def _plain(cell: Any) -> Any:
    """A cell as JSON has it."""
    if isinstance(cell, np.ndarray | np.generic):
        cell = cell.tolist()
    if isinstance(cell, dict):
        return _cells(cell.items())
    if isinstance(cell, list | tuple):
        return [_plain(each) for each in cell]
    return None if cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and math.isnan(cell)) else cell
