"""Tables of text, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from rich.table import Table

from arena.progress import console, escape_unprintable, warn
from arena.storage.files import write_text

Sheet = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # a title, the columns, and the cells of each row
WORDS = ("model", "feature", "score", "beside")  # columns of words, which are aligned to the left


def print_tables(sheets: Iterable[Sheet], notes: Iterable[str] = ()) -> None:
    """Prints tables and, as warnings, notes about them."""
    for title, columns, rows in sheets:
        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(name, justify="left" if name in WORDS else "right")
        for row in rows:
            table.add_row(*map(escape_unprintable, row))
        console.print(table)
    for note in notes:
        warn(escape_unprintable(note))


def write_tables(path: Path, sheets: Iterable[Sheet], notes: Iterable[str] = ()) -> None:
    """Writes tables and notes as Markdown."""
    parts = []
    for title, columns, rows in sheets:
        lines = [columns, ["---"] * len(columns), *rows]
        parts += [f"{title}:", "\n".join(f"| {' | '.join(map(_in_markdown, line))} |" for line in lines)]
    write_text(path, "\n\n".join([*parts, *map(_in_markdown, notes)]) + "\n")


def _in_markdown(text: str) -> str:
    return escape(" ".join(text.split()), quote=False).replace("|", "\\|")
