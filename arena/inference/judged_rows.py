"""Writes rows of files with what was added to them: all other columns stay as they were."""

from __future__ import annotations

import csv
import json
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from arena.data.cells import is_blank, is_utf8, whole_characters
from arena.data.limits import Limits
from arena.data.rows import Cells, read_rows
from arena.inference.judge_inputs import WINDOW_ROWS, Input, every_name

Added = Iterator[list[Any] | None]  # the cells that are added to each row of a file; None: the row is left out
JSON = (".json", ".jsonl")  # endings of files whose rows may differ in their columns and types


@dataclass(frozen=True)
class Table:
    """What is written to a file.

    Attributes:
        inputs: the files whose rows are in it, one after another.
        columns: the names and types of what is added.
        added: of each input.
        limits: as they are read.
    """

    inputs: Sequence[Input]
    columns: dict[str, pa.DataType]
    added: Iterable[Added]
    limits: Limits

    @property
    def names(self) -> list[str]:
        names = every_name(self.inputs)
        return [*([] if "id" in names else ["id"]), *names, *self.columns]

    def each(self) -> Iterator[tuple[Input, int, Added]]:
        """Each input, the number of rows before it, and what is added to its rows."""
        before = 0
        for own, added in zip(self.inputs, self.added, strict=True):
            yield own, before, added
            before += len(own)

    def rows(self, own: Input, before: int, added: Added) -> Iterator[Cells]:
        """The rows of one of the inputs. One without an id gets its number, as where rows to train on are read."""
        every = enumerate(zip(read_rows(own.path, list, self.limits), added, strict=True), before + 1)
        for number, ((_, cells), values) in every:
            if values is not None:
                assert isinstance(cells, dict), "only rows that can be read were judged"
                row = {**({} if "id" in cells else {"id": None}), **cells}
                row["id"] = str(number) if is_blank(row["id"]) else row["id"]
                yield {**row, **dict(zip(self.columns, values, strict=True))}


def csv_writer(handle: TextIO) -> Callable[[Iterable[Any]], object]:
    """What writes a row of CSV.

    A lone carriage return ends a row for readers, but Python before 3.13 does not quote it by itself.
    """
    as_needed, quoted = (
        csv.writer(handle, lineterminator="\n", quoting=how) for how in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
    )

    def write(fields: Iterable[Any]) -> None:
        row = list(fields)
        (quoted if any("\r" in str(field) for field in row) else as_needed).writerow(row)

    return write


def json_line(cells: Any) -> str:
    """A row of JSONL, with escapes if it holds half of a surrogate pair; what JSON lacks becomes text."""
    line = json.dumps(cells, ensure_ascii=False, default=_not_json)
    return (line if is_utf8(line) else json.dumps(cells, default=_not_json)) + "\n"


def as_text(cell: Any) -> str:
    """A cell as text: nothing for null, and JSON for what is not text."""
    if isinstance(cell, bool | int | float | list | dict):
        return whole_characters(json_line(cell).rstrip("\n"))
    return "" if cell is None else whole_characters(cell) if isinstance(cell, str) else _not_json(cell)


def _not_json(value: Any) -> str:
    if isinstance(value, bytes):
        return b64encode(value).decode()
    return str(value.isoformat()) if hasattr(value, "isoformat") else str(value)


def _write_csv(draft: Path, table: Table) -> None:
    with draft.open("w", encoding="utf-8", newline="") as handle:
        write, names = csv_writer(handle), table.names
        write(map(whole_characters, names))
        for each in table.each():
            for cells in table.rows(*each):
                write(as_text(cells.get(name)) for name in names)


def _write_jsonl(draft: Path, table: Table) -> None:
    with draft.open("w", encoding="utf-8", newline="\n") as handle:
        for each in table.each():
            handle.writelines(map(json_line, table.rows(*each)))


