"""Limits on the size of a row: larger rows are reported before they are read into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self, TextIO

from arena.data.cells import FieldError
from arena.settings import MAX_ROW_CHARACTERS, MAX_TURNS, DataSettings

FEWEST_AT_ONCE = 16  # rows of parquet decoded at once, however large their column is
DECODED_BYTES = 2**28  # the rows decoded at once may take this much, as far as column sizes tell
BYTES_A_CHARACTER = 4  # the most in UTF-8
TOO_LONG = "the row's length"  # the field named by such a problem


@dataclass(frozen=True)
class Limits:
    """The largest allowed size of a row. A larger row is an error, so that nothing is truncated silently.

    Attributes:
        max_row_characters: characters in all columns of a row, as they are in the file.
        max_turns: turns of a prompt or an answer.
    """

    max_row_characters: int = MAX_ROW_CHARACTERS
    max_turns: int = MAX_TURNS

    @classmethod
    def of(cls, settings: DataSettings) -> Self:
        """Those that a recipe sets."""
        return cls(settings.max_row_characters, settings.max_turns)

    def check_row(self, characters: int) -> None:
        """Raises `FieldError` for a row with more characters than allowed."""
        if characters > self.max_row_characters:
            raise self.too_long(f"is {characters:,} characters")

    def check_turns(self, turns: int, field: str) -> None:
        """Raises `FieldError` for a field with more turns than allowed."""
        if turns > self.max_turns:
            raise FieldError(
                field, f"has {turns:,} turns, but data.max_turns is {self.max_turns:,}; shorten it or raise that limit"
            )

    def too_long(self, what: str) -> FieldError:
        """The problem of a row that is too long; `what` states its length."""
        allowed = f"data.max_row_characters is {self.max_row_characters:,}"
        return FieldError(TOO_LONG, f"{what}, but {allowed}; shorten the row, close its quotes, or raise that limit")

    def rows_at_once(self, rows: int, sizes: list[int], most: int) -> int:
        """How many rows of a parquet row group to decode at once.

        A repeated value is stored once but decoded many times, and may be as large as its whole column.

        Args:
            rows: number of rows in the row group.
            sizes: decompressed bytes of each of its columns.
            most: the largest result.

        Raises:
            FieldError: the sizes show that some row is too long.
        """
        if max(sizes, default=0) > rows * BYTES_A_CHARACTER * self.max_row_characters:
            raise self.too_long(f"is {sum(sizes) / max(rows, 1):,.0f} bytes on average")
        return max(FEWEST_AT_ONCE, min(most, DECODED_BYTES // max(1, sum(sizes))))


class LimitedLines(Iterator[str]):
    """The lines of a text file, with a limit on the length of each row; call `begin_row()` where a row begins.

    Raises `FieldError` if a row is too long, without reading more of it into memory than the limit.
    """

    def __init__(self, handle: TextIO, limits: Limits) -> None:
        self._handle, self._limits = handle, limits
        self._used = 0  # characters of this row's lines so far, with the ends of those lines
        self._cut = False  # the last line was read incompletely

    def begin_row(self) -> None:
        """Marks the beginning of a row; the rest of a row that was too long is skipped."""
        while self._cut:
            self._cut = _continues(self._handle.readline(self._limits.max_row_characters))
        self._used = 0

    def __next__(self) -> str:
        most = self._limits.max_row_characters
        line = self._handle.readline(max(0, most - self._used) + 3)  # two for the end of the line, and one too many
        if not line:
            raise StopIteration
        if self._used + len(line) - _end(line) > most:
            self._cut = _continues(line)
            raise self._limits.too_long(f"is more than {most:,} characters")
        self._used += len(line)
        return line


def characters(cells: Mapping[str, Any]) -> int:
    """The number of characters in a row's cells; of a list or an object, those of its texts."""
    return sum(len(cell) if type(cell) is str else _size(cell) for cell in cells.values())


def _size(cell: Any) -> int:
    if isinstance(cell, str | bytes):
        return len(cell)
    if isinstance(cell, dict):
        cell = list(cell.values())
    return sum(map(_size, cell)) + len(cell) if isinstance(cell, list) else 1


def _continues(line: str) -> bool:
    return bool(line) and not _end(line)


def _end(line: str) -> int:
    """The number of characters that end a line."""
    return 2 if line.endswith("\r\n") else line.endswith(("\n", "\r"))
