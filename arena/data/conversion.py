"""Converts files into one Arrow file of checked rows; every bad row is reported in one error."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from arena.data.cells import FieldError, Labels, excerpt, read_id
from arena.data.limits import Limits, characters
from arena.data.rows import ROWS_AT_ONCE, Cells, Row, read_rows, required
from arena.data.task import Task
from arena.progress import progress

CHARACTERS_AT_ONCE = 2**24  # a chunk has fewer rows once they have this many characters
PROBLEMS_SHOWN = 20


class BadRowsError(ValueError):
    """Rows or files that cannot be used: how many, and messages about the first 20 in `shown`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.shown: list[str] = []

    def add(self, path: Path, where: str, problem: FieldError) -> None:
        self.count += 1
        if len(self.shown) < PROBLEMS_SHOWN:  # messages about millions of bad rows must not fill the memory
            self.shown.append(f"{path}, {where}, {problem.field}: {problem.what}")

    def __str__(self) -> str:
        title = f"{self.count:,} problem{'s' if self.count > 1 else ''} in the data; nothing was written:"
        hidden = self.count - len(self.shown)
        return "\n  ".join([title, *self.shown, *([f"and {hidden:,} more"] if hidden else [])])


class Conversion:
    """The conversion of files into one Arrow file; what is wrong with bad rows is gathered in `bad`.

    Args:
        repeats: the hashes of ids that may occur twice; only these are remembered, because there may be millions.
    """

    def __init__(
        self, task: Task, labels: Labels, limits: Limits, schema: pa.Schema, repeats: Collection[int] = ()
    ) -> None:
        self.task, self.labels, self.limits, self.schema, self.repeats = task, labels, limits, schema, repeats
        self.hashes = array("q")  # of the ids of good rows
        self.first_file: dict[str, Path] = {}  # id -> the file in which it first occurs, of those that may be repeated
        self.numbered: bool | None = None  # whether this file's rows have their number, over all files, as id
        self.layout: Callable[[Cells], Cells] | None = None  # of this file
        self.number = 0
        self.bad = BadRowsError()

    def write(self, paths: Sequence[Path], draft: Path) -> None:
        with (
            pa.ipc.new_stream(str(draft), self.schema) as stream,
            progress(f"reading {self.task.rows}", None) as advance,
        ):
            for path in paths:
                self.numbered = None
                for chunk in _chunks(read_rows(path, self._columns, self.limits)):
                    good = self._good_rows(path, chunk)
                    if not self.bad.count:  # otherwise nothing is cached
                        stream.write_batch(pa.RecordBatch.from_pylist(good, schema=self.schema))
                    advance(len(chunk))

    def repeated_ids(self) -> frozenset[int]:
        """The hashes that several good rows have."""
        hashes = np.sort(self.hashes)
        return frozenset(hashes[1:][hashes[1:] == hashes[:-1]].tolist())

    def _columns(self, names: list[str]) -> list[str]:
        ids = ("id",) if "id" in names or not self.task.numbers_rows(names) else ()
        wanted = required((*ids, *self.task.file_columns(names)), names)
        return [*wanted, *self.task.label_columns(names, self.labels)]

    def _good_rows(self, path: Path, chunk: list[Row]) -> list[Cells]:
        """The good rows of `chunk`, checked; the others are added to `bad`."""
        good = []
        for where, cells in chunk:
            self.number += 1
            try:
                row = self._checked(cells)
                self._note_id(row["id"], path)
                good.append(row)
            except FieldError as problem:
                self.bad.add(path, where, problem)
        return good

    def _note_id(self, name: str, path: Path) -> None:
        """Raises `FieldError` for an id that occurred earlier, if those that may be repeated are known."""
        key = hash(name)
        self.hashes.append(key)
        if key in self.repeats:
            if (earlier := self.first_file.get(name)) is not None:
                raise FieldError("id", f"{excerpt(name)} also occurs earlier, in {earlier}; every row needs its own")
            self.first_file[name] = path

    def _checked(self, cells: Cells | FieldError) -> Cells:
        if isinstance(cells, FieldError):
            raise cells
        if self.numbered is None:  # the file's first row
            self.numbered = "id" not in cells and self.task.numbers_rows(cells)
            self.layout = self.task.layout_of(cells)
        row = cells if self.layout is None else self.layout(cells)
        texts = self.task.read_texts(row, self.limits)
        return {"id": self._id(cells), **texts, "label": self.task.read_label(row, self.labels)}

    def _id(self, cells: Cells) -> str:
        if not self.numbered:
            return read_id(cells.get("id"))
        if "id" in cells:
            raise FieldError("id", "is there, but the first row has none; give every row of the file an id, or none")
        return str(self.number)


def _chunks(rows: Iterator[Row]) -> Iterator[list[Row]]:
    """The rows in lists of at most `ROWS_AT_ONCE`; lists of long rows are shorter."""
    chunk: list[Row] = []
    held = 0
    for row in rows:
        chunk.append(row)
        held += 0 if isinstance(row[1], FieldError) else characters(row[1])
        if len(chunk) == ROWS_AT_ONCE or held >= CHARACTERS_AT_ONCE:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk
