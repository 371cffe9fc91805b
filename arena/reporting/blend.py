"""What a blend gains, and how two members differ, as tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from arena.progress import console
from arena.reporting.report import score_cells
from arena.training.blending import Fitted
from arena.training.comparing import Comparison


def print_blend(fitted: Fitted) -> None:
    """Prints the log-loss of each member, the gain of each part that was tried, and the blend's own scores."""
    table = Table(
        title=f"{fitted.rows:,} labelled rows in {fitted.groups:,} groups, with 95% intervals", title_justify="left",
        caption="A part is tried on rows that did not fit it, and taken if it gains more than its standard error. "
        "The blend's own score is of rows that neither fitted nor chose it.",
        caption_justify="left",
    )  # fmt: skip
    for name in ("", "log-loss", "interval", ""):
        table.add_column(name, justify="right" if name else "left")
    for name, score in fitted.alone.items():
        table.add_row(name, *score_cells(score), "alone")
    table.add_section()
    table.add_row(fitted.saved.members[fitted.first].name, "", "", "begins the blend")
    for name, gain, taken in fitted.parts:
        table.add_row(f"+ {name}", *score_cells(gain, sign="+"), f"gain, {'taken' if taken else 'left out'}")
    table.add_section()
    table.add_row(Text("the blend", style="bold"), *score_cells(fitted.scores["log_loss"]), "fitted without these rows")
    console.print(table)
    blend = fitted.saved.blend
    weights = ", ".join(f"{m.name} {w:.3f}" for m, w in zip(fitted.saved.members, blend.weights, strict=True))
    console.print(
        f"{blend.pool} pool, weights: {weights}; sharpness {blend.sharpness:.3f}; bias "
        + "; ".join([_signed(blend.bias), *(f"of {name} {_signed(bias)}" for name, bias in blend.kinds.items())])
    )


def _signed(values: Sequence[float]) -> str:
    return ", ".join(f"{each:+.3f}" for each in values)


def print_comparison(found: Comparison) -> None:
    """Prints the settings in which two members differ, their metrics side by side, and slices that differ."""
    one, other = found.names
    if found.settings:
        console.print(f"settings that differ ({one} there, {other} here): " + "; ".join(found.settings))
    table = Table("", title=f"{found.rows:,} labelled rows", title_justify="left")
    for name in (one, other, "difference", "interval"):
        table.add_column(name, justify="right")
    for name, (first, second) in found.scores.items():
        table.add_row(
            name, f"{first.value:.4f}", f"{second.value:.4f}", *score_cells(found.differences[name], sign="+")
        )
    for at, ((kind, value), score) in enumerate(found.slices.items()):
        if at == 0:
            table.add_section()
        table.add_row(f"{kind}: {value}", "", f"{score.rows:,} rows", *score_cells(score, sign="+"))
    table.caption = f"differences: {one} minus {other}, of the slices in log-loss, with 95% intervals by group"
    console.print(table)
