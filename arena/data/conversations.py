"""The competition's files as conversations: bad rows named, good ones kept as memory-mapped Arrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from arena.data.cells import (
    FieldError,
    Labels,
    excerpt,
    is_utf8,
    label_columns,
    read_id,
    read_json,
    read_label,
    read_turns,
)
from arena.files import file_digest, fingerprint, written_whole
from arena.progress import progress

FORMAT = 1  # part of the stored file's name: raise it when the same files would be read differently
TEXTS = ("prompt", "response_a", "response_b")
FEATURES = Features(
    {
        "id": Value("string"),
        **{name: List(Value("string")) for name in TEXTS},
        "label": List(Value("float32")),
    }
)
ROWS_AT_ONCE = 512  # rows held as Python objects, and in one Arrow record batch
PROBLEMS_SHOWN = 20
CSV_FIELD_LIMIT = 2**31 - 1  # Python's own limit, 131,072 characters, is shorter than some conversations

Cells = dict[str, Any]
Row = tuple[str, Cells | FieldError]  # where it stands in its file, and its cells or what is wrong with it


class BadRowsError(ValueError):
    """Rows or files that cannot be used: `count` of them, the first 20 in words in `shown`."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.shown: list[str] = []

    def add(self, path: Path, where: str, problem: FieldError) -> None:
        self.count += 1
        if len(self.shown) < PROBLEMS_SHOWN:  # a hopeless file of millions of rows must not fill the memory
            self.shown.append(f"{path}, {where}, {problem.field}: {problem.what}")

    def __str__(self) -> str:
        title = f"{self.count:,} problem{'s' if self.count > 1 else ''} in the data; nothing was written:"
        hidden = self.count - len(self.shown)
        return "\n  ".join([title, *self.shown, *([f"and {hidden:,} more"] if hidden else [])])


def read_conversations(paths: Sequence[Path], cache_dir: Path, *, labels: Labels) -> Dataset:
    """Reads CSV, parquet and JSONL files of the competition's columns, one after the other, as one dataset.

    Columns of the result: `id` string; `prompt`, `response_a`, `response_b` list<string>, in which a text
    may be None, all three padded with None to the same number of turns; `label` list<float32> [A, B, tie]
    with sum 1, or None. `labels`: "required" (a row without is an error), "optional", "ignored" (all None).

    The rows are kept in one Arrow file in `cache_dir`, named after the content of the files, and are
    memory-mapped from there; a later call with the same content converts nothing.

    Raises `BadRowsError`, a `ValueError` that names file, row and field, when anything cannot be used;
    nothing is kept then. Lines of CSV and JSONL are counted as an editor does, rows of parquet from 1.
    """
    stored = cache_dir / f"conversations-{fingerprint(FORMAT, labels, _contents(paths))}.arrow"
    if not stored.exists():
        with written_whole(stored) as draft:
            _convert(paths, draft, labels)
    return Dataset.from_file(str(stored))


def judgeable(row: Mapping[str, Any]) -> bool:
    """Whether a row has anything to compare: some text that is not blank in at least one of its answers."""
    return any(text and text.strip() for text in [*row["response_a"], *row["response_b"]])


def judgeable_rows(rows: Dataset) -> NDArray[np.bool_]:
    """bool (len(rows),): which rows are `judgeable`."""
    flags: list[bool] = []
    for batch in rows.select_columns(["response_a", "response_b"]).iter(batch_size=ROWS_AT_ONCE):
        answers = zip(batch["response_a"], batch["response_b"], strict=True)
        flags += [judgeable({"response_a": a, "response_b": b}) for a, b in answers]
    return np.array(flags, dtype=np.bool_)


def repeated(extra: Dataset, against: Dataset) -> NDArray[np.bool_]:
    """bool (len(extra),): rows whose prompt and answers stand in `against`, or earlier in `extra`."""
    seen = set(_content_digests(against))
    flags = np.zeros(len(extra), dtype=np.bool_)
    for index, digest in enumerate(_content_digests(extra)):
        flags[index] = digest in seen
        seen.add(digest)
    return flags


def _content_digests(rows: Dataset) -> Iterator[bytes]:
    for batch in rows.select_columns(list(TEXTS)).iter(batch_size=ROWS_AT_ONCE):
        for texts in zip(*(batch[name] for name in TEXTS), strict=True):
            yield blake2b(json.dumps(texts).encode(), digest_size=16).digest()


def _contents(paths: Sequence[Path]) -> list[list[str]]:
    """The ending and the digest of each file: what the result depends on, wherever the files lie."""
    if not paths:
        raise ValueError("no file to read conversations from; name at least one")
    bad = BadRowsError()
    contents = []
    for path in paths:
        if path.suffix.lower() not in READERS:
            problem = FieldError("its name", f"must end in one of {', '.join(READERS)}; convert it")
            bad.add(path, "the file", problem)
            continue
        try:
            contents.append([path.suffix.lower(), file_digest(path)])
        except OSError as error:
            problem = FieldError("any row", f"cannot be read ({error.strerror}); check the path")
            bad.add(path, "the file", problem)
    if bad.count:
        raise bad
    return contents


def _convert(paths: Sequence[Path], draft: Path, labels: Labels) -> None:
    bad = BadRowsError()
    first_file: dict[str, Path] = {}  # id -> the file in which it was seen first
    schema = FEATURES.arrow_schema
    with pa.ipc.new_stream(str(draft), schema) as stream, progress("Reading conversations", None) as advance:
        for path in paths:
            rows = _rows(path, labels)
            while chunk := list(islice(rows, ROWS_AT_ONCE)):
                good = _good_rows(path, chunk, labels, first_file, bad)
                if not bad.count:  # nothing will be kept otherwise
                    stream.write_batch(pa.RecordBatch.from_pylist(good, schema=schema))
                advance(len(chunk))
    if bad.count:
        raise bad


