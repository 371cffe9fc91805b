"""The table of promises: on the screen, as Markdown, as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from arena.progress import console
from arena.storage.files import write_json, write_text
from benchmarks.tables import markdown_table
from tests.torture.ground import Found

HEADER = ["promise", "asked", "found", "what else was counted", "seconds"]


def rows(found: list[Found]) -> list[list[str]]:
    return [
        [each.promise, each.asked, f"{each.held:,} of {each.tried:,}", each.note, f"{each.seconds:.0f}"]
        for each in found
    ]


def show(found: list[Found]) -> None:
    """Prints the table, and what was not kept."""
    table = Table(title="make torture")
    for name in HEADER:
        table.add_column(name, overflow="fold")
    for row in rows(found):
        table.add_row(*row)
    console.print(table)
    for each in found:
        for why in dict.fromkeys(each.failures):
            console.print(f"NOT KEPT: {each.promise}: {why}", style="red")


def write(found: list[Found], about: dict[str, Any], folder: Path) -> None:
    """Writes `torture.md` and `torture.json`.

    Args:
        about: date, command, device and versions, seconds.
    """
    failures = [f"- {each.promise}: {_short(why)}" for each in found for why in dict.fromkeys(each.failures)]
    text = [
        f"# Torture, {about['date'][:10]}",
        f"{about['device']}; torch {about['torch']}. Made by `{about['command']}` at {about['date']} in "
        f"{about['seconds']:.0f} s. Real processes of `arena train` and `arena infer` on a tiny Gemma-2 in NF4 with "
        "LoRA and dropout, 5 steps, a checkpoint after each.",
        markdown_table(HEADER, rows(found)).replace("---:", "---"),
        *(["Not kept:", "\n".join(failures)] if failures else ["Nothing was found that is not kept."]),
    ]
    write_text(folder / "torture.md", "\n\n".join(text) + "\n")
    write_json(folder / "torture.json", {**about, "promises": [vars(each) for each in found]})


def _short(why: str) -> str:
    """Its beginning, and its last line, which tells most where it is a traceback."""
    lines = why.strip().splitlines()
    return lines[0][:200] + (f" ... {lines[-1][:200]}" if len(lines) > 1 else "")
