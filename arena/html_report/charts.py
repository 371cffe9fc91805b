"""Charts of the report, as Vega-Lite made with Altair. The page gives them their data, and colours by its style.

Data with `filter` open rows: pairs of a column of the rows and the value that it has there, which `says` puts in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arena.command_line import command

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
INK, MUTED, FAINT, FIRST, SECOND = (f"var(--{name})" for name in ("ink", "muted", "faint", "first", "second"))
Data = Sequence[Mapping[str, Any]]


def altair() -> Any:
    """The package that makes charts. Raises `ValueError` if it is missing."""
    try:
        import altair
        import vl_convert  # noqa: F401  # which has the JavaScript that draws them
    except ModuleNotFoundError as error:
        install = command("pip", "install", "altair>=6", "vl-convert-python>=1.9")
        raise ValueError(f"the report needs Altair and vl-convert-python ({error}): run `{install}`") from None
    return altair


@dataclass(frozen=True)
class Chart:
    """A chart for the page.

    Attributes:
        spec: Vega-Lite that names its data sets.
        data: the data sets; of `table` the page also makes a table.
        columns: of the table, by the names of fields.
    """

    title: str
    spec: Mapping[str, Any]
    data: Mapping[str, Data]
    columns: Mapping[str, str]
    wide: bool = False

    @classmethod
    def of(cls, title: str, chart: Any, columns: Mapping[str, str], *, wide: bool = False, **data: Data) -> Chart:
        axis = {
            "labelFont": FONT, "titleFont": FONT, "labelColor": MUTED, "titleColor": MUTED, "gridColor": FAINT,
            "domainColor": FAINT, "tickColor": FAINT, "labelFontSize": 12, "titleFontSize": 12,
            "titleFontWeight": "normal", "labelLimit": 200,
        }  # fmt: skip
        legend = {key: value for key, value in axis.items() if key.startswith(("label", "title"))}
        spec = chart.properties(width="container", background="transparent").configure(
            axis=axis, legend=legend | {"title": None, "orient": "top"}, view={"stroke": None}, text={"font": FONT},
            autosize={"type": "fit-x", "contains": "padding"}, tooltipFormat={"numberFormat": ".4f"},
        )  # fmt: skip
        return cls(title, spec.to_dict(), data, columns, wide)


def _table(alt: Any) -> Any:
    return alt.Chart(alt.NamedData("table"))


def references(rows: Data) -> Chart:
    """Log-losses as points, the run's own with its interval."""
    alt = altair()
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(domain=False, ticks=False, grid=True, labelLimit=160))
    x = alt.X("value:Q", title="log-loss", scale=alt.Scale(zero=False, nice=True, padding=24))
    colour = alt.condition("datum.own", alt.value(FIRST), alt.value(MUTED))
    points = _table(alt).mark_point(filled=True, size=110, opacity=1).encode(x=x, y=y, color=colour, tooltip="says:N")
    labels = (
        _table(alt).mark_text(dy=-12, fontSize=12, color=INK).encode(x=x, y=y, text=alt.Text("value:Q", format=".4f"))
    )
    interval = _table(alt).mark_rule(strokeWidth=3, color=FIRST, opacity=0.45).encode(x="low:Q", x2="high:Q", y=y)
    chart = (interval + points + labels).properties(height=alt.Step(34))
    columns = {"name": "", "value": "log-loss", "low": "from", "high": "to"}
    return Chart.of("Log-loss beside references", chart, columns, wide=True, table=rows)


def loss_curve(points: Data, held_out: Data, runs: Sequence[str]) -> Chart:
    """The training loss by step, smoothed, with the held-out log-loss."""
    alt = altair()
    colour = _by_run(alt, runs)
    x = alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickMinStep=1))
    y = alt.Y("smooth:Q", title="loss", scale=alt.Scale(zero=False))
    lines = _table(alt).mark_line(strokeWidth=2).encode(x=x, y=y, color=colour, detail="fold:N")
    marks = (
        alt.Chart(alt.NamedData("held_out"))
        .mark_point(filled=True, size=70, opacity=1, stroke="var(--paper)", strokeWidth=1.5)
        .encode(x="step:Q", y="loss:Q", color=colour, tooltip="says:N")
    )
    raw = _table(alt).mark_line(strokeWidth=1, opacity=0.28).encode(x=x, y="loss:Q", color=colour, detail="fold:N")
    chart = ((raw + lines if _is_single(points) else lines) + marks).properties(height=300)
    columns = {"run": "run", "fold": "fold", "step": "step", "loss": "held-out log-loss"}
    return Chart.of("Loss", chart, columns, wide=True, table=points, held_out=held_out)