def _good_rows(
    path: Path, chunk: list[Row], labels: Labels, first_file: dict[str, Path], bad: BadRowsError
) -> list[Cells]:
    """The rows of `chunk` as conversations; those that cannot be used are added to `bad`."""
    good = []
    for where, cells in chunk:
        try:
            row = _conversation(cells, labels)
            if (earlier := first_file.get(row["id"])) is not None:
                raise FieldError(
                    "id", f"{excerpt(row['id'])} stands earlier too, in {earlier}; every row needs its own"
                )
            first_file[row["id"]] = path
            good.append(row)
        except FieldError as problem:
            bad.add(path, where, problem)
    return good


def _conversation(cells: Cells | FieldError, labels: Labels) -> Cells:
    if isinstance(cells, FieldError):
        raise cells
    texts = {field: read_turns(cells, field) for field in TEXTS}
    turns = max(len(text) for text in texts.values())
    padded = {field: text + [None] * (turns - len(text)) for field, text in texts.items()}
    return {"id": read_id(cells.get("id")), **padded, "label": read_label(cells, labels)}


def _rows(path: Path, labels: Labels) -> Iterator[Row]:
    """Every row of a file, good or bad. What is wrong with the whole file comes as its last row."""
    row = None
    try:
        if path.stat().st_size == 0:
            raise FieldError("any row", "is missing: the file is empty; fetch or write it again")
        for row in READERS[path.suffix.lower()](path, labels):
            yield row
        if row is None:
            raise FieldError("any row", "is missing: there is none; fetch or write it again")
    except FieldError as problem:
        yield "the file", problem
    except (pa.ArrowException, OSError, UnicodeError) as error:
        yield "the file", FieldError("any row", f"cannot be read: {error}; fetch or write the file again")


def _csv_rows(path: Path, labels: Labels) -> Iterator[Row]:
    """Rows of a CSV file, by the line on which each begins.

    Read with Python's own reader, because pandas fills up rows that have too few fields and says nothing.
    """
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        reader = csv.reader(handle, strict=True)
        start = 1
        try:
            names = next((fields for fields in reader if fields), [])
            positions = {name: names.index(name) for name in _columns(names, labels)}
            start = reader.line_num + 1
            for fields in reader:
                if len(fields) == len(names):
                    yield f"line {start}", _checked({name: fields[at] for name, at in positions.items()})
                elif fields:  # a blank line has none
                    what = f"has {len(fields)} fields, but the header has {len(names)}; quote commas in a field"
                    yield f"line {start}", FieldError("the row", what)
                start = reader.line_num + 1
        except csv.Error as error:
            what = f"is broken CSV ({error}), so nothing below it was read; quote it rightly"
            yield f"line {start}", FieldError("the row", what)


def _parquet_rows(path: Path, labels: Labels) -> Iterator[Row]:
    """Rows of a parquet file, counted from 1."""
    number = 0
    with pq.ParquetFile(path) as file:
        names = _columns(file.schema_arrow.names, labels)
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
            columns = [_python_values(batch.column(name)) for name in names]
            for cells in zip(*columns, strict=True):
                number += 1
                yield f"row {number}", _checked(dict(zip(names, cells, strict=True)))


def _jsonl_rows(path: Path, labels: Labels) -> Iterator[Row]:
    """Rows of a file with one JSON object a line; blank lines are passed over."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as handle:
        for number, line in enumerate(handle, 1):
            if line.strip():
                yield f"line {number}", _json_row(line)


READERS: dict[str, Callable[[Path, Labels], Iterator[Row]]] = {
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
    ".jsonl": _jsonl_rows,
}


def _json_row(line: str) -> Cells | FieldError:
    try:
        if not is_utf8(line):
            raise FieldError("the row", "is not UTF-8; save the file as UTF-8")
        cells = read_json(line, "the row")
    except FieldError as problem:
        return problem
    if not isinstance(cells, dict):
        return FieldError("the row", "is not an object; write one JSON object a line")
    return cells


def _columns(names: Sequence[str], labels: Labels) -> list[str]:
    """The columns to read, given those of a file. Raises `FieldError` if one is missing or stands twice."""
    for name in names:
        if not is_utf8(name):
            raise FieldError("a column name", "is not UTF-8; save the file as UTF-8")
        if names.count(name) > 1:
            raise FieldError(f'column "{name}"', "stands twice; rename or remove one of the two")
    wanted = ("id", *TEXTS)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise FieldError(", ".join(missing), f"is missing; the columns found are {excerpt(', '.join(names), 200)}")
    return [*wanted, *label_columns(names, labels)]


def _checked(cells: Cells) -> Cells | FieldError:
    """The cells, unless one of them was not UTF-8."""
    broken = next((name for name, cell in cells.items() if isinstance(cell, str) and not is_utf8(cell)), None)
    return cells if broken is None else FieldError(broken, "is not UTF-8; save the file as UTF-8")


def _python_values(column: pa.Array) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:  # one by one, to find out which
        values = [_python_value(scalar) for scalar in column]
    return values


def _python_value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return "\udcff"  # a bad byte as `surrogateescape` gives it, which `_checked` reports