def _write_parquet(draft: Path, table: Table) -> None:
    schema = _schema(table)
    with pq.ParquetWriter(draft, schema) as writer:
        for own, before, added in table.each():
            if own.path.suffix.lower() == ".parquet":
                for each in _parquet_tables(own, before, added, schema, list(table.columns)):
                    writer.write_table(each)
                continue
            rows = map(_without_halves, table.rows(own, before, added))
            while chunk := list(islice(rows, WINDOW_ROWS)):
                columns = [_array([cells.get(field.name) for cells in chunk], field.type) for field in schema]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))


WRITERS: dict[str, Callable[[Path, Table], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def _parquet_tables(
    own: Input, before: int, added: Added, schema: pa.Schema, names: Sequence[str]
) -> Iterator[pa.Table]:
    """The rows of a parquet file, whose columns never become Python objects, so that any type stays as it is."""
    with pq.ParquetFile(own.path) as file:
        for batch in file.iter_batches(WINDOW_ROWS):
            values = list(islice(added, len(batch)))
            columns: dict[str, Any] = {name: batch.column(name) for name in batch.schema.names}
            ids = columns["id"].to_pylist() if "id" in columns else [None] * len(batch)
            if any(map(is_blank, ids)):
                columns["id"] = [str(at) if is_blank(each) else each for at, each in enumerate(ids, before + 1)]
            for at, name in enumerate(names):
                columns[name] = [None if each is None else each[at] for each in values]
            arrays = [_array(columns.get(field.name, [None] * len(batch)), field.type) for field in schema]
            yield pa.Table.from_arrays(arrays, schema=schema).filter(pa.array([each is not None for each in values]))
            before += len(batch)


def _array(cells: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(cells, pa.Array):
        if cells.type == kind:
            return cells
        cells = cells.to_pylist()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        cells = [None if cell is None else as_text(cell) for cell in cells]
    elif pa.types.is_integer(kind):  # an id's number
        cells = [int(cell) if isinstance(cell, str) else cell for cell in cells]
    return pa.array(cells, kind)


def _schema(table: Table) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    metadata = None
    for own in table.inputs:
        if own.path.suffix.lower() == ".parquet":
            schema = pq.read_schema(own.path)
            metadata = schema.metadata if len(table.inputs) == 1 else None
        elif own.path.suffix.lower() in JSON:
            schema = _json_schema(own, table.limits)
        else:
            schema = pa.schema([(name, pa.string()) for name in own.names])
        for field in schema:
            fields[field.name] = _both(fields.get(field.name, field), field)
    fields |= {name: pa.field(name, kind) for name, kind in table.columns.items()}
    known = {"id": pa.field("id", pa.string()), **fields}
    return pa.schema([known[name] for name in table.names], metadata)


def _json_schema(own: Input, limits: Limits) -> pa.Schema:
    fields: dict[str, pa.Field] = {}
    for window in own.windows(limits, len(own.ends)):
        rows = [_without_halves(cells) for _, cells in window if isinstance(cells, dict)]
        for name in own.names:
            try:
                field = pa.field(name, pa.array([cells.get(name) for cells in rows]).type)
            except (pa.ArrowException, OverflowError):  # cells of several types, which are written as JSON
                field = pa.field(name, pa.string())
            if "struct<>" in str(field.type):  # which parquet cannot hold
                field = pa.field(name, pa.string())
            fields[name] = _both(fields.get(name, field), field)
    return pa.schema(list(fields.values()))


def _both(one: pa.Field, other: pa.Field) -> pa.Field:
    """A field that holds the cells of two, as JSON if need be."""
    try:
        return pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)
    except pa.ArrowException:
        return pa.field(one.name, pa.string())


def _without_halves(cells: Cells) -> Cells:
    """Cells without halves of surrogate pairs, which JSON can hold and Arrow cannot."""
    line = json.dumps(cells, ensure_ascii=False, default=_not_json)
    return cells if is_utf8(line) else dict(json.loads(whole_characters(line)))
