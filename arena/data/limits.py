"""How large a row of a data file may be: what is larger is reported, before it is held in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from arena.config import MAX_ROW_CHARACTERS, MAX_TURNS
from arena.data.cells import FieldError

FEWEST_AT_ONCE = 16  # rows of parquet decoded at once, however large their column is
DECODED_BYTES = 2**28  # what the rows decoded at once may take, as far as the sizes of columns tell
BYTES_A_CHARACTER = 4  # in UTF-8, at most
TOO_LONG = "the row's length"  # the field of such a problem


@dataclass(frozen=True)
class Limits:
    """The sizes beyond which a row is an error, as every other row that cannot be used: nothing is cut silently.

    Attributes:
        max_row_characters: characters of all columns of a row, as they stand in the file.
        max_turns: turns of a prompt or an answer.
    """

    max_row_characters: int = MAX_ROW_CHARACTERS
    max_turns: int = MAX_TURNS

    def check_row(self, characters: int) -> None:
        """Raises `FieldError` for a row of more characters than are allowed."""
        if characters > self.max_row_characters:
            raise self.too_long(f"is {characters:,} characters")

    def check_turns(self, turns: int, field: str) -> None:
        """Raises `FieldError` for a field of more turns than are allowed."""
        if turns > self.max_turns:
            raise FieldError(
                field, f"has {turns:,} turns, data.max_turns is {self.max_turns:,}; shorten it or raise data.max_turns"
            )

    def too_long(self, what: str) -> FieldError:
        """The problem of a row that is too long; `what` says how long."""
        allowed = f"data.max_row_characters is {self.max_row_characters:,}"
        return FieldError(
            TOO_LONG, f"{what}, {allowed}; shorten the row, close its quotes, or raise data.max_row_characters"
        )

    def rows_at_once(self, rows: int, sizes: list[int], most: int) -> int:
        """How many rows of a parquet row group to decode at once.

        A value that repeats is stored once and decoded many times, and may be as large as its column is stored.

        Args:
            rows: of the row group.
            sizes: bytes of each of its columns, decompressed.
            most: the most to give.

        Raises:
            FieldError: the sizes tell that some row is too long.
        """
        if max(sizes, default=0) > rows * BYTES_A_CHARACTER * self.max_row_characters:
            raise self.too_long(f"is {sum(sizes) / max(rows, 1):,.0f} bytes on average")
        return max(FEWEST_AT_ONCE, min(most, DECODED_BYTES // max(1, sum(sizes))))


class LimitedLines(Iterator[str]):
    """The lines of a text file, none and no row of them longer than is allowed. `begin_row()` says where rows begin.

    Raises `FieldError` when a row is too long, having held no more of it than is allowed.
    """

    def __init__(self, handle: TextIO, limits: Limits) -> None:
        self._handle, self._limits = handle, limits
        self._used = 0  # characters of this row's lines so far, with the ends of those lines
        self._cut = False  # the line read last goes on

    def begin_row(self) -> None:
        """The next line begins a row; what is left of one that was too long is passed over."""
        while self._cut:
            self._cut = _goes_on(self._handle.readline(self._limits.max_row_characters))
        self._used = 0

    def __next__(self) -> str:
        most = self._limits.max_row_characters
        line = self._handle.readline(max(0, most - self._used) + 3)  # two for the line's end, one too many
        if not line:
            raise StopIteration
        if self._used + len(line) - _end(line) > most:
            self._cut = _goes_on(line)
            raise self._limits.too_long(f"is more than {most:,} characters")
        self._used += len(line)
        return line


def characters(cells: Mapping[str, Any]) -> int:
    """The characters of a row's cells; a list counts as its texts."""
    return sum(len(cell) if type(cell) is str else _size(cell) for cell in cells.values())


def _size(cell: Any) -> int:
    if isinstance(cell, str | bytes):
        return len(cell)
    return sum(map(_size, cell)) + len(cell) if isinstance(cell, list) else 1


def _goes_on(line: str) -> bool:
    return bool(line) and not _end(line)


def _end(line: str) -> int:
    """The characters of a line's end."""
    return 2 if line.endswith("\r\n") else line.endswith(("\n", "\r"))
