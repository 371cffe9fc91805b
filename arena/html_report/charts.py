"""Charts of the report, as Vega-Lite made with Altair. The page gives them their data, and colours by its style.

Data with `filter` open rows: pairs of a column of the rows and the value that it has there, which `says` puts in words.
`tip` is all that a bar shows. Marks without `aria` are only looked at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from arena.command_line import command

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
PAPER, INK, MUTED, FAINT, FIRST, SECOND = (
    f"var(--{name})" for name in ("paper", "ink", "muted", "faint", "first", "second")
)
TIP = {"description": "tip:N", "tooltip": "tip:N"}
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
        size: how much of the page's width it has: half, wide, or by default a third.
    """

    title: str
    spec: Mapping[str, Any]
    data: Mapping[str, Data]
    columns: Mapping[str, str]
    size: str = ""


def _spec(alt: Any, chart: Any, height: int) -> Mapping[str, Any]:
    """A chart as Vega-Lite, as wide as its place on the page."""
    axis = {
        "labelFont": FONT, "titleFont": FONT, "labelColor": MUTED, "titleColor": MUTED, "gridColor": FAINT,
        "domainColor": FAINT, "tickColor": FAINT, "labelFontSize": 12, "titleFontSize": 12,
        "titleFontWeight": "normal", "labelLimit": 200,
    }  # fmt: skip
    legend = {key: value for key, value in axis.items() if key.startswith(("label", "title"))}
    autosize = alt.AutoSizeParams(type="fit-x", contains="padding")
    sized = chart.properties(width="container", height=height, background="transparent", autosize=autosize)
    legend |= {"title": None, "orient": "top"}
    found: Mapping[str, Any] = sized.configure(
        axis=axis, legend=legend, view={"stroke": None}, text={"font": FONT}
    ).to_dict()
    return found


def _table(alt: Any) -> Any:
    return alt.Chart(alt.NamedData("table"))


def references(rows: Data) -> Chart:
    """Log-losses as points, the run's own with its interval."""
    columns = {"name": "", "value": "log-loss", "low": "from", "high": "to"}
    spec = _references(tuple(row["name"] for row in rows))
    return Chart("Log-loss beside references", spec, {"table": rows}, columns, "wide")


@lru_cache
def _references(names: tuple[str, ...]) -> Mapping[str, Any]:
    alt = altair()
    y = alt.Y("name:N", sort=names, title=None, axis=alt.Axis(domain=False, ticks=False, grid=True, labelLimit=160))
    x = alt.X("value:Q", title="log-loss", scale=alt.Scale(zero=False, padding=24), axis=alt.Axis(tickCount=6))
    colour = alt.condition("datum.own", alt.value(FIRST), alt.value(MUTED))
    points = _table(alt).mark_point(filled=True, size=110, opacity=1).encode(x=x, y=y, color=colour, tooltip="tip:N")
    text = alt.Text("value:Q", format=".4f")
    labels = _table(alt).mark_text(dy=-12, fontSize=12, color=INK, aria=False).encode(x=x, y=y, text=text)
    interval = _table(alt).mark_rule(strokeWidth=3, color=FIRST, opacity=0.45, aria=False)
    return _spec(alt, interval.encode(x="low:Q", x2="high:Q", y=y) + points + labels, 34 * len(names))


def loss_curve(points: Data, held_out: Data, runs: Sequence[str]) -> Chart:
    """The training loss by step, smoothed, with the held-out log-loss."""
    columns = {"run": "run", "fold": "fold", "step": "step", "loss": "held-out log-loss"}
    data = {"table": points, "held_out": held_out}
    return Chart("Loss", _loss_curve(tuple(runs), is_single(points)), data, columns, "wide")


@lru_cache
def _loss_curve(runs: tuple[str, ...], single: bool) -> Mapping[str, Any]:
    alt = altair()
    colour, x = _by_run(alt, runs), _steps(alt)
    y = alt.Y("smooth:Q", title="loss", scale=alt.Scale(zero=False))
    lines = _table(alt).mark_line(strokeWidth=2, aria=False).encode(x=x, y=y, color=colour, detail="fold:N")
    if single:
        raw = _table(alt).mark_line(strokeWidth=1, opacity=0.28, aria=False)
        lines = raw.encode(x=x, y="loss:Q", color=colour, detail="fold:N") + lines
    marks = alt.Chart(alt.NamedData("held_out")).mark_point(
        filled=True, size=70, opacity=1, stroke=PAPER, strokeWidth=1.5
    )
    return _spec(alt, lines + marks.encode(x="step:Q", y="loss:Q", color=colour, tooltip="tip:N"), 300)


def step_curve(points: Data, field: str, title: str, runs: Sequence[str]) -> Chart:
    """A number that the log has for each step."""
    return Chart(title, _step_curve(field, tuple(runs)), {"table": points}, {}, "half")