def step_curve(points: Data, field: str, title: str, runs: Sequence[str]) -> Chart:
    """A number that the log has for each step."""
    alt = altair()
    x = alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickMinStep=1))
    y = alt.Y(f"{field}:Q", title=None, axis=alt.Axis(tickCount=4, format="~g"))
    line = _table(alt).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=_by_run(alt, runs, None), detail="fold:N")
    return Chart.of(title, line.properties(height=150), {}, table=points)


def _by_run(alt: Any, runs: Sequence[str], legend: Any = ...) -> Any:
    if len(runs) == 1:
        return alt.value(FIRST)
    more = {} if legend is ... else {"legend": legend}
    return alt.Color("run:N", scale=alt.Scale(domain=list(runs), range=[FIRST, SECOND]), **more)


def _is_single(points: Data) -> bool:
    return len({(point["run"], point["fold"]) for point in points}) == 1


def reliability(name: str, bins: Data) -> Chart:
    """For each bin of a class's probabilities, how often it is the label (bars) and how probable it was (lines)."""
    alt = altair()
    x = alt.X("bin:O", title="bins of equally many rows, by probability", axis=alt.Axis(labels=False, ticks=False))
    y = alt.Y("observed:Q", title="share of labels", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5))
    bars = _table(alt).mark_bar(color=FIRST, opacity=0.75).encode(x=x, y=y, description="says:N", tooltip="says:N")
    ticks = _table(alt).mark_tick(color=INK, thickness=2.5, bandSize=16).encode(x=x, y="predicted:Q", tooltip="says:N")
    columns = {"bin": "bin", "rows": "rows", "predicted": "mean probability", "observed": "share of labels"}
    return Chart.of(name, (bars + ticks).properties(height=200), columns, table=bins)


def confusion(cells: Data) -> Chart:
    """How many rows of each label were predicted as which class."""
    alt = altair()
    axis = {"axis": alt.Axis(domain=False, ticks=False, labelAngle=0), "sort": None}
    base = _table(alt).encode(x=alt.X("predicted:N", title="judge", **axis), y=alt.Y("label:N", title="label", **axis))
    opacity = alt.Opacity("share:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.05, 0.6]))
    tiles = base.mark_rect(color=FIRST, cornerRadius=3, stroke="var(--paper)", strokeWidth=2)
    counts = base.mark_text(fontSize=13, color=INK).encode(text=alt.Text("rows:Q", format=","))
    chart = tiles.encode(opacity=opacity, description="says:N", tooltip="says:N") + counts
    columns = {"label": "label", "predicted": "judge", "rows": "rows", "share": "share of the label's rows"}
    return Chart.of(
        "Rows by label and most probable class", chart.properties(height=alt.Step(52)), columns, table=cells
    )


def bars(title: str, rows: Data, value: str, most: float, reference: str = "") -> Chart:
    """Bars with intervals, and a line for what each is compared with."""
    alt = altair()
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(domain=False, ticks=False, labelLimit=150))
    least = min(0.0, *(row["low"] if row.get("low") is not None else row["value"] for row in rows))
    x = alt.X("value:Q", title=value, scale=alt.Scale(domain=[least, most], nice=True), axis=alt.Axis(tickCount=5))
    shown = _table(alt).mark_bar(color=FIRST, opacity=0.75, height=16).encode(
        x=x, y=y, description="says:N", tooltip="says:N"
    )  # fmt: skip
    chart = shown + _table(alt).mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q", y=y)
    columns = {"name": "", "rows": "rows", "value": value, "low": "from", "high": "to"}
    if reference:
        chart += _table(alt).mark_tick(color=SECOND, thickness=3, bandSize=20).encode(x="reference:Q", y=y)
        columns["reference"] = reference
    return Chart.of(title, chart.properties(height=alt.Step(30)), columns, table=rows)
