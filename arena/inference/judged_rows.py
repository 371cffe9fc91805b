"""Writes rows of files with what was added to them: all other columns stay as they were."""

from __future__ import annotations

import csv
import json
import math
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from arena.data.cells import is_blank, is_utf8, whole_characters
from arena.data.limits import Limits
from arena.data.rows import Cells, python_values, read_rows
from arena.inference.judge_inputs import Input, every_name, is_parquet, of_rows, pieces

Added = Iterator[list[Any] | None]  # the cells that are added to each row of a file; None: the row is left out
JSON = (".json", ".jsonl")  # endings of files whose rows may differ in their columns and types


@dataclass(frozen=True)
class Table:
    """What is written to a file.

    Attributes:
        inputs: the files whose rows are in it, one after another.
        columns: the names and types of what is added.
        limits: as they are read.
        schema: of parquet, as `parquet_schema` gives it.
        added: of each input.
    """

    inputs: Sequence[Input]
    columns: dict[str, pa.DataType]
    limits: Limits
    schema: pa.Schema | None = None
    added: Iterable[Added] = ()

    @property
    def names(self) -> list[str]:
        return _names(self.inputs, self.columns)

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


def _names(inputs: Sequence[Input], columns: Iterable[str]) -> list[str]:
    """The columns of all rows, with their ids and what is added."""
    names = every_name(inputs)
    return [*([] if "id" in names else ["id"]), *names, *columns]


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
    """A row of JSONL, with escapes if it holds half of a surrogate pair.

    What JSON lacks becomes text, and numbers that are not finite null.
    """
    try:
        line = json.dumps(cells, ensure_ascii=False, default=_not_json, allow_nan=False)
    except ValueError:
        return json_line(_finite(cells))
    return (line if is_utf8(line) else json.dumps(cells, default=_not_json)) + "\n"


def _finite(cell: Any) -> Any:
    if isinstance(cell, dict):
        return {name: _finite(each) for name, each in cell.items()}
    if isinstance(cell, list | tuple):
        return [_finite(each) for each in cell]
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def as_text(cell: Any) -> str:
    """A cell as text: nothing for null, and JSON for what is not text."""
    if isinstance(cell, float):
        return json.dumps(cell)
    if isinstance(cell, bool | int | list | dict):
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
    schema = table.schema
    assert schema is not None, "it was made before the rows were judged"
    with pq.ParquetWriter(draft, schema) as writer:
        for own, before, added in table.each():
            for n, columns in pieces(own, before, table.limits, schema.names):
                values = list(islice(added, n))
                for at, name in enumerate(table.columns):
                    columns[name] = [None if each is None else each[at] for each in values]
                arrays = [_array(columns.get(field.name, [None] * n), field.type) for field in schema]
                piece = pa.Table.from_arrays(arrays, schema=schema)
                writer.write_table(_without_rows(piece, [at for at, each in enumerate(values) if each is None]))


WRITERS: dict[str, Callable[[Path, Table], None]] = {
    ".csv": _write_csv,
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
}


def _without_rows(table: pa.Table, rows: Sequence[int]) -> pa.Table:
    """The other rows, which are not copied: Arrow can filter and take columns of some types only."""
    ends = [-1, *rows, len(table)]
    return pa.concat_tables(table.slice(one + 1, two - one - 1) for one, two in pairwise(ends)) if rows else table


