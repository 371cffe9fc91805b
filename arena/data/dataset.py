"""Reads files as checked rows of a task: reports bad rows, and caches good ones as memory-mapped Arrow."""

from __future__ import annotations

import errno
import json
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from arena.data.cells import FieldError, Labels, excerpt, read_id
from arena.data.limits import Limits, characters
from arena.data.rows import READERS, ROWS_AT_ONCE, Cells, Row, read_rows, required
from arena.data.task import Task
from arena.progress import progress
from arena.storage.files import atomic_write, file_digest, fingerprint

# what the readers of damaged Arrow, parquet and npz files raise
DAMAGED = (
    ValueError, KeyError, OSError, TypeError, EOFError, NotImplementedError, pa.ArrowException, BadZipFile, zlib.error
)  # fmt: skip
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; a stream cut between two batches lacks only this
FORMAT = 2  # part of the cached file's name: increase it when the same files would be read differently
CHARACTERS_AT_ONCE = 2**24  # a chunk has fewer rows once they have this many characters
PROBLEMS_SHOWN = 20


@contextmanager
def reading_cached(path: Path) -> Iterator[None]:
    """Wraps the reading of a cached file.

    Raises:
        ValueError: the file is damaged; the message names it and says how to recreate it.
    """
    try:
        if path.suffix == ".arrow" and not _is_whole(path):
            raise ValueError("its end is missing")
        yield
    except DAMAGED as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged ({reason}): delete it, and it is created again") from error


def _is_whole(path: Path) -> bool:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - len(END)))
        return file.read() == END


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


@dataclass(frozen=True)
class Rows:
    """Checked rows of a task, memory-mapped.

    Attributes:
        table: the columns `id` string, those of `task.features`, and, if the task has classes, `label` list<float32>
            with sum 1, or None.
        fingerprint: changes when the files, or how they are read, change.
    """

    task: Task
    table: Dataset
    fingerprint: str

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def ids(self) -> list[str]:
        return list(self.columns("id").with_format("arrow")[:]["id"].to_pylist())

    @cached_property
    def labels(self) -> NDArray[np.float64]:
        """float64 (len(rows), C); C is 0 for a task without classes. Raises `ValueError` if a row has no label."""
        if not self.task.classes:
            return np.zeros((len(self), 0))
        labels = self.table.select_columns("label").with_format("arrow")[:]["label"].combine_chunks()
        if labels.null_count:
            first = self.ids[labels.is_null().index(True).as_py()]
            raise ValueError(f"{labels.null_count} rows have no label, the first with id {first}: label them")
        return np.asarray(labels.flatten(), dtype=np.float64).reshape(-1, len(self.task.classes))

    def groups(self) -> list[str]:
        """`Task.group` of each row; that of a repeated text is computed once."""
        column = self.task.group_by
        keys: dict[Any, str] = {}
        groups = []
        for batch in self.table.select_columns(column).iter(ROWS_AT_ONCE):
            for texts in batch[column]:
                same = tuple(texts) if isinstance(texts, list) else texts
                if same not in keys:
                    keys[same] = self.task.group(texts)
                groups.append(keys[same])
        return groups

    @cached_property
    def has_input(self) -> NDArray[np.bool_]:
        """bool (len(rows),): `Task.has_input` of each row."""
        return np.fromiter(map(self.task.has_input, self._texts()), np.bool_, len(self))

    @cached_property
    def kinds(self) -> NDArray[np.int8]:
        """int8 (len(rows),): `Task.kind` of each row."""
        if not self.task.kinds:
            return np.full(len(self), -1, dtype=np.int8)
        return np.fromiter(map(self.task.kind, self._texts()), np.int8, len(self))

    def _texts(self) -> Iterator[dict[str, Any]]:
        """The columns `Task.texts` of each row."""
        names = self.task.texts
        for batch in self.columns(*names).iter(batch_size=ROWS_AT_ONCE):
            for texts in zip(*(batch[name] for name in names), strict=True):
                yield dict(zip(names, texts, strict=True))

    def columns(self, *names: str) -> Dataset:
        """Some columns of the table, without the digest of what was selected that `datasets` would make."""
        return self.table.select_columns(list(names), new_fingerprint=self.fingerprint)


