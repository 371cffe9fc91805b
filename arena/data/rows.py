"""Reads the rows of CSV, TSV, parquet, JSONL and JSON files, each with its position: cells, or the problem with it."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from arena.data.cells import FieldError, excerpt, is_utf8, read_json
from arena.data.limits import TOO_LONG, LimitedLines, Limits, characters

ROWS_AT_ONCE = 512  # rows held as Python objects, and in one Arrow record batch
SLICED_BYTES = 2**25  # of a record batch whose rows become Python objects one by one
CSV_FIELD_LIMIT = 2**31 - 1  # Python's own limit, 131,072 characters, is shorter than some conversations

Cells = dict[str, Any]
Choose = Callable[[list[str]], list[str]]  # the columns to read, given those of a file; raises `FieldError`
Row = tuple[str, Cells | FieldError]  # the position in the file, and the cells or the problem


def read_rows(path: Path, choose: Choose, limits: Limits) -> Iterator[Row]:
    """Every row of a file, good or bad, none larger than `limits`. A problem with the whole file comes last.

    Args:
        choose: the columns to read. Rows of JSONL keep all of their keys, which may differ from row to row.
    """
    row = None
    try:
        if path.stat().st_size == 0:
            raise FieldError("any row", "is missing, because the file is empty; fetch or write it again")
        for row in READERS[path.suffix.lower()](path, choose, limits):
            yield row
        if row is None:
            raise FieldError("any row", "is missing, because the file has none; fetch or write it again")
    except FieldError as problem:
        yield "the file", problem
    except (pa.ArrowException, OSError, ValueError, OverflowError, NotImplementedError) as error:
        yield "the file", FieldError("any row", f"cannot be read: {error}; fetch or write the file again")


def _csv_rows(path: Path, choose: Choose, limits: Limits, *, tabs: bool = False) -> Iterator[Row]:
    """The rows of a CSV file, by the line on which each begins.

    In a file of tab-separated values (`tabs`) nothing is quoted: a quote is a character like any other.

    They are read with Python's own reader, because pandas silently fills up rows that have too few fields.
    """
    csv.field_size_limit(CSV_FIELD_LIMIT)
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        lines = LimitedLines(handle, limits)
        reader = (
            csv.reader(lines, strict=True, delimiter="\t", quoting=csv.QUOTE_NONE)
            if tabs
            else csv.reader(lines, strict=True)
        )
        start = 1
        try:
            names = next((fields for fields in reader if fields), [])
            positions = {name: names.index(name) for name in _columns(names, choose)}
            start = reader.line_num + 1
            lines.begin_row()
            for fields in reader:
                if len(fields) == len(names):
                    yield f"line {start}", _checked({name: fields[at] for name, at in positions.items()})
                elif fields:  # a blank line has none
                    remedy = "remove tabs and line breaks in a field" if tabs else "quote commas in a field"
                    what = f"has {len(fields)} fields, but the header has {len(names)}; {remedy}"
                    yield f"line {start}", FieldError("the row", what)
                start = reader.line_num + 1
                lines.begin_row()
        except csv.Error as error:
            what = f"is broken CSV ({error}), so nothing after it was read; correct its quotes"
            yield f"line {start}", FieldError("the row", what)
        except FieldError as problem:
            if problem.field != TOO_LONG:
                raise
            yield f"line {start}", problem  # the last one: the end of a row that is too long is unknown


def _parquet_rows(path: Path, choose: Choose, limits: Limits) -> Iterator[Row]:
    """The rows of a parquet file, counted from 1."""
    number = 0
    with pq.ParquetFile(path) as file:
        names = _columns(file.schema_arrow.names, choose)
        for batch in _record_batches(file, names, limits):
            columns = [python_values(batch.column(name)) for name in names]
            for values in zip(*columns, strict=True):
                number += 1
                cells = _within(dict(zip(names, values, strict=True)), limits)
                yield f"row {number}", cells
                if isinstance(cells, FieldError) and cells.field == TOO_LONG:
                    return  # the next rows may be as long and take hours


def _record_batches(file: pq.ParquetFile, names: list[str], limits: Limits) -> Iterator[pa.RecordBatch]:
    for index in range(file.num_row_groups):
        group = file.metadata.row_group(index)
        chunks = map(group.column, range(group.num_columns))
        sizes = [chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names]
        at_once = limits.rows_at_once(group.num_rows, sizes, ROWS_AT_ONCE) if group.num_rows else 1
        for batch in file.iter_batches(batch_size=at_once, row_groups=[index], columns=names):
            if batch.nbytes > SLICED_BYTES:  # as Python objects they would take as much memory again
                yield from (batch.slice(row, 1) for row in range(len(batch)))
            else:
                yield batch


def _jsonl_rows(path: Path, choose: Choose, limits: Limits) -> Iterator[Row]:
    """The rows of a file with one JSON object per line; blank lines are skipped."""
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as handle:
        lines = LimitedLines(handle, limits)
        for number in count(1):
            lines.begin_row()
            try:
                line = next(lines, None)
            except FieldError as problem:
                yield f"line {number}", problem
                continue
            if line is None:
                return
            if line.strip():
                yield f"line {number}", _json_row(line)


def _json_rows(path: Path, choose: Choose, limits: Limits) -> Iterator[Row]:
    """The rows of a file that is one JSON list of objects, counted from 1. It is read at once."""
    try:
        rows = read_json(path.read_text(encoding="utf-8-sig"), "the file")
    except UnicodeDecodeError:
        raise FieldError("the file", "is not UTF-8; save the file as UTF-8") from None
    if not isinstance(rows, list):
        raise FieldError("the file", "is not a list; write a list of objects, or one object per line as .jsonl")
    for number, cells in enumerate(rows, 1):
        if isinstance(cells, dict):
            yield f"row {number}", _within(cells, limits)
        else:
            yield f"row {number}", FieldError("the row", f"is {excerpt(cells)}; write an object")


Reader = Callable[[Path, Choose, Limits], Iterator[Row]]
READERS: dict[str, Reader] = {
    ".csv": _csv_rows, ".tsv": partial(_csv_rows, tabs=True), ".parquet": _parquet_rows, ".jsonl": _jsonl_rows,
    ".json": _json_rows,
}  # fmt: skip


def _json_row(line: str) -> Cells | FieldError:
    try:
        if not is_utf8(line):
            raise FieldError("the row", "is not UTF-8; save the file as UTF-8")
        cells = read_json(line, "the row")
    except FieldError as problem:
        return problem
    if not isinstance(cells, dict):
        return FieldError("the row", "is not an object; write one JSON object per line")
    return cells


def _columns(names: list[str], choose: Choose) -> list[str]:
    """The columns to read, given those of a file. Raises `FieldError` if one is missing or appears twice."""
    for name in names:
        if not is_utf8(name):
            raise FieldError("a column name", "is not UTF-8; save the file as UTF-8")
        if names.count(name) > 1:
            raise FieldError(f'column "{name}"', "appears twice; rename or remove one of the two")
    return choose(names)


def required(wanted: Sequence[str], names: Sequence[str]) -> list[str]:
    """The wanted columns. Raises `FieldError` if one is not among a file's `names`."""
    missing = [name for name in wanted if name not in names]
    if missing:
        raise FieldError(", ".join(missing), f"is missing; the columns found are {excerpt(', '.join(names), 200)}")
    return list(wanted)


def _checked(cells: Cells) -> Cells | FieldError:
    """The cells, or a problem if one of them is not UTF-8."""
    broken = next((name for name, cell in cells.items() if isinstance(cell, str) and not is_utf8(cell)), None)
    return cells if broken is None else FieldError(broken, "is not UTF-8; save the file as UTF-8")


def _within(cells: Cells, limits: Limits) -> Cells | FieldError:
    """The cells, or a problem if they are too long or not UTF-8."""
    try:
        limits.check_row(characters(cells))
    except FieldError as problem:
        return problem
    return _checked(cells)


def python_values(column: pa.Array) -> list[Any]:
    """The cells of a column; texts that are not UTF-8 have a lone surrogate."""
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
