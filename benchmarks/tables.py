"""Tables and bars of the pages that benchmarks write."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any

from arena.reporting.report import new_figure
from arena.storage.files import atomic_write

Rows = list[list[str]]


@dataclass(frozen=True)
class Bars:
    """A panel of horizontal bars.

    Attributes:
        names, values, texts, colours: of each bar; texts stand to the right of it.
        errors: how far each bar's line goes below and above its end.
    """

    title: str
    names: Sequence[str]
    values: Sequence[float]
    texts: Sequence[str]
    colours: Sequence[str]
    errors: Sequence[tuple[float, float]] | None = None


def markdown_table(header: list[str], rows: Rows) -> str:
    """Cells as a Markdown table; columns of numbers stand to the right."""
    left = ("", "variant", header[0])
    rule = ["---" if name in left else "---:" for name in header]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def cells(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> Rows:
    """The rows as text, by each column's format; a cell is empty where a value that it shows is None.

    A row that lacks figures says in `why` the reason, which stands in the second column then.
    """
    names = {form: [name for _, name, _, _ in Formatter().parse(form) if name] for form in columns.values()}
    found = []
    for row in rows:
        absent = dict.fromkeys(chain.from_iterable(names.values())) if row.get("why") else {}
        known = {**absent, **row}
        texts = ["" if any(known[name] is None for name in names[form]) else form.format(**known) for form in names]
        if row.get("why"):
            texts[1] = row["why"]
        found.append(texts)
    return found


def table(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The same as a Markdown table."""
    return markdown_table(list(columns), cells(columns, rows))


def gib(number: float | None) -> float | None:
    """Bytes in GiB; None where they are not known."""
    return None if number is None else number / 2**30


def draw(panels: Sequence[Bars], columns: int, path: Path, *, title: str, below: str, sharey: bool = False) -> None:
    """Draws panels, left to right and line by line, into a PNG."""
    lines = -(-len(panels) // columns)
    figure, axes = new_figure(lines, columns, figsize=(14, 2.6 * lines + 0.7), sharey=sharey)
    for axis, panel in zip(axes.flat, panels, strict=False):
        errors = panel.errors or [(0.0, 0.0)] * len(panel.values)
        xerr = list(zip(*errors, strict=True)) if panel.errors else None
        axis.barh(list(panel.names), panel.values, xerr=xerr, color=list(panel.colours), ecolor="0.3")
        most = max(panel.values) or 1.0
        for at, (value, text, (_, above)) in enumerate(zip(panel.values, panel.texts, errors, strict=True)):
            axis.text(value + above + 0.01 * most, at, text, va="center", fontsize="small")
        axis.set_title(panel.title, fontsize="medium")
        axis.set_xlim(0, 1.5 * most)
        axis.locator_params(axis="x", nbins=5)
        if not sharey:
            axis.invert_yaxis()
    if sharey:
        axes.flat[0].invert_yaxis()  # for all panels, which share it
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel(below)
    figure.suptitle(title)
    with atomic_write(path) as draft:
        figure.savefig(draft, dpi=120, format="png")
