"""The files of rows that `arena judge` reads: found here or at a URL, looked through once, and read in windows."""

from __future__ import annotations

import json
import posixpath
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from arena.data.cells import FieldError, is_blank, is_utf8, whole_characters
from arena.data.conversion import BadRowsError
from arena.data.limits import TOO_LONG, Limits, characters
from arena.data.records import good_records
from arena.data.rows import READERS, Cells, Row, python_values, read_rows, required
from arena.data.task import Task
from arena.progress import progress
from arena.storage.files import remembered_digest
from arena.storage.remote import file_system, store_errors

WINDOW_ROWS, WINDOW_CHARACTERS = 2048, 2**25  # in memory at once; a window ends with the row that reaches either


@dataclass(frozen=True)
class Input:
    """A file of rows.

    Attributes:
        name: where the user has it.
        below: its path below the folder that was named.
        path: where it is read; a copy, if it is at a URL.
        digest: the SHA-256 of its content.
        names: the columns of all of its rows, in the order in which they occur.
        first: the first row, which tells the layout of all.
        ends: one past the last row of each window.
    """

    name: str
    below: str
    path: Path
    digest: str
    names: tuple[str, ...]
    first: Cells
    ends: tuple[int, ...]

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each window."""
        return [end - first for first, end in zip((0, *self.ends), self.ends, strict=False)]

    def windows(self, limits: Limits, last: int) -> Iterator[list[Row]]:
        """The rows of the windows up to the one with the number `last`."""
        rows = read_rows(self.path, list, limits)
        return (list(islice(rows, size)) for size in self.sizes[: last + 1])

    def check_same(self) -> None:
        """Raises `ValueError` if the file was changed since it was looked through."""
        if remembered_digest(self.path) != self.digest:
            raise ValueError(f"{self.name} was changed meanwhile: run the same command again, which judges it anew")


@contextmanager
def open_inputs(source: str, task: Task, limits: Limits) -> Iterator[list[Input]]:
    """Looks through the files of a path, a folder or a pattern such as `rows/*.csv`, here or at a URL.

    Files at a URL are copied to a temporary folder, which is there as long as the block.

    Raises:
        ValueError: there are no files, or no row of a file can be judged.
        OSError: a file cannot be fetched.
    """
    with tempfile.TemporaryDirectory(prefix="arena-judge-") as folder:
        yield [_looked_through(*each, task, limits) for each in _files(source, Path(folder))]


def _files(source: str, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """The name of each file, its path below the one that was named, and where it can be read."""
    fs, root = file_system(source, source)
    is_local = isinstance(fs, LocalFileSystem)
    with store_errors(source):
        if fs.isfile(root):
            found, top = [root], posixpath.dirname(root)
        elif fs.isdir(root):
            top = root.rstrip("/")
            below = (path for path in fs.find(root) if "/." not in path.removeprefix(top))  # hidden ones are drafts
            found = [path for path in below if Path(path).suffix.lower() in READERS]
        else:
            found = [path for path in fs.glob(root) if fs.isfile(path)]
            top = posixpath.commonpath(map(posixpath.dirname, found)) if found else ""
    if not found:
        raise ValueError(f"{source}: there is no file that ends in {', '.join(READERS)}; check the path")
    if odd := [path for path in found if Path(path).suffix.lower() not in READERS]:
        raise ValueError(f"{odd[0]}: name files that end in {', '.join(READERS)}")
    for number, path in enumerate(sorted(found)):
        local = Path(path) if is_local else folder / f"{number}{Path(path).suffix}"
        if not is_local:
            with store_errors(source):
                fs.get_file(path, str(local))
        yield path if is_local else fs.unstrip_protocol(path), posixpath.relpath(path, top or "/"), local


def _looked_through(name: str, below: str, path: Path, task: Task, limits: Limits) -> Input:
    names: dict[str, Any] = {}
    bad, ends, held, number = BadRowsError(), [0], 0, 0
    first: Cells | None = None
    is_usable, digest = False, remembered_digest(path)

    def choose(found: list[str]) -> list[str]:
        required(task.file_columns(found), found)
        names.update(dict.fromkeys(found))
        return found

    with progress(f"reading {name}", None) as advance:
        for number, (where, cells) in enumerate(read_rows(path, choose, limits), 1):
            if isinstance(cells, FieldError):
                if not is_usable or _ends_reading(path, where, cells):
                    bad.add(Path(name), where, cells)
                if _ends_reading(path, where, cells):
                    raise bad
            else:
                first = first or cells
                names.update(dict.fromkeys(cells))
                if not is_usable and (problems := good_records([cells], task, "ignored", limits, first)[1]):
                    bad.add(Path(name), where, problems[0][1])
                is_usable = is_usable or not problems
                held += characters(cells)
            if number - ends[-1] == WINDOW_ROWS or held >= WINDOW_CHARACTERS:
                advance(number - ends[-1])
                ends.append(number)
                held = 0
        if not is_usable:
            raise bad
        advance(number - ends[-1])
    assert first is not None, "a row can be used"
    ends = ends[1:] if number == ends[-1] else [*ends[1:], number]
    return Input(name, below, path, digest, tuple(names), first, tuple(ends))


def _ends_reading(path: Path, where: str, problem: FieldError) -> bool:
    """Whether nothing after a problem can be read. Such a file is refused: its other rows would be lost silently."""
    is_in_order = path.suffix.lower() in (".csv", ".tsv", ".parquet")
    return where == "the file" or (is_in_order and (problem.field == TOO_LONG or "nothing after it" in problem.what))


def every_name(inputs: Sequence[Input]) -> list[str]:
    """The columns of all files, in the order in which they occur."""
    return list(dict.fromkeys(name for each in inputs for name in each.names))


def is_parquet(own: Input) -> bool:
    return own.path.suffix.lower() == ".parquet"


def pieces(own: Input, before: int, limits: Limits, names: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The number of rows in each piece of a file, and the cells in its columns of these names: Arrow arrays or lists.

    Those of a parquet file only become Python objects where they must, so that any type stays as it is.
    """
    for n, columns in (_of_parquet if is_parquet(own) else of_rows)(own, limits, names):
        if "id" in names:
            ids = columns.get("id", [None] * n)
            ids = ids if isinstance(ids, list) else python_values(ids)
            if any(map(is_blank, ids)):
                columns["id"] = [str(at) if is_blank(each) else each for at, each in enumerate(ids, before + 1)]
        before += n
        yield n, columns


def _of_parquet(own: Input, _: Limits, names: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with pq.ParquetFile(own.path) as file:
        found = [name for name in file.schema_arrow.names if name in names]
        for batch in file.iter_batches(WINDOW_ROWS, columns=found):
            yield len(batch), {name: batch.column(name) for name in found}


def of_rows(own: Input, limits: Limits, names: Collection[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The pieces of a file that is not parquet, which are its windows; ids are as they are."""
    found = [name for name in map(whole_characters, own.names) if name in names]
    for window in own.windows(limits, len(own.ends)):
        rows = [_without_halves(cells) if isinstance(cells, dict) else {} for _, cells in window]
        yield len(rows), {name: [cells.get(name) for cells in rows] for name in found}


def _without_halves(cells: Cells) -> Cells:
    """Cells without halves of surrogate pairs, which JSON can hold and Arrow cannot."""
    line = json.dumps(cells, ensure_ascii=False)
    return cells if is_utf8(line) else dict(json.loads(whole_characters(line)))