def read_dataset(
    paths: Sequence[Path], cache_dir: Path, task: Task, *, labels: Labels, limits: Limits | None = None
) -> Rows:
    """Reads CSV, parquet and JSONL files with a task's columns, one after another.

    The rows are cached in one Arrow file in `cache_dir`, named after the content of the files, and memory-mapped from
    there; a later call with the same content converts nothing.

    Args:
        labels: "required" (a row without a label is an error), "optional", or "ignored" (all labels are None).
        limits: how large a row may be; a larger one is a bad row. The default is `Limits()`.

    Raises:
        BadRowsError: something cannot be used, and nothing is cached. The message names file, row and field; lines of
            CSV and JSONL are counted as in an editor, rows of parquet from 1.
    """
    limits = limits or Limits()
    name = f"{task.rows}-{fingerprint(FORMAT, labels, astuple(limits), *task.reading, _contents(paths))}"
    stored = cache_dir / f"{name}.arrow"
    label = {"label": List(Value("float32"))} if task.classes else {}
    features = Features({"id": Value("string"), **task.features, **label})
    if not stored.exists():
        with atomic_write(stored) as draft:
            _Conversion(task, labels, limits, features.arrow_schema).write(paths, draft)
    with reading_cached(stored):
        table = Dataset.from_file(str(stored))
        if table.features != features:
            raise ValueError(f"it has the columns {', '.join(table.column_names)}")
    return Rows(task, table, name)


def repeated(extra: Rows, *against: Rows) -> NDArray[np.bool_]:
    """bool (len(extra),): rows whose texts also occur in one of `against`, or earlier in `extra`."""
    seen = {digest for rows in against for digest in _content_digests(rows)}
    flags = np.zeros(len(extra), dtype=np.bool_)
    for index, digest in enumerate(_content_digests(extra)):
        flags[index] = digest in seen
        seen.add(digest)
    return flags


def _content_digests(rows: Rows) -> Iterator[bytes]:
    columns = list(rows.task.texts)
    for batch in rows.table.select_columns(columns).iter(batch_size=ROWS_AT_ONCE):
        for texts in zip(*(batch[name] for name in columns), strict=True):
            yield blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def _contents(paths: Sequence[Path]) -> list[list[str]]:
    """The ending and the digest of each file, which determine the result, wherever the files are."""
    if not paths:
        raise ValueError("no file to read rows from; name at least one")
    bad = BadRowsError()
    contents = []
    for path in paths:
        if path.suffix.lower() not in READERS:
            problem = FieldError("its name", f"must end in one of {', '.join(READERS)}; convert it")
            bad.add(path, "the file", problem)
            continue
        try:
            if not (stat.S_ISREG(path.stat().st_mode) or path.is_dir()):  # reading a pipe or a device may never end
                raise OSError(errno.EINVAL, "it is not a regular file")
            contents.append([path.suffix.lower(), file_digest(path)])
        except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
            why = getattr(error, "strerror", None) or error
            problem = FieldError("any row", f"cannot be read ({why}); check the path")
            bad.add(path, "the file", problem)
    if bad.count:
        raise bad
    return contents


class _Conversion:
    """The conversion of files into one Arrow file of checked rows; every bad row is reported in one error."""

    def __init__(self, task: Task, labels: Labels, limits: Limits, schema: pa.Schema) -> None:
        self.task, self.labels, self.limits, self.schema = task, labels, limits, schema
        self.first_file: dict[str, Path] = {}  # id -> the file in which it first occurs
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
            if self.bad.count:  # before rows are said to be read
                raise self.bad

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
                if (earlier := self.first_file.get(row["id"])) is not None:
                    raise FieldError(
                        "id", f"{excerpt(row['id'])} also occurs earlier, in {earlier}; every row needs its own"
                    )
                self.first_file[row["id"]] = path
                good.append(row)
            except FieldError as problem:
                self.bad.add(path, where, problem)
        return good

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
