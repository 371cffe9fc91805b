"""What a blend gains, as a table on the terminal."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from arena.metrics import Score
from arena.progress import console
from arena.training.blending import Fitted


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
        table.add_row(name, *_cells(score), "alone")
    table.add_section()
    table.add_row(fitted.saved.members[fitted.first].name, "", "", "begins the blend")
    for name, gain, taken in fitted.parts:
        table.add_row(f"+ {name}", *_cells(gain, sign="+"), f"gain, {'taken' if taken else 'left out'}")
    table.add_section()
    table.add_row(Text("the blend", style="bold"), *_cells(fitted.scores["log_loss"]), "of other rows' fits")
    console.print(table)
    blend = fitted.saved.blend
    weights = ", ".join(f"{m.name} {w:.3f}" for m, w in zip(fitted.saved.members, blend.weights, strict=True))
    console.print(
        f"{blend.pool} pool, weights: {weights}; sharpness {blend.sharpness:.3f}; bias "
        + ", ".join(f"{each:+.3f}" for each in blend.bias)
    )


def _cells(score: Score, sign: str = "") -> tuple[str, str]:
    interval = "" if score.low is None or score.high is None else f"{score.low:{sign}.4f} to {score.high:{sign}.4f}"
    return f"{score.value:{sign}.4f}", interval
