"""Reads files of predictions and of labels: an id and the probabilities of the classes, whatever else they have."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np

from arena.data.cells import FieldError, excerpt, read_id, read_probabilities
from arena.data.conversion import BadRowsError
from arena.data.limits import Limits
from arena.data.rows import READERS, Cells, read_rows, required
from arena.data.task import Task

BESIDE = "p_"  # before the names of columns of predictions in a file that also has labels, by these names
Table = dict[str, list[float]]  # by id, the probabilities of the classes


def read_predictions(path: Path, columns: Sequence[str]) -> Table:
    """The predictions in a file, scaled to sum to 1, by id. Columns and rows may be in any order.

    Args:
        columns: those of the probabilities, which may be rounded to three digits or to float16. If the file has them
            with `p_` before their names too, these are the predictions, and the others labels.

    Raises:
        BadRowsError: the file or rows of it cannot be used.
    """

    def own(names: Collection[str]) -> list[str]:
        beside = [BESIDE + name for name in columns]
        return beside if set(beside) <= set(names) else list(columns)

    def parse(cells: Cells) -> list[float]:
        return read_probabilities(cells, required(own(cells), list(cells)))

    return _read(path, lambda names: required(["id", *own(names)], names), parse)


def read_labels(path: Path, task: Task) -> Table:
    """The labels in a file, which needs no texts, by id. Raises `BadRowsError` as `read_predictions` does."""

    def label(cells: Cells) -> list[float]:
        found = task.read_label(cells, "required")
        assert found is not None, "it is required"
        return found

    return _read(path, lambda names: [*required(["id"], names), *task.label_columns(names, "required")], label)


def rows_of(table: Table, ids: Sequence[str]) -> np.ndarray:
    """The probabilities of rows, float64 (n, C), which must all be there."""
    return np.array([table[each] for each in ids], dtype=np.float64)


def _read(path: Path, choose: Callable[[list[str]], list[str]], parse: Callable[[Cells], list[float]]) -> Table:
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path}: name a file that ends in {', '.join(READERS)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}: check the path")
    table, bad = Table(), BadRowsError()
    for where, cells in read_rows(path, choose, Limits()):
        try:
            if isinstance(cells, FieldError):
                raise cells
            if (name := read_id(cells.get("id"))) in table:
                raise FieldError("id", f"{excerpt(name)} also occurs earlier; every row needs its own")
            table[name] = parse(cells)
        except FieldError as problem:
            bad.add(path, where, problem)
    if bad.count:
        raise bad
    return table
