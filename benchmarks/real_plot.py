"""The picture of the benchmark at real size: tokens a second and peak memory of every table's cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arena.reporting.figure import new_figure
from benchmarks.matrix import Table, rows_of


def draw(tables: list[Table], result: dict[str, Any], path: Path) -> None:
    """Bars of logical tokens a second, a panel a table, peak memory written beside them; missing cells stay empty."""
    panels = [table for table in tables if len(table.cells) > 1]
    lines = -(-len(panels) // 2)
    figure, axes = new_figure(lines, 2, figsize=(14, 2.4 * lines + 0.8))
    for axis, table in zip(axes.flat, panels, strict=False):
        _panel(axis, table, result["cells"])
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.supxlabel("logical tokens a second")
    figure.suptitle(f"{result['recipe']['name']}, {result['device']}, {result['date'][:10]}")
    figure.savefig(path, dpi=120, format="png")


def _panel(axis: Any, table: Table, cells: dict[str, Any]) -> None:
    found = rows_of(table, cells)
    done = [each if each is not None and each["status"] == "done" else None for each in found.values()]
    rates: list[float] = [0.0 if each is None else each["logical_per_second"] for each in done]
    colours = ["0.6" if cell.way == "padded" else "C0" for cell in table.cells.values()]
    axis.barh(list(found), rates, color=colours)
    most = max(rates) or 1.0
    for at, each in enumerate(done):
        axis.text(rates[at] + 0.01 * most, at, _said(each), va="center", fontsize="small")
    axis.set_title(table.title, fontsize="medium")
    axis.set_xlim(0, 1.4 * most)
    axis.locator_params(axis="x", nbins=5)
    axis.invert_yaxis()


def _said(each: dict[str, Any] | None) -> str:
    if each is None:
        return "no figure"
    peak = each["peak_allocated"]
    return f"{each['logical_per_second']:,.0f}" + ("" if peak is None else f", {peak / 2**30:.1f} GiB")
