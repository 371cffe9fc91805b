"""Writes the report of a run, or of two side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from arena.data.prepare import held_out_file
from arena.html_report.charts import altair
from arena.html_report.content import comparison, data_section, headline, settings, slices, subtitle, training
from arena.html_report.of_rows import OfRows
from arena.html_report.page import write_page
from arena.html_report.rows import moved, read_held_out
from arena.html_report.source import read_source
from arena.training.comparing import compare


def write_report(names: Sequence[str], runs: Path, out: Path | None, data: str | None, most_texts: int) -> Path:
    """Writes the page about one run, or two, and returns its path.

    Args:
        out: the file; None: `report.html` in the folder of the first run.
        data: where the rows are; None: where they were in training.
        most_texts: how many rows have their texts in the page.

    Raises:
        ValueError: Altair is missing, or a run cannot be read or compared.
    """
    altair()  # raises before anything is read
    sources = [read_source(name.rpartition("=")[2], runs) for name in names]  # as in mine=PATH
    source, titles = sources[0], [sources[0].name]
    of_rows = OfRows(source, read_held_out(source, data)) if source.task.classes else None
    held_out = None if of_rows is None else of_rows.held_out
    sections = [headline(source)]
    if len(sources) == 2:
        found = compare(names, None if data is None else str(held_out_file(moved(source.recipe, data).data)), runs)
        sections.append(comparison(found, held_out))
        titles = list(found.names)
    sections.append(training(dict(zip(titles, sources, strict=True))))
    sections += of_rows.sections() if of_rows else [slices(source.metrics.get("slices", {}), {})]
    sections += [data_section(source, held_out), settings(source)]
    content = {
        "title": source.name, "subtitle": " · ".join(subtitle(source)), "sections": sections,
        "rows": None if of_rows is None else of_rows.rows(most_texts),
    }  # fmt: skip
    target = out or source.folder / "report.html"
    write_page(target, f"{source.name}: report", content)
    return target
