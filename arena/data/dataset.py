"""Reads files as checked rows of a task: reports bad rows, and caches good ones as memory-mapped Arrow."""

from __future__ import annotations

import errno
import json
import stat
import zlib
from collections.abc import Iterator, Sequence
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

from arena.data.cells import FieldError, Labels
from arena.data.columns import Texts
from arena.data.conversion import BadRowsError, Conversion
from arena.data.limits import Limits
from arena.data.rows import READERS, ROWS_AT_ONCE
from arena.data.task import Task
from arena.storage.files import atomic_write, file_digest, fingerprint

# what the readers of damaged Arrow, parquet and npz files raise
DAMAGED = (
    ValueError, KeyError, OSError, TypeError, EOFError, NotImplementedError, pa.ArrowException, BadZipFile, zlib.error
)  # fmt: skip
END = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # of an Arrow stream; a stream cut between two batches lacks only this
FORMAT = 2  # part of the cached file's name: increase it when the same files would be read differently
GROUPS_REMEMBERED = 2**14  # texts, which may be long


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
    def ids(self) -> Texts:
        return Texts(self.columns("id").with_format("arrow")[:]["id"])

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
        """`Task.group` of each row."""
        return list(self.group_keys())

    def group_keys(self) -> Iterator[str]:
        """The same, one by one; that of a text that occurred lately is not computed again."""
        column = self.task.group_by
        known: dict[Any, str] = {}
        for batch in self.columns(column).iter(ROWS_AT_ONCE):
            if len(known) > GROUPS_REMEMBERED:
                known.clear()
            for texts in batch[column]:
                same = tuple(texts) if isinstance(texts, list) else texts
                if same not in known:
                    known[same] = self.task.group(texts)
                yield known[same]

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
            reading = Conversion(task, labels, limits, features.arrow_schema)
            reading.write(paths, draft)
            if repeats := reading.repeated_ids():  # once more, to tell which rows have them
                reading = Conversion(task, labels, limits, features.arrow_schema, repeats)
                reading.write(paths, draft)
            if reading.bad.count:
                raise reading.bad
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