def _array(cells: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(cells, pa.Array):
        if cells.type == kind:
            return cells
        cells = python_values(cells)
    if _is_text(kind):
        cells = [None if cell is None else as_text(cell) for cell in cells]
    elif pa.types.is_integer(kind):  # an id's number
        cells = [int(cell) if isinstance(cell, str) else cell for cell in cells]
    return pa.array(cells, kind)


def parquet_schema(inputs: Sequence[Input], columns: dict[str, pa.DataType], limits: Limits) -> pa.Schema:
    """The schema of a parquet file of rows with what is added to them.

    Columns keep their types. A column that no type of parquet's can hold, such as one of JSON with cells of several
    types, is text, and so are ids if some rows have none and their numbers cannot stand among the others.

    Args:
        columns: the names and types of what is added.

    Raises:
        ValueError: the names of two columns would be the same.
    """
    fields: dict[str, pa.Field] = {}
    kinds: dict[str, set[pa.DataType]] = {}
    for field in (field for own in inputs for schema in _schemas(own, limits) for field in schema):
        fields[field.name] = _both(fields.get(field.name, field), field)
        kinds.setdefault(field.name, {pa.null()}).add(field.type)
    fields.setdefault("id", pa.field("id", pa.string()))
    doubtful = {
        name: fields[name].type
        for name, of in kinds.items()
        if len(of) > 2 or not _in_parquet(fields[name].type) or (name == "id" and not _is_text(fields[name].type))
    }
    for name in doubtful.keys() - _that_fit(inputs, limits, doubtful):
        fields[name] = pa.field(name, pa.string())
    if len(inputs) > 1:  # some of which may lack the column
        fields = {name: field.with_nullable(True) for name, field in fields.items()}
    fields |= {name: pa.field(name, kind) for name, kind in columns.items()}
    names = [whole_characters(name) for name in _names(inputs, columns)]
    if twice := [name for name in fields if names.count(name) > 1]:
        raise ValueError(f'columns of {inputs[0].name} have the same name "{twice[0]}" in parquet: rename one of them')
    metadata = pq.read_schema(inputs[0].path).metadata if len(inputs) == 1 and is_parquet(inputs[0]) else None
    return pa.schema([fields[name] for name in names], metadata)


def _that_fit(inputs: Sequence[Input], limits: Limits, kinds: dict[str, pa.DataType]) -> set[str]:
    """The columns all of whose cells can be written as these types."""
    texts = {name for name, kind in kinds.items() if _is_text(kind)}
    left, before = {name for name, kind in kinds.items() if _in_parquet(kind)} - texts, 0
    for own in inputs if left else ():
        for _, columns in pieces(own, before, limits, left):
            left = {name for name in left if name not in columns or _fits(columns[name], kinds[name])}
        before += len(own)
    return left | texts


def _fits(cells: Any, kind: pa.DataType) -> bool:
    try:
        _array(cells, kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return False
    return True


@lru_cache(maxsize=1024)
def _in_parquet(kind: pa.DataType) -> bool:
    """Whether parquet can hold a type, which may not be nested too deeply for those who read it."""
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(pa.schema([("x", kind)]).empty_table(), sink)
        pq.read_schema(pa.BufferReader(sink.getvalue()))
    except (pa.ArrowException, OSError):
        return False
    return True


def _schemas(own: Input, limits: Limits) -> Iterator[pa.Schema]:
    """The schema of a file, or of each of its windows."""
    if is_parquet(own):
        yield pq.read_schema(own.path)
    elif own.path.suffix.lower() not in JSON:
        yield pa.schema([(name, pa.string()) for name in own.names])
    else:
        for _, columns in of_rows(own, limits, set(map(whole_characters, own.names))):
            yield pa.schema([(name, _type_of(cells)) for name, cells in columns.items()])


def _type_of(cells: Sequence[Any]) -> pa.DataType:
    """The type of cells of JSON, which is text if no other can hold them: they are then written as JSON."""
    try:
        kind = pa.array(cells).type
    except (pa.ArrowException, OverflowError):
        return pa.string()
    return kind if _in_parquet(kind) else pa.string()


def _both(one: pa.Field, other: pa.Field) -> pa.Field:
    """A field that holds the cells of two, as JSON if need be."""
    try:
        return pa.unify_schemas([pa.schema([one]), pa.schema([other])], promote_options="permissive").field(0)
    except pa.ArrowException:
        return pa.field(one.name, pa.string())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