@lru_cache
def _step_curve(field: str, runs: tuple[str, ...]) -> Mapping[str, Any]:
    alt = altair()
    y = alt.Y(f"{field}:Q", title=None, axis=alt.Axis(tickCount=4))
    line = _table(alt).mark_line(strokeWidth=1.5, aria=False)
    return _spec(alt, line.encode(x=_steps(alt), y=y, color=_by_run(alt, runs, legend=None), detail="fold:N"), 150)


def is_single(points: Data) -> bool:
    """Whether points are of one fold of one run."""
    return len({(point["run"], point["fold"]) for point in points}) == 1


def _steps(alt: Any) -> Any:
    return alt.X("step:Q", title="step", axis=alt.Axis(grid=False, tickMinStep=1, tickCount=8))


def _by_run(alt: Any, runs: Sequence[str], **legend: None) -> Any:
    if len(runs) == 1:
        return alt.value(FIRST)
    return alt.Color("run:N", scale=alt.Scale(domain=list(runs), range=[FIRST, SECOND]), **legend)


def reliability(name: str, bins: Data) -> Chart:
    """For each bin of a class's probabilities, how often it is the label (bars) and how probable it was (lines)."""
    columns = {"bin": "bin", "rows": "rows", "predicted": "mean probability", "observed": "share of labels"}
    return Chart(name, _reliability(), {"table": bins}, columns)


@lru_cache
def _reliability() -> Mapping[str, Any]:
    alt = altair()
    x = alt.X("bin:O", title="bins of equally many rows, by probability", axis=alt.Axis(labels=False, ticks=False))
    y = alt.Y("observed:Q", title="share of labels", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(tickCount=5))
    # as high as the chart, because nobody can hit the bar of a class that is rarely the label
    targets = _table(alt).mark_bar(color=FAINT, opacity=0.4).encode(x=x, y=alt.datum(1), **TIP)
    bars = _table(alt).mark_bar(color=FIRST, opacity=0.75, aria=False).encode(x=x, y=y)
    ticks = _table(alt).mark_tick(color=INK, thickness=2.5, bandSize=16, aria=False).encode(x=x, y="predicted:Q")
    return _spec(alt, targets + bars + ticks, 200)


def confusion(cells: Data) -> Chart:
    """How many rows of each label were predicted as which class."""
    columns = {"label": "label", "predicted": "judge", "rows": "rows", "share": "share of the label's rows"}
    spec = _confusion(len({cell["label"] for cell in cells}))
    return Chart("Rows by label and most probable class", spec, {"table": cells}, columns, "half")


@lru_cache
def _confusion(classes: int) -> Mapping[str, Any]:
    alt = altair()
    axis = {"axis": alt.Axis(domain=False, ticks=False, labelAngle=0), "sort": None}
    base = _table(alt).encode(x=alt.X("predicted:N", title="judge", **axis), y=alt.Y("label:N", title="label", **axis))
    opacity = alt.Opacity("share:Q", legend=None, scale=alt.Scale(domain=[0, 1], range=[0.05, 0.6]))
    tiles = base.mark_rect(color=FIRST, cornerRadius=3, stroke=PAPER, strokeWidth=2)
    counts = base.mark_text(fontSize=13, color=INK, aria=False).encode(text=alt.Text("rows:Q", format=","))
    return _spec(alt, tiles.encode(opacity=opacity, **TIP) + counts, 52 * classes)


def bars(title: str, rows: Data, value: str, ends: tuple[float, float], reference: str = "", size: str = "") -> Chart:
    """Bars with intervals on an axis with these ends, and a line for what each is compared with."""
    columns = {"name": "", "rows": "rows", "value": value, "low": "from", "high": "to"}
    columns |= {"reference": reference} if reference else {}
    return Chart(title, _bars(len(rows), value, ends, bool(reference)), {"table": rows}, columns, size)


@lru_cache
def _bars(rows: int, value: str, ends: tuple[float, float], reference: bool) -> Mapping[str, Any]:
    alt = altair()
    y = alt.Y("name:N", sort=None, title=None, axis=alt.Axis(domain=False, ticks=False, labelLimit=150))
    x = alt.X("value:Q", title=value, scale=alt.Scale(domain=list(ends), nice=True), axis=alt.Axis(tickCount=5))
    chart = _table(alt).mark_bar(color=FIRST, opacity=0.75, height=16).encode(x=x, y=y, **TIP)
    chart += _table(alt).mark_rule(color=INK, strokeWidth=1.5, aria=False).encode(x="low:Q", x2="high:Q", y=y)
    if reference:
        tick = _table(alt).mark_tick(color=SECOND, thickness=3, bandSize=20, aria=False)
        chart += tick.encode(x="reference:Q", y=y)
    return _spec(alt, chart, 30 * rows)
