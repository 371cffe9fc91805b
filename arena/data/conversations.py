"""Reads the competition's files as conversations: reports bad rows, and caches good ones as memory-mapped Arrow."""

from __future__ import annotations

import errno
import json
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from arena.data.cached import reading_cached
from arena.data.cells import FieldError, Labels, excerpt, read_id, read_label, read_turns
from arena.data.limits import Limits, characters
from arena.data.rows import READERS, ROWS_AT_ONCE, TEXTS, Cells, Row, read_rows
from arena.progress import progress
from arena.storage.files import atomic_write, file_digest, fingerprint

FORMAT = 2  # part of the cached file's name: increase it when the same files would be read differently
FEATURES = Features(
    {
        "id": Value("string"),
        **{name: List(Value("string")) for name in TEXTS},
        "label": List(Value("float32")),
    }
)
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


def read_conversations(
    paths: Sequence[Path], cache_dir: Path, *, labels: Labels, limits: Limits | None = None
) -> Dataset:
    """Reads CSV, parquet and JSONL files with the competition's columns, one after another, as one dataset.

    The result has the columns `id` string; `prompt`, `response_a`, `response_b` list<string>, in which a text may be
    None, all padded with None to the same number of turns; and `label` list<float32> [A, B, tie] with sum 1, or None.

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
    made_from = FORMAT, labels, astuple(limits), _contents(paths)
    stored = cache_dir / f"conversations-{fingerprint(*made_from)}.arrow"
    if not stored.exists():
        with atomic_write(stored) as draft:
            _convert(paths, draft, labels, limits)
    with reading_cached(stored):
        rows = Dataset.from_file(str(stored))
        if rows.features != FEATURES:
            raise ValueError(f"it has the columns {', '.join(rows.column_names)}")
    return rows


def has_responses(row: Mapping[str, Any]) -> bool:
    """Whether at least one of a row's answers has text that is not blank, so that there is something to judge."""
    return any(text and text.strip() for text in [*row["response_a"], *row["response_b"]])


def rows_with_responses(rows: Dataset) -> NDArray[np.bool_]:
    """bool (len(rows),): `has_responses` of each row."""
    flags: list[bool] = []
    for batch in rows.select_columns(["response_a", "response_b"]).iter(batch_size=ROWS_AT_ONCE):
        answers = zip(batch["response_a"], batch["response_b"], strict=True)
        flags += [has_responses({"response_a": a, "response_b": b}) for a, b in answers]
    return np.array(flags, dtype=np.bool_)


def repeated(extra: Dataset, against: Dataset) -> NDArray[np.bool_]:
    """bool (len(extra),): rows whose prompt and answers also occur in `against`, or earlier in `extra`."""
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
    """The ending and the digest of each file, which determine the result, wherever the files are."""
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


def _convert(paths: Sequence[Path], draft: Path, labels: Labels, limits: Limits) -> None:
    bad = BadRowsError()
    first_file: dict[str, Path] = {}  # id -> the file in which it first occurs
    schema = FEATURES.arrow_schema
    with pa.ipc.new_stream(str(draft), schema) as stream, progress("Reading conversations", None) as advance:
        for path in paths:
            for chunk in _chunks(read_rows(path, labels, limits)):
                good = _good_rows(path, chunk, labels, limits, first_file, bad)
                if not bad.count:  # otherwise nothing is cached
                    stream.write_batch(pa.RecordBatch.from_pylist(good, schema=schema))
                advance(len(chunk))
    if bad.count:
        raise bad


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


def _good_rows(
    path: Path, chunk: list[Row], labels: Labels, limits: Limits, first_file: dict[str, Path], bad: BadRowsError
) -> list[Cells]:
    """The good rows of `chunk` as conversations; the others are added to `bad`."""
    good = []
    for where, cells in chunk:
        try:
            row = _conversation(cells, labels, limits)
            if (earlier := first_file.get(row["id"])) is not None:
                raise FieldError(
                    "id", f"{excerpt(row['id'])} also occurs earlier, in {earlier}; every row needs its own"
                )
            first_file[row["id"]] = path
            good.append(row)
        except FieldError as problem:
            bad.add(path, where, problem)
    return good


def _conversation(cells: Cells | FieldError, labels: Labels, limits: Limits) -> Cells:
    if isinstance(cells, FieldError):
        raise cells
    texts = {field: read_turns(cells, field) for field in TEXTS}
    for field, text in texts.items():
        limits.check_turns(len(text), field)
    turns = max(len(text) for text in texts.values())
    padded = {field: text + [None] * (turns - len(text)) for field, text in texts.items()}
    return {"id": read_id(cells.get("id")), **padded, "label": read_label(cells, labels)}
